"""AUC and KS against SciPy and against counting pairs."""

import numpy as np
import pytest
from scipy.stats import ks_2samp, mannwhitneyu

from ibft.errors import InputError
from ibft.memorization.separation import separation


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("m", "n"), [(1, 1), (1, 7), (40, 3), (200, 150)])
def test_equals_scipy_and_the_definition(m: int, n: int, ties: bool) -> None:
    rng = np.random.default_rng(m + n)
    members, others = rng.normal(0.5, 1, m), rng.normal(0, 1, n)
    if ties:
        members, others = np.round(members), np.round(others)
    found = separation(members, others)
    pairs = members[:, None] - others
    assert found.auc == pytest.approx(((pairs > 0).sum() + (pairs == 0).sum() / 2) / (m * n), abs=1e-12)
    assert found.auc == pytest.approx(mannwhitneyu(members, others).statistic / (m * n), abs=1e-12)
    assert found.ks == pytest.approx(ks_2samp(members, others).statistic, abs=1e-12)


def test_the_ends_of_the_scale() -> None:
    assert vars(separation([2, 3], [0, 1])) == {"auc": 1, "ks": 1}
    assert vars(separation([0, 1], [2, 3])) == {"auc": 0, "ks": 1}
    assert vars(separation([1, 1, 1], [1, 1])) == {"auc": 0.5, "ks": 0}
    assert separation([-np.inf, 0], [-np.inf, 1]).auc == 0.375


@pytest.mark.parametrize(
    ("members", "others", "sentence"),
    [
        ([], [1], "members must list at least one score"),
        ([1], [], "non_members must list at least one score"),
        ([[1, 2]], [1], r"members must list .* shape \(1, 2\)"),
        ([1, np.nan], [1], r"members holds a score that is no number \(NaN\), at place 1"),
    ],
)
def test_what_cannot_be_compared_is_refused(members: list, others: list, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        separation(members, others)
