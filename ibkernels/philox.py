"""The noise stream as a public face: `rng_state` makes its (seed, offset), `noise` draws from it.

A pure function of (seed, offset, row id, column), never of tile sizes, threads, backend, packing, micro-batch or rank:
the backward pass regenerates it, and every backend draws the same numbers. Philox-4x32-10 (Salmon et al., SC'11).
"""

import torch
from torch import Tensor

from ibkernels import backends


def rng_state(device: torch.device | str | None = None, generator: torch.Generator | None = None) -> Tensor:
    """A fresh (seed, offset) of the noise stream: int64 [2] on `device`, each in [0, 2^63 - 1).

    Drawn with torch.randint: torch.manual_seed rules, and activation checkpointing draws the same when it recomputes.
    """
    return torch.randint(0, 2**63 - 1, (2,), device=device, generator=generator, dtype=torch.int64)


def noise(rng: Tensor, rows: Tensor, columns: int, *, backend: str | None = None) -> Tensor:
    """Standard normals float32 [N, columns] of the noise stream, as the bottleneck draws them.

    rng: int64 [2], seed and offset. rows: int64 [N], row ids, taken modulo 2^32. Raises ValueError for other shapes or
    dtypes, and for a backend that cannot serve the call.
    """
    check_rng(rng, rows.device)
    if rows.dim() != 1 or rows.dtype != torch.int64:
        raise ValueError(f"rows is {rows.dtype} of shape {tuple(rows.shape)}; the noise stream takes int64 [N].")
    if columns < 0:
        raise ValueError(f"columns is {columns}; it must not be negative.")
    return torch.ops.ibkernels.noise(rng, rows, columns, backend or "")


def check_rng(rng: Tensor, device: torch.device) -> None:
    """Raises ValueError unless rng is int64 [2] on `device`."""
    if rng.dtype != torch.int64 or rng.shape != (2,):
        raise ValueError(f"rng is {rng.dtype} of shape {tuple(rng.shape)}; it must be int64 [2] (seed, offset).")
    if rng.device != device:
        raise ValueError(f"rng is on {rng.device} but the data on {device}; make it there: rng_state(device).")


@torch.library.custom_op("ibkernels::noise", mutates_args=())
def _noise(rng: Tensor, rows: Tensor, columns: int, backend: str) -> Tensor:
    module = backends.select("noise", rows.device.type, torch.float32, backend).backend.load()
    return module.noise(rng, rows, columns).contiguous()


@_noise.register_fake
def _(rng: Tensor, rows: Tensor, columns: int, backend: str) -> Tensor:
    return rows.new_empty((rows.shape[0], columns), dtype=torch.float32)
