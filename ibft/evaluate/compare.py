"""Two runs on the same problems: how far apart they are, how sure that is, and who wins where."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from ibft.errors import InputError
from ibft.evaluate import metrics
from ibft.evaluate.report import Results

_JUDGED_BY = ("completion_format", "header", "rule", "sandbox_tier", "limits", "tools")


def compare(a: Results, b: Results, ks: Sequence[int] | None = None, *, seed: int = 0) -> dict[str, Any]:
    """B against A (JSON-able): each metric's values, their difference b - a, and its paired bootstrap interval.

    The problems of both are resampled together, so what they have in common (some are harder) cancels. `b_ahead` is the
    share of the resamples in which B is ahead, ties counted half. `wins` lists the problems of which A or B solves a
    larger share of its samples. InputError for other tasks, or no problem in common.
    """
    if a.run["task"] != b.run["task"]:
        raise InputError(f"{a.name} is of {a.run['task']} and {b.name} of {b.run['task']}; only one task compares.")
    shared = [task_id for task_id in a.counts if task_id in b.counts]
    if not shared:
        raise InputError(f"{a.name} and {b.name} have no problem in common.")
    counts_a, counts_b = ([results.counts[task_id] for task_id in shared] for results in (a, b))
    ks = metrics.valid_ks([*counts_a, *counts_b]) if ks is None else ks
    values_a, values_b = (metrics.per_problem(counts, ks) for counts in (counts_a, counts_b))
    differences = {
        name: [y - x for x, y in zip(column, values_b[name], strict=True)] for name, column in values_a.items()
    }
    compared = {}
    for name, resampled in metrics.bootstrap(differences, seed=seed).items():
        means = resampled.round(12)  # so that what cancels is a tie, and not the rest of a rounding
        found = metrics.interval(means)
        compared[name] = {
            "a": metrics.mean(values_a[name]),
            "b": metrics.mean(values_b[name]),
            "difference": metrics.mean(differences[name]),
            "interval": [found.low, found.high],
            "b_ahead": float((means > 0).mean() + (means == 0).mean() / 2),
        }
    rates = [
        (task_id, Fraction(x.passed, x.total), Fraction(y.passed, y.total))
        for task_id, x, y in zip(shared, counts_a, counts_b, strict=True)
    ]
    return {
        "a": a.name,
        "b": b.name,
        "task": a.run["task"],
        "problems": len(shared),
        "metrics": compared,
        "wins": {
            "a": [task_id for task_id, x, y in rates if x > y],
            "b": [task_id for task_id, x, y in rates if y > x],
            "ties": sum(x == y for _, x, y in rates),
        },
        "confidence": metrics.CONFIDENCE,
        "resamples": metrics.RESAMPLES,
        "warnings": _warnings(a, b, len(shared)),
    }


def markdown(values: Mapping[str, Any]) -> str:
    """A comparison for people."""
    lines = [
        f"# {values['task']}: {values['b']} (B) against {values['a']} (A)",
        "",
        f"{values['problems']} problems. Intervals of {values['confidence']:.0%}, by {values['resamples']:,} paired "
        "bootstrap resamples of the problems.",
        "",
        "| metric | A | B | B - A | interval | B ahead |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in values["metrics"].items():
        low, high = row["interval"]
        lines.append(
            f"| {name} | {row['a']:.4f} | {row['b']:.4f} | {row['difference']:+.4f} | {low:+.4f} to {high:+.4f} "
            f"| {row['b_ahead']:.1%} |"
        )
    lines.append("")
    for side, other in (("a", "b"), ("b", "a")):
        won = values["wins"][side]
        of = f": {', '.join(won)}" if won else ""
        lines.append(f"- {side.upper()} solves a larger share of its samples than {other.upper()} in {len(won)}{of}")
    lines.append(f"- as large a share in {values['wins']['ties']}")
    lines += [f"- **Warning**: {warning}" for warning in values["warnings"]]
    return "\n".join(lines) + "\n"


def _warnings(a: Results, b: Results, shared: int) -> list[str]:
    found = []
    for name in _JUDGED_BY:
        if a.run.get(name) != b.run.get(name):
            found.append(f"A and B were judged with another {name}: {a.run.get(name)} and {b.run.get(name)}.")
    if shared < max(len(a.counts), len(b.counts)):
        found.append(f"A has {len(a.counts)} problems and B {len(b.counts)}; compared are the {shared} of both.")
    return found
