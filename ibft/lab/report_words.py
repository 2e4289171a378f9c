"""How the report's sentences put numbers: shares, differences, and what one thing is against another."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ibft.lab.report_statistics import Estimate


def percent(value: float) -> str:
    """A share, as "23.5%"."""
    return f"{100 * value:.1f}%"


def points(value: float) -> str:
    """A difference of shares in percentage points, as "+2.5"; a small one with another digit, for its sign to show."""
    for digits in (1, 2):
        if rounded := round(100 * value, digits):
            return f"{rounded:+.{digits}f}".replace("-", "−")
    return "0.0"


def number(value: float | None) -> str:
    """A quantity without a scale of its own, as nats: three significant digits, two below 1."""
    if value is None or not math.isfinite(value):
        return "–"
    return (f"{value:.2g}" if abs(value) < 1 else f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}").replace(
        "-", "−"
    )


def comparison(a: str, b: str, found: Estimate, *, interval: str = "95% interval") -> str:
    """Whether a is above b, below it, or cannot be told from it, with the numbers that say so; no full stop."""
    n = len(found.per_seed)
    if n == 1:
        more = "more" if found.value >= 0 else "fewer"
        low, high = (found.low, found.high) if found.value >= 0 else (-found.high, -found.low)
        return (
            f"{a} solves {100 * abs(found.value):.1f} points {more} of these tasks than {b} ({interval} over tasks "
            f"{points(low)} to {points(high)})"
        )
    ahead, behind = sum(x > 0 for x in found.per_seed), sum(x < 0 for x in found.per_seed)
    if found.verdict == "noise":
        seeds = f"; ahead in {ahead} and behind in {behind} of {n} seeds" if n > 1 else ""
        between = f"{interval} {points(found.low)} to {points(found.high)}"
        return f"{a} cannot be told from {b}: {points(found.value)} points ({between}{seeds})"
    if found.verdict == "above":
        low, high, seeds = found.low, found.high, f"; ahead in {ahead} of {n} seeds"
    else:
        low, high, seeds = -found.high, -found.low, f"; behind in {behind} of {n} seeds"
    between = f"{interval} {100 * low:.1f} to {100 * high:.1f}{seeds if n > 1 else ''}"
    return f"{a} is {found.verdict} {b} by {100 * abs(found.value):.1f} points ({between})"


def as_sentence(text: str) -> str:
    """With a capital letter and a full stop."""
    return text[0].upper() + text[1:] + "."


def listed(parts: Sequence[str], last: str = " and ") -> str:
    """ "a, b and c"."""
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + last + parts[-1]


def counted(count: int, noun: str) -> str:
    """ "1 run", "2 runs"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def by_chance(comparisons: int) -> str:
    """How many of so many comparisons come out by chance, to be put after their count."""
    return f"; by chance alone, about {0.05 * comparisons:.1f} would differ" if comparisons > 1 else ""


def with_interval(found: Estimate) -> str:
    """A difference of shares in points, with its interval."""
    return f"{points(found.value)} points, 95% interval {points(found.low)} to {points(found.high)}"


def span(values: Sequence[float]) -> str:
    """The lowest to the highest of the runs: a mean of collapsed and other ones would be neither's."""
    low, high = number(min(values)), number(max(values))
    return low if low == high else f"{low} to {high}"
