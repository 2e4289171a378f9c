"""Cross-entropy of a linear output head without its logits: of the model's own head, and of the bottleneck's.

Both ops share options and reductions. Under "mean" and "sum" the gradients are computed in the forward pass, where the
logits of a block are at hand, and backward only scales them; under "none" the upstream gradient of each token is not
known then, and backward computes the logits again.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import ibkernels.cross_entropy_ops  # noqa: F401  (registers the ops)
from ibkernels.checks import compute_dtype, require_device, require_floating_rows, require_shape
from ibkernels.options import LogitOptions

REDUCTIONS = ("none", "sum", "mean")


class CrossEntropyStats(NamedTuple):
    """Detached: entropy_sum (nats, float32 scalar) and num_correct (int64 scalar) over unignored tokens; lse [N]."""

    entropy_sum: Tensor
    num_correct: Tensor
    lse: Tensor


def linear_cross_entropy(
    input: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items: int | Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    token_weight: Tensor | None = None,
    return_stats: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, CrossEntropyStats]:
    """Cross-entropy of softcap(logit_scale * (input weight^T) + bias) against labels, softcap(x) = c tanh(x / c).

    A token's loss is (1 - label_smoothing) * nll + label_smoothing * (mean over V of nll) + z_loss * lse^2, where lse
    is the log-sum-exp of its logits. Label smoothing: Szegedy et al., arXiv 1512.00567; z-loss: Chowdhery et al.
    (PaLM), arXiv 2204.02311; the soft cap as in Gemma 2, arXiv 2408.00118.

    Args:
        input: [N, D]; under autocast it is cast to the autocast dtype.
        weight: [V, D], rounded to input's dtype. Frozen: its gradient is neither computed nor allocated.
        labels: int64 [N], in 0..V-1 or ignore_index.
        bias: [V], added in float32.
        reduction: "none" gives [N] (0 where ignored); "sum"; "mean" divides by the number of unignored tokens, or by
            the sum of their weights.
        num_items: replaces mean's count (a global token count, for instance); only with "mean".
        label_smoothing: in [0, 1); z_loss: not negative; softcap: positive, or None for none.
        token_weight: [N], multiplies each token's loss before the reduction; takes no gradient.
        return_stats: also return `CrossEntropyStats`.
        backend: "triton", "cpp" or "reference", instead of the first that serves the input (`python -m ibkernels`
            lists them).

    Returns:
        The loss in float32 (float64 for float64 input), 0 with zero gradients where every label is ignored; with
        return_stats, (loss, stats).

    Saved for backward: with "mean" and "sum" the gradients themselves, input's in its dtype, the others' in float32;
    with "none" the arguments.

    Raises:
        ValueError, TypeError: for a shape, dtype or option that does not fit, naming it.
    """
    options = LogitOptions(ignore_index, label_smoothing, z_loss, softcap, logit_scale)
    _check(input, labels, token_weight, options, reduction, num_items)
    require_shape("weight", weight, (None, input.shape[1]), "[V, D]")
    if bias is not None:
        require_shape("bias", bias, (weight.shape[0],), "[V]")
    require_device(input.device, "input", weight=weight, bias=bias, labels=labels, token_weight=token_weight)
    input = input.to(compute_dtype(input))
    weights, unit = _in_units(token_weight, labels, ignore_index, reduction, input.dtype)
    loss, lse, entropy, correct, *_ = torch.ops.ibkernels.linear_cross_entropy(
        input,
        weight,
        bias,
        labels,
        weights,
        *options,
        reduction == "none",
        _needs(input, weight, bias),
        return_stats,
        backend or "",
    )
    loss = loss if unit is None else loss * unit
    return _finish(loss, lse, entropy, correct, labels, token_weight, ignore_index, reduction, num_items, return_stats)


def bottleneck_cross_entropy(
    z: Tensor,
    up_weight: Tensor,
    up_bias: Tensor | None,
    head_weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    absorb: bool | str = "auto",
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items: int | Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    token_weight: Tensor | None = None,
    return_stats: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, CrossEntropyStats]:
    """Cross-entropy of the model's head behind the bottleneck's up-projection, W_head (W_up z + b_up).

    Args:
        z: [N, K].
        up_weight: [H, K]; up_bias: [H] or None.
        head_weight: [V, H], usually the model's frozen output embedding; bias: [V] or None.
        absorb: form M = W_head W_up [V, K] once and run at width K (4·V·H·K FLOPs once, then 6-10·N·K·V in place of
            4·N·H·V); "auto" does so where it is cheaper, see `absorbs`.
        The rest: as in `linear_cross_entropy`, with the same reductions, results and errors.

    M is rounded to z's dtype; W_head b_up, the logits and the gradient of M stay float32, so that W_up's gradient is
    W_head^T dM with float32 sums. Saved for backward: with "mean" and "sum" the gradients, of z's, W_up's, b_up's (and
    a trainable head's) sizes and no [V, K]; with "none" the arguments.
    """
    options = LogitOptions(ignore_index, label_smoothing, z_loss, softcap, logit_scale)
    _check(z, labels, token_weight, options, reduction, num_items, name="z")
    require_shape("up_weight", up_weight, (None, z.shape[1]), "[H, K]")
    hidden_size, width = up_weight.shape
    require_shape("head_weight", head_weight, (None, hidden_size), "[V, H]")
    if up_bias is not None:
        require_shape("up_bias", up_bias, (hidden_size,), "[H]")
    if bias is not None:
        require_shape("bias", bias, (head_weight.shape[0],), "[V]")
    require_device(z.device, "z", up_weight=up_weight, up_bias=up_bias, head_weight=head_weight, bias=bias)
    require_device(z.device, "z", labels=labels, token_weight=token_weight)
    if absorb not in (True, False, "auto"):
        raise ValueError(f"absorb is {absorb!r}; it must be True, False or 'auto'.")
    z = z.to(compute_dtype(z))
    weights, unit = _in_units(token_weight, labels, ignore_index, reduction, z.dtype)
    loss, lse, entropy, correct, *_ = torch.ops.ibkernels.bottleneck_cross_entropy(
        z,
        up_weight,
        up_bias,
        head_weight,
        bias,
        labels,
        weights,
        *options,
        absorbs(labels.shape[0], hidden_size, width) if absorb == "auto" else bool(absorb),
        reduction == "none",
        _needs(z, up_weight, up_bias, head_weight, bias),
        return_stats,
        backend or "",
    )
    loss = loss if unit is None else loss * unit
    return _finish(loss, lse, entropy, correct, labels, token_weight, ignore_index, reduction, num_items, return_stats)


def absorbs(num_tokens: int, hidden_size: int, width: int) -> bool:
    """Whether absorbing the head is cheaper: from N = H·K / (H - 2K) tokens up, never for K >= H/2.

    Per token the full width costs 4·V·H FLOPs and the absorbed one 8·V·K, next to 4·V·H·K once for M and its gradient.
    8 are those of kernels that compute the logits again in backward, as on a GPU; on a CPU it takes 6, so that the head
    is cheaper absorbed from H·K / (H - 1.5K) already.
    """
    return 2 * width < hidden_size and num_tokens * (hidden_size - 2 * width) >= hidden_size * width


def _check(
    input: Tensor,
    labels: Tensor,
    token_weight: Tensor | None,
    options: LogitOptions,
    reduction: str,
    num_items: int | Tensor | None,
    name: str = "input",
) -> None:
    require_floating_rows(name, input)
    if input.dim() != 2:
        raise ValueError(f"{name} has shape {tuple(input.shape)}; it must be [N, D]: flatten the leading dimensions.")
    if labels.shape != input.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(
            f"labels is {labels.dtype} of shape {tuple(labels.shape)}; it must be int64 [N] = ({input.shape[0]},)."
        )
    if token_weight is not None and token_weight.shape != labels.shape:
        raise ValueError(f"token_weight has shape {tuple(token_weight.shape)}; it must be [N] = ({input.shape[0]},).")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r}; it must be one of {', '.join(REDUCTIONS)}.")
    if num_items is not None and reduction != "mean":
        raise ValueError(f"num_items replaces the count of reduction='mean'; it has no meaning with {reduction!r}.")
    if isinstance(num_items, Tensor) and num_items.dim() != 0:
        raise ValueError(f"num_items has shape {tuple(num_items.shape)}; it must be a number, or a tensor of shape ().")
    options.check()


def _finish(
    loss: Tensor,
    lse: Tensor,
    entropy: Tensor,
    correct: Tensor,
    labels: Tensor,
    token_weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    num_items: int | Tensor | None,
    return_stats: bool,
) -> Tensor | tuple[Tensor, CrossEntropyStats]:
    if reduction == "mean":
        count = num_items
        if count is None:
            valid = labels != ignore_index
            weights = valid if token_weight is None else torch.where(valid, token_weight.detach(), 0)
            count = weights.sum(dtype=loss.dtype)
        # No tokens: 0 / 1, connected to the graph, instead of NaN.
        if isinstance(count, Tensor):
            count = torch.where(count == 0, 1, count)
            # On the CPU it is divided by as a number is: a copy to a GPU would make the host wait.
            count = count.to(loss.dtype) if count.device.type == "cpu" else count.to(loss)
        loss = loss / (count if isinstance(count, Tensor) else count or 1)
    if not return_stats:
        return loss
    return loss, CrossEntropyStats(entropy.sum(), correct.sum(), lse)


def _needs(*tensors: Tensor | None) -> list[bool]:
    grad = torch.is_grad_enabled()
    return [grad and tensor is not None and tensor.requires_grad for tensor in tensors]


def _in_units(
    token_weight: Tensor | None, labels: Tensor, ignore_index: int, reduction: str, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """The op's token weights, and what its loss is in units of (None: 1).

    The gradient of a sum waits for backward in input's dtype. float16 would lose it to weights far from 1, such as
    1 / a number of tokens, however large the upstream gradient that it is then multiplied by.
    """
    if token_weight is None:
        return None, None
    token_weight = token_weight.detach()
    if reduction == "none" or dtype != torch.float16:
        return token_weight, None
    weights = torch.where(labels != ignore_index, token_weight.float(), 0)
    largest = F.pad(weights.abs(), (0, 1)).amax()  # of no tokens, too
    unit = largest.clamp(min=torch.finfo(torch.float32).tiny)
    return weights / unit, unit
