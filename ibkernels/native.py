"""The C++ backend: the ops of the native library under the names that every backend has.

It takes float32 and bfloat16 activations. Whatever is strided, or a parameter in another dtype, is copied here.
"""

import torch
from torch import Tensor

from ibkernels.options import LogitOptions
from ibkernels.reference import cross_entropy as reference
from ibkernels.reference.cross_entropy import BottleneckCrossEntropyResult, CrossEntropyResult

_LOGITS_BYTES = 32 * 2**20  # of a block of rows, as the reference's


def bottleneck_forward(
    hidden: Tensor,
    weight: Tensor,
    lora_b: Tensor | None,
    bias: Tensor | None,
    rng: Tensor | None,
    rows: Tensor | None,
    logvar_range: tuple[float, float],
    kl_mean: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `reference.bottleneck_forward`; without `save` the last two are empty."""
    arguments = _bottleneck_arguments(hidden, weight, lora_b, bias, rng, rows)
    return torch.ops.ibkernels_cpu.bottleneck_forward(*arguments, *logvar_range, kl_mean, save)


def bottleneck_backward(
    grad_z: Tensor | None,
    grad_kl: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    lora_b: Tensor | None,
    bias: Tensor | None,
    rng: Tensor | None,
    rows: Tensor | None,
    saved: tuple[Tensor, Tensor],
    logvar_range: tuple[float, float],
    kl_mean: bool,
    needs: tuple[bool, bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `reference.bottleneck_backward`."""
    arguments = _bottleneck_arguments(hidden, weight, lora_b, bias, rng, rows)
    gradients = torch.ops.ibkernels_cpu.bottleneck_backward(
        None if grad_z is None else grad_z.to(hidden.dtype).contiguous(),
        _floats(grad_kl),
        *arguments,
        *(tensor.contiguous() for tensor in saved),
        *logvar_range,
        kl_mean,
        *needs,
    )
    parameters = (hidden, weight, lora_b, bias)
    results = [
        gradient.to(parameter.dtype) if needed and parameter is not None else hidden.new_empty(0)
        for gradient, parameter, needed in zip(gradients, parameters, needs, strict=True)
    ]
    return results[0], results[1], results[2], results[3]


def linear_cross_entropy(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    token_weight: Tensor | None,
    options: LogitOptions,
    needs: tuple[bool, bool, bool],
    stats: bool,
) -> CrossEntropyResult:
    """As `reference.linear_cross_entropy`."""
    *results, grad_input, grad_weight, grad_bias = torch.ops.ibkernels_cpu.linear_cross_entropy(
        input.contiguous(),
        weight.to(input.dtype).contiguous(),
        _floats(bias),
        labels.contiguous(),
        _floats(token_weight),
        *options,
        *needs,
        stats,
        _LOGITS_BYTES,
    )
    gradients = (grad_input, grad_weight, grad_bias)
    return CrossEntropyResult(
        *results, *(gradient if needed else None for gradient, needed in zip(gradients, needs, strict=True))
    )


def bottleneck_cross_entropy(
    z: Tensor,
    up_weight: Tensor,
    up_bias: Tensor | None,
    head_weight: Tensor,
    head_bias: Tensor | None,
    labels: Tensor,
    token_weight: Tensor | None,
    options: LogitOptions,
    absorb: bool,
    needs: tuple[bool, bool, bool, bool, bool],
    stats: bool,
) -> BottleneckCrossEntropyResult:
    """As `reference.bottleneck_cross_entropy`: what it adds to the linear head are products too."""
    products = None
    if z.dtype == torch.bfloat16 and up_weight.shape[0] % 2 == 0 and has_bfloat16_products():
        products = reference.HeadProducts(_head_times, _transposed_times)
    return reference.bottleneck_cross_entropy(
        z, up_weight, up_bias, head_weight, head_bias, labels, token_weight, options, absorb, needs, stats,
        linear=linear_cross_entropy, products=products,
    )  # fmt: skip


def has_bfloat16_products() -> bool:
    """Whether bfloat16 factors are multiplied as such, sums in float32: where this machine has instructions for that.

    Otherwise they are widened and multiplied as float32, as under torch.backends.mkldnn.flags(enabled=False) and a
    lowered ATEN_CPU_CAPABILITY.
    """
    return torch.ops.ibkernels_cpu.bfloat16_products()


def _head_times(head: Tensor, factor: Tensor) -> Tensor:
    return torch.ops.ibkernels_cpu.head_times(head.contiguous(), factor.contiguous())


def _transposed_times(head: Tensor, *factors: Tensor) -> list[Tensor]:
    products = (torch.ops.ibkernels_cpu.transposed_times(factor.contiguous(), head.contiguous()) for factor in factors)
    return [product.T.contiguous() for product in products]


def noise_bits(rng: Tensor, rows: Tensor, columns: int) -> Tensor:
    """As `reference.noise_bits`."""
    return torch.ops.ibkernels_cpu.philox_bits(rng, rows, columns)


def noise(rng: Tensor, rows: Tensor, columns: int) -> Tensor:
    """As `reference.noise`, float32."""
    return torch.ops.ibkernels_cpu.philox_normal(rng, rows, columns)


def _bottleneck_arguments(
    hidden: Tensor,
    weight: Tensor,
    lora_b: Tensor | None,
    bias: Tensor | None,
    rng: Tensor | None,
    rows: Tensor | None,
) -> tuple[Tensor | None, ...]:
    rounded = (None if each is None else each.to(hidden.dtype).contiguous() for each in (weight, lora_b))
    return hidden.contiguous(), *rounded, _floats(bias), _contiguous(rng), _contiguous(rows)


def _floats(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float().contiguous()


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()
