"""Measures an op: correctness against float64 first, then peak memory, then the time of every variant, interleaved.

Beside the variants run, in the same rounds, the op's floors (its library products, a copy of as many bytes as it moves)
and two probes of the machine (a square matrix product, a copy beyond the caches), from which the roofline follows.
"""

import functools
import gc
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
PRODUCT_PROBE, COPY_PROBE = "probe: product", "probe: copy"
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


def measure_op(
    op: Op,
    size: Size,
    dtype: torch.dtype,
    effort: Effort,
    only: Sequence[str] | None = None,
    passes: Sequence[str] = PASSES,
) -> dict[str, Record]:
    """A record for each pass of the op, by name. only: names of the variants that take part (None: all)."""
    torch.manual_seed(0)
    inputs = tuple(_as(tensor, dtype) for tensor in op.inputs(size))
    variants, left_out = op.variants(dtype, effort.generate_code)
    if only is not None:
        variants, left_out = {name: variants[name] for name in only}, {}
    # A timed backward pass runs again and again over the same graph.
    functorch_config.donated_buffer = False  # type: ignore[attr-defined, unused-ignore]
    errors = _errors(op, variants, inputs, dtype, left_out)
    records = {}
    for name in passes if op.trains else (FORWARD,):
        cost = op.cost(size, name, dtype.itemsize)
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
        records[case_name(op, dtype, name)] = {
            "op": op.name,
            "dtype": dtype_name(dtype),
            "passes": name,
            "size": size._asdict(),
            "cost": cost._asdict(),
            "relative_error": {variant: _worst(parts, name) for variant, parts in errors.items() if variant in steps},
            "peak_bytes": {} if name == BACKWARD else _peaks(steps),
            "left_out": absent,
            **_times(op, inputs, name, steps, cost.bytes, effort, dtype),
        }
        del steps
        gc.collect()
    return records


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


def _times(
    op: Op, inputs: Inputs, passes: str, steps: Steps, moved: float, effort: Effort, dtype: torch.dtype
) -> Record:
    """All samples, in seconds, of the variants and floors and, beside their work, of the probes."""
    matrix, probe_source, probe_target = _probes(effort, dtype)
    probes: Steps = {PRODUCT_PROBE: lambda: matrix @ matrix, COPY_PROBE: lambda: probe_target.copy_(probe_source)}
    floors: Steps = {}
    if op.floor is not None:
        floors[PRODUCTS] = torch.no_grad()(partial(op.floor, inputs, passes))
    source = torch.ones(int(moved) // 8)
    target = torch.ones_like(source)
    floors[COPY] = lambda: target.copy_(source)
    everything = {**steps, **floors, **probes}
    samples = interleave(everything, rounds_within(everything, effort.seconds, effort.least, effort.most))
    probed = {"product": samples.pop(PRODUCT_PROBE), "copy": samples.pop(COPY_PROBE)}
    work = {"flops": 2.0 * effort.probe_rows**3, "bytes": 2.0 * probe_source.nbytes}
    return {"seconds": samples, "probes": {**work, "seconds": probed}}


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
