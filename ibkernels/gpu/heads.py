"""`linear_cross_entropy` and `bottleneck_cross_entropy` on the GPU, under the backends' names.

A narrow input runs flash-style, a wide one (and exact float32) over blocks of logits. The bottleneck's head is absorbed
into one matrix M = W_head W_up; what that costs beyond the narrow kernels are library GEMMs.
"""

import torch
from torch import Tensor

from ibkernels.gpu import configs
from ibkernels.gpu.cross_entropy import narrow_cross_entropy
from ibkernels.gpu.launch import dot_precision, float32_vector, mm_float32
from ibkernels.gpu.wide_cross_entropy import wide_cross_entropy
from ibkernels.options import LogitOptions
from ibkernels.reference.cross_entropy import BottleneckCrossEntropyResult, CrossEntropyResult

_BLOCK_WORDS = 8192  # of the head, whose float32 factors are taken apart at a time


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
    """As `reference.linear_cross_entropy`; strided arguments are copied."""
    valid = labels != options.ignore_index
    upstream = valid.float() if token_weight is None else torch.where(valid, token_weight.float(), 0)
    # Softcap with label smoothing would need a second sum of [BM, D] beside the pull: none has the registers for it.
    fits = _is_narrow(input) and (options.softcap is None or options.label_smoothing == 0)
    kernel = narrow_cross_entropy if fits else wide_cross_entropy
    return kernel(
        input.contiguous(),
        weight.to(input.dtype).contiguous(),
        float32_vector(bias),
        labels.contiguous(),
        upstream,
        options,
        needs,
        stats,
    )


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
) -> BottleneckCrossEntropyResult:
    """As `reference.bottleneck_cross_entropy`."""
    path = _absorbed if absorb else _unabsorbed
    up, head = up_weight.to(z.dtype), head_weight.to(z.dtype)
    return path(z, up, up_bias, head, head_bias, labels, token_weight, options, needs, stats)


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
) -> BottleneckCrossEntropyResult:
    needs_z, needs_up, needs_up_bias, needs_head, needs_head_bias = needs
    matrix = head @ up  # M [V, K], rounded once; what is added to the logits stays float32
    shift = None if head_bias is None else head_bias.float()
    if up_bias is not None:
        c = options.logit_scale * _times(head, up_bias.float()[:, None])[:, 0]
        shift = c if shift is None else c + shift
    needs_shift = shift is not None and (needs_up_bias or needs_head or needs_head_bias)
    needs_matrix = needs_up or needs_head
    result = linear_cross_entropy(
        z, matrix, shift, labels, token_weight, options, (needs_z, needs_matrix, needs_shift), stats
    )
    grad_matrix, grad_shift = result.grad_weight, result.grad_bias
    grad_c = None if grad_shift is None or up_bias is None else options.logit_scale * grad_shift
    grad_up = grad_up_bias = grad_head = None
    if needs_up and grad_matrix is not None:
        grad_up = _transposed_times(head, grad_matrix)
    if needs_up_bias and grad_c is not None:
        grad_up_bias = _transposed_times(head, grad_c[:, None])[:, 0]
    if needs_head and grad_matrix is not None:
        grad_head = _times(up, grad_matrix.T).T.contiguous()
        if grad_c is not None and up_bias is not None:
            grad_head.addr_(grad_c, up_bias.float())
    return BottleneckCrossEntropyResult(
        *result[:4], result.grad_input, grad_up, grad_up_bias, grad_head, grad_shift if needs_head_bias else None
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
) -> BottleneckCrossEntropyResult:
    needs_z, needs_up, needs_up_bias, needs_head, needs_head_bias = needs
    hidden = mm_float32(z, up.T)
    if up_bias is not None:
        hidden += up_bias.float()
    needs_hidden = needs_z or needs_up or needs_up_bias
    result = linear_cross_entropy(
        hidden.to(z.dtype), head, head_bias, labels, token_weight, options,
        (needs_hidden, needs_head, needs_head_bias), stats,
    )  # fmt: skip
    grad_hidden = result.grad_input
    grad_z = grad_up = grad_up_bias = None
    if grad_hidden is not None:
        grad_z = grad_hidden @ up if needs_z else None
        grad_up = mm_float32(grad_hidden.T, z) if needs_up else None
        grad_up_bias = grad_hidden.sum(dim=0, dtype=torch.float32) if needs_up_bias else None
    return BottleneckCrossEntropyResult(
        *result[:4], grad_z, grad_up, grad_up_bias, result.grad_weight, result.grad_bias
    )


def _is_narrow(input: Tensor) -> bool:
    """Whether a row fits on chip. Exact float32 products have no matrix instruction: there a library GEMM is faster."""
    if input.dtype == torch.float32 and dot_precision(input) == "ieee" and input.device.type != "cpu":
        return False
    return input.shape[1] <= configs.widest("cross_entropy_fwd", input.element_size(), configs.chip(input.device))


def _times(matrix: Tensor, exact: Tensor) -> Tensor:
    """matrix @ exact in float32, for a float32 factor that must not be rounded to the low precision of the other.

    It is taken apart into a high and a low half of that precision: two products, and no float32 copy of the head.
    """
    if matrix.dtype == torch.float32:
        return matrix @ exact
    scale = _scale(exact)
    return scale * sum(mm_float32(matrix, half) for half in _halves(exact / scale, matrix.dtype))


def _transposed_times(head: Tensor, exact: Tensor) -> Tensor:
    """head^T exact, likewise; by blocks of words, so that the halves of a [V, K] factor never exist whole."""
    if head.dtype == torch.float32:
        return head.T @ exact
    scale = _scale(exact)
    total = exact.new_zeros(head.shape[1], exact.shape[1])
    for start in range(0, head.shape[0], _BLOCK_WORDS):
        words = slice(start, start + _BLOCK_WORDS)
        for half in _halves(exact[words] / scale, head.dtype):
            total += mm_float32(head[words].T, half)
    return scale * total


def _scale(exact: Tensor) -> Tensor:
    """Its largest value: scaled to 1, a factor fits the range of float16."""
    return exact.abs().amax().clamp(min=torch.finfo(torch.float32).tiny)


def _halves(exact: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    high = exact.to(dtype)
    return high, (exact - high.float()).to(dtype)
