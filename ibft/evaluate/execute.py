"""Runs samples: each verdict is appended to the results as it comes, and what is still true is not judged again."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ibft.errors import HarnessError, InputError
from ibft.evaluate.assembly import format_warning
from ibft.evaluate.jsonl import read_rows
from ibft.evaluate.judge import Judge, Reference, Settings
from ibft.evaluate.problems import Problem
from ibft.evaluate.python_verdict import Verdict
from ibft.evaluate.report import RESULTS_NAME, RUN_NAME
from ibft.evaluate.samples import Sample

REFERENCES_NAME = "references.jsonl"
_LOCK_NAME = ".lock"
_LIMITS = ("timeout", "memory", "output_limit")

Progress = Callable[[int, int, str], None]  # done, all, the category of the last


def run_samples(
    problems: Sequence[Problem],
    samples: Sequence[Sample],
    output: Path,
    settings: Settings | None = None,
    *,
    record: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> list[str]:
    """Judges samples into `output`: run.json, and a line of results.jsonl for each; returns the warnings.

    What is already there for the same problem, source, rule, limits and tools is kept, and everything else judged anew.
    `record`: more for run.json (task, data, samples). InputError for what cannot be used; HarnessError, after which the
    same call goes on, where the judging itself failed.
    """
    settings = settings or Settings()
    judge = Judge(problems, settings)
    by_id = {problem.task_id: problem for problem in problems}
    needed = [by_id[task_id] for task_id in dict.fromkeys(sample.task_id for sample in samples)]
    own = [by_id[sample.task_id] for sample in samples]
    output.mkdir(parents=True, exist_ok=True)
    with _locked(output), worker_pool(judge) as pool:
        references = judge_references(judge, needed, output / REFERENCES_NAME, pool)
        warnings = _warnings(judge, needed, references)
        if warning := format_warning(own, [sample.completion for sample in samples], settings.completion_format):
            warnings.append(warning)
        keys = {
            (sample.task_id, sample.sample): judge.key(
                problem, judge.source(problem, sample.completion), references[sample.task_id]
            )
            for sample, problem in zip(samples, own, strict=True)
        }
        _write_run(output / RUN_NAME, judge, problems, samples, warnings, record or {})
        kept = _kept(output / RESULTS_NAME, lambda row: keys.get((row["task_id"], row["sample"])))
        done = {(row["task_id"], row["sample"]) for row in kept}

        def judged(sample: Sample) -> dict[str, Any] | None:
            problem = by_id[sample.task_id]
            verdict = judge.judge(problem, sample.completion, references[sample.task_id])
            _check(verdict, f"sample {sample.sample} of {sample.task_id!r}")
            identity = {"task_id": sample.task_id, "sample": sample.sample}
            return _row(identity, verdict, keys[sample.task_id, sample.sample])

        todo = [sample for sample in samples if (sample.task_id, sample.sample) not in done]
        for count, row in enumerate(_append_each(output / RESULTS_NAME, pool, judged, todo), start=len(kept) + 1):
            if progress is not None:
                progress(count, len(samples), row["category"])
    return warnings


def judge_references(
    judge: Judge, problems: Sequence[Problem], store: Path | None, pool: ThreadPoolExecutor
) -> dict[str, Reference]:
    """The reference of each problem by its task_id; what `store` has for the same tools is not judged again.

    Unless a limit or a process that died decided it. HarnessError where the judging failed; without `store`, for tests
    that cannot run it is a verdict like the others.
    """
    keys = {problem.task_id: judge.key(problem, problem.canonical_solution) for problem in problems}

    def judged(problem: Problem) -> dict[str, Any] | None:
        reference = judge.reference(problem)
        verdict = reference.verdict or Verdict("missing")
        if store is not None or verdict.transient:
            _check(verdict, f"the canonical solution of {problem.task_id!r}")
        transient = verdict.transient or verdict.category in _LIMITS
        more = {"isolated": reference.isolated, "samples": reference.samples, "transient": transient}
        return _row({"task_id": problem.task_id, **more}, verdict, keys[problem.task_id])

    rows = _kept(store, lambda row: None if row["transient"] else keys.get(row["task_id"])) if store is not None else []
    known = {row["task_id"] for row in rows}
    rows += _append_each(store, pool, judged, [problem for problem in problems if problem.task_id not in known])
    return {row["task_id"]: _reference(row) for row in rows}


def _reference(row: Mapping[str, Any]) -> Reference:
    if row["category"] == "missing":
        return Reference(None)
    verdict = Verdict(row["category"], row["detail"], row["seconds"])
    return Reference(verdict, row["isolated"], row["samples"])


def _check(verdict: Verdict, what: str) -> None:
    if verdict.category == "harness_error":
        raise HarnessError(
            f"{what} could not be judged: {verdict.detail}. What was judged before is kept; a problem whose tests "
            "cannot run here (`ibft eval doctor` lists them) must be left out of the task."
        )


def _row(identity: Mapping[str, Any], verdict: Verdict, key: str) -> dict[str, Any] | None:
    """A line of results; None for what was interrupted."""
    if verdict.category == "interrupted":
        return None
    found = {"category": verdict.category, "passed": verdict.category == "passed", "detail": verdict.detail}
    return {**identity, **found, "seconds": verdict.seconds, "key": key}


def _append_each(
    path: Path | None, pool: ThreadPoolExecutor, judged: Callable[[Any], dict[str, Any] | None], todo: Sequence[Any]
) -> Iterator[dict[str, Any]]:
    """The rows of all, in the order in which they are ready, each on the disk before it is given."""
    futures: list[Future[dict[str, Any] | None]] = [pool.submit(judged, item) for item in todo]
    with open(path, "a", encoding="utf-8") if path is not None else contextlib.nullcontext() as file:
        for future in as_completed(futures):
            row = future.result()
            if row is None:
                continue
            if file is not None:
                file.write(json.dumps(row) + "\n")
                file.flush()
            yield row


def _kept(path: Path, key: Callable[[dict[str, Any]], str | None]) -> list[dict[str, Any]]:
    """The rows that are still true, each once; the file holds no others after this."""
    kept: dict[Any, dict[str, Any]] = {}
    if not path.exists():
        return []
    whole = path.read_bytes()
    for _, row in read_rows(path, appended=True):
        with contextlib.suppress(KeyError, TypeError):
            if row["key"] == key(row):
                kept[row["task_id"], row.get("sample")] = row
    text = "".join(json.dumps(row) + "\n" for row in kept.values())
    if text.encode() != whole:
        _write(path, text)
    return list(kept.values())


def _write_run(
    path: Path,
    judge: Judge,
    problems: Sequence[Problem],
    samples: Sequence[Sample],
    warnings: Sequence[str],
    record: Mapping[str, Any],
) -> None:
    settings = judge.settings
    run = {
        **record,
        "completion_format": settings.completion_format,
        "header": settings.header,
        "rule": settings.rule,
        "subset": settings.subset,
        "sandbox_tier": judge.sandbox.tier,
        "sandbox_reason": judge.sandbox.reason,
        "tools": judge.tools,
        "limits": asdict(settings.limits),
        "problems": [problem.task_id for problem in problems],
        "samples_per_problem": dict(Counter(sample.task_id for sample in samples)),
        "warnings": list(warnings),
    }
    _write(path, json.dumps(run, indent=2) + "\n")


def _write(path: Path, text: str) -> None:
    """All or nothing."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    with open(unfinished, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


def _warnings(judge: Judge, problems: Sequence[Problem], references: Mapping[str, Reference]) -> list[str]:
    found = []
    if judge.sandbox.tier == "rlimits":
        found.append(f"The samples ran with limits alone, which are no sandbox ({judge.sandbox.reason}).")
    together = [problem.task_id for problem in problems if not references[problem.task_id].isolated]
    if together:
        found.append(
            "The tests of these problems ran in the candidate's own process, where a candidate that cheats can pass: "
            f"{', '.join(together)}."
        )
    faulty = [problem.task_id for problem in problems if references[problem.task_id].faulty]
    if faulty:
        found.append(f"The canonical solutions of these problems do not pass here: {', '.join(faulty)}.")
    return found


@contextlib.contextmanager
def _locked(output: Path) -> Iterator[None]:
    """Keeps a second run out of the folder."""
    with open(output / _LOCK_NAME, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"Another run is writing to {str(output)!r}; wait for it, or name another folder."
            ) from None
        yield


@contextlib.contextmanager
def worker_pool(judge: Judge) -> Iterator[ThreadPoolExecutor]:
    """Threads that each wait for one sample's processes; after an error, what runs is ended and nothing is begun."""
    with ThreadPoolExecutor(judge.settings.workers or len(os.sched_getaffinity(0))) as pool:
        try:
            yield pool
        except BaseException:
            judge.sandbox.interrupted.set()
            pool.shutdown(cancel_futures=True)
            raise
