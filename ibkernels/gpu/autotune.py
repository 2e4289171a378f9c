"""`IBKERNELS_AUTOTUNE=1`: a search for faster launch configurations on this GPU, and the winners it keeps.

    python -m ibkernels.gpu.autotune [FOLDER]     prints the winners as rows of the table in configs.py

A kernel is searched for when it is first called with a dtype, a width and a number of rows (the last two up to a power
of two) of which no winner is known: uphill from the shipped configuration, by halving and doubling, each candidate
compiled and timed with the call's own arguments. That takes minutes and waits for the device. Each winner is a file in
$IBKERNELS_AUTOTUNE_DIR (default: ~/.cache/ibkernels), which later processes read instead of searching.

Any configuration gives a correct result, and the same noise; sums may be of another order. While a CUDA graph is being
captured nothing is searched: what has no winner runs as shipped. Tracing by torch.compile runs no kernel.
"""

import argparse
import json
import math
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ibkernels.gpu import configs
from ibkernels.gpu.configs import Config
from ibkernels.gpu.launch import dot_precision

GAIN = 0.98  # of a time: what is not as much faster is taken for noise
_SMALLEST, _LARGEST = 16, 16384  # block: matrix instructions and the noise's columns come in 16s
_MOST_WARPS, _MOST_STAGES = 16, 5
_FORMAT = "ibkernels autotune 1"
_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "tf32": 4}


class Problem(NamedTuple):
    """What a winner is for. width and rows: up to these, powers of two; another Triton compiles other code."""

    kernel: str
    chip: str
    dtype: str  # "tf32": float32 in that precision
    width: int
    rows: int
    triton: str

    @property
    def file(self) -> str:
        """The name of its winner's file."""
        return "-".join(map(str, self)) + ".json"


class Winner(NamedTuple):
    """The fastest configuration found, and how it compares."""

    config: Config
    milliseconds: float
    shipped_milliseconds: float
    device: str


_known: dict[tuple[Path, Problem], Config] = {}


def choose(kernel: str, tensor: Tensor, width: int, run: Callable[[Config], object]) -> Config:
    """The winner for a call, from this process, an earlier one's file, or a search; as `launch.configured`.

    Raises ValueError for a file that is not a winner of this problem, and for a folder that cannot be written.
    """
    shipped = configs.choose(kernel, tensor, width)
    if tensor.shape[0] == 0:
        return shipped
    here, problem = folder(), problem_of(kernel, tensor, width)
    if (here, problem) not in _known:
        path = here / problem.file
        if path.exists():
            winner = read(path, problem)
        elif _capturing(tensor.device):
            return shipped
        else:
            _require_writable(here)
            winner = _search(problem, shipped, tensor.device, run)
            _write(path, problem, winner)
        _known[here, problem] = winner.config
    return _known[here, problem]


def folder() -> Path:
    """Where winners are kept."""
    named = os.environ.get("IBKERNELS_AUTOTUNE_DIR")
    return Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ibkernels"


def problem_of(kernel: str, tensor: Tensor, width: int) -> Problem:
    """The problem that a call belongs to."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype == "float32" and dot_precision(tensor) == "tf32":
        dtype = "tf32"
    width, rows = (max(_SMALLEST, triton.next_power_of_2(size)) for size in (width, tensor.shape[0]))
    return Problem(kernel, configs.chip(tensor.device), dtype, width, rows, triton.__version__)


def neighbours(config: Config) -> Iterator[Config]:
    """Configurations one step away: a block, the warps or both halved or doubled, a stage more or less."""
    blocks, warps, stages = config
    for factor in (0.5, 2.0):
        scaled = int(warps * factor)
        yield Config(blocks, scaled, stages)
        for name, size in blocks.items():
            other = {**blocks, name: int(size * factor)}
            yield Config(other, warps, stages)
            yield Config(other, scaled, stages)
    yield from (Config(blocks, warps, stages + step) for step in (-1, 1))


def climb(start: Config, milliseconds: Callable[[Config], float]) -> tuple[Config, dict[str, float]]:
    """The best configuration that steps from `start` lead to, and the time of each tried (inf: it does not run)."""
    best, times = start, {_call(start): milliseconds(start)}
    while True:
        found = best
        for candidate in neighbours(best):
            if _call(candidate) not in times and _is_possible(candidate):
                times[_call(candidate)] = milliseconds(candidate)
            if times.get(_call(candidate), math.inf) < times[_call(found)]:
                found = candidate
        if not times[_call(found)] < GAIN * times[_call(best)]:
            return best, times
        best = found


def read(path: Path, problem: Problem | None = None) -> Winner:
    """The winner in a file, of `problem` if one is given; ValueError for any other content."""
    try:
        record = json.loads(path.read_text())
        if not isinstance(record, dict) or record.get("format") != _FORMAT:
            raise ValueError(f"its format is not {_FORMAT!r}")
        found = problem_in(record)
        if problem is not None and found != problem:
            raise ValueError(f"it is of {found}, not of {problem}")
        config = Config(record["blocks"], record["num_warps"], record["num_stages"])
        shipped = configs.entry(found.kernel, _BYTES[found.dtype], found.width)["default"]
        assert shipped is not None
        if config.blocks.keys() != shipped.blocks.keys() or not (_is_possible(config) or config == shipped):
            raise ValueError(f"{config.sizes} is no configuration of {found.kernel}")
        return Winner(
            config, float(record["milliseconds"]), float(record["shipped_milliseconds"]), str(record["device"])
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StopIteration) as error:
        raise ValueError(
            f"{path} is not a winner of IBKERNELS_AUTOTUNE's search ({type(error).__name__}: {error}); delete it, or "
            "name another folder with IBKERNELS_AUTOTUNE_DIR."
        ) from None


def problem_in(record: dict[str, Any]) -> Problem:
    """The problem that a file says it is of."""
    return Problem(*(record[name] for name in Problem._fields))


def rows_to_contribute(winners: Sequence[tuple[Problem, Winner]]) -> list[str]:
    """Rows of the table in configs.py, one for each kernel, element size and width, and under it what was measured."""
    groups: dict[tuple[str, int, int], list[tuple[Problem, Winner]]] = {}
    for problem, winner in winners:
        groups.setdefault((problem.kernel, _BYTES[problem.dtype], problem.width), []).append((problem, winner))
    lines = []
    for (kernel, size, width), group in sorted(groups.items()):
        by_chip = dict(configs.entry(kernel, size, width))
        # The table knows neither rows nor the one of two dtypes: the most rows count, and bfloat16.
        group.sort(key=lambda pair: (pair[0].rows, pair[0].dtype == "bfloat16"))
        by_chip |= {problem.chip: winner.config for problem, winner in group}
        cells = ", ".join(f'"{chip}": {_source(config)}' for chip, config in by_chip.items())
        lines += [f'"{kernel}", {size} bytes:', f"    ({width}, {{{cells}}}),"]
        lines += [
            f"    # {problem.chip}, {problem.dtype}, N <= {problem.rows}: {_source(winner.config)} takes "
            f"{winner.milliseconds:.4g} ms, the shipped one {winner.shipped_milliseconds:.4g} ms "
            f"({winner.device}, triton {problem.triton})"
            for problem, winner in group
        ]
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; 1 where a file is not a winner."""
    parser = argparse.ArgumentParser(
        prog="python -m ibkernels.gpu.autotune",
        description="Prints what IBKERNELS_AUTOTUNE=1 found as rows of the table _SHIPPED in ibkernels/gpu/configs.py, "
        "each to stand before the next wider row of its kernel, or for one of the same width.",
    )
    parser.add_argument("folder", nargs="?", type=Path, default=folder(), help="of the winners (default: %(default)s)")
    here = parser.parse_args(argv).folder
    winners, faults = [], []
    for path in sorted(here.glob("*.json")):
        try:
            winner = read(path)
            winners.append((problem_in(json.loads(path.read_text())), winner))
        except ValueError as error:
            faults.append(str(error))
    print("\n".join(rows_to_contribute(winners)) or f"there are no winners in {here}")
    print(*faults, sep="\n", end="\n" if faults else "", file=sys.stderr)
    return 1 if faults else 0


def _search(problem: Problem, shipped: Config, device: torch.device, run: Callable[[Config], object]) -> Winner:
    def attempt(config: Config) -> float:
        try:
            return _milliseconds(partial(run, config), device)
        except torch.AcceleratorError:  # not of the configuration: the device accepts nothing after it
            raise
        except Exception:  # of many kinds: the compiler's, the assembler's, out of registers, shared memory or memory
            return math.inf

    best, times = climb(shipped, attempt)
    # Once more, side by side: the least of many noisy times is too low. A shipped one that does not run raises here.
    milliseconds = shipped_milliseconds = _milliseconds(partial(run, best), device)
    if best is not shipped:
        shipped_milliseconds = attempt(shipped)
        if not milliseconds < GAIN * shipped_milliseconds:
            best, milliseconds = shipped, shipped_milliseconds
    failed = sum(math.isinf(found) for found in times.values())
    print(
        f"ibkernels: {problem.kernel}, {problem.dtype}, width {problem.width}, {problem.rows} rows: of {len(times)} "
        f"configurations, {failed} of which do not run, {_source(best)} is the fastest: {milliseconds:.4g} ms, the "
        f"shipped one {shipped_milliseconds:.4g} ms",
        file=sys.stderr,
    )
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "Triton's interpreter"
    return Winner(best, milliseconds, shipped_milliseconds, name)


def _milliseconds(step: Callable[[], object], device: torch.device) -> float:
    """The median of one call, with a cold L2; of one call on the clock in the interpreter."""
    if device.type == "cpu":
        start = time.perf_counter()
        step()
        return 1e3 * (time.perf_counter() - start)
    return triton.testing.do_bench(step, warmup=5, rep=30, return_mode="median")


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _is_possible(config: Config) -> bool:
    sizes = [*config.blocks.values(), config.num_warps]
    return (
        all(isinstance(size, int) and size > 0 and size & (size - 1) == 0 for size in sizes)
        and all(_SMALLEST <= size <= _LARGEST for size in config.blocks.values())
        and config.num_warps <= _MOST_WARPS
        and 1 <= config.num_stages <= _MOST_STAGES
    )


def _require_writable(here: Path) -> None:
    """Before the search, whose result would be lost."""
    try:
        here.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=here).close()
    except OSError as error:
        raise ValueError(
            f"IBKERNELS_AUTOTUNE cannot keep winners in {here} ({error}); name a folder with IBKERNELS_AUTOTUNE_DIR."
        ) from None


def _write(path: Path, problem: Problem, winner: Winner) -> None:
    """Whole or not at all: another process that searched the same replaces it by a winner of its own."""
    record = {"format": _FORMAT, **problem._asdict(), **winner._asdict(), **winner.config._asdict()}
    del record["config"]
    try:
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
            try:
                file.write(json.dumps(record, indent=1) + "\n")
                file.close()
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise
    except OSError as error:
        warnings.warn(f"the winner of IBKERNELS_AUTOTUNE's search was not kept in {path}: {error}", stacklevel=2)


def _call(config: Config) -> str:
    """What tells configurations apart."""
    return str(config.sizes)


def _source(config: Config | None) -> str:
    if config is None:
        return "None"
    blocks = ", ".join(f"{name}={size}" for name, size in config.blocks.items())
    return f"_config({config.num_warps}, {config.num_stages}, {blocks})"


if __name__ == "__main__":
    sys.exit(main())
