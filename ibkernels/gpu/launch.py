"""What every launch decides alike: its configuration and device, the precision of float32 products, dtypes of sums."""

import contextlib
import os
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from ibkernels.gpu import configs
from ibkernels.gpu.configs import Config

T = TypeVar("T")


def configured(
    kernel: str,
    tensor: Tensor,
    width: int,
    run: Callable[[Config], T],
    trial: Callable[[Config], object] | None = None,
) -> T:
    """run(configuration): the shipped one, or with IBKERNELS_AUTOTUNE=1 the fastest that a search here has found.

    kernel and width: as in the table of `configs`; tensor [N, ...] gives the device, the dtype and N. The search calls
    `trial` (None: run) again and again: it reads what run reads and writes over nothing of it.
    """
    with on_device(tensor.device):
        switch = os.environ.get("IBKERNELS_AUTOTUNE", "0")
        if switch not in ("", "0", "1"):
            raise ValueError(f"IBKERNELS_AUTOTUNE is {switch!r}; it must be 1 (search) or 0.")
        if switch == "1":
            from ibkernels.gpu import autotune

            return run(autotune.choose(kernel, tensor, width, trial or run))
        return run(configs.choose(kernel, tensor, width))


def on_device(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Makes a GPU the current one: Triton launches on the current device and its stream, wherever the tensors are."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def dot_precision(tensor: Tensor) -> str:
    """Triton's input_precision: TF32 for float32 where torch's own switch allows it and the chip has it."""
    # fp32_precision and not allow_tf32, which raises where fp32_precision was set.
    if tensor.dtype != torch.float32 or torch.backends.cuda.matmul.fp32_precision != "tf32":
        return "ieee"  # half types have no choice
    return "tf32" if configs.has_tf32(configs.chip(tensor.device)) else "ieee"


def mm_float32(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a @ b with a float32 result, as the sums of low-precision products are; a library GEMM."""
    if a.dtype == torch.float32:
        return torch.mm(a, b, out=out)
    if a.device.type == "cpu":  # the interpreter's; the CPU's GEMM has no such output
        return torch.mm(a.float(), b.float(), out=out)
    return torch.mm(a, b, out_dtype=torch.float32, out=out)
