"""Whether evaluation can be trusted here: the sandbox, the tools, and every canonical solution through both."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ibft.evaluate.execute import judge_references, worker_pool
from ibft.evaluate.judge import Judge, Reference, Settings
from ibft.evaluate.problems import Problem


@dataclass(frozen=True)
class Diagnosis:
    """What became of a task's canonical solutions, by task_id in the order of the problems."""

    judge: Judge
    references: dict[str, Reference]

    @property
    def failing(self) -> dict[str, Reference]:
        """Those that do not pass: their problems are faulty here, and no sample of them can be judged fairly."""
        return {task_id: reference for task_id, reference in self.references.items() if reference.faulty}

    @property
    def together(self) -> list[str]:
        """Problems whose tests have to run in the candidate's own process."""
        return [task_id for task_id, reference in self.references.items() if not reference.isolated]

    def to_dict(self) -> dict[str, Any]:
        """The diagnosis as JSON has it."""
        return {
            "sandbox_tier": self.judge.sandbox.tier,
            "sandbox_reason": self.judge.sandbox.reason,
            "tools": self.judge.tools,
            "problems": len(self.references),
            "passed": sum(
                reference.verdict is not None and not reference.faulty for reference in self.references.values()
            ),
            "failing": {
                task_id: {"category": reference.verdict.category, "detail": reference.verdict.detail}
                for task_id, reference in self.failing.items()
                if reference.verdict is not None
            },
            "together": self.together,
        }

    def lines(self) -> list[str]:
        """The diagnosis for people."""
        tools = ", ".join(f"{name} {version}" for name, version in self.judge.tools.items())
        checked = [reference for reference in self.references.values() if reference.verdict is not None]
        passed = sum(not reference.faulty for reference in checked)
        lines = [
            f"sandbox   {self.judge.sandbox.tier} ({self.judge.sandbox.reason})",
            f"tools     {tools}",
            f"solutions {passed} of {len(checked)} canonical solutions pass",
        ]
        if without := len(self.references) - len(checked):
            lines.append(f"          {without} problems have no canonical solution")
        categories = Counter(reference.verdict.category for reference in self.failing.values() if reference.verdict)
        lines += [f"          {count} {category}" for category, count in categories.most_common()]
        for task_id, reference in self.failing.items():
            assert reference.verdict is not None
            lines.append(f"  {task_id}: {reference.verdict.category}: {reference.verdict.detail}")
        if self.together:
            lines.append(
                f"{len(self.together)} problems are tested in the candidate's own process, where one that cheats can "
                f"pass: {', '.join(self.together)}"
            )
        return lines


def examine(problems: Sequence[Problem], settings: Settings | None = None) -> Diagnosis:
    """Judges every canonical solution as samples are judged. InputError where there is no sandbox or no tool."""
    judge = Judge(problems, settings or Settings())
    with worker_pool(judge) as pool:
        references = judge_references(judge, problems, None, pool)
    return Diagnosis(judge, {problem.task_id: references[problem.task_id] for problem in problems})
