"""Cross-entropy of a linear output head in plain PyTorch, a block of rows at a time, gradients in the same pass.

The head of the information bottleneck is that of the model behind an up-projection; with no nonlinearity between
them the two are one matrix (`absorb`), of the bottleneck's width.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ibkernels.options import LogitOptions

_LOGITS_BYTES = 32 * 2**20  # of a block of rows: large enough for an efficient GEMM, small beside the model
_HEAD_BYTES = 8 * 2**20  # of the rows of a low-precision head that are converted at a time; two such blocks exist


class CrossEntropyResult(NamedTuple):
    """losses, entropy and correct (bool) [N], zero where the label is ignored; lse [N]; gradients of sum(losses)."""

    losses: Tensor
    lse: Tensor
    entropy: Tensor
    correct: Tensor
    grad_input: Tensor | None
    grad_weight: Tensor | None
    grad_bias: Tensor | None


class BottleneckCrossEntropyResult(NamedTuple):
    """losses [N] and the gradients of their sum, None where not asked for."""

    losses: Tensor
    lse: Tensor
    entropy: Tensor
    correct: Tensor
    grad_z: Tensor | None
    grad_up_weight: Tensor | None
    grad_up_bias: Tensor | None
    grad_head_weight: Tensor | None
    grad_head_bias: Tensor | None


def linear_cross_entropy(
    input: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    bias: Tensor | None,  # [V]
    labels: Tensor,  # int64 [N]
    token_weight: Tensor | None,  # [N]
    options: LogitOptions,
    needs: tuple[bool, bool, bool],
    stats: bool,
) -> CrossEntropyResult:
    """Per-token losses (already weighted) and the gradients of their sum, float32 (float64 for float64 input)."""
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    weight = weight.to(input.dtype)
    num_tokens, vocabulary = input.shape[0], weight.shape[0]
    valid = labels != options.ignore_index
    targets = torch.where(valid, labels, 0)[:, None]
    # The gradient of the summed loss with respect to each unweighted per-token loss.
    upstream = valid.to(dtype) if token_weight is None else torch.where(valid, token_weight.to(dtype), 0)

    losses, lse, entropy = (input.new_zeros(num_tokens, dtype=dtype) for _ in range(3))
    correct = torch.zeros_like(valid)
    grad_input = torch.zeros_like(input, dtype=dtype) if needs[0] else None
    grad_weight = torch.zeros_like(weight, dtype=dtype) if needs[1] else None
    grad_bias = input.new_zeros(vocabulary, dtype=dtype) if needs[2] else None

    block_rows = max(16, _LOGITS_BYTES // (vocabulary * dtype.itemsize))
    for start in range(0, num_tokens, block_rows):
        rows = slice(start, start + block_rows)
        x, target, g = input[rows].to(dtype), targets[rows], upstream[rows]
        logits = _logits(x, weight, bias, options)  # [n, V]
        slope = None if options.softcap is None else 1 - (logits / options.softcap).square()
        peak = logits.amax(dim=1, keepdim=True)
        target_logit = logits.gather(1, target)[:, 0]
        mean_logit = logits.mean(dim=1) if options.label_smoothing else None
        if stats:
            correct[rows] = (logits.argmax(dim=1) == target[:, 0]) & valid[rows]
            shifted = logits - peak
        exp = logits.sub_(peak).exp_()
        total = exp.sum(dim=1)
        row_lse = total.log() + peak[:, 0]
        if stats:
            shifted.masked_fill_(exp == 0, 0)  # 0 log 0 = 0, also for a logit of -inf
            entropy[rows] = total.log() - (exp * shifted).sum(dim=1) / total

        loss = total.log() + (peak[:, 0] - target_logit)  # not lse - target: a large common offset would cost digits
        if mean_logit is not None:
            loss = loss + options.label_smoothing * (target_logit - mean_logit)
        losses[rows] = g * (loss + options.z_loss * row_lse.square())
        lse[rows] = row_lse

        if not any(needs):
            continue
        grad_logits = exp.mul_((g * (1 + 2 * options.z_loss * row_lse) / total)[:, None])
        grad_logits.scatter_add_(1, target, -(1 - options.label_smoothing) * g[:, None])
        if options.label_smoothing:
            grad_logits.sub_((options.label_smoothing / vocabulary) * g[:, None])
        if slope is not None:
            grad_logits.mul_(slope)
        if grad_bias is not None:
            grad_bias += grad_logits.sum(dim=0)
        if grad_weight is not None:
            grad_weight.addmm_(grad_logits.T, x, alpha=options.logit_scale)
        if grad_input is not None:
            for block, head in _blocks(weight, dtype):
                grad_input[rows].addmm_(grad_logits[:, block], head, alpha=options.logit_scale)

    losses.masked_fill_(~valid, 0)
    entropy.masked_fill_(~valid, 0)
    return CrossEntropyResult(losses, lse, entropy, correct, grad_input, grad_weight, grad_bias)


LinearCrossEntropy = Callable[..., CrossEntropyResult]  # called as `linear_cross_entropy`


class HeadProducts(NamedTuple):
    """Products of a head [V, H] of any dtype with float32 (float64) factors, which are not to be rounded to it."""

    times: Callable[[Tensor, Tensor], Tensor]  # (head, factor [H, M]) -> [V, M]
    transposed_times: Callable[..., list[Tensor]]  # (head, *factors [V, M]) -> [H, M] of each


def bottleneck_cross_entropy(
    z: Tensor,  # [N, K]
    up_weight: Tensor,  # [H, K]
    up_bias: Tensor | None,  # [H]
    head_weight: Tensor,  # [V, H]
    head_bias: Tensor | None,  # [V]
    labels: Tensor,
    token_weight: Tensor | None,
    options: LogitOptions,
    absorb: bool,
    needs: tuple[bool, bool, bool, bool, bool],
    stats: bool,
    linear: LinearCrossEntropy = linear_cross_entropy,
    products: HeadProducts | None = None,
) -> BottleneckCrossEntropyResult:
    """Cross-entropy of the logits W_head (W_up z + b_up), and the gradients of its sum; `linear` is its one kernel.

    products: those that absorbing takes, where another backend has them.
    """
    up, head = up_weight.to(z.dtype), head_weight.to(z.dtype)
    arguments = (z, up, up_bias, head, head_bias, labels, token_weight, options, needs, stats, linear)
    if not absorb:
        return _unabsorbed(*arguments)
    return _absorbed(*arguments, products or HeadProducts(_times, _transposed_times))


def _absorbed(
    z: Tensor,
    up: Tensor,
    up_bias: Tensor | None,
    head: Tensor,
    head_bias: Tensor | None,
    labels: Tensor,
    token_weight: Tensor | None,
    options: LogitOptions,
    needs: tuple[bool, bool, bool, bool, bool],
    stats: bool,
    linear: LinearCrossEntropy,
    products: HeadProducts,
) -> BottleneckCrossEntropyResult:
    """M = W_head W_up [V, K] and c = W_head b_up [V], then everything at the bottleneck's width."""
    needs_z, needs_up, needs_up_bias, needs_head, needs_head_bias = needs
    dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
    wide_up = up.to(dtype)
    matrix = products.times(head, wide_up).to(z.dtype)
    shift = None if head_bias is None else head_bias.to(dtype)  # the logits' constant, kept in float32
    if up_bias is not None:
        c = options.logit_scale * products.times(head, up_bias.to(dtype)[:, None])[:, 0]
        shift = c if shift is None else c + shift

    needs_shift = shift is not None and (needs_up_bias or needs_head or needs_head_bias)
    result = linear(
        z, matrix, shift, labels, token_weight, options, (needs_z, needs_up or needs_head, needs_shift), stats
    )
    grad_matrix, grad_shift = result.grad_weight, result.grad_bias
    grad_c = None if grad_shift is None or up_bias is None else options.logit_scale * grad_shift
    grad_up = grad_up_bias = grad_head = None
    if needs_up and needs_up_bias and grad_matrix is not None and grad_c is not None:
        grad_up, grad_up_bias = products.transposed_times(head, grad_matrix, grad_c[:, None])
    elif needs_up and grad_matrix is not None:
        (grad_up,) = products.transposed_times(head, grad_matrix)
    elif needs_up_bias and grad_c is not None:
        (grad_up_bias,) = products.transposed_times(head, grad_c[:, None])
    if grad_up_bias is not None:
        grad_up_bias = grad_up_bias[:, 0]
    if needs_head and grad_matrix is not None:
        grad_head = grad_matrix @ wide_up.T
        if grad_c is not None and up_bias is not None:
            grad_head.addr_(grad_c, up_bias.to(dtype))
    grad_head_bias = grad_shift if needs_head_bias else None
    return BottleneckCrossEntropyResult(
        *result[:4], result.grad_input, grad_up, grad_up_bias, grad_head, grad_head_bias
    )


def _unabsorbed(
    z: Tensor,
    up: Tensor,
    up_bias: Tensor | None,
    head: Tensor,
    head_bias: Tensor | None,
    labels: Tensor,
    token_weight: Tensor | None,
    options: LogitOptions,
    needs: tuple[bool, bool, bool, bool, bool],
    stats: bool,
    linear: LinearCrossEntropy,
) -> BottleneckCrossEntropyResult:
    """Up-projection first, then the model's head at full width: cheaper for few tokens."""
    needs_z, needs_up, needs_up_bias, needs_head, needs_head_bias = needs
    dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
    wide_z, wide_up = z.to(dtype), up.to(dtype)
    hidden = wide_z @ wide_up.T
    if up_bias is not None:
        hidden = hidden + up_bias.to(dtype)
    needs_hidden = needs_z or needs_up or needs_up_bias
    result = linear(
        hidden.to(z.dtype),
        head,
        head_bias,
        labels,
        token_weight,
        options,
        (needs_hidden, needs_head, needs_head_bias),
        stats,
    )
    grad_hidden = result.grad_input
    grad_z = grad_hidden @ wide_up if needs_z and grad_hidden is not None else None
    grad_up = grad_hidden.T @ wide_z if needs_up and grad_hidden is not None else None
    grad_up_bias = grad_hidden.sum(dim=0) if needs_up_bias and grad_hidden is not None else None
    return BottleneckCrossEntropyResult(
        *result[:4], grad_z, grad_up, grad_up_bias, result.grad_weight, result.grad_bias
    )


def _logits(x: Tensor, weight: Tensor, bias: Tensor | None, options: LogitOptions) -> Tensor:
    logits = x.new_empty(x.shape[0], weight.shape[0])
    for block, head in _blocks(weight, x.dtype):
        torch.mm(x, head.T, out=logits[:, block])
    if options.logit_scale != 1.0:
        logits.mul_(options.logit_scale)
    if bias is not None:
        logits.add_(bias.to(x.dtype))
    if options.softcap is not None:
        logits.div_(options.softcap).tanh_().mul_(options.softcap)
    return logits


def _times(head: Tensor, right: Tensor) -> Tensor:
    """head @ right in right's dtype, [V, ...]."""
    if head.dtype == right.dtype:
        return head @ right
    product = right.new_empty(head.shape[0], *right.shape[1:])
    for block, rows in _blocks(head, right.dtype):
        product[block] = rows @ right
    return product


def _transposed_times(head: Tensor, *factors: Tensor) -> list[Tensor]:
    """head^T @ factor [V, M] of each, in their dtype; the head is read once for all."""
    sums = [factor.new_zeros(head.shape[1], factor.shape[1]) for factor in factors]
    for block, rows in _blocks(head, factors[0].dtype):
        for total, factor in zip(sums, factors, strict=True):
            total.addmm_(rows.T, factor[block])
    return sums


def _blocks(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Rows of the head in `dtype`; a block at a time when that takes a copy, so that no second whole head exists."""
    size = weight.shape[0]
    if weight.dtype != dtype:
        size = max(1, _HEAD_BYTES // (dtype.itemsize * max(weight.shape[1], 1)))
    for start in range(0, weight.shape[0], size):
        yield slice(start, start + size), weight[start : start + size].to(dtype)
