"""The tables of `benchmarks.step_scaling`: real tokens a second, FLOPs and memory along each axis."""

import statistics
from typing import Any

from benchmarks.measure import ratio
from benchmarks.tables import markdown

Record = dict[str, Any]
_ORDER = ("eager-sft", "ibft-sft", "eager-ib", "ibft-ib")
NAMES = {
    "vocabulary": "V",
    "length": "sequence length",
    "label_share": "share of labels",
    "bottleneck_dims": "K",
    "target_layer": "target layer L",
}


def axes(record: Record) -> str:
    """A table for each axis."""
    lines = []
    for axis, points in record["axes"].items():
        if not points:
            continue
        rows = [[NAMES[axis], "tokens/s: eager-sft", *_ORDER[1:], "time: ibft-ib / eager-sft (interval)"]]
        rows[0] += ["ibft-ib / ibft-sft", "by FLOPs", "peak above rest, MiB: eager-sft", *_ORDER[1:]]
        for point in points:
            seconds = kinds(point["seconds"])
            row = [value_of(point, axis), *(f"{speed(point, seconds[kind]):,.0f}" for kind in _ORDER)]
            row += [str(ratio(seconds["ibft-ib"], seconds[other])) for other in ("eager-sft", "ibft-sft")]
            flops, memory = kinds(point["flops"]), kinds(point["memory_mib"])
            row.append(f"{flops['ibft-ib'] / flops['ibft-sft']:.2f}")
            rows.append([*row, *(f"{above(memory[kind]):.0f}" if kind in memory else "" for kind in _ORDER)])
        lines += [f"### {NAMES[axis]}", "", *markdown(rows), ""]
    return "\n".join(lines).rstrip()


def kinds(values: dict[str, Any]) -> dict[str, Any]:
    """By variant without its K, of which a point has one."""
    return {name.split(" ")[0]: value for name, value in values.items()}


def speed(point: Record, samples: list[float]) -> float:
    """Real tokens a second, the median."""
    return point["size"]["rows"] * point["size"]["length"] / statistics.median(samples)


def above(memory: dict[str, float]) -> float:
    """MiB that a step needs beyond the model's own."""
    return memory["peak"] - memory["rest"]


def value_of(point: Record, axis: str) -> str:
    """Where on the axis a point lies."""
    value = point["size"][axis]
    return f"{value[0] if isinstance(value, list | tuple) else value:,}"
