"""Pass@k and Pass@k^(m) from counts, in exact integer arithmetic, and how sure they are.

Of n samples of a problem, c pass. Draw k of the n without replacement: Pass@k^(m) is the probability that at least m
of them pass (arXiv 2510.16022), and Pass@k, the unbiased estimator of arXiv 2107.03374, is the case m = 1. A task's
value is the mean over its problems.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from ibft.errors import InputError

KS = (1, 5, 10)  # reported where there are as many samples of each problem
RESAMPLES = 10_000
CONFIDENCE = 0.95
_CHUNK = 1_000  # resamples at a time: their weights are [chunk, problems] numbers


@dataclass(frozen=True)
class Count:
    """What became of a problem's samples: `passed` of `total`."""

    total: int
    passed: int


@dataclass(frozen=True)
class Interval:
    """A percentile interval of the bootstrap over problems."""

    low: float
    high: float


def pass_at_k_m(n: int, c: int, k: int, m: int) -> Fraction:
    """P(at least m of k samples drawn without replacement pass), where c of n pass; exact.

    sum_{j=m}^{min(c,k)} C(c, j) C(n-c, k-j) / C(n, k). InputError unless 0 <= c <= n and 1 <= m <= k <= n.
    """
    if not 0 <= c <= n:
        raise InputError(f"c, the number of samples that pass, must be between 0 and n = {n}, not {c}.")
    if k < 1:
        raise InputError(f"k must be at least 1, not {k}.")
    if n < k:
        raise InputError(f"Pass@{k} needs at least {k} samples of each problem, and there are {n}.")
    if not 1 <= m <= k:
        raise InputError(f"m must be between 1 and k = {k}, not {m}.")
    ways = sum(math.comb(c, j) * math.comb(n - c, k - j) for j in range(m, min(c, k) + 1))
    return Fraction(ways, math.comb(n, k))


def pass_at_k(n: int, c: int, k: int) -> Fraction:
    """P(at least one of k samples drawn without replacement passes) = 1 - C(n-c, k) / C(n, k); exact."""
    return pass_at_k_m(n, c, k, 1)


def metric_name(k: int, m: int = 1) -> str:
    """ "pass@5" for m = 1, else "pass@5^(3)"."""
    return f"pass@{k}" if m == 1 else f"pass@{k}^({m})"


def valid_ks(counts: Iterable[Count], ks: Sequence[int] = KS) -> list[int]:
    """Those of `ks` for which every problem has samples enough."""
    fewest = min((count.total for count in counts), default=0)
    return [k for k in ks if k <= fewest]


def values(counts: Sequence[Count], k: int, m: int) -> list[Fraction]:
    """Pass@k^(m) of each problem. InputError as for `pass_at_k_m`."""
    known: dict[Count, Fraction] = {}  # most problems share their counts with others
    for count in counts:
        if count not in known:
            known[count] = pass_at_k_m(count.total, count.passed, k, m)
    return [known[count] for count in counts]


def per_problem(counts: Sequence[Count], ks: Sequence[int]) -> dict[str, list[Fraction]]:
    """Every metric of `ks`, with every m, by name: its values in the order of the problems."""
    return {metric_name(k, m): values(counts, k, m) for k in ks for m in range(1, k + 1)}


def mean(numbers: Sequence[Fraction]) -> float:
    """The mean, rounded once."""
    return float(sum(numbers, Fraction(0)) / len(numbers))


def bootstrap(
    columns: Mapping[str, Sequence[Fraction]], *, seed: int = 0, resamples: int = RESAMPLES
) -> dict[str, np.ndarray]:
    """Means over problems drawn with replacement: for every column an array [resamples] float64.

    Row r of every column is of the same draw, so that differences of columns are paired. The columns, of one length,
    hold a value a problem.
    """
    table = np.array([[float(value) for value in column] for column in columns.values()]).T  # [problems, columns]
    problems = len(table)
    generator = np.random.default_rng(seed)
    means = []
    for first in range(0, resamples, _CHUNK):
        draws = min(_CHUNK, resamples - first)
        # How often each problem was drawn; the same as drawing indices, with a matrix product in place of a gather.
        weights = generator.multinomial(problems, np.full(problems, 1 / problems), size=draws)  # [draws, problems]
        means.append(weights @ table / problems)
    return dict(zip(columns, np.concatenate(means).T, strict=True))


def interval(resampled: np.ndarray, confidence: float = CONFIDENCE) -> Interval:
    """The central `confidence` of resampled means [resamples]."""
    low, high = np.quantile(resampled, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(low), float(high))
