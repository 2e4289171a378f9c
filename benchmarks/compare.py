"""Two records of one suite: what became slower or larger by more than noise.

Each variant's time is taken relative to eager PyTorch in its own record, round by round, so that a machine that is
faster today is not mistaken for a better kernel; the interval of a change is a bootstrap of both records' rounds.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from benchmarks.measure import BETWEEN_RUNS, CONFIDENCE, resampled_medians
from benchmarks.ops import PRODUCTS
from benchmarks.tables import markdown

Record = dict[str, Any]
Samples = dict[str, list[float]]
# What a group's times are relative to: never of this project, whose changes would cancel out.
BASELINES = ("eager", "eager-sft", "eager-ib, published", PRODUCTS)
_PEAK_GROWTH = 1.05
_MIB = 2**20


class Group(NamedTuple):
    """Variants that were interleaved, of one size: seconds, and bytes at the peak where they were measured."""

    name: str
    size: Any
    seconds: Samples
    peaks: dict[str, float]


class Change(NamedTuple):
    """new / old of a variant's time, or of its peak, whose interval is empty."""

    group: str
    variant: str
    what: str  # "time" or "peak"
    ratio: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """Beyond noise: "worse" or "better"; "same" otherwise."""
        return "worse" if self.low > 1 else "better" if self.high < 1 else "same"


def groups(record: Record) -> Iterator[Group]:
    """All that a record has timed. Raises KeyError for what is no record."""
    if "cases" in record:  # of ops, or of a GPU
        for name, case in record["cases"].items():
            yield Group(name, case.get("size"), case["seconds"], case["peak_bytes"])
    elif "sweeps" in record:
        for name, sweep in record["sweeps"].items():
            for point in sweep["points"]:
                value = point["size"][sweep["axis"]]
                yield Group(f"{name}={value}", point["size"], point["seconds"], point["peak_bytes"])
    elif "axes" in record:
        for axis, points in record["axes"].items():
            for point in points:
                yield _step(f"{axis}={point['size'][axis]}", point)
    else:
        yield _step(record.get("suite", "step"), record)


def compare(old: Record, new: Record) -> list[Change]:
    """Of every variant that both have, at the same size."""
    before = {group.name: group for group in groups(old)}
    changes = []
    for group in groups(new):
        other = before.get(group.name)
        if other is None or other.size != group.size:
            continue
        baseline = next((name for name in BASELINES if name in group.seconds and name in other.seconds), None)
        for name in group.seconds.keys() & other.seconds.keys() - {baseline}:
            one, two = (_relative(each.seconds, name, baseline) for each in (other, group))
            changes.append(_change(group.name, name, one, two))
        for name in group.peaks.keys() & other.peaks.keys():
            before_it, now = other.peaks[name], group.peaks[name]
            if max(before_it, now) > _MIB:  # of less, libraries' buffers make half
                ratio = now / max(before_it, 1.0)
                low, high = ratio / _PEAK_GROWTH, ratio * _PEAK_GROWTH
                changes.append(Change(group.name, name, "peak", ratio, low, high))
    return sorted(changes)


def report(changes: list[Change], everything: bool) -> str:
    """A table of what is beyond noise, or of everything, and how many are not."""
    shown = [change for change in changes if everything or change.verdict != "same"]
    rows = [["group", "variant", "", "new / old", f"interval ({CONFIDENCE:.0%})", ""]]
    for change in shown:
        rows.append([change.group, change.variant, change.what, f"{change.ratio:.2f}"])
        rows[-1] += [f"{change.low:.2f} to {change.high:.2f}", change.verdict]
    same = sum(change.verdict == "same" for change in changes)
    summary = f"{same} of {len(changes)} the same within their intervals."
    return "\n".join([*markdown(rows), "", summary]) if shown else summary


def differences(old: Record, new: Record) -> list[str]:
    """What else differs between the two, and may be the reason."""
    found = [
        f"{name}: {old['device'].get(name)} and {new['device'].get(name)}"
        for name in ("cpu", "name", "threads")
        if old["device"].get(name) != new["device"].get(name)
    ]
    sizes = {group.name: group.size for group in groups(old)}
    found += [
        f"{group.name}: another size, so not compared"
        for group in groups(new)
        if sizes.get(group.name, group.size) != group.size
    ]
    names = sorted(old["versions"].keys() | new["versions"].keys())
    return found + [
        f"{name}: {old['versions'].get(name)} and {new['versions'].get(name)}"
        for name in names
        if old["versions"].get(name) != new["versions"].get(name)
    ]


def _step(name: str, record: Record) -> Group:
    peaks = {variant: (mib["peak"] - mib["rest"]) * _MIB for variant, mib in record.get("memory_mib", {}).items()}
    peaks |= {variant: mib * _MIB for variant, mib in record.get("peak_mib", {}).items()}
    return Group(name, record.get("size"), record["seconds"], peaks)


def _relative(seconds: Samples, name: str, baseline: str | None) -> np.ndarray:
    samples = np.array(seconds[name])
    return samples if baseline is None else samples / np.array(seconds[baseline])


def _change(group: str, variant: str, old: np.ndarray, new: np.ndarray) -> Change:
    ratio = float(np.median(new) / np.median(old))
    drawn = resampled_medians(new, seed=1) / resampled_medians(old, seed=2)
    low, high = np.quantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    slack = 1 + BETWEEN_RUNS
    return Change(group, variant, "time", ratio, min(float(low), ratio / slack), max(float(high), ratio * slack))
