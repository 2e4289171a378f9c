"""Cross-entropy of a wide head (the model's own): library GEMMs over blocks of rows, and a fused kernel on the logits.

    logits = x W^T in float32, a block of rows within a fixed budget       2·n·V·D FLOPs, a library GEMM
    one program a row: maximum and sum of exponentials, then the gradient   2 reads and 1 write of n·V elements,
                                                                            the gradient in the logits' own memory
    grad_x = G W                                                           2·n·V·D FLOPs, a library GEMM

Float32 logits, because the rounding of a bfloat16 logit of 20 is 0.06. A frozen weight's gradient is neither computed
nor allocated.
"""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from ibkernels.gpu.configs import Config
from ibkernels.gpu.launch import configured, mm_float32
from ibkernels.gpu.softmax import LOG2E, LOWEST, RAISED, softcapped
from ibkernels.options import LogitOptions
from ibkernels.reference.cross_entropy import CrossEntropyResult

LOGITS_BYTES = 300 * 2**20  # of a block's float32 logits: 512 rows of up to 150,000 words, which fill a GPU's GEMMs
_VECTOR = 64  # elements: rows of logits and of their gradient begin at multiples of it, as fast GEMMs ask
_WEIGHT_ROWS = 8192  # of the head's gradient that are added to at a time


@triton.jit
def softmax_grad_kernel(
    logits,  # [n, V] float32, rows `stride` apart: x W^T
    bias,  # [V] float32
    labels,  # [n] int64
    upstream,  # [n] float32
    grad,  # [n, V] in the compute dtype, rows `grad_stride` apart, may be the logits' memory; in float16 times RAISED
    losses,
    lse,
    entropy,
    correct,
    V,
    stride,
    grad_stride,
    ignore_index,
    label_smoothing,
    z_loss,
    softcap,
    logit_scale,
    HAS_BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SMOOTH: tl.constexpr,
    STATS: tl.constexpr,
    GRAD: tl.constexpr,
    BV: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    p_logits = logits + n * stride
    label = tl.load(labels + n)
    valid = label != ignore_index
    # A label outside the vocabulary reads nothing and makes its loss NaN: no error can be raised without a wait.
    known = (label >= 0) & (label < V)
    target = tl.where(known, label, 0)
    target_logit = tl.load(p_logits + target) * logit_scale
    if HAS_BIAS:
        target_logit += tl.load(bias + target)
    if SOFTCAP:
        target_logit, _ = softcapped(target_logit, softcap)
    # Running values per lane, put together once at the end: no reduction inside the loop.
    b_peak = tl.full((BV,), LOWEST, tl.float32)
    b_total = tl.zeros((BV,), tl.float32)
    b_logit_sum = tl.zeros((BV,), tl.float32)
    b_weighted = tl.zeros((BV,), tl.float32)
    b_best = tl.zeros((BV,), tl.int32)
    for v in range(0, V, BV):
        o_v = v + tl.arange(0, BV)
        in_v = o_v < V
        # What pads a row is read too, and not used: whole vectors, whatever V is.
        b_logits = tl.load(p_logits + o_v, mask=o_v < stride, other=0.0) * logit_scale
        if HAS_BIAS:
            b_logits += tl.load(bias + o_v, mask=in_v, other=0.0)
        if SOFTCAP:
            b_logits, slope = softcapped(b_logits, softcap)
        if SMOOTH:
            b_logit_sum += tl.where(in_v, b_logits, 0.0)
        b_logits = tl.where(in_v, b_logits, float("-inf"))
        new_peak = tl.maximum(b_peak, b_logits)
        decay = tl.exp2((b_peak - new_peak) * LOG2E)
        shifted = b_logits - new_peak
        exp = tl.exp2(shifted * LOG2E)
        if STATS:
            b_best = tl.where(b_logits > b_peak, o_v, b_best)
            lost = tl.where(b_total > 0, (b_peak - new_peak) * b_total, 0.0)
            b_weighted = (b_weighted + lost) * decay + tl.where(exp > 0, exp * shifted, 0.0)
        b_total = b_total * decay + exp
        b_peak = new_peak
    peak = tl.max(b_peak, 0)
    below = b_peak - peak
    decay = tl.exp2(below * LOG2E)
    total = tl.sum(b_total * decay, 0)
    log_total = tl.log(total)
    row_lse = log_total + peak
    loss = log_total + (peak - target_logit)
    if SMOOTH:
        loss += label_smoothing * (target_logit - tl.sum(b_logit_sum, 0) / V)
    g = tl.load(upstream + n)
    loss = tl.where(known, g * (loss + z_loss * row_lse * row_lse), float("nan"))
    tl.store(losses + n, tl.where(valid, loss, 0.0))
    tl.store(lse + n, row_lse)
    if STATS:
        lost = tl.where(b_total > 0, below * b_total, 0.0)
        weighted = tl.sum((b_weighted + lost) * decay, 0)
        tl.store(entropy + n, tl.where(valid, log_total - weighted / total, 0.0))
        first = tl.min(tl.where(b_peak == peak, b_best, V), 0)
        tl.store(correct + n, (first == target) & valid)
    if GRAD:
        if grad.dtype.element_ty == tl.float16:
            g *= RAISED
        # exp(logit - peak) / total: exp(logit - lse) has lost digits to the sum of the two.
        factor = g * (1.0 + 2.0 * z_loss * row_lse) / total
        column = target.to(tl.int32)
        for v in range(0, V, BV):
            o_v = v + tl.arange(0, BV)
            in_v, in_row = o_v < V, o_v < stride
            b_logits = tl.load(p_logits + o_v, mask=in_row, other=0.0) * logit_scale
            # A row's gradient begins where the row does and is no longer: all must have read what it overwrites.
            tl.debug_barrier()
            if HAS_BIAS:
                b_logits += tl.load(bias + o_v, mask=in_v, other=0.0)
            if SOFTCAP:
                b_logits, slope = softcapped(b_logits, softcap)
            b_grad = tl.exp2((b_logits - peak) * LOG2E) * factor
            if SMOOTH:
                b_grad -= g * label_smoothing / V
            b_grad -= tl.where(o_v == column, g * (1.0 - label_smoothing), 0.0)
            if SOFTCAP:
                b_grad *= slope
            # By selection: a row of no weight may hold an infinity.
            b_grad = tl.where(g != 0, b_grad, 0.0)
            tl.store(grad + n * grad_stride + o_v, b_grad.to(grad.dtype.element_ty), mask=in_row)


def wide_cross_entropy(
    x: Tensor,  # [N, D]
    weight: Tensor,  # [V, D], x's dtype
    bias: Tensor | None,  # [V] float32
    labels: Tensor,  # int64 [N]
    upstream: Tensor,  # [N] float32
    options: LogitOptions,
    needs: tuple[bool, bool, bool],
    stats: bool,
) -> CrossEntropyResult:
    """As `reference.linear_cross_entropy`, any D; upstream stands for valid labels and token weights."""
    (num_tokens, width), vocabulary = x.shape, weight.shape[0]
    block, stride = min(rows_per_block(vocabulary), max(num_tokens, 1)), triton.cdiv(vocabulary, _VECTOR) * _VECTOR
    lowered = 1 / RAISED.value if x.dtype == torch.float16 else 1.0

    def sums(*shape: int) -> Tensor:
        return torch.empty(shape, device=x.device, dtype=torch.float32)

    losses, lse, entropy = sums(num_tokens), sums(num_tokens), torch.zeros_like(upstream)
    correct = torch.zeros_like(labels, dtype=torch.bool)
    grad_x = torch.empty_like(x) if needs[0] else None
    grad_weight = sums(vocabulary, width).zero_() if needs[1] else None
    grad_bias = sums(vocabulary).zero_() if needs[2] else None
    buffer = sums(block, stride)
    logits_buffer = buffer[:, :vocabulary]
    grad_buffer = buffer.view(x.dtype)[:, :vocabulary] if any(needs) else None

    def softmax_grad(rows: slice, logits: Tensor, grad: Tensor | None, config: Config) -> None:
        softmax_grad_kernel[(logits.shape[0],)](
            logits,
            bias,
            labels[rows],
            upstream[rows],
            grad,
            losses[rows],
            lse[rows],
            entropy[rows],
            correct[rows],
            vocabulary,
            logits.stride(0),
            0 if grad is None else grad.stride(0),
            options.ignore_index,
            options.label_smoothing,
            options.z_loss,
            options.softcap or 1.0,
            options.logit_scale,
            HAS_BIAS=bias is not None,
            SOFTCAP=options.softcap is not None,
            SMOOTH=options.label_smoothing > 0,
            STATS=stats,
            GRAD=grad is not None,
            **config.launch,
        )

    def elsewhere(rows: slice, logits: Tensor, grad: Tensor | None, config: Config) -> None:
        apart = None if grad is None else grad.new_empty(logits.shape[0], stride)
        softmax_grad(rows, logits, apart, config)

    for start in range(0, num_tokens, block):
        rows = slice(start, min(start + block, num_tokens))
        logits = mm_float32(x[rows], weight.T, out=logits_buffer[: rows.stop - start])
        grad = None if grad_buffer is None else grad_buffer[: rows.stop - start]
        arguments = rows, logits, grad
        configured(
            "softmax_grad", x[rows], vocabulary, partial(softmax_grad, *arguments), partial(elsewhere, *arguments)
        )
        if grad is None:
            continue
        if grad_x is not None:  # a float32 sum over the whole vocabulary, rounded once
            grad_x[rows] = mm_float32(grad, weight).mul_(options.logit_scale * lowered)
        if grad_bias is not None:
            grad_bias += grad.sum(dim=0, dtype=torch.float32) * lowered
        if grad_weight is not None:
            for first in range(0, vocabulary, _WEIGHT_ROWS):
                columns = slice(first, first + _WEIGHT_ROWS)
                part = mm_float32(grad[:, columns].T, x[rows])
                grad_weight[columns].add_(part, alpha=options.logit_scale * lowered)
    return CrossEntropyResult(losses, lse, entropy, correct, grad_x, grad_weight, grad_bias)


def rows_per_block(vocabulary: int) -> int:
    """A power of two: the GEMMs' tiles come out even, and no block begins where a vector does not."""
    return 1 << (max(16, LOGITS_BYTES // (4 * vocabulary)).bit_length() - 1)
