"""Cross-entropy of a narrow head (D <= 512: the bottleneck's), flash-style: logits exist in registers only.

    forward      one pass over the vocabulary for a block of rows: the running maximum and sum of exponentials, and with
                 gradients the running sum of exp(logit) · weight row, rescaled when the maximum moves (the form of
                 flash-attention): 2 or 4·N·V·D FLOPs
    grad_weight  vocabulary-parallel, logits again: 4·N·V·D

The vocabulary may be split over programs that leave partial sums; a finishing kernel puts them together in a fixed
order, adds the target, and applies the options. Both passes are bound by the tensor cores and, for small D, by the
exponentials: N·V of them a pass.

All sums leave the target out. The gradient of a token is that of the others, and the target's row times -(1 - p), which
is what the others have of the probability: of a confident token little, and not to be had from the difference of p and
1, or of two sums, after tensor cores have cut off (they do not round) the last bit of each partial one.

In half precision and without a soft cap only.
"""

import functools

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ibkernels.gpu import configs
from ibkernels.gpu.configs import Config
from ibkernels.gpu.launch import configured
from ibkernels.gpu.softmax import LOG2E, LOWEST, RAISED
from ibkernels.options import LogitOptions
from ibkernels.reference.cross_entropy import CrossEntropyResult

_VECTOR = 16  # elements: rows that are no multiple of it would be loaded one element at a time


@triton.jit(do_not_specialize=["N"])
def cross_entropy_fwd_kernel(
    x,  # [N, D]
    weight,  # [V, D]
    bias,  # [V] float32
    peak,  # [S, N] float32, the running maximum of a split of the vocabulary
    total,  # [S, N], sum of exp(logit - peak)
    logit_sum,  # [S, N], for label smoothing
    weighted_sum,  # [S, N], sum of exp(logit - peak) (logit - peak), for the entropy
    best,  # [S, N] int32, the first column of the largest logit
    pull,  # [S, N, D] float32, sum of exp(logit - peak) weight_row
    labels,  # [N] int64: these words are left out of all sums but logit_sum
    N,
    V,
    D,
    columns_per_split,
    logit_scale,
    HAS_BIAS: tl.constexpr,
    SMOOTH: tl.constexpr,
    STATS: tl.constexpr,
    PULL: tl.constexpr,
    BM: tl.constexpr,
    BV: tl.constexpr,
    BD: tl.constexpr,
):
    split = tl.program_id(1)
    o_n = tl.program_id(0) * BM + tl.arange(0, BM)
    o_d = tl.arange(0, BD)
    in_n, in_d = o_n < N, o_d < D
    b_x = tl.load(x + o_n.to(tl.int64)[:, None] * D + o_d[None, :], mask=in_n[:, None] & in_d[None, :], other=0.0)
    label = tl.load(labels + o_n, mask=in_n, other=-1)
    target = tl.where((label >= 0) & (label < V), label, -1).to(tl.int32)  # none that 32 bits do not hold
    b_peak = tl.full((BM,), LOWEST, tl.float32)
    b_total = tl.zeros((BM,), tl.float32)
    b_logit_sum = tl.zeros((BM,), tl.float32)
    b_weighted = tl.zeros((BM,), tl.float32)
    b_best = tl.zeros((BM,), tl.int32)
    if PULL:
        b_pull = tl.zeros((BM, BD), tl.float32)
    start = split * columns_per_split
    for v in range(start, tl.minimum(V, start + columns_per_split), BV):
        o_v = v + tl.arange(0, BV)
        in_v = o_v < V
        b_weight = tl.load(
            weight + o_v.to(tl.int64)[:, None] * D + o_d[None, :], mask=in_v[:, None] & in_d[None, :], other=0.0
        )
        logits = tl.dot(b_x, tl.trans(b_weight)) * logit_scale
        if HAS_BIAS:
            logits += tl.load(bias + o_v, mask=in_v, other=0.0)[None, :]
        if SMOOTH:
            b_logit_sum += tl.sum(tl.where(in_v[None, :], logits, 0.0), 1)
        logits = tl.where(in_v[None, :] & (tl.arange(0, BV)[None, :] != (target - v)[:, None]), logits, float("-inf"))
        highest = tl.max(logits, 1)
        new_peak = tl.maximum(b_peak, highest)
        decay = tl.exp2((b_peak - new_peak) * LOG2E)
        shifted = logits - new_peak[:, None]
        exp = tl.exp2(shifted * LOG2E)
        if STATS:
            first = tl.min(tl.where(logits == highest[:, None], o_v[None, :], V), 1)
            b_best = tl.where(highest > b_peak, first, b_best)
            # The old terms lose (new_peak - b_peak) each; nothing has been summed while the maximum is the lowest.
            lost = tl.where(b_total > 0, (b_peak - new_peak) * b_total, 0.0)
            b_weighted = (b_weighted + lost) * decay + tl.sum(exp * tl.maximum(shifted, LOWEST), 1)  # 0 log 0 = 0
        b_total = b_total * decay + tl.sum(exp, 1)
        b_peak = new_peak
        if PULL:
            if b_weight.dtype == tl.float16:
                exp *= RAISED
            b_pull = tl.dot(exp.to(b_weight.dtype), b_weight, b_pull * decay[:, None])
    o_s = split.to(tl.int64) * N + o_n
    tl.store(peak + o_s, b_peak, mask=in_n)
    tl.store(total + o_s, b_total, mask=in_n)
    if SMOOTH:
        tl.store(logit_sum + o_s, b_logit_sum, mask=in_n)
    if STATS:
        tl.store(weighted_sum + o_s, b_weighted, mask=in_n)
        tl.store(best + o_s, b_best, mask=in_n)
    if PULL:
        if x.dtype.element_ty == tl.float16:
            b_pull /= RAISED
        p_pull = pull + split.to(tl.int64) * N * D
        tl.store(p_pull + o_n.to(tl.int64)[:, None] * D + o_d[None, :], b_pull, mask=in_n[:, None] & in_d[None, :])


@triton.jit(do_not_specialize=["N", "S"])
def cross_entropy_finish_kernel(
    x,
    weight,
    bias,
    labels,  # [N] int64
    upstream,  # [N] float32: the gradient of the summed loss to each token's, 0 where ignored
    peak,
    total,
    logit_sum,
    weighted_sum,
    best,
    pull,
    weight_sum,  # [D] float32, sum of the weight's rows: label smoothing only
    losses,  # [N] float32
    lse,  # [N] float32
    peaks,  # [N] float32; for the weight's gradient, as the next two
    factors,  # [N] float32, of exp(logit - peak) in the gradient
    owns,  # [N] float32, the gradient of the target's logit, but for label smoothing
    entropy,  # [N] float32
    correct,  # [N] bool
    grad_x,  # [N, D]
    N,
    V,
    D,
    S,
    ignore_index,
    label_smoothing,
    z_loss,
    logit_scale,
    HAS_BIAS: tl.constexpr,
    SMOOTH: tl.constexpr,
    STATS: tl.constexpr,
    PULL: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
):
    o_n = tl.program_id(0) * BM + tl.arange(0, BM)
    o_d = tl.arange(0, BD)
    in_n = o_n < N
    mask = in_n[:, None] & (o_d < D)[None, :]
    label = tl.load(labels + o_n, mask=in_n, other=ignore_index)
    valid = label != ignore_index
    # A label outside the vocabulary reads nothing and makes its loss NaN: no error can be raised without a wait.
    known = (label >= 0) & (label < V)
    target = tl.where(known, label, 0)
    b_x = tl.load(x + o_n.to(tl.int64)[:, None] * D + o_d[None, :], mask=mask, other=0.0).to(tl.float32)
    b_row = tl.load(weight + target[:, None] * D + o_d[None, :], mask=mask, other=0.0).to(tl.float32)
    target_logit = tl.sum(b_x * b_row, 1) * logit_scale
    if HAS_BIAS:
        target_logit += tl.load(bias + target, mask=in_n, other=0.0)

    b_peak = tl.full((BM,), LOWEST, tl.float32)
    b_best = tl.zeros((BM,), tl.int32)
    o_s = o_n.to(tl.int64)
    for _ in range(0, S):
        split_peak = tl.load(peak + o_s, mask=in_n, other=LOWEST)
        if STATS:
            b_best = tl.where(split_peak > b_peak, tl.load(best + o_s, mask=in_n, other=0), b_best)
        b_peak = tl.maximum(b_peak, split_peak)
        o_s += N
    others_peak = b_peak
    b_peak = tl.where(known, tl.maximum(b_peak, target_logit), b_peak)
    b_total = tl.zeros((BM,), tl.float32)
    b_logit_sum = tl.zeros((BM,), tl.float32)
    b_weighted = tl.zeros((BM,), tl.float32)
    b_pull = tl.zeros((BM, BD), tl.float32)
    o_s = o_n.to(tl.int64)
    for _ in range(0, S):
        below = tl.load(peak + o_s, mask=in_n, other=LOWEST) - b_peak
        decay = tl.exp2(below * LOG2E)
        split_total = tl.load(total + o_s, mask=in_n, other=0.0)
        b_total += split_total * decay
        if SMOOTH:
            b_logit_sum += tl.load(logit_sum + o_s, mask=in_n, other=0.0)
        if STATS:
            lost = tl.where(split_total > 0, below * split_total, 0.0)
            b_weighted += (tl.load(weighted_sum + o_s, mask=in_n, other=0.0) + lost) * decay
        if PULL:
            b_pull += tl.load(pull + o_s[:, None] * D + o_d[None, :], mask=mask, other=0.0) * decay[:, None]
        o_s += N

    b_others = b_total
    b_own = tl.where(known, tl.exp2((target_logit - b_peak) * LOG2E), 0.0)
    b_total += b_own
    log_total = tl.log(b_total)
    b_lse = log_total + b_peak
    b_loss = log_total + (b_peak - target_logit)  # not lse - target: a large common offset would cost digits
    if SMOOTH:
        b_loss += label_smoothing * (target_logit - b_logit_sum / V)
    g = tl.load(upstream + o_n, mask=in_n, other=0.0)
    b_loss = tl.where(known, g * (b_loss + z_loss * b_lse * b_lse), float("nan"))
    b_loss = tl.where(valid, b_loss, 0.0)
    tl.store(losses + o_n, b_loss, mask=in_n)
    tl.store(lse + o_n, b_lse, mask=in_n)
    # Not exp(logit - lse), whose exponent has lost the digits that the sum of the two has not.
    factor = (1.0 + 2.0 * z_loss * b_lse) / b_total
    tl.store(peaks + o_n, b_peak, mask=in_n)
    tl.store(factors + o_n, g * factor, mask=in_n)
    # p (1 + 2 z lse) - 1 + label_smoothing, with the others' share for 1 - p
    own = (2.0 * z_loss * b_lse * b_own - b_others) / b_total + label_smoothing
    tl.store(owns + o_n, g * own, mask=in_n)
    if STATS:
        b_weighted += b_own * tl.maximum(target_logit - b_peak, LOWEST)  # 0 log 0 = 0
        b_entropy = tl.where(valid, log_total - b_weighted / b_total, 0.0)
        tl.store(entropy + o_n, b_entropy, mask=in_n)
        first = (target_logit > others_peak) | ((target_logit == others_peak) & (target < b_best))
        tl.store(correct + o_n, first & valid & known, mask=in_n)
    if PULL:
        b_grad = b_pull * factor[:, None] + own[:, None] * b_row
        if SMOOTH:
            b_grad -= (label_smoothing / V) * tl.load(weight_sum + o_d, mask=o_d < D, other=0.0)[None, :]
        b_grad *= (g * logit_scale)[:, None]
        p_grad = grad_x + o_n.to(tl.int64)[:, None] * D + o_d[None, :]
        tl.store(p_grad, b_grad.to(grad_x.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["N"])
def cross_entropy_bwd_weight_kernel(
    x,
    weight,
    bias,
    labels,
    upstream,
    peaks,
    factors,
    owns,
    grad_weight,  # [V, D] float32
    grad_bias,  # [V] float32
    N,
    V,
    D,
    label_smoothing,
    logit_scale,
    HAS_BIAS: tl.constexpr,
    SMOOTH: tl.constexpr,
    NEEDS_BIAS: tl.constexpr,
    BM: tl.constexpr,
    BV: tl.constexpr,
    BD: tl.constexpr,
):
    o_v = tl.program_id(0) * BV + tl.arange(0, BV)
    o_d = tl.arange(0, BD)
    in_v, in_d = o_v < V, o_d < D
    p_weight = o_v.to(tl.int64)[:, None] * D + o_d[None, :]
    mask_w = in_v[:, None] & in_d[None, :]
    b_weight = tl.load(weight + p_weight, mask=mask_w, other=0.0)
    if HAS_BIAS:
        b_bias = tl.load(bias + o_v, mask=in_v, other=0.0)
    acc = tl.zeros((BV, BD), tl.float32)
    b_grad_bias = tl.zeros((BV,), tl.float32)
    for n in range(0, N, BM):
        o_n = n + tl.arange(0, BM)
        in_n = o_n < N
        b_x = tl.load(x + o_n.to(tl.int64)[:, None] * D + o_d[None, :], mask=in_n[:, None] & in_d[None, :], other=0.0)
        label = tl.load(labels + o_n, mask=in_n, other=-1)
        target = tl.where((label >= 0) & (label < V), label, -1).to(tl.int32)  # none that 32 bits do not hold
        g = tl.load(upstream + o_n, mask=in_n, other=0.0)
        b_peak = tl.load(peaks + o_n, mask=in_n, other=0.0)
        factor = tl.load(factors + o_n, mask=in_n, other=0.0)
        own = tl.load(owns + o_n, mask=in_n, other=0.0)
        if b_x.dtype == tl.float16:
            g *= RAISED
            factor *= RAISED
            own *= RAISED
        logits = tl.dot(b_weight, tl.trans(b_x)) * logit_scale  # [BV, BM]
        if HAS_BIAS:
            logits += b_bias[:, None]
        grad = tl.exp2((logits - b_peak[None, :]) * LOG2E) * factor[None, :]
        grad = tl.where(o_v[:, None] == target[None, :], own[None, :], grad)
        if SMOOTH:
            grad -= (g * (label_smoothing / V))[None, :]
        # A row of no weight is left out by selection: 0 times a logit's infinity would be no number.
        grad = tl.where((g != 0)[None, :], grad, 0.0)
        if NEEDS_BIAS:
            b_grad_bias += tl.sum(grad, 1)
        acc = tl.dot(grad.to(b_x.dtype), b_x, acc)
    if x.dtype.element_ty == tl.float16:
        acc /= RAISED
        b_grad_bias /= RAISED
    tl.store(grad_weight + p_weight, acc * logit_scale, mask=mask_w)
    if NEEDS_BIAS:
        tl.store(grad_bias + o_v, b_grad_bias, mask=in_v)


def narrow_cross_entropy(
    x: Tensor,  # [N, D] in half precision, contiguous
    weight: Tensor,  # [V, D], x's dtype, contiguous
    bias: Tensor | None,  # [V] float32
    labels: Tensor,  # int64 [N]
    upstream: Tensor,  # [N] float32
    options: LogitOptions,
    needs: tuple[bool, bool, bool],
    stats: bool,
) -> CrossEntropyResult:
    """As `reference.linear_cross_entropy`, D within `configs.widest`; upstream holds validity and token weights."""
    assert options.softcap is None and x.dtype.itemsize == 2
    if padding := -x.shape[1] % _VECTOR:
        x, weight = F.pad(x, (0, padding)), F.pad(weight, (0, padding))
        result = narrow_cross_entropy(x, weight, bias, labels, upstream, options, needs, stats)
        grad_x, grad_weight = (
            None if gradient is None else gradient[:, :-padding].contiguous() for gradient in result[4:6]
        )
        return result._replace(grad_input=grad_x, grad_weight=grad_weight)
    (num_tokens, width), vocabulary = x.shape, weight.shape[0]
    flags = {"HAS_BIAS": bias is not None, "SMOOTH": options.label_smoothing > 0}
    flags_fwd = {**flags, "STATS": stats, "PULL": needs[0]}
    BD = max(16, triton.next_power_of_2(width))

    def sums(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, device=x.device, dtype=dtype)

    losses, lse, peaks, factors, owns = (sums(num_tokens) for _ in range(5))
    entropy = torch.zeros_like(upstream)
    correct = torch.zeros_like(labels, dtype=torch.bool)
    grad_x = torch.empty_like(x) if needs[0] else None
    weight_sum = weight.sum(dim=0, dtype=torch.float32) if needs[0] and flags["SMOOTH"] else None

    def forward(config: Config) -> tuple[Tensor | None, ...]:
        row_blocks, columns = triton.cdiv(num_tokens, config.blocks["BM"]), config.blocks["BV"]
        blocks = triton.cdiv(vocabulary, columns)
        blocks_per_split = triton.cdiv(blocks, configs.splits(x.device, row_blocks, blocks))
        splits = triton.cdiv(blocks, blocks_per_split)
        partial = (
            sums(splits, num_tokens),
            sums(splits, num_tokens),
            sums(splits, num_tokens) if flags["SMOOTH"] else None,
            sums(splits, num_tokens) if stats else None,
            sums(splits, num_tokens, dtype=torch.int32) if stats else None,
            sums(splits, num_tokens, width) if needs[0] else None,
        )
        cross_entropy_fwd_kernel[(row_blocks, splits)](
            x,
            weight,
            bias,
            *partial,
            labels,
            num_tokens,
            vocabulary,
            width,
            blocks_per_split * columns,
            options.logit_scale,
            **flags_fwd,
            BD=BD,
            **config.launch,
        )
        return partial

    def finish(partial: tuple[Tensor | None, ...], config: Config) -> None:
        assert partial[0] is not None
        cross_entropy_finish_kernel[(triton.cdiv(num_tokens, config.blocks["BM"]),)](
            x,
            weight,
            bias,
            labels,
            upstream,
            *partial,
            weight_sum,
            losses,
            lse,
            peaks,
            factors,
            owns,
            entropy,
            correct,
            grad_x,
            num_tokens,
            vocabulary,
            width,
            partial[0].shape[0],
            options.ignore_index,
            options.label_smoothing,
            options.z_loss,
            options.logit_scale,
            **flags_fwd,
            BD=BD,
            **config.launch,
        )

    def backward(config: Config) -> tuple[Tensor, Tensor | None]:
        grad_weight, grad_bias = sums(vocabulary, width), sums(vocabulary) if needs[2] else None
        cross_entropy_bwd_weight_kernel[(triton.cdiv(vocabulary, config.blocks["BV"]),)](
            x,
            weight,
            bias,
            labels,
            upstream,
            peaks,
            factors,
            owns,
            grad_weight,
            grad_bias,
            num_tokens,
            vocabulary,
            width,
            options.label_smoothing,
            options.logit_scale,
            **flags,
            NEEDS_BIAS=needs[2],
            BD=BD,
            **config.launch,
        )
        return grad_weight, grad_bias

    kernel = "cross_entropy_fwd_stats" if stats or flags["SMOOTH"] else "cross_entropy_fwd"
    partial = configured(kernel, x, width, forward)
    configured("cross_entropy_finish", x, width, functools.partial(finish, partial))
    del partial
    grad_weight = grad_bias = None
    if needs[1] or needs[2]:
        grad_weight, grad_bias = configured("cross_entropy_bwd_weight", x, width, backward)
    return CrossEntropyResult(losses, lse, entropy, correct, grad_x, grad_weight if needs[1] else None, grad_bias)
