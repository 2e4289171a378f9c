"""Which rows are the most and the least memorised, by their scores, and which documents each of them became."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ibft.errors import InputError


class Groups(NamedTuple):
    """Indices of rows, the extreme ones first in both groups, and the scores at which the groups end."""

    most: np.ndarray
    least: np.ndarray
    lowest_of_most: float
    highest_of_least: float


def distinct_rows(rows: np.ndarray, digests: Sequence[str]) -> list[np.ndarray]:
    """The documents of each row that gave any: one array of indices for each text, in the order of the rows.

    rows: [documents] int64, the row that each document comes from, ascending; digests: of all rows' texts. A row that
    became several documents is one observation, and so are rows of equal text, of which the first stands for all: to
    count each of them would make chance look rarer than it is.
    """
    numbers, first = np.unique(rows, return_index=True)
    documents = dict(zip(numbers.tolist(), np.split(np.arange(len(rows)), first[1:]), strict=True))
    of_text: dict[str, np.ndarray] = {}
    for row, found in documents.items():
        of_text.setdefault(digests[row], found)
    return list(of_text.values())


def choose_groups(scores: np.ndarray, share: float, where: str) -> Groups:
    """The rows whose scores are among the highest and the lowest `share` of all; two at least in each group.

    scores: [rows], NaN for those without one, which are in neither group; the higher is the more memorised, and of
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
