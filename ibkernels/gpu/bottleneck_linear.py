"""The bottleneck with a linear encoder: one GEMM, with clamp, noise, sample and KL in its epilogue.

    [mu | logvar] = hidden W^T + b       2·N·H·2K FLOPs on N·H + 2K·H elements: bound by the tensor cores
    backward                             one elementwise kernel to the gradient of [mu | logvar], then two GEMMs

W's rows are loaded interleaved in blocks of 8, so that one product of width 2·BK leaves mu and logvar of a column in
one thread, without repacking the weight: half the matrix instructions of two products.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ibkernels.gpu import configs
from ibkernels.gpu.configs import Config
from ibkernels.gpu.launch import configured, dot_precision, mm_float32
from ibkernels.gpu.philox import load_rng, normals, row_ids


@triton.jit
def _finish(
    acc,  # [BM, 2·BK]: the products of columns first .. first + BK - 1, mu and logvar in turn by blocks of 8
    first,
    bias,
    rng,
    rows,
    z,
    mu,
    raw_logvar,
    o_n,
    N,
    K,
    logvar_min,
    logvar_max,
    HAS_BIAS: tl.constexpr,
    SAMPLE: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    SAVE: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    """Everything after the product: writes z and what backward needs, and returns twice the sum of the KL [BM]."""
    if BK > 32:  # one half after the other: all of it would not stay in registers
        left, right = tl.split(tl.permute(tl.reshape(acc, (BM, 2, BK)), (0, 2, 1)))
        b_kl = _finish(
            left, first, bias, rng, rows, z, mu, raw_logvar, o_n, N, K, logvar_min, logvar_max,
            HAS_BIAS, SAMPLE, HAS_ROWS, SAVE, BM, BK // 2,
        )  # fmt: skip
        return b_kl + _finish(
            right, first + BK // 2, bias, rng, rows, z, mu, raw_logvar, o_n, N, K, logvar_min, logvar_max,
            HAS_BIAS, SAMPLE, HAS_ROWS, SAVE, BM, BK // 2,
        )  # fmt: skip
    in_n = o_n < N
    b_mu, b_raw = tl.split(tl.permute(tl.reshape(acc, (BM, BK // 8, 2, 8)), (0, 1, 3, 2)))
    b_mu = tl.reshape(b_mu, (BM, BK))
    b_raw = tl.reshape(b_raw, (BM, BK))
    o_k = first + tl.arange(0, BK)
    in_k = o_k < K
    if HAS_BIAS:
        b_mu += tl.load(bias + o_k, mask=in_k, other=0.0).to(tl.float32)[None, :]
        b_raw += tl.load(bias + K + o_k, mask=in_k, other=0.0).to(tl.float32)[None, :]
    b_logvar = tl.clamp(b_raw, logvar_min, logvar_max, tl.PropagateNan.ALL)
    std = tl.exp(0.5 * b_logvar)
    mask = in_n[:, None] & in_k[None, :]
    o_z = o_n.to(tl.int64)[:, None] * K + o_k[None, :]
    if SAVE:
        tl.store(mu + o_z, b_mu.to(mu.dtype.element_ty), mask=mask)
        tl.store(raw_logvar + o_z, b_raw, mask=mask)
    b_kl = tl.where(in_k[None, :], b_mu * b_mu + (tl.exp(b_logvar) - 1.0 - b_logvar), 0.0)
    b_z = b_mu
    if SAMPLE:
        key, low, high = load_rng(rng)
        b_z += std * normals(row_ids(rows, o_n, in_n, HAS_ROWS)[:, None], first, key, low, high, BK)
    tl.store(z + o_z, b_z.to(z.dtype.element_ty), mask=mask)
    return tl.sum(b_kl, 1)


@triton.jit(do_not_specialize=["N"])
def bottleneck_linear_fwd_kernel(
    hidden,  # [N, H], rows stride_n apart
    weight,  # [2K, H]
    bias,  # [2K], of any dtype
    rng,
    rows,
    z,  # [N, K]
    mu,  # [N, K], saved
    raw_logvar,  # [N, K] float32, saved
    kl,  # [cdiv(K, BK), N] float32: a row's sum over a tile of columns, times kl_scale
    N,
    H,
    K,
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
):
    # The column tiles of a block of rows are neighbours in the grid: hidden leaves DRAM once, L2 serves the others.
    # One dimension, because the second one of a grid ends at 65535.
    tiles = tl.cdiv(K, BK)
    pid_k = tl.program_id(0) % tiles
    o_n = tl.program_id(0) // tiles * BM + tl.arange(0, BM)
    o_h = tl.arange(0, BH)
    i = tl.arange(0, 2 * BK)
    column = pid_k * BK + (i >> 4) * 8 + (i & 7)
    o_w = column + ((i >> 3) & 1) * K  # mu's row, or logvar's
    in_n, in_w = o_n < N, column < K
    p_hidden = hidden + o_n.to(tl.int64)[:, None] * stride_n + o_h[None, :]
    p_weight = weight + o_w.to(tl.int64)[None, :] * H + o_h[:, None]
    acc = tl.zeros((BM, 2 * BK), tl.float32)
    for h in range(0, H, BH):
        if EVEN_H:
            b_hidden = tl.load(p_hidden + h, mask=in_n[:, None], other=0.0)
            b_weight = tl.load(p_weight + h, mask=in_w[None, :], other=0.0)
        else:
            in_h = h + o_h < H
            b_hidden = tl.load(p_hidden + h, mask=in_n[:, None] & in_h[None, :], other=0.0)
            b_weight = tl.load(p_weight + h, mask=in_w[None, :] & in_h[:, None], other=0.0)
        acc = tl.dot(b_hidden, b_weight, acc, input_precision=PRECISION)
    first = pid_k * BK
    b_kl = _finish(
        acc, first, bias, rng, rows, z, mu, raw_logvar, o_n, N, K, logvar_min, logvar_max,
        HAS_BIAS, SAMPLE, HAS_ROWS, SAVE, BM, BK,
    )  # fmt: skip
    tl.store(kl + pid_k.to(tl.int64) * N + o_n, 0.5 * kl_scale * b_kl, mask=in_n)


@triton.jit(do_not_specialize=["N"])
def bottleneck_linear_bwd_kernel(
    grad_z,  # [N, K]
    grad_kl,  # [N] float32
    mu,
    raw_logvar,
    rng,
    rows,
    grad,  # [N, 2K] in hidden's dtype: of [mu | logvar]
    N,
    K,
    kl_scale,
    logvar_min,
    logvar_max,
    HAS_Z: tl.constexpr,
    HAS_KL: tl.constexpr,
    SAMPLE: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    """Elementwise: 2-3 reads and 2 writes of N·K elements, bound by memory."""
    tiles = tl.cdiv(K, BK)
    pid_k = tl.program_id(0) % tiles
    o_n = tl.program_id(0) // tiles * BM + tl.arange(0, BM)
    o_k = pid_k * BK + tl.arange(0, BK)
    in_n = o_n < N
    mask = in_n[:, None] & (o_k < K)[None, :]
    o_z = o_n.to(tl.int64)[:, None] * K + o_k[None, :]
    b_mu = tl.load(mu + o_z, mask=mask, other=0.0).to(tl.float32)
    b_raw = tl.load(raw_logvar + o_z, mask=mask, other=0.0)
    b_logvar = tl.clamp(b_raw, logvar_min, logvar_max, tl.PropagateNan.ALL)
    std = tl.exp(0.5 * b_logvar)
    b_grad_mu = tl.zeros((BM, BK), tl.float32)
    b_grad_logvar = tl.zeros((BM, BK), tl.float32)
    if HAS_KL:
        scale = (tl.load(grad_kl + o_n, mask=in_n, other=0.0).to(tl.float32) * kl_scale)[:, None]
        b_grad_mu += scale * b_mu
        b_grad_logvar += 0.5 * scale * (tl.exp(b_logvar) - 1.0)
    if HAS_Z:
        b_grad_z = tl.load(grad_z + o_z, mask=mask, other=0.0).to(tl.float32)
        b_grad_mu += b_grad_z
        if SAMPLE:
            key, low, high = load_rng(rng)
            noise = normals(row_ids(rows, o_n, in_n, HAS_ROWS)[:, None], pid_k * BK, key, low, high, BK)
            b_grad_logvar += 0.5 * std * b_grad_z * noise
    b_grad_logvar = tl.where((b_raw >= logvar_min) & (b_raw <= logvar_max), b_grad_logvar, 0.0)
    o_grad = o_n.to(tl.int64)[:, None] * (2 * K) + o_k[None, :]
    tl.store(grad + o_grad, b_grad_mu.to(grad.dtype.element_ty), mask=mask)
    tl.store(grad + o_grad + K, b_grad_logvar.to(grad.dtype.element_ty), mask=mask)


def forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rng: Tensor | None,
    rows: Tensor | None,
    logvar_range: tuple[float, float],
    kl_scale: float,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """z [N, K], kl [N] (over K its sum times kl_scale), mu and raw logvar [N, K] (empty unless `save`).

    hidden's last stride is 1.
    """
    num_tokens, width = hidden.shape[0], weight.shape[0] // 2
    z = hidden.new_empty(num_tokens, width)
    shape = (num_tokens, width) if save else (0,)
    mu, raw_logvar = hidden.new_empty(shape), hidden.new_empty(shape, dtype=torch.float32)
    weight = weight.to(hidden.dtype).contiguous()

    def run(config: Config) -> Tensor:
        tiles = triton.cdiv(width, config.blocks["BK"])
        kl = hidden.new_empty(num_tokens if tiles == 1 else (tiles, num_tokens), dtype=torch.float32)
        bottleneck_linear_fwd_kernel[(tiles * triton.cdiv(num_tokens, config.blocks["BM"]),)](
            hidden,
            weight,
            bias,
            rng,
            rows,
            z,
            mu,
            raw_logvar,
            kl,
            num_tokens,
            hidden.shape[1],
            width,
            hidden.stride(0),
            kl_scale,
            *logvar_range,
            HAS_BIAS=bias is not None,
            SAMPLE=rng is not None,
            HAS_ROWS=rows is not None,
            SAVE=save,
            EVEN_H=hidden.shape[1] % config.blocks["BH"] == 0,
            PRECISION=dot_precision(hidden),
            **config.launch,
        )
        return kl if tiles == 1 else kl.sum(dim=0)

    kl = configured(_tiles(hidden, width), hidden, width, run)
    return z, kl, mu, raw_logvar


def backward(
    grad_z: Tensor | None,
    grad_kl: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rng: Tensor | None,
    rows: Tensor | None,
    saved: tuple[Tensor, Tensor],
    logvar_range: tuple[float, float],
    kl_scale: float,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of (hidden, weight, bias), None where not needed; of the weight and bias in float32."""
    mu, raw_logvar = saved
    num_tokens, width = mu.shape
    grad = hidden.new_empty(num_tokens, 2 * width)

    def run(config: Config) -> None:
        tiles = triton.cdiv(width, config.blocks["BK"])
        bottleneck_linear_bwd_kernel[(tiles * triton.cdiv(num_tokens, config.blocks["BM"]),)](
            grad_z,
            grad_kl,
            mu,
            raw_logvar,
            rng,
            rows,
            grad,
            num_tokens,
            width,
            kl_scale,
            *logvar_range,
            HAS_Z=grad_z is not None,
            HAS_KL=grad_kl is not None,
            SAMPLE=rng is not None,
            HAS_ROWS=rows is not None,
            **config.launch,
        )

    configured("bottleneck_linear_bwd", hidden, width, run)
    grad_hidden = grad @ weight.to(hidden.dtype) if needs[0] else None
    grad_weight = mm_float32(grad.T, hidden) if needs[1] else None
    grad_bias = grad.sum(dim=0, dtype=torch.float32) if needs[2] and bias is not None else None
    return grad_hidden, grad_weight, grad_bias


def _tiles(hidden: Tensor, width: int) -> str:
    """The name of the forward kernel in the table: with large tiles, or with half as wide ones.

    By waves of programs, one a multiprocessor. A small one is taken to need 0.6 of a large one's time: half of its
    products, for two thirds of its reads.
    """
    large, half = "bottleneck_linear_fwd", "bottleneck_linear_fwd_half"
    if hidden.element_size() != 2 or width <= 64:
        return large

    def waves(kernel: str) -> int:
        blocks = configs.choose(kernel, hidden, width).blocks
        programs = triton.cdiv(hidden.shape[0], blocks["BM"]) * triton.cdiv(width, blocks["BK"])
        return triton.cdiv(programs, configs.processors(hidden.device))

    return large if waves(large) <= 0.6 * waves(half) else half
