"""How time, memory and error are measured, and what a record says of the machine."""

import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

# glibc raises its mmap threshold with every large block that is freed, and then keeps freed memory for itself, more or
# less of it by chance. Pinned, a tensor larger than this goes back to the system when it is freed.
_PINNED_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}


class Ratio(NamedTuple):
    """Of a variant's time to the baseline's, over rounds: median and quartiles."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f})"


def interleave(
    steps: dict[str, Callable[[], object]],
    rounds: int,
    timer: Callable[[Callable[[], object]], float] | None = None,
) -> dict[str, list[float]]:
    """Seconds of every step, round by round: each round runs all of them, so that a busy moment falls on all alike.

    A round starts one variant further than the round before it; one round to warm up is not counted. timer: gives the
    seconds of one call; None: `timed`.
    """
    names = list(steps)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for index in range(-1, rounds):
        first = index % len(names)
        for name in names[first:] + names[:first]:
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
    """The ratio of two variants' times, taken round by round and not of their medians."""
    ratios = [mine / other for mine, other in zip(samples, baseline, strict=True)]
    if len(ratios) < 2:
        return Ratio(ratios[0], ratios[0], ratios[0])
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return Ratio(median, low, high)


def peak_of(step: Callable[[], object], release: Callable[[], object], repeats: int) -> dict[str, float]:
    """MiB resident in this process: `rest` with what outlives a step, and the highest point during a step, `peak`.

    The first call warms up (libraries' buffers, the optimizer's state); `release` then frees what a step leaves behind.
    The kernel's high-water mark is reset before the steps that count. Linux only.
    """
    step()
    release()
    rest = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    for _ in range(repeats):
        step()
    return {"rest": rest, "peak": _resident("VmHWM")}


def in_fresh_process(module: str, arguments: Sequence[str], pinned_malloc: bool) -> Any:
    """Runs `python -m module arguments` and returns the JSON of its last line of output."""
    command = [sys.executable, "-m", module, *arguments]
    environment = {**os.environ, **(_PINNED_MALLOC if pinned_malloc else {})}
    root = Path(__file__).parents[1]
    result = subprocess.run(command, env=environment, cwd=root, stdout=subprocess.PIPE, text=True, check=True)
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
    """What a record says of where it was made: device, versions, date, load. No host or user names."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": {
            "cpu": _cpu_name(),
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


def _resident(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024  # kB
    raise RuntimeError(f"/proc/self/status has no {field}")


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
