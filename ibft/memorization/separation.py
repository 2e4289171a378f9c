"""How far scores tell two groups of rows apart: AUC and the Kolmogorov-Smirnov statistic, exact, with ties."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ibft.errors import InputError


@dataclass(frozen=True)
class Separation:
    """auc: P(member > non-member) + P(equal) / 2, 0.5 for groups that do not differ, 1 where every member scores
    higher than every non-member. ks: the largest distance between their cumulative distributions, in [0, 1].
    """

    auc: float
    ks: float


def separation(members: Any, non_members: Any) -> Separation:
    """Both statistics of two groups of scores, [m] and [n] numbers; more than 0.5 where members score higher.

    AUC is the Mann-Whitney U over m·n, KS that of the two-sample test. O((m + n) log(m + n)). InputError for a group
    that is empty, has another shape, or holds a value that is no number.
    """
    groups = [_checked(members, "members"), _checked(non_members, "non_members")]
    values, place = np.unique(np.concatenate(groups), return_inverse=True)
    m, n = (
        np.bincount(part, minlength=len(values)).astype(np.float64)  # how often each value occurs
        for part in np.split(place, [len(groups[0])])
    )
    below = np.cumsum(n) - n
    auc = (m * (below + n / 2)).sum() / (m.sum() * n.sum())
    distance = np.cumsum(m) / m.sum() - np.cumsum(n) / n.sum()
    return Separation(auc=float(auc), ks=float(np.abs(distance).max()))


def _checked(scores: Any, name: str) -> np.ndarray:
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 1 or not len(values):
        raise InputError(f"{name} must list at least one score, not an array of shape {values.shape}.")
    if np.isnan(values).any():
        raise InputError(f"{name} holds a score that is no number (NaN), at place {int(np.isnan(values).argmax())}.")
    return values
