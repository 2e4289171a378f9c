"""How fast a run is and where its time goes: tokens and FLOPs a second, padding, memory, seconds by phase, a trace."""

import resource
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from ibft.config import TrainConfig
from ibft.estimate.devices import find_device

if TYPE_CHECKING:
    from ibft.run import Run
    from ibft.step_records import StepRecord

PHASES = ("forward", "data", "backward", "optimizer")
# The fields of a record that a clock or the machine decides, and not the run.
MEASURED = (
    "seconds",
    *(f"{phase}_seconds" for phase in PHASES),
    "tokens_per_second",
    "mfu",
    "peak_memory_gib",
)
_TRACED = range(3, 6)  # steps of a run from its start: the first ones are slower than the rest


class Peak(NamedTuple):
    """TFLOP/s of one device at the dtype it computes in, None where nobody says; and who says so."""

    tflops: float | None
    source: str


def peak_of(config: TrainConfig, device: torch.device, dtype: torch.dtype) -> Peak:
    """What --peak_tflops gives, else the data sheet's for a GPU that computes in bfloat16."""
    if config.peak_tflops is not None:
        return Peak(config.peak_tflops, "--peak_tflops")
    known = device.type == "cuda" and dtype == torch.bfloat16
    if known and (found := find_device(torch.cuda.get_device_name(device))) is not None:
        return Peak(found.tflops, f"{found.name}, dense bf16")
    return Peak(None, "not known for this device; --peak_tflops gives it")


class Speedometer:
    """Times a run's phases: `mark` ends one. On a GPU by events on its stream, so that no phase makes the host wait."""

    def __init__(self, run: "Run") -> None:
        self._run, self._cuda = run, run.engine.device.type == "cuda"
        self._marks: list[tuple[str, Any]] = []
        self._start = 0.0
        self.restart()

    def restart(self) -> None:
        """Begins a window: what lay between, evaluating or saving, is not the training's speed."""
        self._marks, self._start = [("", self._now())], time.perf_counter()
        if self._cuda:
            torch.cuda.reset_peak_memory_stats(self._run.engine.device)

    def mark(self, phase: str) -> None:
        """The time since the last mark was this phase's."""
        self._marks.append((phase, self._now()))

    def read(self, window: "Sequence[StepRecord]") -> list[dict[str, Any]]:
        """The fields of each step in a window, on the main process; times are means over it.

        Collective, and waits for the device.
        """
        run, phases = self._run, self._phases()
        seconds = time.perf_counter() - self._start
        memory = run.engine.highest(self._peak_mib())
        if not run.engine.is_main:
            return [{} for _ in window]
        steps = len(window)
        tokens = sum(record.num_tokens for record in window)
        flops = [self._flops(record) for record in window]
        mfu = None
        if run.peak.tflops is not None and None not in flops:
            mfu = sum(flops) / (seconds * run.engine.world_size * run.peak.tflops * 1e12)  # type: ignore[arg-type]
        measured = {
            "seconds": seconds / steps,
            **{f"{phase}_seconds": phases[phase] / steps for phase in PHASES},
            "tokens_per_second": round(tokens / seconds, 1),
            "mfu": mfu,
            "peak_memory_gib": round(memory / 1024, 3),
        }
        return [
            {
                "padding": 1 - record.num_tokens / record.positions,
                "masked": 1 - record.num_labels / record.num_tokens,
                "flops": step_flops,
                **measured,
            }
            for record, step_flops in zip(window, flops, strict=True)
        ]

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _phases(self) -> dict[str, float]:
        """Seconds of each, over the window."""
        if self._cuda:
            self._marks[-1][1].synchronize()
        phases: dict[str, float] = defaultdict(float)
        for (_, begin), (phase, end) in zip(self._marks, self._marks[1:], strict=False):
            phases[phase] += begin.elapsed_time(end) / 1000 if self._cuda else end - begin
        return phases

    def _flops(self, record: "StepRecord") -> float | None:
        cost = self._run.cost
        if cost is None:
            return None
        pairs = cost.pairs(self._run.data.lengths[record.documents])
        return cost.flops(record.num_tokens, record.num_labels, pairs).model

    def _peak_mib(self) -> int:
        """Of this process: what the allocator gave out at once, without a GPU the process's resident peak."""
        if self._cuda:
            return torch.cuda.max_memory_allocated(self._run.engine.device) // 2**20
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak // (2**20 if sys.platform == "darwin" else 2**10)


@contextmanager
def tracing(wanted: bool, folder: Path, rank: int) -> Iterator[Any]:
    """A profiler whose `step` ends a training step, and which writes its trace of `_TRACED`; None if not wanted.

    The trace is for https://ui.perfetto.dev or chrome://tracing. Raises OSError where the folder cannot be made.
    """
    if not wanted:
        yield None
        return
    folder.mkdir(parents=True, exist_ok=True)
    before = _TRACED.start - 1
    with profile(
        activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])],
        schedule=schedule(wait=before - 1, warmup=1, active=len(_TRACED), repeat=1),
        on_trace_ready=lambda profiler: profiler.export_chrome_trace(str(folder / f"trace-{rank}.json.gz")),
        record_shapes=True,
        profile_memory=True,
    ) as profiler:
        yield profiler
