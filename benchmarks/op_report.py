"""The tables of the ops' records: what bounds an op and how far it is from there, every variant, curves, crossovers."""

import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks.cost import BACKWARD, BOTH, FORWARD, Cost
from benchmarks.measure import CONFIDENCE, ratio, resampled_medians
from benchmarks.tables import markdown, mib, milliseconds

Record = dict[str, Any]
OURS, EAGER, PRODUCTS, COPY = "ibkernels", "eager", "floor: products", "floor: copy"
_NAMES = {"tokens": "N", "hidden": "H", "bottleneck": "K", "rank": "R", "vocabulary": "V"}


class Crossover(NamedTuple):
    """N from which the absorbed head is faster, with its interval."""

    tokens: float
    low: float
    high: float


def summary(record: Record) -> str:
    """One row for each op and dtype, forward and backward together: what bounds it, its distance, the best other."""
    rows = [["op", "bound by", "least, ms", "ours, ms", "share of the limit", "time / its products", "time / eager"]]
    rows[0] += ["time / fastest other", "peak / eager", "fastest"]
    for name, case in record["cases"].items():
        if case["passes"] != (BOTH if case["op"] != "noise" else FORWARD) or OURS not in case["seconds"]:
            continue
        seconds, peaks, bound = case["seconds"], case["peak_bytes"], _bound(case)
        others = peers(case)
        fastest = min(others, key=lambda other: statistics.median(seconds[other]), default=None)
        least = statistics.median(limits(case))
        ours = statistics.median(seconds[OURS])
        row = [name, bound, milliseconds(least), milliseconds(ours), f"{share(case, OURS):.0%}"]
        row.append(str(ratio(seconds[OURS], seconds[PRODUCTS])) if PRODUCTS in seconds else "")
        row.append(str(ratio(seconds[OURS], seconds[EAGER])) if EAGER in seconds else "")
        row.append("" if fastest is None else f"{ratio(seconds[OURS], seconds[fastest])} {fastest}")
        large = {OURS, EAGER} <= peaks.keys() and peaks[EAGER] > 2**20  # of less, libraries' buffers make half
        row.append(f"{peaks[OURS] / peaks[EAGER]:.2f}" if large else "")
        rows.append([*row, _winner(case, fastest)])
    return "\n".join(markdown(rows))


def details(record: Record) -> str:
    """A section for each op and dtype: a row for each variant and floor, and what was not measured, with reasons."""
    grouped: dict[tuple[str, str], dict[str, Record]] = {}
    for case in record["cases"].values():
        grouped.setdefault((case["op"], case["dtype"]), {})[case["passes"]] = case
    lines = []
    for (op, dtype), passes in grouped.items():
        lines += [f"### {op}, {dtype}", "", _size(next(iter(passes.values()))["size"]), "", *_variants(passes), ""]
        reasons: dict[str, list[str]] = {}
        for name, case in passes.items():
            for variant, reason in case["left_out"].items():
                reasons.setdefault(f"{variant} ({reason})", []).append(name)
        for reason, where in reasons.items():
            only = "" if len(where) == len(passes) else f", {' and '.join(where)} alone"
            lines.append(f"- Not measured{only}: {reason}.")
        lines += [""] * bool(reasons)
    return "\n".join(lines).rstrip()


def memory(record: Record) -> str:
    """Peaks beyond the inputs beside those of the cost model."""
    rows = [["op", "variant", "predicted, MiB", "measured, MiB", "measured / predicted"]]
    for name, case in record["cases"].items():
        for variant, predicted in case["cost"]["peaks"].items():
            if (measured := case["peak_bytes"].get(variant)) is not None:
                rows.append([name, variant, mib(predicted), mib(measured), f"{measured / max(predicted, 1):.2f}"])
    return "\n".join(markdown(rows))


def machine(record: Record) -> str:
    """The rates that the probes found, in a sentence: medians over all cases."""
    rates: dict[str, list[float]] = {}
    for case in record["cases"].values():
        probes = case["probes"]
        per_second = [probes["flops"] / second / 1e9 for second in probes["seconds"]["product"]]
        rates.setdefault(case["dtype"], []).extend(per_second)
        rates.setdefault("copy", []).extend(probes["bytes"] / second / 1e9 for second in probes["seconds"]["copy"])
    copied = statistics.median(rates.pop("copy"))
    products = ", ".join(f"{statistics.median(values):,.0f} GFLOP/s in {dtype}" for dtype, values in rates.items())
    return f"Measured in the same rounds: square matrix products {products}; a copy {copied:.1f} GB/s read and written."


def sweeps(record: Record) -> str:
    """A table for each sweep: ours, eager and the products against the growth that the cost model predicts."""
    lines = []
    for name, sweep in record["sweeps"].items():
        axis = _NAMES[sweep["axis"]]
        rows = [[axis, "GFLOP", "ours, ms", "eager, ms", "ours / eager", "ours / its products", "share of the limit"]]
        rows[0].append("peak, MiB: ours, eager")
        for point in sweep["points"]:
            seconds, peaks = point["seconds"], point["peak_bytes"]
            row = [f"{point['size'][sweep['axis']]:,}", f"{point['cost']['flops'] / 1e9:.3g}"]
            row += [milliseconds(statistics.median(seconds[which])) for which in (OURS, EAGER)]
            row += [str(ratio(seconds[OURS], seconds[which])) for which in (EAGER, PRODUCTS)]
            row.append(f"{share(point, OURS):.0%}")
            rows.append([*row, ", ".join(mib(peaks[which]) for which in (OURS, EAGER) if which in peaks)])
        lines += [f"### {name}", "", *markdown(rows), ""]
    return "\n".join(lines).rstrip()


def crossovers(record: Record) -> str:
    """Measured beside predicted."""
    rows = [["head", "ibkernels.absorbs, N", "fewer FLOPs from N", f"measured, N (interval, {CONFIDENCE:.0%})"]]
    rows[0] += ["measured / fewer FLOPs"]
    for name, found in record["crossovers"].items():
        measured = crossing(found)
        rows.append([name, f"{found['predicted']:.0f}", f"{found['predicted_here']:.0f}"])
        if measured is None:
            rows[-1] += ["outside of the range", ""]
        else:
            rows[-1] += [f"{measured.tokens:.0f} ({measured.low:.0f} to {measured.high:.0f})"]
            rows[-1] += [f"{measured.tokens / found['predicted_here']:.2f}"]
    return "\n".join(markdown(rows))


def crossing(found: Record) -> Crossover | None:
    """Where the ratio absorbed / full width passes 1, interpolated between points in logarithms."""
    tokens = [math.log(point["tokens"]) for point in found["points"]]
    ratios = [_absorbed_over_full(point) for point in found["points"]]
    middle = _passes_one(tokens, [math.log(float(np.median(values))) for values in ratios])
    if middle is None:
        return None
    resampled = np.log(np.array([resampled_medians(values, seed=seed) for seed, values in enumerate(ratios)]))
    drawn = [at for column in resampled.T if (at := _passes_one(tokens, column)) is not None]
    low, high = np.quantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Crossover(math.exp(middle), math.exp(low), math.exp(high))


def _absorbed_over_full(point: Record) -> np.ndarray:
    return np.array(point["seconds"]["absorbed"]) / np.array(point["seconds"]["full width"])


def _passes_one(tokens: Sequence[float], logs: Sequence[float] | np.ndarray) -> float | None:
    """log N of the last crossing from above 1 to below; None without one."""
    for index in range(len(tokens) - 1, 0, -1):
        before, after = float(logs[index - 1]), float(logs[index])
        if before > 0 >= after:
            return tokens[index - 1] + (tokens[index] - tokens[index - 1]) * before / (before - after)
    return None


def peers(case: Record) -> list[str]:
    """Variants that are not this project's."""
    return [name for name in case["seconds"] if not name.startswith(("ibkernels", "floor"))]


def limits(case: Record) -> list[float]:
    """Seconds that the machine needs at least, by each round's own probes."""
    probes, cost = case["probes"], Cost(**case["cost"])
    pairs = zip(probes["seconds"]["product"], probes["seconds"]["copy"], strict=True)
    return [cost.roofline(probes["flops"] / product, probes["bytes"] / copy) for product, copy in pairs]


def share(case: Record, variant: str) -> float:
    """Of the limit that a variant reaches: the median over rounds."""
    pairs = zip(limits(case), case["seconds"][variant], strict=True)
    return statistics.median(limit / taken for limit, taken in pairs)


def _bound(case: Record) -> str:
    probes = case["probes"]
    product, copy = (statistics.median(probes["seconds"][name]) for name in ("product", "copy"))
    return Cost(**case["cost"]).bound(probes["flops"] / product, probes["bytes"] / copy)


def _winner(case: Record, fastest: str | None) -> str:
    """What a user who wants time alone takes: ours, another, or either where the interval holds 1."""
    if fastest is None:
        return "no other passed"
    found = ratio(case["seconds"][OURS], case["seconds"][fastest])
    if found.high < 1:
        return OURS
    return fastest if found.low > 1 else "either"


def _size(size: dict[str, int]) -> str:
    return ", ".join(f"{_NAMES[name]}={value}" for name, value in size.items()) + "."


def _variants(passes: dict[str, Record]) -> list[str]:
    last = passes.get(BOTH) or next(iter(passes.values()))
    rows = [["variant", *(f"{name}, ms" for name in passes), "/ eager (interval)", "share of the limit"]]
    rows[0] += ["GFLOP/s", "GB/s", "peak, MiB", "error of results", "of gradients"]
    names = list(dict.fromkeys(name for case in passes.values() for name in case["seconds"]))
    for name in names:
        row = [name]
        for case in passes.values():
            row.append(milliseconds(statistics.median(case["seconds"][name])) if name in case["seconds"] else "")
        samples = last["seconds"].get(name)
        if samples is None:
            row += [""] * 4
        else:
            median = statistics.median(samples)
            row.append(str(ratio(samples, last["seconds"][EAGER])) if EAGER in last["seconds"] else "")
            row += ["" if name.startswith("floor") else f"{share(last, name):.0%}"]
            row.append("" if name == COPY else f"{last['cost']['flops'] / median / 1e9:,.0f}")
            row.append("" if name == PRODUCTS else f"{last['cost']['bytes'] / median / 1e9:.1f}")
        row.append(mib(last["peak_bytes"][name]) if name in last["peak_bytes"] else "")
        errors = {part: case["relative_error"].get(name) for part, case in passes.items()}
        # Who has no backward pass alone is judged by both together.
        for error in (errors.get(FORWARD), errors.get(BACKWARD) or errors.get(BOTH)):
            row.append("" if error is None else f"{error:.0e}")
        rows.append(row)
    return markdown(rows)
