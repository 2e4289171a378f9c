"""Run as a script, without Triton's interpreter: the ops' launches, compiled for an H100 as they would be there.

A launch compiles a kernel for its arguments: their dtypes, which are None, which are 1, which are multiples of 16. Here
the tensors are the CPU's, and nothing is run. Prints, for each kernel of the table, whether a launch at the sizes of a
model is for the arguments that `ibkernels.aot` takes; and of each kernel, how many launches were compiled, and whether
all of them fuse products into sums.
"""

import importlib
import json
import os
from collections.abc import Callable
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)
os.environ["TRITON_DEFAULT_FP_FUSION"] = "0"  # as a later Triton: what no launch asks for is not there

import torch
import triton
from triton.backends.compiler import GPUTarget

from ibkernels import aot
from ibkernels.gpu import bottleneck, configs, heads, philox
from ibkernels.options import LogitOptions

ARCH = "sm_90"
RNG = torch.tensor([3, 4])
PLAIN = LogitOptions()
EVERY_OPTION = LogitOptions(ignore_index=1, label_smoothing=0.1, z_loss=0.1, logit_scale=0.5)


class Driver:
    """What a launch asks of the driver before anything would run."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", int(ARCH.removeprefix("sm_")), 32)


class Compiled:
    """In the place of a kernel: a launch compiles it, and does no more."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.launches: list[dict[str, Any]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def compile(*arguments: Any, **settings: Any) -> None:
            self.launches.append(described(self.kernel.warmup(*arguments, grid=grid, **settings)))

        return compile


def described(compiled: Any) -> dict[str, Any]:
    """All that decides about the code of a kernel, beside its source: not the code, which names the source's lines."""
    source, settings = compiled.src, compiled.metadata
    aligned = {argument: found for argument, found in source.attrs.items() if found}
    return {
        "signature": source.signature,
        "constants": source.constants,
        "aligned": aligned,
        "settings": (settings.target, settings.num_warps, settings.num_stages, settings.shared),
        "fused": settings.enable_fp_fusion,
    }


def encode(tokens: int, features: int, width: int, rank: int | None, everything: bool = True) -> None:
    """Forward and backward, with all that is optional or with as little as can be."""
    hidden, bias, rows = torch.zeros(tokens, features).bfloat16(), torch.zeros(2 * width), torch.arange(tokens)
    encoder = torch.zeros(rank or 2 * width, features), None if rank is None else torch.zeros(2 * width, rank)
    inputs = (hidden, *encoder, bias, RNG, rows) if everything else (hidden, *encoder, None, None, None)
    options = (-8.0, 8.0), True
    z, kl, *saved = bottleneck.bottleneck_forward(*inputs, *options, True)
    needs = (True,) * 4 if everything else (True, False, True, False)
    bottleneck.bottleneck_backward(z, kl if everything else None, *inputs, (saved[0], saved[1]), *options, needs)


def lose(tokens: int, words: int, width: int, biased: bool, stats: bool, options: LogitOptions = PLAIN) -> None:
    """With a bias all gradients too, without one that of x alone."""
    x, weight = torch.zeros(tokens, width).bfloat16(), torch.zeros(words, width).bfloat16()
    bias, token_weight = (torch.zeros(words), torch.ones(tokens)) if biased else (None, None)
    labels, needs = torch.zeros(tokens, dtype=torch.int64), (True, biased, biased)
    heads.linear_cross_entropy(x, weight, bias, labels, token_weight, options, needs, stats)


# A launch at sizes of a model, kernels of the table that it compiles, and at which of its widths.
LIKE_A_MODEL: list[tuple[Callable[[], None], tuple[str, ...], int]] = [
    (lambda: encode(16384, 256, 256, None), ("bottleneck_linear_fwd", "bottleneck_linear_bwd"), 256),
    (lambda: encode(12287, 256, 256, None), ("bottleneck_linear_fwd_half",), 256),
    (lambda: encode(99, 256, 256, 32), tuple(name for name in aot.KERNELS if "_lora_" in name), 32),
    (lambda: lose(99, 1024, 256, True, True), ("cross_entropy_fwd_stats", "cross_entropy_finish"), 256),
    (lambda: lose(99, 1024, 256, True, False), ("cross_entropy_fwd", "cross_entropy_bwd_weight"), 256),
    (lambda: lose(99, 4096, 1024, False, True), ("softmax_grad",), 4096),
]
OTHERS: list[Callable[[], object]] = [
    lambda: encode(1, 1, 1, None),
    lambda: encode(1, 1, 1, 1),
    lambda: encode(5, 40, 19, None, False),
    lambda: encode(5, 40, 19, 8, False),
    lambda: lose(1, 1, 1, True, True),
    lambda: lose(5, 1001, 48, False, True, EVERY_OPTION),
    lambda: lose(1, 1, 1024, True, False),
    lambda: lose(5, 1001, 1024, True, True, EVERY_OPTION._replace(softcap=30.0)),
    lambda: philox.noise(RNG, torch.arange(5), 1),
]


def main() -> None:
    expected = {
        name: described(aot.compiled_kernel(aot.Job(name, ARCH, "bf16", width), configs.lookup(name, 2, width, ARCH)))
        for _, names, width in LIKE_A_MODEL
        for name in names
    }
    triton.runtime.driver.set_active(Driver())
    configs.chip = lambda device: ARCH
    configs.processors = lambda device: 132
    launched: dict[str, Compiled] = {}
    for module in {kernel.module for kernel in aot.KERNELS.values()} | {"philox"}:
        module = importlib.import_module(f"ibkernels.gpu.{module}")
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            launched[name] = Compiled(getattr(module, name))
            setattr(module, name, launched[name])
    same = dict.fromkeys(aot.KERNELS, False)
    for launch, names, _ in LIKE_A_MODEL:
        launch()
        same |= {name: launched[aot.KERNELS[name].name].launches[-1] == expected[name] for name in names}
    for launch in OTHERS:
        launch()
    launches = {name: len(kernel.launches) for name, kernel in launched.items()}
    fused = {name: all(launch["fused"] for launch in kernel.launches) for name, kernel in launched.items()}
    print(json.dumps({"same": same, "launches": launches, "fused": fused}))


if __name__ == "__main__":
    main()
