"""`linear_cross_entropy` and `bottleneck_cross_entropy` on the GPU, under the backends' names.

A narrow input runs flash-style, a wide one over blocks of logits, and so do float32 and a soft cap. The bottleneck's
head is absorbed into one matrix M = W_head W_up; what that costs beyond the narrow kernels are library GEMMs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ibkernels.gpu import configs
from ibkernels.gpu.cross_entropy import narrow_cross_entropy
from ibkernels.gpu.launch import mm_float32
from ibkernels.gpu.wide_cross_entropy import wide_cross_entropy
from ibkernels.options import LogitOptions
from ibkernels.reference.cross_entropy import BottleneckCrossEntropyResult, CrossEntropyResult

_BLOCK_WORDS = 8192  # of the head, whose float32 factors are taken apart at a time
_VECTOR = 8  # half-precision elements: fast GEMMs ask for rows of whole vectors


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
    # In "none" the weights are the upstream gradients, so small that float16 would lose their products: all results are
    # in proportion to them, and come for the largest being 1.
    # A vector, as in `cross_entropy_ops`: float16 need not hold it.
    unit = _scale(upstream)[None] if token_weight is not None and input.dtype == torch.float16 else None
    kernel = narrow_cross_entropy if _is_narrow(input, options) else wide_cross_entropy
    result = kernel(
        input.contiguous(),
        weight.to(input.dtype).contiguous(),
        None if bias is None else bias.float().contiguous(),
        labels.contiguous(),
        upstream if unit is None else upstream / unit,
        options,
        needs,
        stats,
    )
    if unit is None:
        return result
    gradients = (None if gradient is None else (gradient * unit).to(gradient.dtype) for gradient in result[4:])
    return CrossEntropyResult(result.losses * unit, *result[1:4], *gradients)


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
    del matrix  # what follows needs memory of its own
    grad_matrix, grad_shift = result.grad_weight, result.grad_bias
    grad_c = None if grad_shift is None or up_bias is None else options.logit_scale * grad_shift
    grad_up = grad_up_bias = grad_head = None
    factors = []  # side by side, so that the head is read once for both
    if needs_up and grad_matrix is not None:
        factors.append(grad_matrix)
    if needs_up_bias and grad_c is not None:
        factors.append(grad_c[:, None])
    if factors:
        product = _times(head.T, *factors)
        # Copies, even of one row, whose columns are contiguous already: an op's results share no memory.
        grad_up = product[:, : up.shape[1]].clone(memory_format=torch.contiguous_format) if needs_up else None
        grad_up_bias = product[:, -1].clone() if needs_up_bias else None
    if needs_head and grad_matrix is not None:
        grad_head = _times_transposed(grad_matrix, up)
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
    hidden = hidden.to(z.dtype)  # and the float32 one is free
    needs_hidden = needs_z or needs_up or needs_up_bias
    result = linear_cross_entropy(
        hidden, head, head_bias, labels, token_weight, options, (needs_hidden, needs_head, needs_head_bias), stats
    )
    grad_hidden = result.grad_input
    grad_z = grad_up = grad_up_bias = None
    if grad_hidden is not None:
        grad_z = mm_float32(grad_hidden, up) if needs_z else None
        grad_up = mm_float32(grad_hidden.T, z) if needs_up else None
        grad_up_bias = grad_hidden.sum(dim=0, dtype=torch.float32) if needs_up_bias else None
    return BottleneckCrossEntropyResult(
        *result[:4], grad_z, grad_up, grad_up_bias, result.grad_weight, result.grad_bias
    )


def _is_narrow(input: Tensor, options: LogitOptions) -> bool:
    """Whether the flash-style kernels serve it: their table has no float32, and they have no soft cap."""
    width = configs.widest("cross_entropy_fwd", input.element_size(), configs.chip(input.device))
    return options.softcap is None and input.shape[1] <= width


def _times(matrix: Tensor, *factors: Tensor) -> Tensor:
    """matrix @ [factors], in float32, for float32 factors that must not be rounded to the low precision of matrix.

    Each is taken apart into a high and a low half of that precision, a block of the inner dimension at a time: matrix
    is read once, and neither a float32 copy of it nor the halves of a [V, K] factor exist whole.
    """
    if matrix.dtype == torch.float32:
        return torch.cat([matrix @ factor for factor in factors], dim=1)
    scale = torch.cat([_scale(factor, dim=0) for factor in factors])  # of each column
    total: Tensor | float = 0.0
    for start in range(0, matrix.shape[1], _BLOCK_WORDS):
        inner = slice(start, start + _BLOCK_WORDS)
        halves = _halves(torch.cat([factor[inner] for factor in factors], dim=1) / scale, matrix.dtype)
        total = total + mm_float32(matrix[:, inner], F.pad(halves, (0, -halves.shape[1] % _VECTOR)))
    assert isinstance(total, Tensor)
    columns = scale.shape[0]
    return (total[:, :columns] + total[:, columns : 2 * columns]) * scale


def _times_transposed(exact: Tensor, matrix: Tensor) -> Tensor:
    """exact @ matrix^T in float32, likewise: the halves of exact follow each other in the inner dimension."""
    if matrix.dtype == torch.float32:
        return exact @ matrix.T
    scale = _scale(exact)
    return mm_float32(_halves(exact / scale, matrix.dtype), torch.cat([matrix, matrix], dim=1).T).mul_(scale)


def _scale(exact: Tensor, dim: int | None = None) -> Tensor:
    """Its largest magnitude: scaled to 1, a factor fits the range of float16."""
    if not exact.numel():
        return exact.new_ones(()) if dim is None else exact.new_ones(exact.shape[1])
    low, high = exact.aminmax(dim=dim)
    return torch.maximum(-low, high).clamp(min=torch.finfo(torch.float32).tiny)


def _halves(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """[high | low], of twice its width."""
    high = exact.to(dtype)
    return torch.cat([high, (exact - high.float()).to(dtype)], dim=1)
