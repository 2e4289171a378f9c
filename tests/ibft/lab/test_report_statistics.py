"""The report's intervals are those of others: Wilson, Student, Agresti and Min, and an independent bootstrap."""

from __future__ import annotations

import math

import numpy as np
import pytest
from lab_results import TASKS
from scipy import stats

from ibft.errors import InputError
from ibft.evaluate.metrics import Count, pass_at_k_m
from ibft.lab import report_statistics as statistics


def solved(*counts: int, tasks: int = TASKS) -> list[np.ndarray]:
    """For each seed, the first so many tasks solved."""
    return [np.array([task < count for task in range(tasks)], dtype=float) for count in counts]


def test_shares_of_one_seed_have_wilsons_interval() -> None:
    for count in (0, 1, 37, TASKS):
        estimate = statistics.share(solved(count))
        expected = stats.binomtest(count, TASKS).proportion_ci(method="wilson")
        assert (estimate.low, estimate.high) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_seeds_that_differ_have_students_interval() -> None:
    counts = [10, 40, 25, 70]
    estimate = statistics.share(solved(*counts))
    shares = np.array(counts) / TASKS
    expected = stats.t.interval(0.95, 3, loc=shares.mean(), scale=stats.sem(shares))
    assert estimate.value == pytest.approx(shares.mean())
    assert (estimate.low, estimate.high) == pytest.approx((max(0, expected[0]), min(1, expected[1])))
    paired = statistics.difference(solved(*counts), solved(30, 30, 30, 30))
    shares = (np.array(counts) - 30) / TASKS
    expected = stats.ttest_1samp(shares, 0).confidence_interval(0.95)
    assert (paired.low, paired.high) == pytest.approx((expected.low, expected.high))
    assert paired.per_seed == pytest.approx(tuple(shares))
    corrected = statistics.difference(solved(*counts), solved(30, 30, 30, 30), comparisons=9)
    expected = stats.ttest_1samp(shares, 0).confidence_interval(1 - 0.05 / 9)
    assert (corrected.low, corrected.high) == pytest.approx((expected.low, expected.high))


def test_seeds_that_agree_are_not_taken_for_certain() -> None:
    alike = statistics.share(solved(20, 20, 20))
    expected = stats.binomtest(60, 300).proportion_ci(method="wilson")
    assert (alike.low, alike.high) == pytest.approx((expected.low, expected.high))
    assert statistics.difference(solved(21, 21, 21), solved(20, 20, 20)).verdict == "noise"
    assert statistics.difference(solved(30, 30, 30), solved(20, 20, 20)).verdict == "above"


def test_pairs_of_one_seed_have_agresti_and_mins_interval() -> None:
    a, b = solved(30)[0], np.roll(solved(20)[0], 15)
    n12, n21 = int(((a == 1) & (b == 0)).sum()), int(((a == 0) & (b == 1)).sum())
    n = TASKS + 2  # Agresti & Min 2005, section 3: a half added to each cell, then Wald's interval
    plus, minus = (n12 + 0.5) / n, (n21 + 0.5) / n
    half = stats.norm.ppf(0.975) * math.sqrt((plus + minus - (plus - minus) ** 2) / n)
    estimate = statistics.difference([a], [b])
    assert n12 > 0 < n21 and estimate.value == pytest.approx((n12 - n21) / TASKS)
    assert (estimate.low, estimate.high) == pytest.approx((plus - minus - half, plus - minus + half))


def test_coverage_of_paired_intervals() -> None:
    """Of 400 experiments without any difference, and of 400 with one, about 95% of the intervals hold the truth."""
    rng = np.random.default_rng(0)
    for gain, seeds in ((0.0, 3), (0.2, 3), (0.0, 1), (0.2, 1)):
        inside = 0
        for _ in range(400):
            a, b = (
                [(rng.random(60) < np.clip(0.4 + extra + rng.normal(0, 0.05 if seeds > 1 else 0), 0, 1)).astype(float)
                 for _ in range(seeds)]
                for extra in (gain, 0.0)
            )  # fmt: skip
            estimate = statistics.difference(a, b)
            inside += estimate.low <= gain <= estimate.high
        assert 0.93 <= inside / 400 <= 1.0, (gain, seeds)


def test_pass_curve_against_an_independent_bootstrap() -> None:
    counts = np.random.default_rng(0).integers(0, 6, size=150)
    curve = statistics.pass_curve([[Count(5, int(c)) for c in counts]], 5)
    values = np.array([[float(pass_at_k_m(5, int(c), 5, m)) for c in counts] for m in range(1, 6)])
    drawn = np.random.default_rng(1).integers(len(counts), size=(4000, len(counts)))
    for m, estimate in enumerate(curve):
        low, high = np.quantile(values[m][drawn].mean(axis=1), [0.025, 0.975])
        assert estimate.value == pytest.approx(values[m].mean())
        assert (estimate.low, estimate.high) == pytest.approx((low, high), abs=0.015)


def test_other_tasks_cannot_be_paired() -> None:
    with pytest.raises(InputError, match="must share their held-out tasks, and have 3 and 4"):
        statistics.difference([np.zeros(3)], [np.zeros(4)])


def test_intervals_stay_within_what_a_quantity_can_be() -> None:
    wide = statistics.over_seeds([0.99, 0.6, 0.98])
    free = stats.t.interval(0.95, 2, loc=np.mean([0.99, 0.6, 0.98]), scale=stats.sem([0.99, 0.6, 0.98]))
    assert (wide.low, wide.high) == pytest.approx(free) and wide.high > 1
    clamped = statistics.over_seeds([0.99, 0.6, 0.98], least=0, most=1)
    assert (clamped.low, clamped.high) == (pytest.approx(free[0]), 1)
    assert statistics.over_seeds([0.01, 0.4], least=0, most=1).low == 0
    assert math.isnan(statistics.over_seeds([0.5], least=0, most=1).low)
