"""The noise stream in Triton: the counter contract of `reference.noise`, drawn where a kernel holds the columns.

One Philox call gives the four columns {16m + 2q, +1, +8, +9}, which one GPU thread holds of a tensor-core accumulator,
so the compiler computes each call once: about 45 instructions a normal.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ibkernels.gpu.configs import COMPILER
from ibkernels.gpu.launch import on_device

_BLOCK_ROWS = 32
_BLOCK_COLUMNS = 64


@triton.jit
def load_rng(rng):
    """(key, offset low, offset high) of the stream from int64 [2] (seed, offset); the key is the seed as it is."""
    offset = tl.load(rng + 1).to(tl.uint64)
    low = (offset & 0xFFFFFFFF).to(tl.uint32)
    high = (offset >> 32).to(tl.uint32) ^ 0x49424654  # "IBFT": clear of torch's own CUDA Philox
    return tl.load(rng).to(tl.uint64), low, high


@triton.jit
def row_ids(rows, o_n, mask, HAS_ROWS: tl.constexpr):
    """uint32 [BM]: the loaded ids, modulo 2^32, or the rows' own numbers."""
    if HAS_ROWS:
        return tl.load(rows + o_n, mask=mask, other=0).to(tl.uint32)
    else:
        return o_n.to(tl.uint32)


@triton.jit
def _words(b_row, first, key, low, high, BK: tl.constexpr):
    i = tl.arange(0, BK)[None, :]
    group = ((first >> 2) + (((i >> 4) << 2) | ((i >> 1) & 3))).to(tl.uint32)
    zero = b_row * 0 + group * 0
    return tl.philox(key, zero + group, zero + b_row, zero + low, zero + high)


@triton.jit
def _uniform(word):
    """((word >> 8) | 1) 2^-24, exactly: a float in [1, 2) of 23 bits, less 1 - 2^-24."""
    return ((word >> 9) | 0x3F800000).to(tl.float32, bitcast=True) - 0.99999994039535522


@triton.jit
def _cos_sin_turn(word):
    """cos and sin of 2 pi u(word): the quadrant from the top bits, the rest by polynomials (tl.cos branches)."""
    quadrant = word >> 30
    t = (((word >> 7) & 0x7FFFFC) | 0x3F800000).to(tl.float32, bitcast=True) - 1.49999976158142090
    t = t * 1.5707963267948966  # in +-pi/4, about the middle of the quadrant
    t2 = t * t
    sin = t * (1.0 + t2 * (-0.16666667 + t2 * (8.3333333e-3 + t2 * (-1.98412698e-4 + t2 * 2.7557319e-6))))
    cos = 1.0 + t2 * (-0.5 + t2 * (4.16666667e-2 + t2 * (-1.38888889e-3 + t2 * 2.48015873e-5)))
    across = 0.7071067811865476 * (cos - sin)  # cos(pi/4 + t)
    along = 0.7071067811865476 * (cos + sin)  # sin(pi/4 + t)
    odd = (quadrant & 1) != 0
    b_cos = tl.where(odd, along, across)
    b_sin = tl.where(odd, across, along)
    b_cos = tl.where((quadrant == 1) | (quadrant == 2), -b_cos, b_cos)
    return b_cos, tl.where(quadrant >= 2, -b_sin, b_sin)


@triton.jit
def normals(b_row, first, key, low, high, BK: tl.constexpr):
    """Standard normals [BM, BK] of columns first .. first + BK - 1 (first a multiple of 16); b_row uint32 [BM, 1].

    As float32 they differ from the reference's by 1e-6, and by at most 2e-7 / r where the radius r is small: the GPU's
    logarithm has an absolute error near 1. Below zero, where it could then end, there is no root.
    """
    i = tl.arange(0, BK)[None, :]
    x0, x1, x2, x3 = _words(b_row, first, key, low, high, BK)
    upper = (i & 8) != 0
    radius = tl.sqrt(tl.maximum(-2.0 * tl.log(_uniform(tl.where(upper, x2, x0))), 0.0))
    cos, sin = _cos_sin_turn(tl.where(upper, x3, x1))
    return radius * tl.where((i & 1) != 0, sin, cos)


@triton.jit
def noise_kernel(rng, rows, out, N, K, BITS: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr):
    """out [N, K]: the uint32 words as int64 (BITS), or the normals."""
    o_n = tl.program_id(0) * BM + tl.arange(0, BM)
    first = tl.program_id(1) * BK
    o_k = first + tl.arange(0, BK)
    mask = o_n < N
    key, low, high = load_rng(rng)
    b_row = row_ids(rows, o_n, mask, True)[:, None]
    if BITS:
        i = tl.arange(0, BK)[None, :]
        x0, x1, x2, x3 = _words(b_row, first, key, low, high, BK)
        odd = (i & 1) != 0
        b_out = tl.where((i & 8) != 0, tl.where(odd, x3, x2), tl.where(odd, x1, x0)).to(tl.int64)
    else:
        b_out = normals(b_row, first, key, low, high, BK)
    tl.store(out + o_n.to(tl.int64)[:, None] * K + o_k[None, :], b_out, mask=mask[:, None] & (o_k < K)[None, :])


def noise_bits(rng: Tensor, rows: Tensor, columns: int) -> Tensor:
    """As `reference.noise_bits`."""
    return _draw(rng, rows, columns, torch.int64)


def noise(rng: Tensor, rows: Tensor, columns: int) -> Tensor:
    """As `reference.noise`, float32."""
    return _draw(rng, rows, columns, torch.float32)


def _draw(rng: Tensor, rows: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    out = torch.empty(rows.numel(), columns, device=rows.device, dtype=dtype)
    if out.numel():
        grid = (triton.cdiv(rows.numel(), _BLOCK_ROWS), triton.cdiv(columns, _BLOCK_COLUMNS))
        with on_device(rows.device):
            noise_kernel[grid](
                rng.contiguous(), rows.contiguous(), out, *out.shape, BITS=dtype == torch.int64,
                BM=_BLOCK_ROWS, BK=_BLOCK_COLUMNS, **COMPILER,
            )  # fmt: skip
    return out
