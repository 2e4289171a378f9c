"""The torch.library ops behind `cross_entropy`: dispatch to a backend, shapes for tracing, and autograd.

Each op returns the loss together with the gradients of its sum (empty where not asked for), which autograd keeps and
scales. With `per_token` there are none: backward calls the op again with the upstream gradients as token weights.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ibkernels import backends
from ibkernels.options import LogitOptions


@torch.library.custom_op("ibkernels::linear_cross_entropy", mutates_args=())
def _linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    token_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    logit_scale: float,
    per_token: bool,
    needs: Sequence[bool],
    stats: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    module = backends.implementation("linear_cross_entropy", input, backend)
    options = LogitOptions(ignore_index, label_smoothing, z_loss, softcap, logit_scale)
    wanted = (False,) * 3 if per_token else tuple(needs)
    with torch.autocast(input.device.type, enabled=False):
        result = module.linear_cross_entropy(input, weight, bias, labels, token_weight, options, wanted, stats)
        loss, *others = _outputs(result, input, per_token)
    return loss, others[0], others[1], others[2], others[3], others[4], others[5]


@_linear.register_fake
def _(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    token_weight: Tensor | None,
    *settings: Any,
) -> tuple[Tensor, ...]:
    return _fake_outputs(input, (input, weight, bias), settings)


@torch.library.custom_op("ibkernels::bottleneck_cross_entropy", mutates_args=())
def _bottleneck(
    z: Tensor,
    up_weight: Tensor,
    up_bias: Tensor | None,
    head_weight: Tensor,
    head_bias: Tensor | None,
    labels: Tensor,
    token_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    logit_scale: float,
    absorb: bool,
    per_token: bool,
    needs: Sequence[bool],
    stats: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    module = backends.implementation("bottleneck_cross_entropy", z, backend)
    options = LogitOptions(ignore_index, label_smoothing, z_loss, softcap, logit_scale)
    wanted = (False,) * 5 if per_token else tuple(needs)
    with torch.autocast(z.device.type, enabled=False):
        result = module.bottleneck_cross_entropy(
            z, up_weight, up_bias, head_weight, head_bias, labels, token_weight, options, absorb, wanted, stats
        )
        loss, *others = _outputs(result, z, per_token)
    return loss, others[0], others[1], others[2], others[3], others[4], others[5], others[6], others[7]


@_bottleneck.register_fake
def _(
    z: Tensor,
    up_weight: Tensor,
    up_bias: Tensor | None,
    head_weight: Tensor,
    head_bias: Tensor | None,
    labels: Tensor,
    token_weight: Tensor | None,
    *settings: Any,
) -> tuple[Tensor, ...]:
    return _fake_outputs(z, (z, up_weight, up_bias, head_weight, head_bias), settings)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...], num_parameters: int) -> None:
    """The inputs are `num_parameters` differentiable tensors, labels, token_weight, and settings."""
    num_tensors = num_parameters + 2
    tensors, ctx.settings = inputs[:num_tensors], inputs[num_tensors:]
    gradients = output[4:]
    ctx.per_token = ctx.settings[-4]
    ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in tensors[:num_parameters]]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*(tensors if ctx.per_token else gradients))


def _backward(ctx: Any, op: Any, grad: Tensor | None) -> list[Tensor | None]:
    """The gradients of the op's differentiable inputs."""
    if torch.is_grad_enabled():
        raise RuntimeError("the fused cross-entropy has no second derivative: create_graph=True is not supported.")
    needs = list(ctx.needs_input_grad[: len(ctx.dtypes)])
    if grad is None:
        return [None] * len(needs)
    if ctx.per_token:
        *tensors, token_weight = ctx.saved_tensors
        upstream = grad if token_weight is None else grad * token_weight
        *options, _, _, _, backend = ctx.settings
        # `needs` of this backward may be less than forward's; stats are not wanted here.
        gradients = op(*tensors, upstream, *options, False, needs, False, backend)[4:]
        return [
            gradient.to(dtype) if needed else None
            for gradient, dtype, needed in zip(gradients, ctx.dtypes, needs, strict=True)
        ]
    # As a vector: a GPU rounds a scalar to the dtype of what it is multiplied with, so that all of them err alike, and
    # a loss scale of 2^16 is infinite. And rounded at once: a product in float32 would be a second copy of a head's.
    factor = grad.reshape(1)
    return [
        torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=dtype)) if needed else None
        for gradient, dtype, needed in zip(ctx.saved_tensors, ctx.dtypes, needs, strict=True)
    ]


def _setup_linear(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _setup(ctx, inputs, output, num_parameters=3)


def _backward_linear(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    return (*_backward(ctx, torch.ops.ibkernels.linear_cross_entropy, grad), *(None,) * 11)


def _setup_bottleneck(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _setup(ctx, inputs, output, num_parameters=5)


def _backward_bottleneck(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    return (*_backward(ctx, torch.ops.ibkernels.bottleneck_cross_entropy, grad), *(None,) * 12)


_linear.register_autograd(_backward_linear, setup_context=_setup_linear)
_bottleneck.register_autograd(_backward_bottleneck, setup_context=_setup_bottleneck)


def _outputs(result: Any, input: Tensor, per_token: bool) -> list[Tensor]:
    """A backend's result as the op's outputs: the loss or the losses, the statistics, a tensor per gradient."""
    losses, lse, entropy, correct, grad_input, *grad_parameters = result
    empty = [losses.new_empty(0) if gradient is None else gradient for gradient in grad_parameters]
    grad_input = input.new_empty(0) if grad_input is None else grad_input.to(input.dtype)
    return [losses if per_token else losses.sum(), lse, entropy, correct, grad_input, *empty]


def _fake_outputs(
    input: Tensor, parameters: tuple[Tensor | None, ...], settings: tuple[Any, ...]
) -> tuple[Tensor, ...]:
    *_, per_token, needs, _, _ = settings
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    num_tokens = input.shape[0]

    def sums(*shape: Any) -> Tensor:
        return input.new_empty(shape, dtype=dtype)

    gradients = []
    for position, (parameter, needed) in enumerate(zip(parameters, needs, strict=True)):
        kind = input.dtype if position == 0 else dtype
        shape = parameter.shape if needed and not per_token and parameter is not None else (0,)
        gradients.append(input.new_empty(shape, dtype=kind))
    loss = sums(num_tokens) if per_token else sums()
    correct = input.new_empty((num_tokens,), dtype=torch.bool)
    return (loss, sums(num_tokens), sums(num_tokens), correct, *gradients)
