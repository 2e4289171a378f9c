"""How the cost of an op grows with N, H, K, R and V, and from which N the absorbed head is the cheaper one.

`python -m benchmarks.scaling --record FILE`: float32, forward and backward, against eager PyTorch and library products.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from benchmarks.cost import BOTH, Size, crossover
from benchmarks.measure import environment, interleave, relative_error, rounds_within, write_record
from benchmarks.op_cases import EAGER, OPS, OURS, Op, bottleneck_head
from benchmarks.ops import EFFORTS, TOLERANCE, Effort, measure_op, run_pass
from benchmarks.report import tables

Axis = tuple[str, tuple[int, ...]]

# For each op the size that the others keep, and for each axis its values.
SWEEPS: dict[str, dict[str, tuple[Size, tuple[Axis, ...]]]] = {
    "full": {
        "bottleneck, linear": (
            Size(2048, 1024, 256),
            (("tokens", (512, 1024, 2048, 4096, 8192)), ("hidden", (512, 1024, 2048, 4096)),
             ("bottleneck", (32, 64, 128, 256, 512))),
        ),
        "bottleneck, LoRA": (Size(2048, 1024, 256), (("rank", (8, 16, 32, 64, 128)),)),
        "linear CE": (
            Size(256, 512, 128),
            (("tokens", (64, 128, 256, 512, 1024)), ("vocabulary", (8000, 32000, 64000, 128000, 256000))),
        ),
        "bottleneck CE": (
            Size(512, 1024, 64),
            (("tokens", (128, 256, 512, 1024, 2048)), ("bottleneck", (16, 32, 64, 128, 256)),
             ("vocabulary", (8000, 32000, 64000, 128000))),
        ),
    },
    "toy": {
        "bottleneck, linear": (Size(16, 32, 8), (("tokens", (8, 16)),)),
        "bottleneck, LoRA": (Size(16, 32, 8, 4), (("rank", (2, 4)),)),
        "linear CE": (Size(16, 32, 8, vocabulary=64), (("vocabulary", (40, 64)),)),
        "bottleneck CE": (Size(16, 32, 4, vocabulary=64), (("tokens", (4, 16)),)),
    },
}  # fmt: skip
# N of each is that of the prediction, times FACTORS.
_WIDTHS = {"full": ((512, 64), (1024, 64), (1024, 128), (1024, 256), (2048, 128)), "toy": ((32, 4),)}
CROSSOVERS = {
    name: [Size(0, hidden, width, vocabulary=16000 if name == "full" else 64) for hidden, width in widths]
    for name, widths in _WIDTHS.items()
}
FACTORS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0)
ABSORBED, FULL_WIDTH = "absorbed", "full width"


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description="How cost grows with size.")
    parser.add_argument("--size", choices=SWEEPS, default="full")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch (default: 2)")
    parser.add_argument("--record", metavar="FILE", help="write all that was measured, as JSON; after every point")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    command = " ".join(["python -m benchmarks.scaling", *arguments])
    record: dict[str, Any] = {"suite": "scaling", "command": command, **environment(), "size": options.size}
    record |= {"sweeps": {}, "crossovers": {}}

    def save() -> None:
        if options.record:
            write_record(options.record, record)

    for name, (size, axes) in SWEEPS[options.size].items():
        for axis, values in axes:
            points: list[dict[str, Any]] = []
            record["sweeps"][f"{name} over {axis}"] = {"axis": axis, "points": points}
            for value in values:
                points.append(measure_point(OPS[name], size._replace(**{axis: value}), EFFORTS[options.size]))
                save()
    for size in CROSSOVERS[options.size]:
        name = f"H={size.hidden} K={size.bottleneck}"
        record["crossovers"][name] = measure_crossover(size, EFFORTS[options.size])
        save()
    print(tables(record))


def measure_point(op: Op, size: Size, effort: Effort) -> dict[str, Any]:
    """Ours, eager and the floors, forward and backward in float32."""
    (record,) = measure_op(op, size, torch.float32, effort, only=(EAGER, OURS), passes=(BOTH,)).values()
    return record


def measure_crossover(size: Size, effort: Effort) -> dict[str, Any]:
    """Our bottleneck's cross-entropy, absorbed and at full width, side by side at several N around the prediction."""
    op = OPS["bottleneck CE"]
    predicted = size.hidden * size.bottleneck / (size.hidden - 2 * size.bottleneck)  # as `ibkernels.absorbs`
    points = []
    for factor in FACTORS:
        here = size._replace(tokens=max(1, math.ceil(predicted * factor)))
        torch.manual_seed(0)
        inputs = op.inputs(here)
        calls = {name: bottleneck_head(None, name == ABSORBED) for name in (ABSORBED, FULL_WIDTH)}
        results = [run_pass(call, inputs, BOTH) for call in calls.values()]
        pairs = zip(*([*outputs, *gradients] for outputs, gradients in results), strict=True)
        error = max(relative_error(one, other) for one, other in pairs)
        if not error <= TOLERANCE[torch.float32]:
            raise RuntimeError(f"absorbed and at full width differ by {error:.2g} at {here}; neither is measured.")
        steps = {name: partial(run_pass, call, inputs, BOTH) for name, call in calls.items()}
        rounds = rounds_within(dict(steps), effort.seconds / 2, effort.least, effort.most)
        points.append({"tokens": here.tokens, "relative_error": error, "seconds": interleave(dict(steps), rounds)})
    return {"size": size._asdict(), "predicted": predicted, "predicted_here": crossover(size), "points": points}


if __name__ == "__main__":
    main()
