"""`ibft memorization plot`: densities of the scores of several models and datasets, and how far apart each two lie."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ibft.config import Measure
from ibft.data.memorized import ScoreTable
from ibft.errors import InputError
from ibft.figure import check_figure, save_figure, start_pyplot
from ibft.memorization.config import PlotFlags
from ibft.memorization.separation import separation

_AXES = {
    "min_k": "Min-{k}% Prob: mean log-probability of the least probable tokens (nats)",
    "min_k_plus_plus": "Min-{k}%++: the same, standardised (standard deviations)",
    "mean_log_prob": "mean log-probability of the tokens (nats)",
}


def compare(config: PlotFlags, names: Sequence[str]) -> dict[str, Any]:
    """What the command prints: each file's scores in short, and each pair's separation. Draws them if asked to.

    InputError for files that cannot be compared: one without scores, or scores of another k, span or dtype.
    """
    if config.output is not None:
        check_figure(Path(config.output), "--output")
    if config.labels and len(config.labels) != len(names):
        raise InputError(
            f"--labels gives {len(config.labels)} labels for {len(names)} files; give one for each, or none."
        )
    tables = [ScoreTable(Path(name).expanduser()) for name in names]
    settings = _common_settings(tables)
    labels = list(config.labels) or _labels(tables)
    scores = [_scores(table, config.measure) for table in tables]
    result: dict[str, Any] = {
        "measure": config.measure,
        **settings,
        "files": [
            {
                "file": str(table.path),
                "label": label,
                **{name: table.record.get(name) for name in ("model", "adapter", "dataset")},
                "documents": len(values),
                "mean": float(values.mean()),
                "quartiles": [float(value) for value in np.quantile(values, [0.25, 0.5, 0.75])],
            }
            for table, label, values in zip(tables, labels, scores, strict=True)
        ],
        "pairs": [
            {
                "a": labels[a],
                "b": labels[b],
                "differ": _what_differs(tables[a], tables[b]),
                **vars(separation(scores[a], scores[b])),
            }
            for a, b in itertools.combinations(range(len(tables)), 2)
        ],
    }
    if config.output is not None:
        _draw(scores, labels, config.measure, settings["k"], Path(config.output))
    return result


def describe(result: dict[str, Any]) -> str:
    """The result as two tables for people."""
    files = [
        (each["label"], f"{each['documents']:,}", *(f"{value:.4g}" for value in (each["mean"], *each["quartiles"])))
        for each in result["files"]
    ]
    pairs = [
        (pair["a"], pair["b"], pair["differ"] or "", f"{pair['auc']:.3f}", f"{pair['ks']:.3f}")
        for pair in result["pairs"]
    ]
    parts = [_columns([(result["measure"], "documents", "mean", "25%", "50%", "75%"), *files], numbers=5)]
    if pairs:
        parts.append(_columns([("a", "b", "differ in", "AUC", "KS"), *pairs], numbers=2))
        parts.append("AUC: the chance that a document of a is better known than one of b; 0.5 where they do not differ")
    return "\n\n".join(parts)


def density(values: np.ndarray, at: np.ndarray, upper: float | None = None) -> np.ndarray:
    """A Gaussian kernel estimate of the density of values [n] at the points [m], with Silverman's bandwidth.

    `upper`: no value can be above it, and kernels are reflected there: mean log-probabilities of what is memorised lie
    close below 0, and a plain estimate would put half of them above.
    """
    bandwidth = _bandwidth(values)
    total = np.zeros(len(at))
    for chunk in np.array_split(values, math.ceil(len(values) / 1000)):
        for centres in [chunk] if upper is None else [chunk, 2 * upper - chunk]:
            total += np.exp(-0.5 * ((at[:, None] - centres) / bandwidth) ** 2).sum(1)
    return total / (len(values) * bandwidth * math.sqrt(2 * math.pi))


def _bandwidth(values: np.ndarray) -> float:
    """Silverman's rule of thumb: 0.9 min(deviation, interquartile range / 1.34) n^(-1/5)."""
    low, high = np.quantile(values, [0.25, 0.75])
    spreads = [spread for spread in (float(values.std()), float(high - low) / 1.34) if spread > 0]
    # Of values that are all the same, a narrow bump says as much as can be said.
    return 0.9 * min(spreads, default=1e-3 * max(1.0, abs(float(low)))) * len(values) ** -0.2


def _near(values: np.ndarray) -> np.ndarray:
    """What the axis must reach: without those of the outer 1% at either end that are also ten quartile ranges off.

    One token that a model held impossible can put a row's Min-K%++ at -1e21, beside which all others are one point.
    """
    first, last = np.quantile(values, 0.01, method="higher"), np.quantile(values, 0.99, method="lower")
    low, high = np.quantile(values, [0.25, 0.75])
    reach = 10 * (high - low)
    return values[(values >= min(first, low - reach)) & (values <= max(last, high + reach))]


def _draw(scores: Sequence[np.ndarray], labels: Sequence[str], measure: Measure, k: float | None, file: Path) -> None:
    upper = None if measure == "min_k_plus_plus" else 0.0
    margin = 3 * max(map(_bandwidth, scores))
    shown = [_near(values) for values in scores]
    lowest, highest = min(values.min() for values in shown) - margin, max(values.max() for values in shown) + margin
    # Each curve has points where its own values lie, however narrow they are beside the others.
    grid = np.unique(
        np.concatenate(
            [np.linspace(lowest, highest, 400), *(np.quantile(values, np.linspace(0, 1, 200)) for values in shown)]
        )
    )
    grid = grid if upper is None else np.append(grid[grid < upper], upper)
    figure, axes = start_pyplot().subplots(figsize=(7, 4), layout="constrained")
    for values, label in zip(scores, labels, strict=True):
        heights = density(values, grid, upper)
        (line,) = axes.plot(grid, heights, label=f"{label} ({len(values):,})")
        axes.fill_between(grid, heights, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set(xlabel=_AXES[measure].format(k="K" if k is None else f"{100 * k:g}"), ylabel="density")
    axes.set_ylim(bottom=0)
    axes.legend()
    save_figure(figure, file)


def _common_settings(tables: Sequence[ScoreTable]) -> dict[str, Any]:
    """What the files were scored with, as far as their records say; None where none does. InputError if they differ."""
    known = [table for table in tables if table.record]
    names = ("k", "span", "dtype")
    for name, table in itertools.product(names, known):
        one, other = known[0].record.get(name), table.record.get(name)
        if one != other:
            raise InputError(
                f"{known[0].path} was scored with --{name} {one} and {table.path} with --{name} {other}; scores can be "
                "compared only where these agree."
            )
    return {name: known[0].record.get(name) if known else None for name in names}


def _scores(table: ScoreTable, measure: Measure) -> np.ndarray:
    values = table.table[measure].drop_null().to_numpy()
    if not len(values):
        raise InputError(f"{table.path} holds no scores: every row is empty or too long.")
    return values


def _labels(tables: Sequence[ScoreTable]) -> list[str]:
    """Model (or adapter) and dataset by their last names, where these tell the files apart; else the files' names."""
    labels = []
    for table in tables:
        who = table.record.get("adapter") or table.record.get("model")
        what = table.record.get("dataset")
        if isinstance(who, str) and isinstance(what, list):
            labels.append(f"{Path(who).name} on {', '.join(Path(name).stem for name in what)}")
    if len(set(labels)) < len(tables):
        labels = [table.path.stem for table in tables]
    return labels if len(set(labels)) == len(tables) else [str(table.path) for table in tables]


def _what_differs(a: ScoreTable, b: ScoreTable) -> str | None:
    """Model, data, or both; None where a record is missing."""
    one, other = a.record.get("identity"), b.record.get("identity")
    if not (isinstance(one, dict) and isinstance(other, dict)):
        return None
    names = {"model": ("model", "adapter"), "data": ("data",)}
    return " and ".join(what for what, keys in names.items() if any(one.get(key) != other.get(key) for key in keys))


def _columns(rows: Sequence[Sequence[str]], numbers: int) -> str:
    """Rows of words in columns, the last `numbers` of them to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    words = len(widths) - numbers
    return "\n".join(
        "  ".join(
            cell.ljust(width) if place < words else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
