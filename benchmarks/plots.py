"""Pictures of any record, from the record alone; the same record gives the same bytes."""

import re
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import op_report, step_report
from benchmarks.cost import BOTH
from benchmarks.gpu_plots import case_figure, plots
from benchmarks.measure import ratio
from benchmarks.report import suite
from benchmarks.tables import warning, where

Record = dict[str, Any]
_INK, _GREY = "#0b6e4f", "#8d99ae"
_COLOURS = {
    "ibkernels": _INK, "eager": "#d1495b", "floor: products": _GREY, "limit": "#222222",
    "eager-sft": "#edae49", "eager-ib": "#d1495b", "ibft-sft": "#00798c", "ibft-ib": _INK,
}  # fmt: skip
_TITLES = {"floor: products": "its products alone"}


def draw(record: Record, stem: str, folder: Path, kind: str = "svg") -> list[Path]:
    """Writes the pictures of a record as STEM.*.KIND and returns their paths; a GPU's are SVG and name themselves."""
    import matplotlib

    if suite(record) == "gpu":
        return plots(record, folder)
    matplotlib.use("Agg")
    written = []
    with matplotlib.rc_context({"svg.hashsalt": "benchmarks", "svg.fonttype": "none", "font.size": 9}):
        folder.mkdir(parents=True, exist_ok=True)
        for name, figure in _figures(record):
            path = folder / f"{stem}.{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}.{kind}"
            figure.savefig(path, metadata={"Date": None} if kind == "svg" else {"Software": None}, dpi=120)
            written.append(path)
    return written


def _figures(record: Record) -> Iterator[tuple[str, Any]]:
    match suite(record):
        case "ops":
            yield "limits", limits(record)
            for name, case in record["cases"].items():
                if case["seconds"] and (case["passes"] == BOTH or case["op"] == "noise"):
                    yield (
                        name.replace(": forward + backward", ""),
                        case_figure(name, case, where(record), warning(record), "peak beyond inputs, MB"),
                    )
        case "scaling":
            yield "sweeps", sweeps(record)
            if record["crossovers"]:
                yield "crossovers", crossovers(record)
        case "step scaling":
            yield "axes", step_axes(record)
        case "step":
            medians = {name: statistics.median(seconds) for name, seconds in record["seconds"].items()}
            yield "time", bars(record, medians, "seconds of a step, median")
            if record["memory_mib"]:
                memory = {name: step_report.above(mib) for name, mib in record["memory_mib"].items()}
                yield "memory", bars(record, memory, "peak above rest, MiB")
        case "padding":
            speeds = {n: record["real_tokens"] / statistics.median(s) for n, s in record["seconds"].items()}
            yield "speed", bars(record, speeds, "real tokens a second")


def limits(record: Record) -> Any:
    """The share of the machine's limit that ours and eager PyTorch reach, for each op."""
    cases = {
        f"{case['op']}, {case['dtype']}": case
        for case in record["cases"].values()
        if case["passes"] == BOTH and {"ibkernels", "eager"} <= case["seconds"].keys()
    }
    drawn, axes = _figure(record, 1, 1, 8.5, 1.2 + 0.36 * len(cases))
    axis = axes[0]
    for offset, variant in ((-0.18, "ibkernels"), (0.18, "eager")):
        shares = [op_report.share(case, variant) for case in cases.values()]
        places = [at + offset for at in range(len(cases))]
        made = axis.barh(places, shares, 0.34, color=_COLOURS[variant], label=variant)
        axis.bar_label(made, [f"{value:.0%}" for value in shares], padding=3, fontsize=8)
    axis.axvline(1, color="#222222", linewidth=0.8)
    axis.set_yticks(range(len(cases)), list(cases))
    axis.invert_yaxis()
    axis.set_xlim(0, 1.15)
    axis.set_xlabel("share of the limit by the rates measured beside it, forward and backward")
    axis.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=2)
    return drawn


def sweeps(record: Record) -> Any:
    """Time over each axis, of ours, eager PyTorch and the products alone, and the limit of the cost model."""
    names = list(record["sweeps"])
    drawn, axes = _figure(record, -(-len(names) // 3), min(3, len(names)), 11, 3.0 * -(-len(names) // 3))
    for axis, name in zip(axes, names, strict=False):
        sweep = record["sweeps"][name]
        values = [point["size"][sweep["axis"]] for point in sweep["points"]]
        for variant in ("eager", "ibkernels", "floor: products"):
            medians = [1e3 * statistics.median(point["seconds"][variant]) for point in sweep["points"]]
            label = _TITLES.get(variant, variant)
            axis.plot(values, medians, marker="o", markersize=3, color=_COLOURS[variant], label=label)
        least = [1e3 * statistics.median(op_report.limits(point)) for point in sweep["points"]]
        axis.plot(values, least, color=_COLOURS["limit"], linestyle=":", label="limit")
        _axis(axis, name, "ms", logarithmic=True)
    for axis in axes[len(names) :]:
        axis.remove()
    axes[0].legend(frameon=False, fontsize=8)
    return drawn


def crossovers(record: Record) -> Any:
    """Absorbed over full width by N, measured, and the N at which the cost model sees them equal."""
    names = list(record["crossovers"])
    drawn, axes = _figure(record, -(-len(names) // 3), min(3, len(names)), 11, 3.0 * -(-len(names) // 3))
    for axis, name in zip(axes, names, strict=False):
        found = record["crossovers"][name]
        tokens = [point["tokens"] for point in found["points"]]
        ratios = [ratio(point["seconds"]["absorbed"], point["seconds"]["full width"]) for point in found["points"]]
        spread = [[r.median - r.low for r in ratios], [r.high - r.median for r in ratios]]
        axis.errorbar(tokens, [r.median for r in ratios], spread, marker="o", markersize=3, capsize=2, color=_INK)
        axis.axhline(1, color="#222222", linewidth=0.8)
        axis.axvline(found["predicted_here"], color=_GREY, linestyle=":", label="predicted")
        measured = op_report.crossing(found)
        if measured is not None:
            axis.axvspan(measured.low, measured.high, color=_INK, alpha=0.15, label="measured")
        _axis(axis, f"{name}: absorbed / full width", "time ratio", logarithmic=True)
        axis.set_xlabel("N")
    for axis in axes[len(names) :]:
        axis.remove()
    axes[0].legend(frameon=False, fontsize=8)
    return drawn


def step_axes(record: Record) -> Any:
    """Real tokens a second and peak memory of a step's four variants along each axis."""
    names = [axis for axis, points in record["axes"].items() if points]
    has_memory = any(point["memory_mib"] for axis in names for point in record["axes"][axis])
    drawn, axes = _figure(record, 1 + has_memory, len(names), 2.6 * len(names) + 1, 2.9 * (1 + has_memory))
    for column, name in enumerate(names):
        points = record["axes"][name]
        values = [point["size"][name] for point in points]
        values = [value[0] if isinstance(value, list) else value for value in values]
        for variant in ("eager-sft", "eager-ib", "ibft-sft", "ibft-ib"):
            speeds = [step_report.speed(point, step_report.kinds(point["seconds"])[variant]) for point in points]
            style = {"marker": "o", "markersize": 3, "color": _COLOURS[variant], "label": variant}
            axes[column].plot(values, speeds, **style)
            if has_memory:
                memory = [step_report.above(step_report.kinds(point["memory_mib"])[variant]) for point in points]
                axes[len(names) + column].plot(values, memory, **style)
        _axis(axes[column], step_report.NAMES[name], "real tokens/s", logarithmic=False)
        if has_memory:
            _axis(axes[len(names) + column], step_report.NAMES[name], "peak above rest, MiB", logarithmic=False)
    axes[0].legend(frameon=False, fontsize=8)
    return drawn


def bars(record: Record, values: dict[str, float], label: str) -> Any:
    """One horizontal bar for each name."""
    drawn, axes = _figure(record, 1, 1, 8.5, 1.2 + 0.3 * len(values))
    colours = [_COLOURS.get(name.split(" ")[0].rstrip(","), _INK) for name in values]
    made = axes[0].barh(list(values), list(values.values()), color=colours)
    axes[0].bar_label(made, [f"{v:.3g}" if v < 1000 else f"{v:,.0f}" for v in values.values()], padding=4)
    axes[0].margins(x=0.2)
    axes[0].invert_yaxis()
    axes[0].set_xlabel(label)
    return drawn


def _figure(record: Record, rows: int, columns: int, width: float, height: float) -> tuple[Any, list[Any]]:
    """A figure whose foot says where the record was made, and its axes, row by row."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(width, height + 0.35), layout="constrained")
    axes = list(drawn.subplots(rows, columns, squeeze=False).flat)
    foot = 0.35 / (height + 0.35)
    drawn.get_layout_engine().set(rect=(0, foot, 1, 1 - foot))  # type: ignore[union-attr, call-arg]
    drawn.text(0.01, 0.01, f"{warning(record)} {where(record)}".strip(), fontsize=6.5, color="#444444", wrap=True)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return drawn, axes


def _axis(axis: Any, title: str, label: str, logarithmic: bool) -> None:
    axis.set_title(title, fontsize=9)
    axis.set_ylabel(label)
    if logarithmic:
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.xaxis.set_major_formatter("{x:,.0f}")
    else:
        axis.set_ylim(bottom=0)
    axis.grid(color="#dddddd", linewidth=0.5)
