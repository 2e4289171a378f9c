"""How sure the lab's numbers are: by Student's t over seeds, by binomial intervals over tasks, the wider of the two.

An interval over a few seeds alone can be short by luck, even of no width when all seeds agree, although the tasks that
measure each seed are finite in number; an interval over tasks alone knows nothing of how seeds differ. So both are
computed and the hull of the two is what is reported; with one seed only the second exists.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from ibft.errors import InputError
from ibft.evaluate import metrics

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its interval; `low` and `high` are nan where nothing tells how sure it is."""

    value: float
    low: float
    high: float
    per_seed: tuple[float, ...]

    @property
    def verdict(self) -> str:
        """Of a difference: "above" or "below" where the interval excludes 0, else "noise"; of one seed always "noise".

        An interval over tasks knows nothing of how trainings differ, so that one training of each says nothing certain.
        """
        if len(self.per_seed) == 1:
            return "noise"
        return "above" if self.low > 0 else "below" if self.high < 0 else "noise"


def share(solved: Sequence[np.ndarray]) -> Estimate:
    """The share of tasks solved. `solved`: for each seed [tasks] of 0 or 1.

    Over tasks: Wilson's interval (Wilson 1927), the tasks of all seeds together. Over seeds: Student's t.
    """
    per_seed = tuple(float(each.mean()) for each in solved)
    found = _hull(per_seed, _wilson(np.concatenate(solved)), CONFIDENCE)
    return Estimate(found.value, max(found.low, 0.0), min(found.high, 1.0), per_seed)


def difference(a: Sequence[np.ndarray], b: Sequence[np.ndarray], *, comparisons: int = 1) -> Estimate:
    """a - b, paired by seed and by task; for each seed [tasks], of the same tasks.

    Over tasks: the adjusted Wald interval for paired shares (Agresti & Min 2005). Over seeds: Student's t of the
    differences. `comparisons`: among how many the pair was chosen; the interval is Bonferroni's, of confidence
    1 - 0.05 / comparisons. InputError where the tasks cannot be the same.
    """
    for x, y in zip(a, b, strict=True):
        if len(x) != len(y):
            raise InputError(f"runs of one seed must share their held-out tasks, and have {len(x)} and {len(y)}.")
    confidence = 1 - (1 - CONFIDENCE) / comparisons
    paired = [x - y for x, y in zip(a, b, strict=True)]
    per_seed = tuple(float(each.mean()) for each in paired)
    return _hull(per_seed, _agresti_min(np.concatenate(paired), confidence), confidence)


def over_seeds(values: Sequence[float], *, least: float = -math.inf, most: float = math.inf) -> Estimate:
    """The mean of a quantity that has no tasks (an AUC, a distance): Student's t, no interval for one seed.

    `least` and `most` are what the quantity cannot pass, and its interval does not.
    """
    found = _hull(tuple(float(value) for value in values), (math.nan, math.nan), CONFIDENCE)
    low, high = np.clip([found.low, found.high], least, most).tolist()  # which leaves nan alone
    return Estimate(found.value, low, high, found.per_seed)


def pass_curve(counts: Sequence[Sequence[metrics.Count]], k: int) -> list[Estimate]:
    """Pass@k^(m) for m = 1..k. `counts`: for each seed, of each task.

    Over tasks: the bootstrap over the tasks of all seeds together. Over seeds: Student's t.
    """
    ms = range(1, k + 1)
    values = [[metrics.values(of_seed, k, m) for of_seed in counts] for m in ms]  # [m][seed][task]
    resampled = metrics.bootstrap(
        {str(m): [x for of_seed in of_m for x in of_seed] for m, of_m in zip(ms, values, strict=True)}, resamples=2_000
    )
    found = []
    for m, of_m in zip(ms, values, strict=True):
        over_tasks = metrics.interval(resampled[str(m)])
        estimate = _hull(
            tuple(metrics.mean(of_seed) for of_seed in of_m), (over_tasks.low, over_tasks.high), CONFIDENCE
        )
        found.append(Estimate(estimate.value, max(estimate.low, 0.0), min(estimate.high, 1.0), estimate.per_seed))
    return found


def _hull(per_seed: tuple[float, ...], over_tasks: tuple[float, float], confidence: float) -> Estimate:
    value = sum(per_seed) / len(per_seed)
    low, high = over_tasks
    if len(per_seed) > 1:
        from scipy.stats import t

        spread = float(np.std(per_seed, ddof=1)) / math.sqrt(len(per_seed))
        half = float(t.ppf((1 + confidence) / 2, len(per_seed) - 1)) * spread
        low, high = np.fmin(low, value - half), np.fmax(high, value + half)  # of a nan and a number: the number
    return Estimate(value, float(low), float(high), per_seed)


def _wilson(values: np.ndarray) -> tuple[float, float]:
    n, p, z = len(values), float(values.mean()), _z(CONFIDENCE)
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return centre - half, centre + half


def _agresti_min(values: np.ndarray, confidence: float) -> tuple[float, float]:
    """Half a pair added to each cell of the two-by-two table: as values, half a +1, half a -1 and a 0."""
    n = len(values) + 2
    centre = float(values.sum()) / n
    variance = (float((values**2).sum()) + 1) / n - centre**2
    half = _z(confidence) * math.sqrt(variance / n)
    return centre - half, centre + half


def _z(confidence: float) -> float:
    return NormalDist().inv_cdf((1 + confidence) / 2)
