"""Which documents are the most and the least memorised, by the scores of their rows."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ibft.errors import InputError


class Groups(NamedTuple):
    """Indices of documents, the extreme ones first in both groups, and the scores at which the groups end."""

    most: np.ndarray
    least: np.ndarray
    lowest_of_most: float
    highest_of_least: float

    @property
    def documents(self) -> np.ndarray:
        """Both groups, the most memorised first."""
        return np.concatenate([self.most, self.least])


def choose_groups(scores: np.ndarray, share: float, where: str) -> Groups:
    """The documents whose scores are among the highest and the lowest `share` of all; two at least in each group.

    scores: [documents], NaN for those without one, which are in neither group; the higher is the more memorised, and of
    equal ones the earlier. InputError, with `where` for what the scores are of, where there are too few, or the groups
    would share a score.
    """
    scored = np.flatnonzero(np.isfinite(scores))
    count = max(2, round(share * len(scored)))
    if 2 * count > len(scored):
        raise InputError(f"{where}: {len(scored):,} rows have a score, and two groups of {count:,} need {2 * count:,}.")
    order = scored[np.argsort(-scores[scored], kind="stable")]
    most, least = order[:count], order[-count:][::-1]
    if scores[most[-1]] == scores[least[-1]]:
        raise InputError(
            f"{where}: both the highest and the lowest {count:,} scores include {scores[most[-1]]:.4g}, so the groups "
            "would differ in nothing; take a smaller --share, or another --measure."
        )
    return Groups(most, least, float(scores[most[-1]]), float(scores[least[-1]]))
