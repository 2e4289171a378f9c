"""Launch configurations: one table of shipped ones, per kernel, element size, width and chip.

What the table names was compiled for the chips it names (`python -m ibkernels.aot` does so again): registers, spills
and shared memory are facts. Which of several is fastest is not confirmed by any GPU yet, except where a record under
benchmarks/results says so.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

# What every kernel is compiled with. Products are fused into the sums that they go into, each with one rounding and one
# instruction: Triton's own choice until 3.9, which warns that a later one will not.
COMPILER = {"enable_fp_fusion": True}


class Config(NamedTuple):
    """Block sizes, and how many warps and pipeline stages run them."""

    blocks: dict[str, int]
    num_warps: int
    num_stages: int

    @property
    def sizes(self) -> dict[str, int]:
        """All of it by name."""
        return {**self.blocks, "num_warps": self.num_warps, "num_stages": self.num_stages}

    @property
    def launch(self) -> dict[str, int]:
        """What a launch takes."""
        return {**self.sizes, **COMPILER}


def _config(num_warps: int, num_stages: int, **blocks: int) -> Config:
    return Config(blocks, num_warps, num_stages)


ANY = 2**31  # a width that tiles take, however large

# kernel -> bytes of an element -> (greatest width it is for, configuration by chip; "default" for the others). The
# width is D of a cross-entropy, K of the linear encoder, R of LoRA's, V of the softmax's gradient.
_SHIPPED: dict[str, dict[int, list[tuple[int, dict[str, Config | None]]]]] = {
    "bottleneck_linear_fwd": {
        2: [
            (64, {"default": _config(4, 3, BM=64, BK=64, BH=64)}),
            (
                ANY,
                {
                    "default": _config(8, 3, BM=128, BK=128, BH=64),
                    "sm_80": _config(8, 4, BM=128, BK=128, BH=32),
                    "sm_89": _config(8, 4, BM=128, BK=128, BH=32),
                    "gfx942": _config(8, 2, BM=128, BK=128, BH=64),
                },
            ),
        ],
        4: [(ANY, {"default": _config(4, 2, BM=64, BK=32, BH=32)})],
    },
    # The same kernel where tiles as large as these would leave many processors idle, all the time or in the last wave.
    "bottleneck_linear_fwd_half": {
        2: [(ANY, {"default": _config(8, 3, BM=128, BK=64, BH=64), "sm_80": _config(8, 4, BM=128, BK=64, BH=32)})],
    },
    "bottleneck_linear_bwd": {size: [(ANY, {"default": _config(4, 2, BM=32, BK=64)})] for size in (2, 4)},
    "bottleneck_lora_fwd": {
        2: [
            (64, {"default": _config(4, 3, BM=64, BK=32, BH=128)}),
            (128, {"default": _config(4, 3, BM=64, BK=32, BH=64)}),
        ],
        4: [(32, {"default": _config(4, 2, BM=32, BK=32, BH=32)})],
    },
    "bottleneck_lora_bwd_t": {
        2: [
            (64, {"default": _config(4, 2, BM=64, BK=32), "sm_89": _config(8, 2, BM=64, BK=32)}),
            (
                128,
                {
                    "default": _config(8, 2, BM=64, BK=32),
                    "sm_89": _config(8, 2, BM=32, BK=32),
                    "gfx942": _config(4, 2, BM=64, BK=16),
                },
            ),
        ],
        4: [(32, {"default": _config(4, 2, BM=64, BK=32)})],
    },
    "bottleneck_lora_bwd_b": {
        2: [
            (64, {"default": _config(4, 2, BM=64, BK=32), "sm_100": _config(8, 2, BM=64, BK=32)}),
            (
                128,
                {
                    "default": _config(8, 2, BM=64, BK=32),
                    "sm_100": _config(8, 1, BM=64, BK=16),
                    "gfx942": _config(4, 2, BM=64, BK=16),
                },
            ),
        ],
        4: [
            (
                32,
                {
                    "default": _config(4, 2, BM=64, BK=32),
                    "sm_89": _config(4, 2, BM=32, BK=32),
                    "sm_100": _config(4, 2, BM=32, BK=32),
                },
            ),
        ],
    },
    "bottleneck_lora_bwd_hidden": {
        2: [
            (
                64,
                {
                    "default": _config(4, 3, BM=64, BH=128),
                    "sm_80": _config(4, 2, BM=64, BH=64),
                    "sm_89": _config(4, 2, BM=64, BH=64),
                },
            ),
            (
                128,
                {
                    "default": _config(8, 3, BM=64, BH=128),
                    "sm_80": _config(4, 2, BM=32, BH=64),
                    "sm_89": _config(4, 2, BM=32, BH=64),
                    "gfx942": _config(4, 2, BM=64, BH=64),
                },
            ),
        ],
        4: [(32, {"default": _config(4, 2, BM=32, BH=64), "sm_80": _config(8, 2, BM=32, BH=64)})],
    },
    "cross_entropy_fwd": {
        2: [
            (
                128,
                {
                    "default": _config(8, 2, BM=128, BV=128),
                    "sm_89": _config(8, 2, BM=128, BV=64),
                    "gfx942": _config(8, 1, BM=128, BV=64),
                },
            ),
            (
                256,
                {
                    "default": _config(8, 2, BM=128, BV=64),
                    "sm_80": _config(8, 2, BM=64, BV=128),
                    "sm_89": _config(8, 2, BM=64, BV=64),
                    "gfx942": _config(8, 1, BM=128, BV=32),
                },
            ),
            (
                512,
                {
                    "default": _config(8, 2, BM=64, BV=32),
                    "sm_89": _config(8, 2, BM=64, BV=16),
                    "sm_100": None,  # none was found that spills nothing and multiplies by tcgen05
                    "gfx942": _config(8, 1, BM=32, BV=16),
                },
            ),
        ],
    },
    # The same kernel with statistics or label smoothing, which take registers.
    "cross_entropy_fwd_stats": {
        2: [
            (
                128,
                {
                    "default": _config(8, 2, BM=128, BV=32),
                    "sm_90": _config(8, 2, BM=128, BV=128),
                    "gfx942": _config(8, 1, BM=128, BV=32),
                },
            ),
            (
                256,
                {
                    "default": _config(8, 2, BM=64, BV=64),
                    "sm_90": _config(8, 2, BM=128, BV=64),
                    "gfx942": _config(8, 1, BM=64, BV=32),
                },
            ),
            (
                512,
                {
                    "default": _config(8, 2, BM=64, BV=16),
                    "sm_100": None,
                    "gfx942": _config(4, 1, BM=64, BV=32),
                },
            ),
        ],
    },
    "cross_entropy_finish": {
        2: [(256, {"default": _config(4, 1, BM=16)}), (512, {"default": _config(4, 1, BM=8)})],
    },
    "cross_entropy_bwd_weight": {
        2: [
            (128, {"default": _config(8, 2, BM=64, BV=128), "gfx942": _config(8, 1, BM=32, BV=128)}),
            (
                256,
                {
                    "default": _config(8, 2, BM=64, BV=64),
                    "sm_90": _config(8, 2, BM=32, BV=128),
                    "sm_100": _config(8, 2, BM=32, BV=128),
                    "gfx942": _config(8, 1, BM=16, BV=128),
                },
            ),
            (
                512,
                {
                    "default": _config(8, 2, BM=32, BV=64),
                    "sm_89": _config(8, 2, BM=16, BV=64),
                    "gfx942": _config(8, 1, BM=16, BV=32),
                },
            ),
        ],
    },
    "softmax_grad": {size: [(ANY, {"default": _config(8, 1, BV=4096)})] for size in (2, 4)},
}
# Small, so that the small tensors of a test still span several blocks of every kind.
_INTERPRETED = {"BM": 16, "BK": 16, "BH": 16, "BV": 32}


def choose(kernel: str, tensor: Tensor, width: int) -> Config:
    """The shipped configuration of a kernel for the tensor's dtype and device; width as the table counts it."""
    return lookup(kernel, tensor.element_size(), width, chip(tensor.device))


def lookup(kernel: str, element_size: int, width: int, chip_name: str) -> Config:
    """The table's entry: the narrowest that `width` fits into."""
    config = _of_chip(entry(kernel, element_size, width), chip_name)
    assert config is not None, f"{kernel} has no configuration of width {width} for {chip_name}: see `widest`"
    if chip_name == "interpreter":
        return config._replace(blocks={name: _INTERPRETED[name] for name in config.blocks})
    return config


def entry(kernel: str, element_size: int, width: int) -> dict[str, Config | None]:
    """Every chip's configuration of the table's row for `width`."""
    return next(by_chip for limit, by_chip in _SHIPPED[kernel][element_size] if width <= limit)


def widest(kernel: str, element_size: int, chip_name: str) -> int:
    """The widest that the table has a configuration for on that chip; 0 for elements of a size that it has not."""
    entries = _SHIPPED[kernel].get(element_size, [])
    return max((limit for limit, by_chip in entries if _of_chip(by_chip, chip_name) is not None), default=0)


def _of_chip(by_chip: dict[str, Config | None], chip_name: str) -> Config | None:
    name = chip_name if chip_name in by_chip else _like(chip_name)
    return by_chip.get(name, by_chip["default"])


def _like(chip_name: str) -> str:
    """The chip of the table that has the same matrix instructions as one that is not in it, and no more memory."""
    if chip_name.startswith("gfx"):
        return "gfx942"
    if chip_name == "sm_86" or chip_name.startswith("sm_12"):  # 99 KiB of shared memory
        return "sm_89"
    if chip_name.startswith(("sm_10", "sm_11")):
        return "sm_100"
    return "sm_80" if chip_name == "sm_87" else chip_name


def has_tf32(chip_name: str) -> bool:
    """Whether Triton multiplies in TF32 there."""
    return not chip_name.startswith("gfx") or chip_name == "gfx942"


@functools.cache
def chip(device: torch.device) -> str:
    """sm_90 and the like, gfx942 and the like; "interpreter" on the CPU."""
    if device.type == "cpu":
        return "interpreter"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def splits(device: torch.device, row_blocks: int, column_blocks: int) -> int:
    """Over how many programs to split the vocabulary of a block of rows: the fewest within a tenth of the best.

    row_blocks * s programs of 1/s of the work each run in waves of as many as there are processors. Each split leaves
    sums of its own in memory.
    """
    if device.type == "cpu":
        return min(2, column_blocks)
    count = processors(device)
    times = [-(-row_blocks * s // count) / s for s in range(1, min(8, column_blocks) + 1)]
    return next(s for s, time in enumerate(times, 1) if time <= 1.1 * min(times))


@functools.cache
def processors(device: torch.device) -> int:
    """How many multiprocessors a GPU has; a few on the CPU, where the interpreter runs."""
    if device.type == "cpu":
        return 8
    return torch.cuda.get_device_properties(device).multi_processor_count
