"""The C++ backend: the ops of the native library under the names that every backend has."""

import torch
from torch import Tensor


def noise_bits(rng: Tensor, rows: Tensor, columns: int) -> Tensor:
    """As `reference.noise_bits`."""
    return torch.ops.ibkernels_cpu.philox_bits(rng, rows, columns)


def noise(rng: Tensor, rows: Tensor, columns: int) -> Tensor:
    """As `reference.noise`, float32."""
    return torch.ops.ibkernels_cpu.philox_normal(rng, rows, columns)
