"""`python -m benchmarks.gpu`: time and memory of every op on this GPU.

`python -m benchmarks.gpu report FILE [--plots DIR]`: tables, and pictures in DIR, of a record alone.

Every variant is first compared with float64, and one that errs is not timed. The record, all samples in it, goes to
$OUT/gpu-<device>.json (OUT unset: benchmarks/results). IBKERNELS_DRY=1: the same at toy sizes in Triton's interpreter.
"""

import argparse
import contextlib
import datetime
import gc
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_plots import plots
from benchmarks.gpu_problems import DRY, MEASURED, keep_regimes_apart, peak_bytes
from benchmarks.gpu_report import report
from benchmarks.measure import interleave, relative_error, timed, write_record

ROUNDS = 2 if DRY else 25
ROOT = Path(__file__).parents[1]
_AHEAD_CYCLES = 4_000_000  # about 2 ms in which the host queues a whole step, so that the device never waits for it
_MOST_AHEAD_CYCLES = 8 * _AHEAD_CYCLES


class DeviceTimer:
    """Seconds of device time of one call, from events, with a cold L2 and the launches already queued.

    Where the device began before the host had queued them all, the call is timed again with twice the time to do so. A
    step that takes longer than the most that is given keeps the device busy while the rest is queued.
    """

    def __init__(self) -> None:
        cache = torch.cuda.get_device_properties().L2_cache_size
        self.buffer = torch.zeros(cache, dtype=torch.float32, device="cuda")  # four times as large
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def __call__(self, step: Callable[[], object]) -> float:
        ahead = _AHEAD_CYCLES
        while True:
            self.buffer.sum()  # reading leaves clean lines: written ones would be evicted at the step's expense
            torch.cuda._sleep(ahead)
            self.start.record()
            result = step()
            self.end.record()
            late = self.start.query()
            self.end.synchronize()
            del result
            if not late or ahead == _MOST_AHEAD_CYCLES:
                return self.start.elapsed_time(self.end) / 1e3
            ahead *= 2


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; 1 where one of our own ops did not pass its gate."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").split("\n\n")[2])
    commands = parser.add_subparsers(dest="command")
    reporting = commands.add_parser("report", help="tables of a record")
    reporting.add_argument("file", metavar="FILE", type=Path)
    reporting.add_argument("--plots", metavar="DIR", type=Path, help="also a picture of every case, as SVG, in DIR")
    arguments = parser.parse_args(argv)
    if arguments.command == "report":
        return report_file(arguments.file, arguments.plots)
    if DRY:
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
        keep_regimes_apart()
    elif not torch.cuda.is_available():
        print("there is no GPU; IBKERNELS_DRY=1 runs the same code without one", file=sys.stderr)
        return 2
    record: dict[str, Any] = {
        "command": "python -m benchmarks.gpu", "dry": DRY, **environment(), "shape": MEASURED._asdict(), "cases": {},
    }  # fmt: skip
    folder = Path(os.environ.get("OUT") or ("runs" if DRY else "benchmarks/results"))
    file = folder / f"gpu-{record_name(record)}.json"
    record["cases"] = measure(lambda cases: write_record(file, {**record, "cases": cases}))
    print(report(record))
    return 1 if any("ibkernels" in case["left_out"] for case in record["cases"].values()) else 0


def record_name(record: dict[str, Any]) -> str:
    """What a record's file is called after."""
    return "dry" if DRY else re.sub(r"[^a-z0-9]+", "-", record["device"]["name"].lower()).strip("-")


def report_file(file: Path, folder: Path | None) -> int:
    """Prints a record's tables and draws its plots; 2, with the reason, where there is no record or no matplotlib."""
    try:
        record = json.loads(file.read_text())
        printed = report(record)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        print(f"{file} is not a record of benchmarks.gpu ({type(error).__name__}: {error})", file=sys.stderr)
        return 2
    print(printed)
    if folder is None:
        return 0
    try:
        paths = plots(record, folder)
    except ModuleNotFoundError as error:
        print(f'the plots need {error.name}: pip install "ibft[bench]"', file=sys.stderr)
        return 2
    except OSError as error:
        print(f"the plots cannot be written to {folder}: {error}", file=sys.stderr)
        return 2
    print(*["", *paths], sep="\n")
    return 0


def measure(save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Every case's errors, peak memory and samples; saved after each, so that a failure or a limit costs one case."""
    import torch._functorch.config as functorch_config

    from benchmarks.gpu_cases import cases

    # A timed backward pass runs again and again over the same graph.
    functorch_config.donated_buffer = False  # type: ignore[attr-defined, unused-ignore]
    torch.manual_seed(0)
    timer = timed if DRY else DeviceTimer()
    results: dict[str, Any] = {}
    started = time.perf_counter()
    for name, made in cases():
        try:
            results[name] = measure_case(made(), timer)
        except Exception as error:  # of its inputs, its float64 result or a timed step: the others are measured
            traceback.print_exc()
            results[name] = {part: {} for part in ("relative_error", "peak_bytes", "moved_bytes", "seconds")}
            results[name]["left_out"] = {"ibkernels": reason(error)}
        save(results)
        print(f"after {time.perf_counter() - started:.0f} s: {name}", file=sys.stderr, flush=True)
        gc.collect()
        if not DRY:
            with contextlib.suppress(RuntimeError):  # of a device that accepts nothing after an error
                torch.cuda.empty_cache()
    return results


def reason(error: Exception) -> str:
    """An error in a line, as a record has it."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def measure_case(case: Any, timer: Callable[[Callable[[], object]], float]) -> dict[str, Any]:
    """One case's part of the record."""
    from benchmarks.gpu_cases import TOLERANCE

    exact = case.exact()
    left_out, errors, peaks = dict(case.left_out), {}, {}
    steps: dict[str, Callable[[], object]] = {}
    for name in case.calls:
        try:
            actual = case.run(name, True)
            errors[name] = max(relative_error(actual.get(key), expected) for key, expected in exact.items())
            del actual
            if not errors[name] <= TOLERANCE:
                left_out[name] = f"differs from float64 by {errors[name]:.2g} (accepted: {TOLERANCE:.0e})"
                continue
            peaks[name] = peak_bytes(lambda name=name: case.run(name, False))  # type: ignore[misc]
            steps[name] = case.step(name)
        except Exception as error:  # another library's, or out of memory: the others are measured all the same
            left_out[name] = reason(error)
        gc.collect()
    del exact
    samples = interleave({**steps, **case.floors}, ROUNDS, timer)
    return {
        "relative_error": errors, "peak_bytes": peaks, "moved_bytes": case.moved,
        "left_out": left_out, "seconds": samples,
    }  # fmt: skip


def environment() -> dict[str, Any]:
    """What a record says of where it was made. No host or user names."""
    device: dict[str, Any] = {"name": "Triton's interpreter"}
    if not DRY:
        properties = torch.cuda.get_device_properties()
        device = {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0],
        }
    import triton

    versions = {"torch": torch.__version__, "triton": triton.__version__, "numpy": version("numpy")}
    described = _output("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40")
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": os.environ.get("IBFT_COMMIT") or described,  # a copy of the tree may have no .git
        "device": device,
        "autotune": os.environ.get("IBKERNELS_AUTOTUNE") == "1",
        "versions": {
            "python": platform.python_version(), **versions, "cuda": torch.version.cuda, "hip": torch.version.hip,
        },
    }  # fmt: skip


def _output(*command: str) -> str:
    """What a program prints; "" where it is not there or fails."""
    if shutil.which(command[0]) is None:
        return ""
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
