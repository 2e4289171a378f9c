"""How time, memory and error are measured, and what a record says of the machine."""

import ctypes
import datetime
import functools
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ibft.estimate.devices import cpu_name

# glibc raises its mmap threshold with every large block that is freed, and then keeps freed memory for itself, more or
# less of it by chance. Pinned, a tensor larger than this goes back to the system when it is freed.
_PINNED_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
_PINNED_BYTES, _GROWN_BYTES = 131072, 32 * 2**20  # glibc's threshold at first, and the most that it grows to
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of mallopt, from malloc.h

CONFIDENCE = 0.99  # of an interval: a record has dozens of ratios, and each has to hold
BETWEEN_RUNS = 0.1  # how far apart two processes were for reasons that no round sees: pages, alignment, other tenants
BATCHES = 6  # of one ratio's rounds
_RESAMPLES = 2000
ROOT = Path(__file__).parents[1]


class Ratio(NamedTuple):
    """Of a variant's time to the baseline's: the median over rounds, and the interval where a repeated run's lies."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f})"


def interleave(
    steps: dict[str, Callable[[], object]],
    rounds: int,
    timer: Callable[[Callable[[], object]], float] | None = None,
    first: int = 0,
    warm_up: bool = True,
) -> dict[str, list[float]]:
    """Seconds of every step, round by round: each round runs all of them, so that a busy moment falls on all alike.

    A round starts one variant further than the round before it, the first that counts with number `first`; before them
    one round to warm up is not counted. timer: gives the seconds of one call; None: `timed`.
    """
    names = list(steps)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for index in range(-1 if warm_up else 0, rounds):
        start = (first + index) % len(names)
        for name in names[start:] + names[:start]:
            elapsed = (timer or timed)(steps[name])
            if index >= 0:
                samples[name].append(elapsed)
    return samples


def timed(step: Callable[[], object]) -> float:
    """Seconds that one call takes."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def ratio(samples: Sequence[float], baseline: Sequence[float]) -> Ratio:
    """The ratio of two variants' times, taken round by round and not of their medians.

    The interval is where the median of a repeated run lies with `CONFIDENCE`: from a bootstrap (`resampled_medians`),
    widened by the square root of 2 because the other run's median varies as well, and at least `BETWEEN_RUNS` on either
    side. A variant's ratio to itself is 1 and has none.
    """
    ratios = np.array([mine / other for mine, other in zip(samples, baseline, strict=True)])
    median = float(np.median(ratios))
    if (ratios == 1).all():
        return Ratio(1.0, 1.0, 1.0)
    bounds = np.quantile(resampled_medians(ratios), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    low, high = (median * (float(bound) / median) ** math.sqrt(2) for bound in bounds)
    return Ratio(median, min(low, median / (1 + BETWEEN_RUNS)), max(high, median * (1 + BETWEEN_RUNS)))


def resampled_medians(values: Sequence[float] | np.ndarray, seed: int = 0) -> np.ndarray:
    """Medians of `_RESAMPLES` bootstrap samples; the same ones for the same seed.

    What is drawn are the medians of `BATCHES` stretches of the values, not single ones: what else the machine does at a
    time falls on neighbouring rounds alike, so that these tell of each other (the method of batch means).
    """
    stretches = np.array_split(np.asarray(values), min(BATCHES, len(values)))
    medians = np.array([np.median(stretch) for stretch in stretches])
    drawn = np.random.default_rng(seed).integers(0, len(medians), (_RESAMPLES, len(medians)))
    return np.median(medians[drawn], axis=1)


def rounds_within(steps: dict[str, Callable[[], object]], seconds: float, least: int, most: int) -> int:
    """How many rounds of all steps fit into that time; every step, which should be warm, runs once to find out."""
    once = sum(timed(step) for step in steps.values())
    return max(least, min(most, int(seconds / once)))


@contextmanager
def pinned_malloc() -> Iterator[Callable[[], object]]:
    """Within it, freed tensors go back to the system, so that what is resident is what is live.

    Gives a function that hands back what was freed before and is kept: a `release` for `peak_of`, because a block that
    is taken from there and returned to it would not be seen.

    Afterwards glibc's threshold stands where it comes to rest by itself once large tensors have been freed, so that
    timings are those of an ordinary process. Elsewhere than on glibc it does nothing.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    mallopt, trim = (getattr(libc, name, None) for name in ("mallopt", "malloc_trim"))
    _set_thresholds(mallopt, _PINNED_BYTES, _PINNED_BYTES)
    try:
        yield lambda: trim and trim(0)
    finally:
        _set_thresholds(mallopt, _GROWN_BYTES, 2 * _GROWN_BYTES)


def _set_thresholds(mallopt: Callable[[int, int], int] | None, mmap: int, trim: int) -> None:
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, mmap)
        mallopt(_M_TRIM_THRESHOLD, trim)


def peak_of(step: Callable[[], object], release: Callable[[], object], repeats: int) -> dict[str, float]:
    """MiB resident in this process: `rest` with what outlives a step, and the highest point during a step, `peak`.

    The first call warms up (libraries' buffers, the optimizer's state); `release` then frees what a step leaves behind.
    The kernel's high-water mark is reset before the steps that count. Linux only.

    Steps run in a thread of their own, to which glibc gives a heap of its own: in the main one are holes that earlier
    work left, and a block that fits a hole is taken from there and stays resident when it is freed.
    """
    run = _own_heap().submit
    run(step).result()
    release()
    rest = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    for _ in range(repeats):
        run(step).result()
    return {"rest": rest, "peak": _resident("VmHWM")}


@functools.cache
def _own_heap() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=1)


def in_fresh_process(module: str, arguments: Sequence[str], pinned_malloc: bool) -> Any:
    """Runs `python -m module arguments` and returns the JSON of its last line of output."""
    command = [sys.executable, "-m", module, *arguments]
    environment = {**os.environ, **(_PINNED_MALLOC if pinned_malloc else {})}
    result = subprocess.run(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


def can_measure_memory() -> bool:
    """Whether this system tells a process its high-water mark and resets it."""
    return os.access("/proc/self/clear_refs", os.W_OK)


def relative_error(actual: Tensor | None, expected: Tensor | None) -> float:
    """||actual - expected|| / ||expected|| in float64; infinite where one of them is missing or not finite."""
    if actual is None or expected is None or not torch.isfinite(actual).all():
        return float("inf")
    actual, expected = actual.detach().double(), expected.detach().double()
    return ((actual - expected).norm() / expected.norm().clamp(min=1e-30)).item()


def environment() -> dict[str, Any]:
    """What a record says of where it was made: device, versions, commit, date, load. No host or user names."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "device": {
            "cpu": cpu_name(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "load_average": list(os.getloadavg()),
        },
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "peft", "numpy")},
        },
    }


def write_record(path: str | Path, record: dict[str, Any]) -> None:
    """Writes a record as JSON, making its folder."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(record, indent=1) + "\n")


def commit() -> str:
    """What git calls the sources, "-dirty" where they are changed; "" where this is no clone."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout.strip()
    except OSError:  # no git
        return ""


def _resident(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024  # kB
    raise RuntimeError(f"/proc/self/status has no {field}")
