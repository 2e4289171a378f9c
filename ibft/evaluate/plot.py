"""Pass@k^(m) against m, a line for each model, as arXiv 2510.16022 shows it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ibft.evaluate.metrics import metric_name
from ibft.figure import save_figure, start_pyplot


def plot(reports: Sequence[Mapping[str, Any]], file: Path) -> int:
    """Draws the reports' Pass@k^(m), with its intervals, for the largest k that all have; returns that k."""
    pyplot = start_pyplot()
    from matplotlib.ticker import MaxNLocator

    k = max(set.intersection(*(set(each["ks"]) for each in reports)))
    ms = list(range(1, k + 1))
    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for each in reports:
        names = [metric_name(k, m) for m in ms]
        (line,) = axes.plot(ms, [100 * each["metrics"][name] for name in names], marker="o", label=each["name"])
        low, high = zip(*(each["intervals"][name] for name in names), strict=True)
        axes.fill_between(
            ms, [100 * x for x in low], [100 * x for x in high], color=line.get_color(), alpha=0.15, linewidth=0
        )
    axes.set(
        xlabel=f"m (of k = {k} samples, at least m pass)",
        ylabel=f"Pass@{k}$^{{(m)}}$, %",
        title=", ".join(dict.fromkeys(str(each["task"]) for each in reports)),
    )
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, file)
    return k
