"""Pass@k and Pass@k^(m): against every draw there is, scipy, and what the bootstrap must be."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from scipy import stats

from ibft.errors import InputError
from ibft.evaluate.metrics import (
    Count,
    bootstrap,
    interval,
    mean,
    metric_name,
    pass_at_k,
    pass_at_k_m,
    per_problem,
    valid_ks,
    values,
)


def enumerated(n: int, c: int, k: int, m: int) -> Fraction:
    """The share of the k-subsets of n samples, c of them passing, in which at least m pass."""
    passed = [True] * c + [False] * (n - c)
    draws = [sum(draw) >= m for draw in itertools.combinations(passed, k)]
    return Fraction(sum(draws), len(draws))


@pytest.mark.parametrize("n", range(1, 9))
def test_every_draw(n: int) -> None:
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        for m in range(1, k + 1):
            assert pass_at_k_m(n, c, k, m) == enumerated(n, c, k, m), (n, c, k, m)
        assert pass_at_k(n, c, k) == enumerated(n, c, k, 1)


@pytest.mark.parametrize("c", [0, 1, 3, 97, 2_500, 9_990, 10_000])
@pytest.mark.parametrize(("k", "m"), [(1, 1), (5, 3), (10, 1), (10, 10), (100, 37), (1_000, 250)])
def test_the_hypergeometric_tail_at_10_000_samples(c: int, k: int, m: int) -> None:
    ours = float(pass_at_k_m(10_000, c, k, m))
    theirs = stats.hypergeom.sf(m - 1, 10_000, c, k)  # P(more than m - 1 of k)
    assert ours == pytest.approx(theirs, rel=1e-9, abs=1e-300)


@pytest.mark.parametrize(("n", "c", "k"), [(10, 3, 5), (200, 7, 100), (20, 20, 1), (20, 0, 20)])
def test_the_product_formula_of_the_codex_paper(n: int, c: int, k: int) -> None:
    """arXiv 2107.03374, figure 3: 1 - prod_{i=n-c+1}^{n} (1 - k/i), or 1 where n - c < k."""
    theirs = 1.0 if n - c < k else 1.0 - math.prod(1.0 - k / i for i in range(n - c + 1, n + 1))
    assert float(pass_at_k(n, c, k)) == pytest.approx(theirs, abs=1e-12)


def test_a_problem_that_always_or_never_passes() -> None:
    assert [pass_at_k_m(10, 10, 5, m) for m in range(1, 6)] == [1] * 5
    assert [pass_at_k_m(10, 0, 5, m) for m in range(1, 6)] == [0] * 5
    assert pass_at_k_m(10, 2, 5, 3) == 0  # three cannot pass where two do


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((4, 2, 5, 1), "Pass@5 needs at least 5 samples of each problem, and there are 4"),
        ((4, 5, 1, 1), "between 0 and n = 4, not 5"),
        ((4, -1, 1, 1), "between 0 and n = 4, not -1"),
        ((4, 2, 0, 1), "k must be at least 1, not 0"),
        ((4, 2, 3, 0), "m must be between 1 and k = 3, not 0"),
        ((4, 2, 3, 4), "m must be between 1 and k = 3, not 4"),
    ],
)
def test_what_is_refused(arguments: tuple[int, int, int, int], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence.replace("(", r"\(")):
        pass_at_k_m(*arguments)


def test_the_mean_of_a_task_is_rounded_once() -> None:
    counts = [Count(3, 1)] * 3
    assert mean(values(counts, 1, 1)) == 1 / 3
    assert mean([Fraction(1, 3), Fraction(1, 3), Fraction(1, 3), Fraction(0)]) == 0.25


def test_names_and_columns() -> None:
    assert metric_name(1) == "pass@1" and metric_name(5, 3) == "pass@5^(3)"
    columns = per_problem([Count(5, 2), Count(6, 0)], [1, 5])
    assert list(columns) == ["pass@1", "pass@5", "pass@5^(2)", "pass@5^(3)", "pass@5^(4)", "pass@5^(5)"]
    assert columns["pass@1"] == [Fraction(2, 5), 0]
    assert valid_ks([Count(5, 2), Count(6, 0)]) == [1, 5]
    assert valid_ks([Count(12, 2), Count(10, 0)]) == [1, 5, 10]
    assert valid_ks([]) == []


class TestBootstrap:
    def test_its_spread_is_the_standard_error(self) -> None:
        numbers = [Fraction(int(x), 100) for x in np.random.default_rng(1).integers(0, 100, 164)]
        resampled = bootstrap({"a": numbers})["a"]
        column = np.array([float(number) for number in numbers])
        assert resampled.shape == (10_000,)
        assert resampled.mean() == pytest.approx(column.mean(), abs=4 * column.std() / math.sqrt(164 * 10_000))
        assert resampled.std() == pytest.approx(column.std() / math.sqrt(164), rel=0.03)  # 4 standard errors: 0.028

    def test_three_problems_have_their_ten_multisets(self) -> None:
        """With values 0, 1, 9 a mean tells which problems were drawn; each multiset as often as it must be."""
        resampled = bootstrap({"a": [Fraction(0), Fraction(1), Fraction(9)]}, resamples=27_000)["a"]
        sums, counts = np.unique(np.rint(3 * resampled), return_counts=True)
        draws = [sum(draw) for draw in itertools.product([0, 1, 9], repeat=3)]
        expected = {total: 1_000 * draws.count(total) for total in sorted(set(draws))}
        assert list(sums) == list(expected)
        assert stats.chisquare(counts, list(expected.values())).pvalue > 1e-4

    def test_columns_are_drawn_together(self) -> None:
        numbers = [Fraction(i, 7) for i in range(8)]
        resampled = bootstrap({"a": numbers, "b": [number + Fraction(1, 10) for number in numbers]})
        assert resampled["b"] - resampled["a"] == pytest.approx(np.full(10_000, 0.1))

    def test_the_seed_decides(self) -> None:
        column = {"a": [Fraction(i, 7) for i in range(8)]}
        same, other = bootstrap(column)["a"], bootstrap(column, seed=1)["a"]
        assert (same == bootstrap(column)["a"]).all() and (same != other).any()

    def test_no_spread_no_interval(self) -> None:
        found = interval(bootstrap({"a": [Fraction(1)] * 5})["a"])
        assert (found.low, found.high) == pytest.approx((1, 1))

    def test_an_interval_holds_its_share(self) -> None:
        found = interval(np.arange(1_001) / 1_000)
        assert (found.low, found.high) == pytest.approx((0.025, 0.975))
