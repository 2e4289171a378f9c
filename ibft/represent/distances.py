"""How far apart two groups of rows lie: L2 distance and angle of their means, beside what chance alone would give.

A distance between two means says nothing alone: it grows with the scale of the hidden states, and is never zero for
groups of finite size. So it comes with the spread within the groups, with what random groups of the same rows and sizes
give (a permutation test), and with the interval that follows from leaving out one row at a time (the jackknife; Efron
and Stein, 1981). Everything is computed in float64, whatever the rows' dtype.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ibft.errors import InputError

PERMUTATIONS = 1000
_Z = 1.959964  # two-sided 95% of a normal distribution
_BLOCK = 2**22  # numbers in a block of random groups or of their means, 32 MiB


class Interval(NamedTuple):
    """A value and the bounds of its 95% interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Distances:
    """Two groups of rows in space.

    Args:
        rows: of the first group, of the second.
        l2: distance between the group means, in the units of the rows.
        angle_degrees: between the group means, as seen from the origin, 0..180.
        spread: root mean square distance of a row to the mean of its group (the groups pooled, n + m - 2 degrees of
            freedom).
        within_angle_degrees: mean angle of a row to the mean of its group.
        separation: l2 / spread, which no scaling of the space changes, with its jackknife interval, whose bounds are
            NaN where the rows without one of them have no spread.
        chance_l2, chance_angle_degrees: the bounds of the middle 95% for random groups of the same rows and sizes.
        p_l2, p_angle: share of random groups that lie at least as far apart as these, which count as one of them.
    """

    rows: tuple[int, int]
    l2: float
    angle_degrees: float
    spread: float
    within_angle_degrees: float
    separation: Interval
    chance_l2: tuple[float, float]
    chance_angle_degrees: tuple[float, float]
    p_l2: float
    p_angle: float


def between(a: np.ndarray, b: np.ndarray, *, permutations: int = PERMUTATIONS, seed: int = 0) -> Distances:
    """The distances between the groups a [n, H] and b [m, H].

    `seed` draws the random groups. An angle is NaN where a mean is the origin itself. Raises InputError unless both
    groups have at least two rows of the same width, all finite, and some row differs from the mean of its group.
    """
    a, b = _checked(a, b)
    mean_a, mean_b = a.mean(0), b.mean(0)
    l2, angle = float(np.linalg.norm(mean_a - mean_b)), float(_angles(mean_a, mean_b))
    chance_l2, chance_angle = _random_groups(np.concatenate([a, b]), len(a), permutations, seed)
    separation = _jackknife(*_separations(a, b))
    return Distances(
        rows=(len(a), len(b)),
        l2=l2,
        angle_degrees=angle,
        spread=math.sqrt((_squares(a).sum() + _squares(b).sum()) / (len(a) + len(b) - 2)),
        within_angle_degrees=float(np.concatenate([_angles(a, mean_a), _angles(b, mean_b)]).mean()),
        separation=separation._replace(low=float(np.maximum(separation.low, 0))),  # unlike max, it keeps a NaN
        chance_l2=_middle(chance_l2),
        chance_angle_degrees=_middle(chance_angle),
        p_l2=_p_value(chance_l2, l2),
        p_angle=_p_value(chance_angle, angle),
    )


def ratio(a: np.ndarray, b: np.ndarray, reference_a: np.ndarray, reference_b: np.ndarray) -> Interval:
    """How many times larger the separation of two groups is than that of the same rows under a reference model.

    a, reference_a: [n, H]; b, reference_b: [m, H]; row by row the same documents, which narrows the interval: that of
    the logarithm's jackknife. NaN bounds where means coincide. Raises InputError as `between` does, and for other
    numbers of rows.
    """
    (a, b), (reference_a, reference_b) = _checked(a, b), _checked(reference_a, reference_b)
    if (len(a), len(b)) != (len(reference_a), len(reference_b)):
        raise InputError(
            f"the groups have {len(a)} and {len(b)} rows, and {len(reference_a)} and {len(reference_b)} under the "
            "reference model; they must be the same rows."
        )
    pairs = zip(_separations(a, b), _separations(reference_a, reference_b), strict=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        value, low, high = _jackknife(*(np.log(ours) - np.log(reference) for ours, reference in pairs))
        return Interval(*np.exp([value, low, high]).tolist())


def _checked(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise InputError(f"the groups must be rows of the same width, not of the shapes {a.shape} and {b.shape}.")
    if min(len(a), len(b)) < 2:
        raise InputError(f"the groups have {len(a)} and {len(b)} rows; each needs at least two.")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise InputError("the groups hold numbers that are not finite.")
    if (a == a[0]).all() and (b == b[0]).all():
        raise InputError("all rows of each group are the same, so there is no spread to compare a distance with.")
    return a, b


def _squares(rows: np.ndarray) -> np.ndarray:
    """[n]: the squared distance of each row to the mean."""
    return ((rows - rows.mean(0)) ** 2).sum(1)


def _angles(rows: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """Degrees between each row [..., H] and a direction [H]; accurate where they are small (Kahan)."""
    with np.errstate(invalid="ignore"):
        rows = rows / np.linalg.norm(rows, axis=-1, keepdims=True)
        direction = direction / np.linalg.norm(direction, axis=-1, keepdims=True)
    half = np.arctan2(np.linalg.norm(rows - direction, axis=-1), np.linalg.norm(rows + direction, axis=-1))
    return np.degrees(2 * half)


def _separations(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """l2 / spread: of the groups as they are [1], without each row of the first [n], and of the second [m]."""
    sizes = len(a), len(b)
    difference = a.mean(0) - b.mean(0)  # [H]
    squares = _squares(a), _squares(b)
    total = squares[0].sum() + squares[1].sum()
    freedom = sum(sizes) - 2

    def without(group: int, rows: np.ndarray) -> np.ndarray:
        size = sizes[group]
        moved = (-1) ** group * (rows - rows.mean(0)) / (size - 1)  # what each row's absence takes from the difference
        left = total - squares[group] * size / (size - 1)
        return _divided(np.linalg.norm(difference - moved, axis=1), left, freedom - 1)

    return _divided(np.linalg.norm(difference[None], axis=1), total, freedom), without(0, a), without(1, b)


def _divided(l2: np.ndarray, squares: np.ndarray, freedom: int) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return l2 / np.sqrt(np.maximum(squares, 0) / freedom)


def _jackknife(value: np.ndarray, without_a: np.ndarray, without_b: np.ndarray) -> Interval:
    """A statistic of two groups with the interval that its values without one row give."""
    with np.errstate(invalid="ignore"):
        variance = sum(
            (len(group) - 1) / len(group) * ((group - group.mean()) ** 2).sum() for group in (without_a, without_b)
        )
        error = _Z * math.sqrt(variance)
    return Interval(float(value[0]), float(value[0]) - error, float(value[0]) + error)


def _random_groups(rows: np.ndarray, size: int, permutations: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """l2 and angle, [permutations] each, between `size` rows drawn without replacement and the others."""
    generator = np.random.default_rng(seed)
    total = rows.sum(0)
    block = max(1, _BLOCK // max(rows.shape))
    l2, angles = [], []
    for first in range(0, permutations, block):
        chosen = np.zeros((min(block, permutations - first), len(rows)))
        for each in chosen:
            each[generator.permutation(len(rows))[:size]] = 1
        sums = chosen @ rows  # [block, H]
        means, others = sums / size, (total - sums) / (len(rows) - size)
        l2.append(np.linalg.norm(means - others, axis=1))
        angles.append(_angles(means, others))
    return np.concatenate(l2), np.concatenate(angles)


def _middle(by_chance: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(by_chance, (0.025, 0.975))
    return float(low), float(high)


def _p_value(by_chance: np.ndarray, value: float) -> float:
    if math.isnan(value):
        return math.nan
    # A hair of tolerance: the very same grouping, summed in another order, is as far apart.
    return float((1 + (by_chance >= value * (1 - 1e-12)).sum()) / (1 + len(by_chance)))
