"""Measures an op: correctness against float64 first, then peak memory, then the time of every variant, interleaved.

Beside the variants run, in the same rounds, the op's floors (its library products, a copy of as many bytes as it moves)
and two probes of the machine (a square matrix product, a copy beyond the caches), from which the roofline follows.
"""

import functools
import gc
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch._functorch.config as functorch_config
from torch import Tensor

from benchmarks.cost import BACKWARD, BOTH, FORWARD, PASSES, Size
from benchmarks.measure import (
    can_measure_memory,
    interleave,
    peak_of,
    pinned_malloc,
    relative_error,
    rounds_within,
)
from benchmarks.op_cases import OURS, Call, Inputs, Op

# ||x - x64|| / ||x64|| of every output and gradient: a few roundings to the dtype.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
PRODUCTS, COPY = "floor: products", "floor: copy"
PRODUCT_PROBE, COPY_PROBE = "product", "copy"
_RNG = (0, 1)  # of the noise that variants share when they are compared

Steps = dict[str, Callable[[], object]]
Record = dict[str, Any]


class Effort(NamedTuple):
    """How much to spend on one pass of one op: seconds, and the least and the most rounds."""

    seconds: float
    least: int
    most: int
    probe_rows: int = 1536  # of the square product
    probe_bytes: int = 256 * 2**20  # of the copy, read and written each
    generate_code: bool = True  # by torch.compile


EFFORTS = {"toy": Effort(0.0, 2, 2, 32, 2**16, generate_code=False), "full": Effort(3.0, 5, 40)}


class Case:
    """One pass of an op whose correctness is known; `visit` times it, at once or a few rounds now and some later."""

    def __init__(self, op: Op, inputs: Inputs, calls: dict[str, Call], record: Record, effort: Effort) -> None:
        self.record = record  # with all samples so far
        self._op, self._inputs, self._calls, self._effort = op, inputs, calls, effort
        self._visited = 0

    def visit(self, visits: int = 1) -> None:
        """Times all variants, floors and probes, interleaved, for one of that many parts of the effort."""
        steps = self._steps()
        probes = self.record["probes"]["seconds"]
        if not self._visited:
            effort = self._effort
            least, most = (math.ceil(rounds / visits) for rounds in (effort.least, effort.most))
            self._rounds = rounds_within(steps, effort.seconds / visits, least, most)
        # A call so long that one round takes a visit's time does not notice what is in the caches.
        samples = interleave(steps, self._rounds, first=self._visited, warm_up=self._rounds > 1)
        for name, seconds in samples.items():
            kept = probes if name in probes else self.record["seconds"]
            kept.setdefault(name, []).extend(seconds)
        self._visited += 1

    def _steps(self) -> Steps:
        passes = self.record["passes"]
        steps = {name: _step(call, self._inputs, passes) for name, call in self._calls.items()}
        if self._op.floor is not None:
            steps[PRODUCTS] = torch.no_grad()(partial(self._op.floor, self._inputs, passes))
        source = torch.ones(int(self.record["cost"]["bytes"]) // 8)
        target = torch.ones_like(source)
        matrix, probe_source, probe_target = _probes(self._effort, self._inputs[0].dtype)
        return {
            **steps,
            COPY: lambda: target.copy_(source),
            PRODUCT_PROBE: lambda: matrix @ matrix,
            COPY_PROBE: lambda: probe_target.copy_(probe_source),
        }


def measure_op(
    op: Op,
    size: Size,
    dtype: torch.dtype,
    effort: Effort,
    only: Sequence[str] | None = None,
    passes: Sequence[str] = PASSES,
) -> dict[str, Record]:
    """A record for each pass of the op, by name. only: names of the variants that take part (None: all)."""
    cases = prepare(op, size, dtype, effort, only, passes)
    for case in cases.values():
        case.visit()
    return {name: case.record for name, case in cases.items()}


def prepare(
    op: Op,
    size: Size,
    dtype: torch.dtype,
    effort: Effort,
    only: Sequence[str] | None = None,
    passes: Sequence[str] = PASSES,
) -> dict[str, Case]:
    """The passes of the op, by name: checked, their peaks measured, not timed yet."""
    torch.manual_seed(0)
    inputs = tuple(_as(tensor, dtype) for tensor in op.inputs(size))
    variants, left_out = op.variants(dtype, effort.generate_code)
    if only is not None:
        variants, left_out = {name: variants[name] for name in only}, {}
    # A timed backward pass runs again and again over the same graph.
    functorch_config.donated_buffer = False  # type: ignore[attr-defined, unused-ignore]
    errors = _errors(op, variants, inputs, dtype, left_out)
    cases = {}
    for name in passes if op.trains else (FORWARD,):
        steps: Steps = {}
        absent = dict(left_out)
        for variant, call in variants.items():
            if variant in left_out:
                continue
            try:
                steps[variant] = _step(call, inputs, name)
                for _ in range(2 if name == BACKWARD else 1):  # who lets go of the graph fails in the second of these
                    steps[variant]()
            except Exception as error:  # a library's own limits: the others are measured all the same
                steps.pop(variant, None)
                absent[variant] = _reason(error)
        record = {
            "op": op.name,
            "dtype": dtype_name(dtype),
            "passes": name,
            "size": size._asdict(),
            "cost": op.cost(size, name, dtype.itemsize)._asdict(),
            "relative_error": {variant: _worst(parts, name) for variant, parts in errors.items() if variant in steps},
            "peak_bytes": {} if name == BACKWARD else _peaks(steps),
            "left_out": absent,
            "seconds": {},
            "probes": {
                "flops": 2.0 * effort.probe_rows**3,
                "bytes": 2.0 * effort.probe_bytes,
                "seconds": {PRODUCT_PROBE: [], COPY_PROBE: []},
            },
        }
        calls = {variant: variants[variant] for variant in steps}
        cases[case_name(op, dtype, name)] = Case(op, inputs, calls, record, effort)
        del steps
        gc.collect()
    return cases


def run_pass(call: Call, inputs: Inputs, passes: str, rng: Tensor | None = None) -> tuple[Inputs, Inputs]:
    """A call's outputs and, with a backward pass, the gradients of those inputs that require them."""
    if passes == FORWARD:
        with torch.no_grad():
            return call(inputs, rng), ()
    outputs = call(inputs, rng)
    gradients = torch.autograd.grad(outputs, _wanted(inputs), _upstream(outputs))
    return tuple(output.detach() for output in outputs), gradients


def case_name(op: Op, dtype: torch.dtype, passes: str) -> str:
    """Of a record."""
    return f"{op.name}, {dtype_name(dtype)}: {passes}"


def dtype_name(dtype: torch.dtype) -> str:
    """Without torch's name before it."""
    return str(dtype).removeprefix("torch.")


def _errors(
    op: Op, variants: dict[str, Call], inputs: Inputs, dtype: torch.dtype, left_out: dict[str, str]
) -> dict[str, dict[str, float]]:
    """Of the outputs and of the gradients, the largest, by variant; what errs too much goes to `left_out`."""
    passes = BOTH if op.trains else FORWARD
    rng = torch.tensor(_RNG)
    doubles = tuple(_as(each, torch.float64) for each in inputs)
    exact_outputs, exact_gradients = run_pass(op.exact or op.eager, doubles, passes, rng)
    errors = {}
    for name, call in variants.items():
        if op.exact is not None and not name.startswith(OURS):
            continue  # draws other numbers
        try:
            outputs, gradients = run_pass(call, inputs, passes, rng)
        except Exception as error:  # another library's: the others are measured all the same
            left_out[name] = _reason(error)
            continue
        pairs = {"outputs": (outputs, exact_outputs), "gradients": (gradients, exact_gradients)}
        errors[name] = {
            part: max((relative_error(a, e) for a, e in zip(actual, exact, strict=True)), default=0.0)
            for part, (actual, exact) in pairs.items()
        }
        worst = max(errors[name].values())
        if not worst <= TOLERANCE[dtype]:
            left_out[name] = f"differs from float64 by {worst:.2g} (accepted: {TOLERANCE[dtype]:.0e})"
    return errors


@functools.cache
def _probes(effort: Effort, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    source = torch.ones(effort.probe_bytes // 4)
    return torch.randn(effort.probe_rows, effort.probe_rows).to(dtype), source, torch.ones_like(source)


def _peaks(steps: Steps) -> dict[str, float]:
    """Bytes at the highest point of a pass beyond what was there before, its results included."""
    if not can_measure_memory():
        return {}
    peaks = {}
    gc.collect()
    with pinned_malloc() as trim:
        for name, step in steps.items():
            found = peak_of(step, trim, repeats=1)
            peaks[name] = max(0.0, found["peak"] - found["rest"]) * 2**20
    return peaks


def _step(call: Call, inputs: Inputs, passes: str) -> Callable[[], object]:
    """What is timed."""
    if passes != BACKWARD:
        return partial(run_pass, call, inputs, passes)
    outputs = call(inputs, None)
    return partial(torch.autograd.grad, outputs, _wanted(inputs), _upstream(outputs), retain_graph=True)


def _upstream(outputs: Inputs) -> list[Tensor]:
    """No number is like another, as in training; made of what costs nothing."""
    return [torch.ones_like(output) if output.dim() == 0 else output.detach() for output in outputs]


def _wanted(inputs: Inputs) -> list[Tensor]:
    return [tensor for tensor in inputs if tensor.requires_grad]


def _worst(errors: dict[str, float], passes: str) -> float:
    return max(errors.values()) if passes == BOTH else errors["outputs" if passes == FORWARD else "gradients"]


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to(dtype).requires_grad_(tensor.requires_grad) if tensor.is_floating_point() else tensor


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
