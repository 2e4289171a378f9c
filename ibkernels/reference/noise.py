"""The noise stream: Philox-4x32-10 (Salmon et al., SC'11) and Box-Muller, as a pure function of its counter.

Every backend draws these numbers: the uint32s bit for bit, the normals to float32 rounding.
"""

import math

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_TAG = 0x49424654  # "IBFT": keeps the counter clear of torch's own CUDA Philox, which leaves the fourth word small


def noise_bits(rng: Tensor, rows: Tensor, columns: int) -> Tensor:
    """The stream's uint32 words as int64 [N, columns]; rng int64 [2] is (seed, offset), rows int64 [N]."""
    groups = (columns + 15) // 16 * 4
    seed, offset = rng[0], rng[1]
    keys = [seed & _MASK, (seed >> 32) & _MASK]
    counter = [
        torch.arange(groups, device=rows.device)[None, :],  # [1, G]
        (rows & _MASK)[:, None],  # [N, 1]
        (offset & _MASK).expand(1, 1),
        (((offset >> 32) & _MASK) ^ _TAG).expand(1, 1),
    ]
    for _ in range(10):
        counter = _round(counter, keys)
        keys = [(key + weyl) & _MASK for key, weyl in zip(keys, _WEYL, strict=True)]
    # One call serves the columns {16m + 2q, +1, +8, +9}, those that one GPU thread holds of a tensor-core accumulator:
    # call 4m+q, output 2b+a goes to column 16m + 8b + 2q + a.
    shape = (rows.numel(), groups // 4, 4, 2, 2)  # [N, m, q, b, a]
    words = torch.stack([word.expand(rows.numel(), groups) for word in counter], dim=-1).view(shape)
    return words.transpose(2, 3).reshape(rows.numel(), 4 * groups)[:, :columns]


def noise(rng: Tensor, rows: Tensor, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normals [N, columns] of the stream, computed in float64 and rounded once to `dtype`."""
    padded = (columns + 15) // 16 * 16
    # Columns 2i and 2i+1 are one pair of Philox outputs, hence one Box-Muller pair: r cos t, r sin t.
    pairs = noise_bits(rng, rows, padded).view(rows.numel(), padded // 2, 2)
    uniform = ((pairs >> 8) | 1).to(torch.float64) * 2.0**-24  # inside (0, 1)
    radius = torch.sqrt(-2.0 * torch.log(uniform[..., 0]))
    angle = uniform[..., 1] * (2.0 * math.pi)
    normals = torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], dim=-1)
    return normals.view(rows.numel(), padded)[:, :columns].to(dtype)


def _round(counter: list[Tensor], keys: list[Tensor]) -> list[Tensor]:
    c0, c1, c2, c3 = counter
    # int64 wraps modulo 2^64, so the low 64 bits of the unsigned product are right; the mask undoes the sign extension.
    product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
    high0, low0 = (product0 >> 32) & _MASK, product0 & _MASK
    high1, low1 = (product1 >> 32) & _MASK, product1 & _MASK
    return [high1 ^ c1 ^ keys[0], low1, high0 ^ c3 ^ keys[1], low0]
