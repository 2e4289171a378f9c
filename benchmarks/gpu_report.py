"""The tables of a record of `benchmarks.gpu`, from the record alone, with the targets and whether each was met."""

import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from benchmarks.measure import ratio
from benchmarks.tables import markdown

Case = dict[str, Any]
OURS, EAGER, COMPILED, COPY, GEMMS = "ibkernels", "eager", "torch.compile", "floor: copy", "floor: GEMMs"


class Target(NamedTuple):
    """`measured` gives the figure that is held against the limit; KeyError where the record lacks a part of it."""

    case: str
    text: str
    measured: Callable[[Case], float]
    limit: float
    at_least: bool


def _times(other: str) -> Callable[[Case], float]:
    """Our time over another's, round by round."""
    return lambda case: ratio(case["seconds"][OURS], case["seconds"][other]).median


def _speedup(other: str) -> Callable[[Case], float]:
    return lambda case: ratio(case["seconds"][other], case["seconds"][OURS]).median


def _copy_share(case: Case) -> float:
    moved = case["moved_bytes"]
    return moved[OURS] / moved[COPY] * ratio(case["seconds"][COPY], case["seconds"][OURS]).median


def _rivals(case: Case) -> list[str]:
    return [name for name in case["seconds"] if name != OURS and not name.startswith("floor")]


def _over_fastest(case: Case) -> float:
    fastest = min(_rivals(case), key=lambda name: statistics.median(case["seconds"][name]))
    return _times(fastest)(case)


def _over_leanest(case: Case) -> float:
    return case["peak_bytes"][OURS] / min(case["peak_bytes"][name] for name in _rivals(case))


_LORA, _LINEAR = "bottleneck, lora", "bottleneck, linear"
_HEAD, _WIDE = "bottleneck cross-entropy: forward + backward", "wide cross-entropy, frozen head: forward + backward"
TARGETS = [
    Target(f"{_LORA}: forward", "share of the copy's bandwidth", _copy_share, 0.8, True),
    Target(f"{_LORA}: forward", "times faster than eager", _speedup(EAGER), 2.2, True),
    Target(f"{_LORA}: forward", "time / torch.compile", _times(COMPILED), 1.0, False),
    Target(f"{_LINEAR}: forward", "time / its GEMM", _times(GEMMS), 1.2, False),
    Target(f"{_LINEAR}: forward", "times faster than eager", _speedup(EAGER), 1.6, True),
    Target(f"{_LINEAR}: forward", "time / torch.compile", _times(COMPILED), 1.0, False),
    Target(f"{_LORA}: backward", "time / copy of the hidden states", _times(COPY), 1.25, False),
    Target(f"{_LINEAR}: backward", "time / its two GEMMs", _times(GEMMS), 1.25, False),
    Target(_HEAD, "time / eager", _times(EAGER), 0.2, False),
    Target(_HEAD, "MB beyond inputs and outputs", lambda case: case["peak_bytes"][OURS] / 1e6, 300, False),
    Target(_WIDE, "time / the fastest other", _over_fastest, 1.0, False),
    Target(_WIDE, "memory / the leanest other", _over_leanest, 1.2, False),
]


def report(record: dict[str, Any]) -> str:
    """Markdown."""
    lines = [heading(record)]
    if record["dry"]:
        lines.append("\n**A dry run: these numbers mean nothing.**")
    for name, case in record["cases"].items():
        lines += ["", f"### {name}", "", *_case_table(case)]
        lines += [f"\nNot measured: {other} ({reason})." for other, reason in case["left_out"].items()]
    return "\n".join([*lines, "", "### Targets", "", *_target_table(record)])


def heading(record: dict[str, Any]) -> str:
    """Device, versions, date, commit and shape, in a sentence."""
    device, versions, shape = record["device"], record["versions"], record["shape"]
    named = ", ".join(f"{name} {number}" for name, number in versions.items() if number)
    sizes = ", ".join(f"{name} {number}" for name, number in shape.items())
    driver = f", driver {device['driver']}" if device.get("driver") else ""
    tuned = "; IBKERNELS_AUTOTUNE=1" if record.get("autotune") else ""
    where = f"{device['name']}{driver}; {named}; {record['date']}, commit {record['commit'] or 'unknown'}"
    return f"{where}; {sizes}{tuned}."


def summary(samples: Sequence[float]) -> tuple[float, float, float]:
    """Median, p20 and p80."""
    fifths = statistics.quantiles(samples, n=5, method="inclusive")
    return statistics.median(samples), fifths[0], fifths[-1]


def _case_table(case: Case) -> list[str]:
    rows = [["variant", "ms: median", "p20", "p80", f"/ {OURS}", "peak beyond in- and outputs, MB", "error"]]
    for name, seconds in case["seconds"].items():
        times = [1e3 * second for second in summary(seconds)]
        against = f"{ratio(seconds, case['seconds'][OURS]).median:.2f}" if OURS in case["seconds"] else "-"
        peak, error = case["peak_bytes"].get(name), case["relative_error"].get(name)
        rows.append([name, *(f"{time:.4g}" for time in times), against])
        rows[-1] += ["-" if peak is None else f"{peak / 1e6:.0f}", "-" if error is None else f"{error:.1e}"]
    return markdown(rows)


def _target_table(record: dict[str, Any]) -> list[str]:
    rows = [["case", "target", "measured", "met"]]
    for target in TARGETS:
        case = record["cases"].get(target.case)
        sign = ">=" if target.at_least else "<="
        row = [target.case, f"{target.text} {sign} {target.limit:g}"]
        try:
            value = target.measured({} if case is None else case)
        except (KeyError, ValueError, ZeroDivisionError):  # ours or its baseline was not measured: the case says why
            rows.append([*row, "-", "not measured"])
            continue
        met = value >= target.limit if target.at_least else value <= target.limit
        rows.append([*row, f"{value:.3g}", "-" if record["dry"] else "yes" if met else "**no**"])
    return markdown(rows)
