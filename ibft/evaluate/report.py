"""From a folder of results to numbers: `run.json` and `results.jsonl` in, one object or Markdown out."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ibft.errors import InputError
from ibft.evaluate import metrics
from ibft.evaluate.jsonl import read_rows, read_text, shown
from ibft.evaluate.metrics import Count

RUN_NAME, RESULTS_NAME = "run.json", "results.jsonl"
# What is said of a run beside its numbers, as run.json has it.
_SETTINGS = ("task", "completion_format", "header", "rule", "sandbox_tier", "tools", "limits", "subset")


@dataclass(frozen=True)
class Results:
    """What became of a task's samples: counts by task_id, in the order of the problems."""

    name: str
    run: Mapping[str, Any]
    counts: Mapping[str, Count]
    categories: Mapping[str, int] = field(default_factory=dict)  # of samples, the missing ones included


def folders(path: Path) -> list[Path]:
    """The folders of results that a user means: the one named, or those of its temperatures, ascending."""
    if not path.is_dir():
        raise InputError(f"{str(path)!r} is not a folder; name the --output of `ibft eval run`.")
    if (path / RUN_NAME).is_file():
        return [path]
    inner = [file.parent for file in path.glob(f"temperature-*/{RUN_NAME}")]
    if not inner:
        raise InputError(f"{str(path)!r} holds no {RUN_NAME}, so no results; name the --output of `ibft eval run`.")
    return sorted(inner, key=lambda folder: float(folder.name.removeprefix("temperature-")))


def load_results(folder: Path, name: str | None = None) -> Results:
    """The results in a folder, named after it if not otherwise.

    InputError where they are not whole, or there was a harness error among them.
    """
    run = _read_run(folder / RUN_NAME)
    given: dict[str, int] = {task_id: run["samples_per_problem"].get(task_id, 0) for task_id in run["problems"]}
    found: dict[tuple[str, int], bool] = {}
    categories: Counter[str] = Counter()
    rows = read_rows(folder / RESULTS_NAME) if (folder / RESULTS_NAME).exists() else ()
    for number, row in rows:
        where = f"{folder / RESULTS_NAME}, line {number}"
        try:
            identity, category, passed = (row["task_id"], row["sample"]), str(row["category"]), row["passed"]
        except KeyError as error:
            raise InputError(f"{where} has no {error}, so `ibft eval run` did not write it.") from error
        if not isinstance(identity[0], str) or type(identity[1]) is not int:
            raise InputError(
                f"{where}: {shown(identity[1])} is no sample of {shown(identity[0])}, so `ibft eval run` did not write "
                "it."
            )
        if identity in found or row["task_id"] not in given:
            raise InputError(f"{where}: sample {identity[1]} of {identity[0]!r} is not one of the run, or comes twice.")
        if category == "harness_error":
            raise InputError(f"{where}: the harness failed ({row.get('detail', '')}); run it again before a report.")
        found[identity] = passed is True
        categories[category] += 1
    if len(found) < (expected := sum(given.values())):
        raise InputError(
            f"{folder} is not finished: {len(found)} of {expected} samples are judged. Run the same `ibft eval run` "
            "again, which does the rest."
        )
    passed_of = Counter(task_id for (task_id, _), passed in found.items() if passed)
    most = max(given.values())
    if run["subset"]:
        counts = {task_id: Count(n, passed_of[task_id]) for task_id, n in given.items() if n}
    else:
        counts = {task_id: Count(most, passed_of[task_id]) for task_id in given}
        if missing := most * len(given) - expected:
            categories["missing"] = missing
    return Results(name or folder.resolve().name, run, counts, dict(categories.most_common()))


def report(results: Results, ks: Sequence[int] | None = None, *, seed: int = 0) -> dict[str, Any]:
    """The report (JSON-able): `metrics` and their `intervals` by name, and what they are of.

    `ks`: None for those of `metrics.KS` that the samples allow. InputError for a k that they do not.
    """
    counts = list(results.counts.values())
    ks = metrics.valid_ks(counts) if ks is None else ks
    columns = metrics.per_problem(counts, ks)
    intervals = {name: metrics.interval(means) for name, means in metrics.bootstrap(columns, seed=seed).items()}
    return {
        "name": results.name,
        **{name: results.run.get(name) for name in _SETTINGS},
        "problems": len(counts),
        "samples_per_problem": min(count.total for count in counts),
        "samples": sum(count.total for count in counts),
        "ks": list(ks),
        "metrics": {name: metrics.mean(column) for name, column in columns.items()},
        "intervals": {name: [found.low, found.high] for name, found in intervals.items()},
        "confidence": metrics.CONFIDENCE,
        "resamples": metrics.RESAMPLES,
        "categories": dict(results.categories),
        "warnings": [*(results.run.get("warnings") or []), *_missing(results)],
    }


def markdown(values: Mapping[str, Any]) -> str:
    """A report for people."""
    share = values["samples"]
    lines = [
        f"# {values['task']}: {values['name']}",
        "",
        f"{values['problems']} problems, {values['samples']} samples"
        + (" (a subset of the task)" if values["subset"] else "")
        + ".",
        "",
        f"| metric | value | {values['confidence']:.0%} interval |",
        "|---|---|---|",
    ]
    for name, value in values["metrics"].items():
        low, high = values["intervals"][name]
        lines.append(f"| {name} | {value:.4f} | {low:.4f} to {high:.4f} |")
    lines += ["", "| samples | count | share |", "|---|---|---|"]
    lines += [f"| {name} | {count} | {count / share:.1%} |" for name, count in values["categories"].items()]
    lines += ["", *(f"- **Warning**: {warning}" for warning in values["warnings"])]
    tools = ", ".join(f"{name} {version}" for name, version in (values["tools"] or {}).items())
    lines += [
        f"- assembly: completion format {values['completion_format']}, header {values['header']}",
        f"- verdict: rule {values['rule']}; sandbox: {values['sandbox_tier']}",
        f"- tools: {tools or 'not recorded'}",
        f"- pass@k^(m): at least m of k samples drawn without replacement pass; intervals by {values['resamples']:,} "
        "bootstrap resamples of the problems",
    ]
    return "\n".join(lines) + "\n"


def _missing(results: Results) -> list[str]:
    """A sentence on samples that are not there, which count as failed."""
    missing = results.categories.get("missing")
    if not missing:
        return []
    given = results.run["samples_per_problem"]
    fewer = [task_id for task_id in results.counts if given.get(task_id, 0) < max(given.values())]
    ids = ", ".join(fewer[:5]) + " and others" * (len(fewer) > 5)
    return [f"{missing} samples are not there and count as failed, of {len(fewer)} problems: {ids}."]


def _read_run(file: Path) -> dict[str, Any]:
    try:
        run = json.loads(read_text(file))
        whole = isinstance(run["problems"], list) and isinstance(run["samples_per_problem"], dict) and "subset" in run
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{file} is not what `ibft eval run` writes ({type(error).__name__}: {error}).") from error
    if not whole or not run["problems"] or not any(run["samples_per_problem"].values()):
        raise InputError(f"{file} is not what `ibft eval run` writes.")
    return dict(run)
