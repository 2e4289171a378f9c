"""Which rows are the most and the least memorised."""

import numpy as np
import pytest

from ibft.errors import InputError
from ibft.represent.groups import choose_groups, distinct_rows

SCORES = np.array([-1.0, np.nan, -5.0, -2.0, -4.0, -2.0, -3.0, -9.0, np.inf])


@pytest.mark.parametrize(
    ("share", "most", "least", "bounds"),
    [
        (0.01, [0, 3], [7, 2], (-2.0, -5.0)),  # two at least
        (0.29, [0, 3], [7, 2], (-2.0, -5.0)),
        (0.4, [0, 3, 5], [7, 2, 4], (-2.0, -4.0)),  # equal scores: the earlier row first
    ],
)
def test_both_ends(share: float, most: list[int], least: list[int], bounds: tuple[float, float]) -> None:
    groups = choose_groups(SCORES, share, "scores")
    assert groups.most.tolist() == most and groups.least.tolist() == least
    assert (groups.lowest_of_most, groups.highest_of_least) == bounds


def test_equal_rows_and_the_documents_of_a_row_count_once() -> None:
    """Row 0 gave two documents, row 1 none, rows 3 and 5 have the text of row 0, row 4 that of row 2."""
    found = distinct_rows(np.array([0, 0, 2, 3, 3, 4, 5, 5, 6]), ["a", "x", "b", "a", "b", "a", "c"])
    assert [documents.tolist() for documents in found] == [[0, 1], [2], [8]]


@pytest.mark.parametrize(
    ("scores", "sentence"),
    [
        ([1.0, 2.0, np.nan, 3.0], "file.jsonl: 3 rows have a score, and two groups of 2 need 4"),
        ([np.nan] * 4, "0 rows have a score"),
        ([1.0, 1.0, 1.0, 1.0], "both the highest and the lowest 2 scores include 1, .*--share, or another --measure"),
        ([0.0, 1.0, 1.0, 2.0], "both the highest and the lowest 2 scores include 1"),
    ],
)
def test_scores_that_make_no_groups(scores: list[float], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        choose_groups(np.array(scores), 0.5, "file.jsonl")
