"""Backward of the bottleneck with a LoRA encoder: from t = hidden A^T, which forward has saved, and hidden.

dt                    by blocks of rows: mu and raw logvar again from t, the noise drawn again
dB, dbias             by tiles of columns over shares of the rows, from the same
dA, grad of hidden    dt^T hidden and dt A together: hidden read once, its gradient written once
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ibkernels.gpu import configs
from ibkernels.gpu.bottleneck_lora import encode_tile, rank_block
from ibkernels.gpu.configs import Config
from ibkernels.gpu.launch import configured, dot_precision
from ibkernels.gpu.philox import load_rng, normals, row_ids

_VECTOR = 16  # elements: rows of dt that are no multiple of it would be loaded one by one, once a tile of columns


@triton.jit
def _grad_tile(
    b_mu,
    b_raw,
    grad_z,
    b_grad_kl,
    b_row,
    rng,
    o_n,
    first,
    N,
    K,
    logvar_min,
    logvar_max,
    HAS_Z: tl.constexpr,
    HAS_KL: tl.constexpr,
    SAMPLE: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    """Gradients of mu and raw logvar [BM, BK]; b_grad_kl [BM] is that of the sum over K."""
    o_k = first + tl.arange(0, BK)
    mask = (o_n < N)[:, None] & (o_k < K)[None, :]
    b_logvar = tl.clamp(b_raw, logvar_min, logvar_max, tl.PropagateNan.ALL)
    std = tl.exp(0.5 * b_logvar)
    b_grad_mu = tl.zeros((BM, BK), tl.float32)
    b_grad_logvar = tl.zeros((BM, BK), tl.float32)
    if HAS_KL:
        b_grad_mu += b_grad_kl[:, None] * b_mu
        b_grad_logvar += 0.5 * b_grad_kl[:, None] * (tl.exp(b_logvar) - 1.0)
    if HAS_Z:
        b_grad_z = tl.load(grad_z + o_n.to(tl.int64)[:, None] * K + o_k[None, :], mask=mask, other=0.0).to(tl.float32)
        b_grad_mu += b_grad_z
        if SAMPLE:
            key, low, high = load_rng(rng)
            b_grad_logvar += 0.5 * std * b_grad_z * normals(b_row, first, key, low, high, BK)
    inside = mask & (b_raw >= logvar_min) & (b_raw <= logvar_max)
    return tl.where(mask, b_grad_mu, 0.0), tl.where(inside, b_grad_logvar, 0.0)


@triton.jit(do_not_specialize=["N"])
def bottleneck_lora_bwd_t_kernel(
    grad_z,
    grad_kl,
    t,
    lora_b,
    bias,
    rng,
    rows,
    grad_t,  # [N, columns], columns >= R: zeros beyond R
    N,
    K,
    R,
    columns,
    kl_scale,
    logvar_min,
    logvar_max,
    HAS_BIAS: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_KL: tl.constexpr,
    SAMPLE: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
):
    """grad_t = [grad_mu | grad_logvar] B, a block of rows at a time; N·K reads of grad_z: bound by memory."""
    o_n = tl.program_id(0) * BM + tl.arange(0, BM)
    o_r = tl.arange(0, BR)
    in_n = o_n < N
    mask = in_n[:, None] & (o_r < R)[None, :]
    b_t = tl.load(t + o_n.to(tl.int64)[:, None] * R + o_r[None, :], mask=mask, other=0.0)
    b_row = row_ids(rows, o_n, in_n, HAS_ROWS)[:, None]
    b_grad_kl = tl.zeros((BM,), tl.float32)
    if HAS_KL:
        b_grad_kl = tl.load(grad_kl + o_n, mask=in_n, other=0.0).to(tl.float32) * kl_scale
    acc = tl.zeros((BM, BR), tl.float32)
    for first in range(0, K, BK):
        b_mu, b_raw, b_mu_weight, b_logvar_weight = encode_tile(
            b_t, lora_b, bias, first, K, R, HAS_BIAS, PRECISION, BK, BR
        )
        b_grad_mu, b_grad_logvar = _grad_tile(
            b_mu, b_raw, grad_z, b_grad_kl, b_row, rng, o_n, first, N, K, logvar_min, logvar_max,
            HAS_Z, HAS_KL, SAMPLE, BM, BK,
        )  # fmt: skip
        acc = tl.dot(b_grad_mu.to(b_t.dtype), tl.trans(b_mu_weight), acc, input_precision=PRECISION)
        acc = tl.dot(b_grad_logvar.to(b_t.dtype), tl.trans(b_logvar_weight), acc, input_precision=PRECISION)
    p_grad_t = grad_t + o_n.to(tl.int64)[:, None] * columns + o_r[None, :]
    tl.store(p_grad_t, acc.to(grad_t.dtype.element_ty), mask=in_n[:, None] & (o_r < columns)[None, :])


@triton.jit(do_not_specialize=["N"])
def bottleneck_lora_bwd_b_kernel(
    grad_z,
    grad_kl,
    t,
    lora_b,
    bias,
    rng,
    rows,
    grad_b,  # [SPLITS, 2K, R] float32
    grad_bias,  # [SPLITS, 2K] float32
    N,
    K,
    R,
    rows_per_split,
    kl_scale,
    logvar_min,
    logvar_max,
    HAS_BIAS: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_KL: tl.constexpr,
    SAMPLE: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
):
    """grad_b = [grad_mu | grad_logvar]^T t for a tile of columns, over a share of the rows: summed later, in order."""
    first = tl.program_id(0) * BK
    split = tl.program_id(1)
    o_k = first + tl.arange(0, BK)
    o_r = tl.arange(0, BR)
    acc_mu = tl.zeros((BK, BR), tl.float32)
    acc_logvar = tl.zeros((BK, BR), tl.float32)
    sum_mu = tl.zeros((BK,), tl.float32)
    sum_logvar = tl.zeros((BK,), tl.float32)
    for start in range(split * rows_per_split, tl.minimum(N, (split + 1) * rows_per_split), BM):
        o_n = start + tl.arange(0, BM)
        in_n = o_n < N
        b_t = tl.load(
            t + o_n.to(tl.int64)[:, None] * R + o_r[None, :], mask=in_n[:, None] & (o_r < R)[None, :], other=0.0
        )
        b_row = row_ids(rows, o_n, in_n, HAS_ROWS)[:, None]
        b_grad_kl = tl.zeros((BM,), tl.float32)
        if HAS_KL:
            b_grad_kl = tl.load(grad_kl + o_n, mask=in_n, other=0.0).to(tl.float32) * kl_scale
        b_mu, b_raw, _, _ = encode_tile(b_t, lora_b, bias, first, K, R, HAS_BIAS, PRECISION, BK, BR)
        b_grad_mu, b_grad_logvar = _grad_tile(
            b_mu, b_raw, grad_z, b_grad_kl, b_row, rng, o_n, first, N, K, logvar_min, logvar_max,
            HAS_Z, HAS_KL, SAMPLE, BM, BK,
        )  # fmt: skip
        acc_mu = tl.dot(tl.trans(b_grad_mu.to(b_t.dtype)), b_t, acc_mu, input_precision=PRECISION)
        acc_logvar = tl.dot(tl.trans(b_grad_logvar.to(b_t.dtype)), b_t, acc_logvar, input_precision=PRECISION)
        sum_mu += tl.sum(b_grad_mu, 0)
        sum_logvar += tl.sum(b_grad_logvar, 0)
    in_k = o_k < K
    mask = in_k[:, None] & (o_r < R)[None, :]
    p_b = grad_b + (split.to(tl.int64) * 2 * K + o_k)[:, None] * R + o_r[None, :]
    tl.store(p_b, acc_mu, mask=mask)
    tl.store(p_b + K * R, acc_logvar, mask=mask)
    p_bias = grad_bias + split * 2 * K + o_k
    tl.store(p_bias, sum_mu, mask=in_k)
    tl.store(p_bias + K, sum_logvar, mask=in_k)


@triton.jit(do_not_specialize=["N"])
def bottleneck_lora_bwd_hidden_kernel(
    grad_t,  # [N, R]
    hidden,  # [N, H], rows stride_n apart
    lora_a,  # [R, H]
    grad_hidden,  # [N, H]
    grad_a,  # [SPLITS, R, H] float32
    N,
    H,
    R,
    stride_n,
    rows_per_split,
    NEEDS_HIDDEN: tl.constexpr,
    NEEDS_A: tl.constexpr,
    EVEN_H: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BH: tl.constexpr,
    BR: tl.constexpr,
):
    """grad_hidden = grad_t A and grad_a = grad_t^T hidden for a tile of columns, over a share of the rows.

    Bound by memory. A library's GEMM for grad_a has as many tiles of columns as there are here, too few for a GPU
    unless it splits the sum too, and reads while nothing is written.
    """
    o_h = tl.program_id(0) * BH + tl.arange(0, BH)
    split = tl.program_id(1)
    o_r = tl.arange(0, BR)
    in_r = o_r < R
    mask_a = in_r[:, None] if EVEN_H else in_r[:, None] & (o_h < H)[None, :]
    p_a = o_r.to(tl.int64)[:, None] * H + o_h[None, :]
    if NEEDS_HIDDEN:
        b_a = tl.load(lora_a + p_a, mask=mask_a, other=0.0)
    acc = tl.zeros((BH, BR), tl.float32)  # transposed: the longer side is the one that matrix instructions want long
    for start in range(split * rows_per_split, tl.minimum(N, (split + 1) * rows_per_split), BM):
        o_n = start + tl.arange(0, BM)
        in_n = o_n < N
        mask = in_n[:, None] if EVEN_H else in_n[:, None] & (o_h < H)[None, :]
        p_n = o_n.to(tl.int64)[:, None]
        b_grad_t = tl.load(grad_t + p_n * R + o_r[None, :], mask=in_n[:, None] & in_r[None, :], other=0.0)
        if NEEDS_A:
            b_hidden = tl.load(hidden + p_n * stride_n + o_h[None, :], mask=mask, other=0.0)
            acc = tl.dot(tl.trans(b_hidden), b_grad_t, acc, input_precision=PRECISION)
        if NEEDS_HIDDEN:
            b_grad = tl.dot(b_grad_t, b_a, input_precision=PRECISION)
            tl.store(grad_hidden + p_n * H + o_h[None, :], b_grad.to(grad_hidden.dtype.element_ty), mask=mask)
    if NEEDS_A:
        tl.store(grad_a + split.to(tl.int64) * R * H + p_a, tl.trans(acc), mask=mask_a)


def backward(
    grad_z: Tensor | None,
    grad_kl: Tensor | None,
    hidden: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    rng: Tensor | None,
    rows: Tensor | None,
    t: Tensor,
    logvar_range: tuple[float, float],
    kl_scale: float,
    needs: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of (hidden, lora_a, lora_b, bias), None where not needed; of the parameters in float32."""
    num_tokens, rank, width = t.shape[0], lora_a.shape[0], lora_b.shape[0] // 2
    arguments = (
        grad_z,
        grad_kl,
        t,
        lora_b.to(hidden.dtype).contiguous(),
        bias,
        rng,
        rows,
    )
    flags = {
        "HAS_BIAS": bias is not None,
        "HAS_Z": grad_z is not None,
        "HAS_KL": grad_kl is not None,
        "SAMPLE": rng is not None,
        "HAS_ROWS": rows is not None,
        "PRECISION": dot_precision(hidden),
        "BR": rank_block(rank),
    }
    grad_hidden = grad_a = grad_b = grad_bias = None
    if needs[0] or needs[1]:
        columns = triton.cdiv(rank, _VECTOR) * _VECTOR
        grad_t = hidden.new_empty(num_tokens, columns)

        def run_t(config: Config) -> None:
            bottleneck_lora_bwd_t_kernel[(triton.cdiv(num_tokens, config.blocks["BM"]),)](
                *arguments, grad_t, num_tokens, width, rank, columns, kl_scale, *logvar_range, **flags, **config.launch
            )

        configured("bottleneck_lora_bwd_t", hidden, rank, run_t)
        grad_hidden, grad_a = _through_a(grad_t, hidden, lora_a, needs[:2])
    if needs[2] or needs[3]:

        def run_b(config: Config) -> tuple[Tensor, Tensor]:
            splits, rows_per_split = _shares(num_tokens, config.blocks["BM"], 64)
            partial_b = hidden.new_empty((splits, 2 * width, rank), dtype=torch.float32)
            partial_bias = hidden.new_empty((splits, 2 * width), dtype=torch.float32)
            bottleneck_lora_bwd_b_kernel[(triton.cdiv(width, config.blocks["BK"]), splits)](
                *arguments,
                partial_b,
                partial_bias,
                num_tokens,
                width,
                rank,
                rows_per_split,
                kl_scale,
                *logvar_range,
                **flags,
                **config.launch,
            )
            return partial_b.sum(dim=0), partial_bias.sum(dim=0)

        grad_b, grad_bias = configured("bottleneck_lora_bwd_b", hidden, rank, run_b)
    return grad_hidden, grad_a, grad_b if needs[2] else None, grad_bias if needs[3] and bias is not None else None


def _through_a(
    grad_t: Tensor, hidden: Tensor, lora_a: Tensor, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """grad_t A [N, H] in hidden's dtype and grad_t^T hidden [R, H] in float32, None where not needed.

    grad_t has columns of zeros beyond R, and A gets rows.
    """
    (num_tokens, columns), (rank, size) = grad_t.shape, lora_a.shape
    lora_a = F.pad(lora_a.to(hidden.dtype), (0, 0, 0, columns - rank)).contiguous()
    grad_hidden = hidden.new_empty(num_tokens, size) if needs[0] else None

    def run(config: Config) -> Tensor | None:
        tiles = triton.cdiv(size, config.blocks["BH"])
        # Programs at once: of what is shipped for an H100, two fit on a multiprocessor up to rank 64, else one.
        at_once = (2 if rank <= 64 else 1) * configs.processors(hidden.device)
        splits, rows_per_split = _shares(num_tokens, config.blocks["BM"], at_once // tiles)
        partial = hidden.new_empty((splits, columns, size), dtype=torch.float32) if needs[1] else None
        bottleneck_lora_bwd_hidden_kernel[(tiles, splits)](
            grad_t,
            hidden,
            lora_a,
            grad_hidden,
            partial,
            num_tokens,
            size,
            columns,
            hidden.stride(0),
            rows_per_split,
            NEEDS_HIDDEN=needs[0],
            NEEDS_A=needs[1],
            EVEN_H=size % config.blocks["BH"] == 0,
            PRECISION=dot_precision(hidden),
            BR=rank_block(rank),
            **config.launch,
        )
        return None if partial is None else partial.sum(dim=0)[:rank]

    return grad_hidden, configured("bottleneck_lora_bwd_hidden", hidden, rank, run)


def _shares(num_tokens: int, block: int, most: int) -> tuple[int, int]:
    """Into how many shares to split the rows, four blocks at least in each and `most` in all, and the rows of one."""
    splits = max(1, min(most, triton.cdiv(num_tokens, 4 * block)))
    return splits, triton.cdiv(num_tokens, splits * block) * block
