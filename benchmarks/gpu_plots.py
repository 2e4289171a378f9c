"""Pictures of a record of `benchmarks.gpu`, from the record alone: time, peak memory and error of every variant."""

import math
import re
import textwrap
from pathlib import Path
from typing import Any

from benchmarks.gpu_report import OURS, Case, heading, summary

_COLOURS = {"ours": "#0b6e4f", "other": "#8d99ae", "floor": "#e0e1dd"}
DRY_LABEL = "Toy sizes in Triton's interpreter: these numbers mean nothing."


def plots(record: dict[str, Any], folder: Path) -> list[Path]:
    """Writes an SVG for every case that was measured, and returns their paths; the same record gives the same bytes."""
    import matplotlib

    matplotlib.use("Agg")
    written = []
    with matplotlib.rc_context({"svg.hashsalt": "benchmarks.gpu", "svg.fonttype": "none", "font.size": 9}):
        folder.mkdir(parents=True, exist_ok=True)
        for name, case in record["cases"].items():
            if not case["seconds"]:
                continue
            path = folder / f"gpu-{_slug(record['device']['name'])}-{_slug(name)}.svg"
            figure(record, name).savefig(path, metadata={"Date": None})
            written.append(path)
    return written


def figure(record: dict[str, Any], name: str) -> Any:
    """One case of a record."""
    return case_figure(name, record["cases"][name], heading(record), DRY_LABEL if record["dry"] else "")


def case_figure(name: str, case: Case, head: str, warning: str, peak: str = "peak beyond in- and outputs, MB") -> Any:
    """A row for each variant, ours first and the floors last; bars are medians, whiskers p20 and p80."""
    from matplotlib.figure import Figure

    variants = sorted(case["seconds"], key=_kind)  # stable: within a kind as measured
    notes = [head, *(f"Not measured: {other} ({why})." for other, why in case["left_out"].items())]
    lines = [line for note in notes for line in textwrap.wrap(note, 150)]
    height, foot = 1.3 + 0.3 * len(variants), 0.2 + 0.16 * len(lines)
    drawn = Figure(figsize=(11, height + foot))
    drawn.subplots_adjust(left=0.27, right=0.98, top=1 - 0.6 / (height + foot), bottom=(foot + 0.5) / (height + foot))
    drawn.suptitle(name, x=0.02, y=1 - 0.12 / (height + foot), ha="left", va="top", fontsize=12, fontweight="bold")
    drawn.text(0.02, 0.06 / (height + foot), "\n".join(lines), va="bottom", fontsize=7.5, color="#444444")
    times, memory, errors = drawn.subplots(1, 3, sharey=True, gridspec_kw={"width_ratios": (5, 4, 3), "wspace": 0.08})
    medians, fifths = [], []
    for variant in variants:
        median, p20, p80 = (1e3 * second for second in summary(case["seconds"][variant]))
        medians.append(median)
        fifths.append((median - p20, p80 - median))
    peaks = [_or_nan(case["peak_bytes"].get(variant), 1e6) for variant in variants]
    _bars(times, variants, medians, "time, ms (p20 to p80)", fifths)
    _bars(memory, variants, peaks, peak)
    _errors(errors, variants, [_or_nan(case["relative_error"].get(variant), 1) for variant in variants])
    times.set_yticks(range(len(variants)), variants)
    times.invert_yaxis()
    for axes in (times, memory, errors):
        axes.spines[["top", "right"]].set_visible(False)
    top = 1 - 0.12 / (height + foot)
    drawn.text(0.98, top, warning, ha="right", va="top", color="#b00020", fontweight="bold")
    return drawn


def _bars(axes: Any, variants: list[str], values: list[float], label: str, spread: Any = None) -> None:
    """Horizontal bars with their values written beside them; nothing where there is no value."""
    bars = axes.barh(
        range(len(variants)), values, color=[_colour(variant) for variant in variants], edgecolor="#555555",
        linewidth=0.4, xerr=None if spread is None else list(zip(*spread, strict=True)), ecolor="#222222", capsize=2,
    )  # fmt: skip
    axes.bar_label(bars, [_number(value) for value in values], padding=4, fontsize=8)
    axes.margins(x=0.25)
    axes.set_xlim(left=0)
    axes.set_xlabel(label)


def _errors(axes: Any, variants: list[str], values: list[float]) -> None:
    """Points on a logarithmic axis of whole decades."""
    axes.set_xscale("log")
    axes.scatter(values, range(len(variants)), color=[_colour(variant) for variant in variants], zorder=2)
    decades = [math.log10(value) for value in values if value > 0 and math.isfinite(value)] or [-1.0, -1.0]
    axes.set_xlim(10.0 ** (math.floor(min(decades)) - 0.2), 10.0 ** (math.floor(max(decades)) + 1.2))
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.set_xlabel("error against float64")


def _number(value: float) -> str:
    if math.isnan(value):
        return ""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _or_nan(value: float | None, unit: float) -> float:
    return float("nan") if value is None else value / unit


def _kind(variant: str) -> int:
    return 0 if variant == OURS else 2 if variant.startswith("floor") else 1


def _colour(variant: str) -> str:
    return _COLOURS[("ours", "other", "floor")[_kind(variant)]]


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
