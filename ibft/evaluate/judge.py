"""Completions, assembled and judged in a sandbox, and a hash of everything that decides the verdict.

Before the samples of a problem comes its canonical solution, which says how its tests work here: whether a Python
candidate can be kept in a process of its own, and how many samples a Verilog testbench takes.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib import resources
from typing import Any

import ibft
from ibft.evaluate import python_verdict, verilog_verdict
from ibft.evaluate.assembly import CompletionFormat, Header, assemble
from ibft.evaluate.problems import Problem
from ibft.evaluate.python_verdict import Verdict
from ibft.evaluate.sandbox import Limits, Sandbox, choose_sandbox, readable_folders
from ibft.evaluate.verilog_verdict import Rule

# The text of these modules decides the verdict on a source: with a change of any, results are stale. Extraction and the
# reading of tasks are not among them, since what they make, the source and the problem, is itself in the key.
_DECIDING = (
    *("judge", "assembly", "python_verdict", "python_child", "verilog_verdict"),
    *("sandbox", "walls", "seccomp", "supervisor"),
)


@dataclass(frozen=True)
class Settings:
    """How samples are assembled, judged and kept."""

    completion_format: CompletionFormat = "auto"
    header: Header = "dataset"
    rule: Rule = "strict"  # of Verilog; Python has one
    subset: bool = False  # recorded: problems without samples do not count as failed
    limits: Limits = field(default_factory=Limits)
    workers: int | None = None  # None: the cores that this process may use
    allow_unsafe: bool = False


@dataclass(frozen=True)
class Reference:
    """What a problem's canonical solution shows of its tests."""

    verdict: Verdict | None  # None where the task has no canonical solution
    isolated: bool = True  # Python: candidates work in a process of their own
    samples: int | None = None  # Verilog: how many the testbench takes

    @property
    def faulty(self) -> bool:
        return self.verdict is not None and self.verdict.category != "passed"


class Judge:
    """Judges completions with what is installed here. InputError where there is no sandbox or no tool for the task."""

    def __init__(self, problems: Sequence[Problem], settings: Settings, sandbox: Sandbox | None = None) -> None:
        self.settings = settings
        languages = {problem.language for problem in problems}
        needed = [python_verdict.INTERPRETER]  # the supervisor of the last tier is a Python program too
        self.tools = {"ibft": ibft.__version__, "rules": rules()}
        if "python" in languages:
            self.tools |= python_verdict.versions()
        if "verilog" in languages:
            needed += verilog_verdict.programs()
            self.tools |= verilog_verdict.versions()
        if sandbox is None:
            sandbox = choose_sandbox(allow_unsafe=settings.allow_unsafe, readable=readable_folders(*needed))
        self.sandbox = sandbox

    def key(self, problem: Problem, source: str, reference: Reference | None = None) -> str:
        """A hash of everything that the verdict on this source depends on."""
        basis: list[Any] = [asdict(problem), source, self.tools, self.sandbox.tier, asdict(self.settings.limits)]
        if problem.language == "verilog":
            basis.append(self.settings.rule)
        if reference is not None:
            basis.append([reference.isolated, reference.samples])
        return hashlib.sha256(json.dumps(basis).encode()).hexdigest()[:32]

    def source(self, problem: Problem, completion: str) -> str:
        return assemble(problem, completion, self.settings.completion_format, self.settings.header)

    def judge(self, problem: Problem, completion: str, reference: Reference) -> Verdict:
        """The verdict on one completion."""
        if not completion.strip():
            return Verdict("no_code", "the completion is empty")
        source, limits = self.source(problem, completion), self.settings.limits
        if problem.language == "python":
            return python_verdict.judge(self.sandbox, problem, source, limits, isolated=reference.isolated)
        rule = self.settings.rule
        verdict = verilog_verdict.judge(self.sandbox, problem, source, limits, rule=rule, samples=reference.samples)
        if verdict.category == "passed" and reference.faulty and rule == "strict":
            return verdict._replace(
                category="suspicious", detail="it passes tests that the canonical solution does not pass here"
            )
        return verdict

    def reference(self, problem: Problem) -> Reference:
        """What the canonical solution shows; it is assembled as the task has it, whatever the samples' format."""
        solution, limits = problem.canonical_solution, self.settings.limits
        if not solution.strip():
            return Reference(None)
        if problem.language == "python":
            source = assemble(problem, solution)
            # Twice, and never for a limit or a process that died: in one process a candidate that cheats can pass.
            for _ in range(2):
                verdict = python_verdict.judge(self.sandbox, problem, source, limits)
                if verdict.category == "passed" or verdict.transient:
                    return Reference(verdict)
            beside = python_verdict.judge(self.sandbox, problem, source, limits, isolated=False)
            return Reference(beside, isolated=False) if beside.category == "passed" else Reference(verdict)
        design = assemble(problem, solution)
        verdict, samples = verilog_verdict.reference(self.sandbox, problem, design, limits, rule=self.settings.rule)
        return Reference(verdict, samples=samples)


@functools.cache
def rules() -> str:
    """A digest of the rules of judging, which change with the version of this code."""
    folder = resources.files("ibft.evaluate")
    return hashlib.sha256(b"\0".join((folder / f"{name}.py").read_bytes() for name in _DECIDING)).hexdigest()[:12]
