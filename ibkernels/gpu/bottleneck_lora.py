"""The bottleneck with a LoRA encoder: one pass over the hidden states, everything else on chip.

t = hidden A^T                       2·N·H·R FLOPs, N·H elements read once: bound by memory
[mu | logvar] = t B^T + bias         2·N·2K·R FLOPs, from t in registers

Backward is in `bottleneck_lora_bwd`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ibkernels.gpu import configs
from ibkernels.gpu.configs import Config
from ibkernels.gpu.launch import configured, dot_precision
from ibkernels.gpu.philox import load_rng, normals, row_ids


@triton.jit
def encode_tile(
    b_t, lora_b, bias, first, K, R, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr
):
    """mu and raw logvar [BM, BK] of columns first .. first + BK - 1, and the two tiles of B they came from [BR, BK]."""
    o_k = first + tl.arange(0, BK)
    o_r = tl.arange(0, BR)
    in_k = o_k < K
    mask = (o_r < R)[:, None] & in_k[None, :]
    p_mu = lora_b + o_k[None, :] * R + o_r[:, None]
    b_mu_weight = tl.load(p_mu, mask=mask, other=0.0)
    b_logvar_weight = tl.load(p_mu + K * R, mask=mask, other=0.0)
    b_mu = tl.dot(b_t, b_mu_weight, input_precision=PRECISION)
    b_raw = tl.dot(b_t, b_logvar_weight, input_precision=PRECISION)
    if HAS_BIAS:
        b_mu += tl.load(bias + o_k, mask=in_k, other=0.0).to(tl.float32)[None, :]
        b_raw += tl.load(bias + K + o_k, mask=in_k, other=0.0).to(tl.float32)[None, :]
    return b_mu, b_raw, b_mu_weight, b_logvar_weight


@triton.jit(do_not_specialize=["N"])
def bottleneck_lora_fwd_kernel(
    hidden,  # [N, H], rows stride_n apart
    lora_a,  # [R, H]
    lora_b,  # [2K, R]
    bias,  # [2K], of any dtype
    rng,
    rows,
    z,  # [N, K]
    t,  # [N, R], saved
    kl,  # [N] float32, the sum over K times kl_scale
    N,
    H,
    K,
    R,
    stride_n,
    kl_scale,
    logvar_min,
    logvar_max,
    HAS_BIAS: tl.constexpr,
    SAMPLE: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    SAVE: tl.constexpr,
    EVEN_H: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BH: tl.constexpr,
    BR: tl.constexpr,
):
    o_n = tl.program_id(0) * BM + tl.arange(0, BM)
    o_h = tl.arange(0, BH)
    o_r = tl.arange(0, BR)
    in_n, in_r = o_n < N, o_r < R
    p_hidden = hidden + o_n.to(tl.int64)[:, None] * stride_n + o_h[None, :]
    p_a = lora_a + o_r.to(tl.int64)[None, :] * H + o_h[:, None]
    acc = tl.zeros((BM, BR), tl.float32)
    for h in range(0, H, BH):
        if EVEN_H:
            b_hidden = tl.load(p_hidden + h, mask=in_n[:, None], other=0.0)
            b_a = tl.load(p_a + h, mask=in_r[None, :], other=0.0)
        else:
            in_h = h + o_h < H
            b_hidden = tl.load(p_hidden + h, mask=in_n[:, None] & in_h[None, :], other=0.0)
            b_a = tl.load(p_a + h, mask=in_r[None, :] & in_h[:, None], other=0.0)
        acc = tl.dot(b_hidden, b_a, acc, input_precision=PRECISION)
    b_t = acc.to(lora_b.dtype.element_ty)  # rounded here as everywhere, so that backward sees the same
    if SAVE:
        tl.store(t + o_n.to(tl.int64)[:, None] * R + o_r[None, :], b_t, mask=in_n[:, None] & in_r[None, :])
    if SAMPLE:
        key, low, high = load_rng(rng)
        b_row = row_ids(rows, o_n, in_n, HAS_ROWS)[:, None]
    b_kl = tl.zeros((BM,), tl.float32)
    for first in range(0, K, BK):
        b_mu, b_raw, _, _ = encode_tile(b_t, lora_b, bias, first, K, R, HAS_BIAS, PRECISION, BK, BR)
        b_logvar = tl.clamp(b_raw, logvar_min, logvar_max, tl.PropagateNan.ALL)
        std = tl.exp(0.5 * b_logvar)
        o_k = first + tl.arange(0, BK)
        in_k = (o_k < K)[None, :]
        b_kl += tl.sum(tl.where(in_k, b_mu * b_mu + (tl.exp(b_logvar) - 1.0 - b_logvar), 0.0), 1)
        b_z = b_mu
        if SAMPLE:
            b_z += std * normals(b_row, first, key, low, high, BK)
        tl.store(
            z + o_n.to(tl.int64)[:, None] * K + o_k[None, :], b_z.to(z.dtype.element_ty), mask=in_n[:, None] & in_k
        )
    tl.store(kl + o_n, 0.5 * kl_scale * b_kl, mask=in_n)


def forward(
    hidden: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    rng: Tensor | None,
    rows: Tensor | None,
    logvar_range: tuple[float, float],
    kl_scale: float,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """z [N, K], kl [N] (over K its sum times kl_scale), t [N, R] (empty unless `save`). hidden's last stride is 1."""
    num_tokens, rank, width = hidden.shape[0], lora_a.shape[0], lora_b.shape[0] // 2
    z = hidden.new_empty(num_tokens, width)
    kl = hidden.new_empty(num_tokens, dtype=torch.float32)
    t = hidden.new_empty((num_tokens, rank) if save else (0,))
    lora_a, lora_b = (factor.to(hidden.dtype).contiguous() for factor in (lora_a, lora_b))

    def run(config: Config) -> None:
        bottleneck_lora_fwd_kernel[(triton.cdiv(num_tokens, config.blocks["BM"]),)](
            hidden,
            lora_a,
            lora_b,
            bias,
            rng,
            rows,
            z,
            t,
            kl,
            num_tokens,
            hidden.shape[1],
            width,
            rank,
            hidden.stride(0),
            kl_scale,
            *logvar_range,
            HAS_BIAS=bias is not None,
            SAMPLE=rng is not None,
            HAS_ROWS=rows is not None,
            SAVE=save,
            EVEN_H=hidden.shape[1] % config.blocks["BH"] == 0,
            PRECISION=dot_precision(hidden),
            BR=rank_block(rank),
            **config.launch,
        )

    configured("bottleneck_lora_fwd", hidden, rank, run)
    return z, kl, t


def holds(hidden: Tensor, rank: int) -> bool:
    """Whether the rows of B for a tile, and t, fit on chip: see the table of `configs`."""
    return rank <= configs.widest("bottleneck_lora_fwd", hidden.element_size(), configs.chip(hidden.device))


def rank_block(rank: int) -> int:
    """The block that holds a whole rank: a power of two that a matrix instruction takes."""
    return max(16, triton.next_power_of_2(rank))
