"""Distances between groups: closed forms, brute force, and what they say of groups whose true distance is known."""

import itertools
import math
from typing import Any

import numpy as np
import pytest

from ibft.errors import InputError
from ibft.represent.distances import Interval, between, ratio


def cluster(size: int, mean: Any, seed: int, spread: float = 1.0) -> np.ndarray:
    mean = np.asarray(mean, np.float64)
    return mean + spread * np.random.default_rng(seed).normal(size=(size, len(mean)))


def test_closed_form() -> None:
    """Means (3, 0, 0) and (0, 4, 0); every row one unit away from its mean, along the third axis."""
    a = np.array([[3, 0, 1], [3, 0, -1]])
    b = np.array([[0, 4, 1], [0, 4, -1], [0, 4, 1], [0, 4, -1]])
    found = between(a, b)
    assert found.rows == (2, 4)
    assert found.l2 == pytest.approx(5) and found.angle_degrees == pytest.approx(90)
    assert found.spread == pytest.approx(math.sqrt(6 / 4))  # six squares of 1, 2 + 4 - 2 degrees of freedom
    assert found.separation.value == pytest.approx(5 / math.sqrt(1.5))
    within = [math.degrees(math.atan(1 / 3))] * 2 + [math.degrees(math.atan(1 / 4))] * 4
    assert found.within_angle_degrees == pytest.approx(np.mean(within))


@pytest.mark.parametrize("degrees", [0, 1e-5, 0.01, 30, 120, 179.99, 180])
def test_angles_are_accurate_from_0_to_180(degrees: float) -> None:
    """The mean of two rows that differ along a third axis is exactly the direction that was planted."""
    turned = [math.cos(math.radians(degrees)), math.sin(math.radians(degrees)), 0]
    a, b = (np.add([mean, mean], [[0, 0, 1], [0, 0, -1]]) for mean in ([5.0, 0, 0], turned))
    assert between(a, b).angle_degrees == pytest.approx(degrees, rel=1e-9, abs=1e-12)


def test_scale_and_rotation() -> None:
    a, b = cluster(20, [1, 2, 3, 4], 0), cluster(30, [2, 2, 3, 3], 1)
    turn, _ = np.linalg.qr(np.random.default_rng(2).normal(size=(4, 4)))
    found, other = between(a, b), between(7 * a @ turn, 7 * b @ turn)
    assert other.l2 == pytest.approx(7 * found.l2) and other.spread == pytest.approx(7 * found.spread)
    np.testing.assert_allclose(other.chance_l2, 7 * np.array(found.chance_l2))
    np.testing.assert_allclose(other.separation, found.separation)
    np.testing.assert_allclose(other.chance_angle_degrees, found.chance_angle_degrees)
    assert (other.p_l2, other.p_angle) == (found.p_l2, found.p_angle)


def test_float32_rows_far_from_the_origin() -> None:
    """Hidden states have a few enormous components; float32 sums of them would drown a difference."""
    a, b = (cluster(500, [1e4, mean], seed, spread=1e-3).astype(np.float32) for mean, seed in ((0.0, 0), (1.0, 1)))
    assert between(a, b, permutations=10).l2 == pytest.approx(1, abs=1e-3)


def test_random_groups_are_drawn_as_all_of_them_would_be() -> None:
    """All 20 ways of splitting six rows into three and three, one by one."""
    a, b = cluster(3, [4, 1], 0), cluster(3, [4, 2], 1)
    rows = np.concatenate([a, b])
    l2, angles = [], []
    for chosen in itertools.combinations(range(6), 3):
        x, y = rows[list(chosen)].mean(0), rows[[i for i in range(6) if i not in chosen]].mean(0)
        l2.append(np.linalg.norm(x - y))
        angles.append(np.degrees(np.arccos(x @ y / np.linalg.norm(x) / np.linalg.norm(y))))
    found = between(a, b, permutations=20_000)
    assert found.p_l2 == pytest.approx(np.mean(np.array(l2) >= l2[0] - 1e-9), abs=0.015)
    assert found.p_angle == pytest.approx(np.mean(np.array(angles) >= angles[0] - 1e-9), abs=0.015)
    assert found.chance_l2 == pytest.approx((min(l2), max(l2)))  # each of the ten pairs of groups has more than 2.5%
    assert found.chance_angle_degrees == pytest.approx((min(angles), max(angles)), rel=1e-6)


def test_planted_groups_are_told_from_chance_and_others_are_not() -> None:
    planted = between(cluster(40, np.zeros(50), 0), cluster(60, np.full(50, 0.3), 1))
    assert planted.p_l2 == pytest.approx(1 / 1001) and planted.l2 > planted.chance_l2[1]
    p_values = [
        between(cluster(10, np.ones(8), 2 * seed), cluster(15, np.ones(8), 2 * seed + 1), permutations=200).p_l2
        for seed in range(200)
    ]
    # Uniform: 5% of 200 lie below 0.05, give or take three standard deviations (3.1 each).
    assert sum(p < 0.05 for p in p_values) <= 19
    assert np.mean(p_values) == pytest.approx(0.5, abs=3 * math.sqrt(1 / 12 / 200))


def test_chance_is_what_theory_says() -> None:
    """Of groups from one distribution, E|difference|^2 = trace of the covariance * (1/n + 1/m)."""
    found = between(cluster(50, np.zeros(400), 0), cluster(80, np.zeros(400), 1))
    middle = math.sqrt(400 * (1 / 50 + 1 / 80))
    assert found.chance_l2[0] < middle < found.chance_l2[1] < 1.2 * middle
    assert found.chance_l2[0] < found.l2 < found.chance_l2[1]


def separation_of(a: np.ndarray, b: np.ndarray) -> float:
    squares = sum(((group - group.mean(0)) ** 2).sum() for group in (a, b))
    return float(np.linalg.norm(a.mean(0) - b.mean(0)) / np.sqrt(squares / (len(a) + len(b) - 2)))


def jackknife(a: np.ndarray, b: np.ndarray, statistic: Any) -> float:
    """The standard error, by leaving out each row and computing anew."""
    without_a = [statistic(np.delete(a, row, 0), b, row, None) for row in range(len(a))]
    without_b = [statistic(a, np.delete(b, row, 0), None, row) for row in range(len(b))]
    return math.sqrt(sum((len(v) - 1) * np.var(v) for v in (without_a, without_b)))


def test_intervals_are_those_of_leaving_out_each_row() -> None:
    a, b = cluster(7, [0, 0, 3], 0), cluster(5, [1, 1, 3], 1)
    error = jackknife(a, b, lambda x, y, *_: separation_of(x, y))
    value = separation_of(a, b)
    expected = Interval(value, max(0, value - 1.959964 * error), value + 1.959964 * error)
    np.testing.assert_allclose(between(a, b).separation, expected, rtol=1e-12)

    other_a, other_b = a @ [[2.0, 0, 0], [0, 1, 1], [0, 0, 1]], b @ [[2.0, 0, 0], [0, 1, 1], [0, 0, 1]]

    def log_ratio(x: np.ndarray, y: np.ndarray, row_a: int | None, row_b: int | None) -> float:
        left_a = other_a if row_a is None else np.delete(other_a, row_a, 0)
        left_b = other_b if row_b is None else np.delete(other_b, row_b, 0)
        return math.log(separation_of(left_a, left_b) / separation_of(x, y))

    error = jackknife(a, b, log_ratio)
    value = math.log(separation_of(other_a, other_b) / separation_of(a, b))
    expected = Interval(*np.exp([value, value - 1.959964 * error, value + 1.959964 * error]).tolist())
    np.testing.assert_allclose(ratio(other_a, other_b, a, b), expected, rtol=1e-12)


def test_intervals_cover_the_truth() -> None:
    """Clusters whose true separation is 2 / sqrt(4), a thousand times; 95% give or take three standard deviations."""
    truth, covered = 1.0, 0
    for seed in range(1000):
        interval = between(
            cluster(60, [1, 1, 1, 1], 2 * seed), cluster(90, [3, 1, 1, 1], 2 * seed + 1), permutations=1
        ).separation
        covered += interval.low <= truth <= interval.high
    assert covered / 1000 == pytest.approx(0.95, abs=3 * math.sqrt(0.05 * 0.95 / 1000))


def test_the_same_rows_narrow_a_comparison() -> None:
    a, b = cluster(40, np.zeros(6), 0), cluster(40, np.full(6, 0.8), 1)
    assert ratio(5 * a, 5 * b, a, b) == pytest.approx((1, 1, 1))
    halved = ratio(a - a.mean(0) / 2, b - b.mean(0) / 2, a, b)  # half the way to each other, every row alike
    assert halved.value == pytest.approx(0.5) and 0.39 < halved.low < 0.5 < halved.high < 0.64
    unpaired = ratio((a - a.mean(0) / 2)[::-1], (b - b.mean(0) / 2)[::-1], a, b)
    assert unpaired.value == pytest.approx(0.5)
    assert math.log(unpaired.high / unpaired.low) > 1.2 * math.log(halved.high / halved.low)


def test_means_that_coincide_or_vanish() -> None:
    a = np.array([[1.0, 0], [-1, 0]])
    found = between(a, a[::-1])
    assert found.l2 == 0 and found.p_l2 == 1
    assert math.isnan(found.angle_degrees) and math.isnan(found.p_angle)
    assert math.isnan(ratio(a, a, a, a).low)
    bounds = between(a, np.ones((2, 2))).separation  # without either row of the first group, no two rows differ
    assert bounds.value == pytest.approx(math.sqrt(2)) and math.isnan(bounds.low) and math.isnan(bounds.high)
    uneven = between(a, np.array([[2.0, 0], [-1, 0], [-1, 0]])).separation
    assert uneven.value == uneven.low == 0 < uneven.high  # a distance is not negative


@pytest.mark.parametrize(
    ("a", "b", "sentence"),
    [
        (np.ones((1, 2)), np.ones((3, 2)), "have 1 and 3 rows; each needs at least two"),
        (np.ones((2, 2)), np.ones((2, 3)), r"same width, not of the shapes \(2, 2\) and \(2, 3\)"),
        (np.ones(4), np.ones(4), r"not of the shapes \(4,\) and \(4,\)"),
        (np.ones((2, 2)), np.full((2, 2), np.nan), "not finite"),
        (np.ones((2, 2)), np.zeros((2, 2)), "no spread to compare"),
    ],
)
def test_groups_that_cannot_be_compared(a: np.ndarray, b: np.ndarray, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        between(a, b)


def test_a_ratio_needs_the_same_rows() -> None:
    a = cluster(4, [0, 0], 0)
    with pytest.raises(InputError, match="the groups have 4 and 4 rows, and 4 and 3 under the reference model"):
        ratio(a, a, a, a[:3])
