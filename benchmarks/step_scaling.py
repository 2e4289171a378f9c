"""How a training step's cost grows with vocabulary, sequence length, share of labels, K and the tapped layer.

`python -m benchmarks.step_scaling --record FILE`: SFT and IB-FT, eager and ours, as in `benchmarks.step`, on a smaller
model; every point passes the same comparison of gradients before it is timed.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from benchmarks.measure import can_measure_memory, environment, write_record
from benchmarks.report import tables
from benchmarks.step import Size, compare

_SMALL = Size(
    hidden=256, intermediate=688, layers=4, heads=4, vocabulary=32000, lora_rank=16, target_layer=3,
    rows=1, length=512, bottleneck_dims=(64,),
)  # fmt: skip
_TOY = Size(
    hidden=32, intermediate=64, layers=2, heads=2, vocabulary=128, lora_rank=4, target_layer=1,
    rows=1, length=32, bottleneck_dims=(8,),
)  # fmt: skip
# Axes by the field of a size that they change.
AXES: dict[str, dict[str, tuple[Any, ...]]] = {
    "full": {
        "vocabulary": (32000, 64000, 128000, 256000),
        "length": (128, 256, 512, 1024, 2048),
        "label_share": (0.1, 0.25, 0.5, 1.0),
        "bottleneck_dims": ((16,), (64,), (128,), (256,)),
        "target_layer": (1, 2, 3, 4),
    },
    "toy": {"vocabulary": (64, 128), "label_share": (0.25, 1.0), "bottleneck_dims": ((4,), (8,))},
}
SIZES = {"full": _SMALL, "toy": _TOY}


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step_scaling", description="How a step's time and memory grow."
    )
    parser.add_argument("--size", choices=AXES, default="full")
    parser.add_argument("--axis", action="append", help="one of the axes; may be given again (default: all)")
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of every variant (default: 7)")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch (default: 2)")
    parser.add_argument("--no-memory", action="store_true", help="time only")
    parser.add_argument("--record", metavar="FILE", help="write all that was measured, as JSON; after every point")
    options = parser.parse_args(arguments)
    axes = AXES[options.size]
    for axis in options.axis or ():
        if axis not in axes:
            parser.error(f"--axis {axis}: there are {', '.join(axes)}")
    torch.set_num_threads(options.threads)
    command = " ".join(["python -m benchmarks.step_scaling", *arguments])
    record: dict[str, Any] = {"suite": "step scaling", "command": command, **environment(), "axes": {}}
    memory = can_measure_memory() and not options.no_memory
    for axis in options.axis or axes:
        points = record["axes"][axis] = []
        for value in axes[axis]:
            size = replace(SIZES[options.size], **{axis: value})
            points.append(compare(size, options.rounds, memory, default_malloc=False))
            if options.record:
                write_record(options.record, record)
    print(tables(record))


if __name__ == "__main__":
    main()
