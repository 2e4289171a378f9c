"""How time, memory, ratios and errors are taken. No test asserts a time."""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.measure import (
    BETWEEN_RUNS,
    can_measure_memory,
    commit,
    environment,
    interleave,
    peak_of,
    pinned_malloc,
    ratio,
    relative_error,
    rounds_within,
)

ROOT = Path(__file__).parents[2]
needs_memory = pytest.mark.skipif(not can_measure_memory(), reason="needs /proc/self/clear_refs")


@needs_memory
@pytest.mark.parametrize("pinned_by", ["environment", "context"])
def test_peak_is_that_of_the_live_tensors(pinned_by: str) -> None:
    """A step that holds 96 MiB and then, once they are freed, 64: its peak is 96 above rest, of which nothing stays.

    Before it, a process frees blocks of up to 30 MiB, after which an ordinary malloc would keep what is freed.
    """
    probe = "; ".join(
        [
            "import json, torch",
            "from benchmarks.measure import peak_of, pinned_malloc",
            "[torch.ones(mib * 2**18).sum() for mib in range(1, 30)]",
            "step = lambda: [[torch.ones(2**18) for _ in range(mib)] and None for mib in (96, 64)]",
            f"context = pinned_malloc() if {pinned_by == 'context'} else None",
            "_ = context and context.__enter__()",
            "print(json.dumps(peak_of(step, lambda: None, repeats=2)))",
        ]
    )
    environment = dict(os.environ)
    if pinned_by == "environment":
        environment |= {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
    output = subprocess.check_output([sys.executable, "-c", probe], cwd=ROOT, env=environment, text=True)
    result = json.loads(output)
    assert 95 <= result["peak"] - result["rest"] <= 100


@needs_memory
def test_memory_is_given_back_within_pinned_malloc() -> None:
    kept = [torch.ones(5 * 2**18) for _ in range(40)]
    del kept[1:39]  # which malloc keeps, between two that live
    with pinned_malloc() as trim:
        for mib in (64, 16, 4):
            peak = peak_of(lambda mib=mib: torch.ones(mib * 2**18).sum(), trim, 1)  # type: ignore[misc]
            assert mib - 1 <= peak["peak"] - peak["rest"] <= mib + 3


@needs_memory
def test_holes_that_earlier_work_left_are_not_used() -> None:
    """A block of 18 MiB, freed, and then one of 30, where malloc has a hole of 20."""
    with pinned_malloc():
        pass  # its end lets blocks of up to 32 MiB come from the heap
    kept = [torch.ones(20 * 2**18) for _ in range(3)]
    del kept[1]
    with pinned_malloc() as trim:
        peak = peak_of(lambda: [float(torch.ones(mib * 2**18).sum()) for mib in (18, 30)], trim, 1)
    assert 29 <= peak["peak"] - peak["rest"] <= 33


def test_rounds_run_every_step_once_and_ratios_are_taken_within_a_round() -> None:
    calls: list[str] = []
    samples = interleave({name: lambda name=name: calls.append(name) for name in "abc"}, rounds=4)  # type: ignore[misc]
    assert [sorted(calls[start : start + 3]) for start in range(0, 15, 3)] == [["a", "b", "c"]] * 5
    assert [len(times) for times in samples.values()] == [4, 4, 4]
    assert ratio([2, 40, 60], [1, 10, 30]).median == 2  # of the medians it would be 4


def test_a_later_visit_starts_where_the_one_before_stopped_and_needs_no_warm_up() -> None:
    calls: list[str] = []
    steps = {name: lambda name=name: calls.append(name) for name in "abc"}
    interleave(steps, rounds=2, first=0, warm_up=False)  # type: ignore[arg-type]
    interleave(steps, rounds=1, first=2, warm_up=False)  # type: ignore[arg-type]
    assert "".join(calls) == "abc" + "bca" + "cab"


def test_rounds_within_stay_between_their_bounds() -> None:
    steps = {"a": lambda: None}
    assert rounds_within(steps, 0.0, 5, 40) == 5 and rounds_within(steps, 60.0, 5, 40) == 40


def test_intervals_hold_what_a_repeated_run_would_find() -> None:
    """Of two runs with the same spread, the median of one lies in the interval of the other 19 times of 20."""
    generator = np.random.default_rng(0)
    held = 0
    for _ in range(200):
        one, other = (np.exp(generator.normal(0, 0.08, (2, 12))) for _ in range(2))
        interval = ratio(one[0], one[1])
        held += interval.low <= statistics.median(other[0] / other[1]) <= interval.high
    assert held >= 190


def test_intervals_hold_where_neighbouring_rounds_share_a_busy_moment() -> None:
    """A machine slow for four rounds at a time: 24 rounds tell no more than 6 do."""
    generator = np.random.default_rng(0)

    def drawn() -> np.ndarray:
        return np.exp(np.repeat(generator.normal(0, 0.2, 6), 4) + generator.normal(0, 0.01, 24))

    held = 0
    for _ in range(200):
        interval = ratio(drawn(), np.ones(24))
        held += interval.low <= statistics.median(drawn()) <= interval.high
    assert held >= 190


def test_an_interval_is_never_narrower_than_two_processes_differ() -> None:
    steady = ratio([2.0] * 10, [1.0] * 10)
    assert steady == (2.0, 2.0 / (1 + BETWEEN_RUNS), 2.0 * (1 + BETWEEN_RUNS))
    assert ratio([3.0, 4.0], [3.0, 4.0]) == (1, 1, 1)


def test_relative_error_of_what_is_missing_or_not_finite_is_infinite() -> None:
    expected = torch.tensor([3.0, 4.0])
    assert relative_error(expected + torch.tensor([0.0, 0.5]), expected) == pytest.approx(0.1)
    assert relative_error(None, expected) == relative_error(expected * float("nan"), expected) == float("inf")


def test_a_record_says_where_it_was_made_and_not_on_whose_machine() -> None:
    where = environment()
    assert {"date", "commit", "device", "versions"} == where.keys() and where["commit"] == commit()
    text = json.dumps(where)
    assert os.uname().nodename not in text and str(ROOT) not in text and str(Path.home()) not in text
