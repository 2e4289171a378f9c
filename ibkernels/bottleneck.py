"""The variational bottleneck: encode hidden states, sample z, and the KL of every token, in one op.

    mu, logvar = encoder(hidden)                 logvar clamped, its gradient zero outside
    z          = mu + exp(logvar / 2) * eps      eps ~ N(0, 1), the noise stream of `philox`
    kl         = reduce_K 1/2 (mu^2 + exp(logvar) - 1 - logvar)

The auxiliary branch of information-bottleneck fine-tuning (arXiv 2510.16022); the closed-form KL to N(0, I) and the
reparameterised sample are those of Kingma & Welling, arXiv 1312.6114.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ibkernels import backends
from ibkernels.checks import compute_dtype, require_device, require_floating_rows, require_shape
from ibkernels.philox import check_rng

LOGVAR_RANGE = (-4.0, 4.0)
KL_REDUCTIONS = ("mean", "sum")
EncoderWeight = Tensor | tuple[Tensor, Tensor]


def variational_bottleneck(
    hidden: Tensor,
    weight: EncoderWeight,
    bias: Tensor | None = None,
    rng: Tensor | None = None,
    *,
    rows: Tensor | None = None,
    logvar_range: tuple[float, float] = LOGVAR_RANGE,
    kl_reduction: str = "mean",
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Samples z and gives the per-token KL to the standard normal.

    Args:
        hidden: [..., H], float16, bfloat16, float32 or float64.
        weight: linear encoder: [2K, H], rows 0..K-1 give mu, rows K..2K-1 logvar. LoRA encoder: the pair
            (lora_a [R, H], lora_b [2K, R]).
        bias: [2K] or None.
        rng: int64 [2] from `rng_state`, on hidden's device; None: z = mu, deterministic (evaluation).
        rows: [...] int64 row ids of the noise stream; None: 0..N-1 in order.
        logvar_range: the clamp (low, high) of logvar.
        kl_reduction: over K, "mean" (the published scale) or "sum" (nats per token).
        backend: "triton", "cpp" or "reference", instead of the first that serves the input (`python -m ibkernels`
            lists them).

    Returns:
        z [..., K] in hidden's dtype (under autocast, the autocast dtype); kl [...] in float32 (float64 for float64).

    Weights are rounded to the compute dtype; biases and sums are float32; gradients come back in each parameter's own
    dtype. Saved for backward besides the arguments: mu in the compute dtype and the raw logvar in float32 (linear),
    2·N·K elements; or hidden A^T [N, R] (LoRA). Backward redraws the noise.

    Raises:
        ValueError, TypeError: for a shape, dtype, device or option that does not fit, naming it.
    """
    weight, lora_b, flat = _check_encoder(hidden, weight, bias)
    check_logvar_range(logvar_range)
    if kl_reduction not in KL_REDUCTIONS:
        raise ValueError(f"kl_reduction is {kl_reduction!r}; it must be one of {', '.join(KL_REDUCTIONS)}.")
    if rng is not None:
        check_rng(rng, hidden.device)
    if rows is not None:
        if rows.shape != hidden.shape[:-1] or rows.dtype != torch.int64:
            raise ValueError(
                f"rows is {rows.dtype} of shape {tuple(rows.shape)}; it must be int64 {tuple(hidden.shape[:-1])}, "
                "one row id for each row of hidden."
            )
        require_device(hidden.device, "hidden", rows=rows)
        rows = rows.reshape(-1)
    # Known before the op runs, so that without gradients nothing is kept for a backward pass.
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (hidden, weight, lora_b, bias))
    z, kl, _, _ = torch.ops.ibkernels.variational_bottleneck(
        flat, weight, lora_b, bias, rng, rows, *logvar_range, kl_reduction == "mean", save, backend or ""
    )
    shape = hidden.shape[:-1]
    return z.view(*shape, z.shape[1]), kl.view(shape)


def encode(
    hidden: Tensor,
    weight: EncoderWeight,
    bias: Tensor | None = None,
    *,
    logvar_range: tuple[float, float] = LOGVAR_RANGE,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """mu and the clamped logvar of every token, float32 (float64 for float64) [..., K] each.

    For diagnostics and analysis; arguments, rounding and errors are those of `variational_bottleneck`.
    """
    weight, lora_b, flat = _check_encoder(hidden, weight, bias)
    check_logvar_range(logvar_range)
    mu, logvar = torch.ops.ibkernels.encode(flat, weight, lora_b, bias, *logvar_range, backend or "")
    shape = (*hidden.shape[:-1], mu.shape[1])
    return mu.view(shape), logvar.view(shape)


def _check_encoder(hidden: Tensor, weight: EncoderWeight, bias: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor]:
    """The encoder's matrices as (weight or lora_a, lora_b or None), and hidden as [N, H] in the compute dtype."""
    require_floating_rows("hidden", hidden)
    width = hidden.shape[-1]
    lora_b = None
    if isinstance(weight, Tensor):
        require_shape("weight", weight, (None, width), "[2K, H]")
        outputs = weight.shape[0]
    else:
        if len(weight) != 2:
            raise ValueError(f"weight is {len(weight)} tensors; it must be one tensor, or the pair (lora_a, lora_b).")
        weight, lora_b = weight
        require_shape("lora_a", weight, (None, width), "[R, H]")
        require_shape("lora_b", lora_b, (None, weight.shape[0]), "[2K, R]")
        outputs = lora_b.shape[0]
    if outputs % 2:
        raise ValueError(
            f"the encoder gives {outputs} outputs; it must be an even number, mu and logvar of each dimension."
        )
    if bias is not None:
        require_shape("bias", bias, (outputs,), "[2K]")
    require_device(hidden.device, "hidden", weight=weight, lora_b=lora_b, bias=bias)
    return weight, lora_b, hidden.reshape(-1, width).to(compute_dtype(hidden))


def check_logvar_range(logvar_range: tuple[float, float]) -> None:
    """Raises ValueError unless it is (low, high) in order."""
    if not logvar_range[0] <= logvar_range[1]:
        raise ValueError(f"logvar_range is {logvar_range}; it must be (low, high) with low <= high.")


# ---------------------------------------------------------------------------------------------------------------------
# The ops. `save` and `needs` are plain arguments because an op cannot see what autograd will ask for.


@torch.library.custom_op("ibkernels::variational_bottleneck", mutates_args=())
def _bottleneck(
    hidden: Tensor,
    weight: Tensor,
    lora_b: Tensor | None,
    bias: Tensor | None,
    rng: Tensor | None,
    rows: Tensor | None,
    logvar_min: float,
    logvar_max: float,
    kl_mean: bool,
    save: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    module = backends.implementation("variational_bottleneck", hidden, backend)
    with torch.autocast(hidden.device.type, enabled=False):
        z, kl, *saved = module.bottleneck_forward(
            hidden, weight, lora_b, bias, rng, rows, (logvar_min, logvar_max), kl_mean, save
        )
    if not save:
        saved = [hidden.new_empty(0), hidden.new_empty(0, dtype=kl.dtype)]
    return z, kl, saved[0], saved[1]


@_bottleneck.register_fake
def _(hidden: Tensor, weight: Tensor, lora_b: Tensor | None, *settings: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *_, save, _ = settings
    num_tokens = hidden.shape[0]
    width = (weight if lora_b is None else lora_b).shape[0] // 2
    sums = _sum_dtype(hidden)
    first, second = hidden.new_empty(0), hidden.new_empty(0, dtype=sums)
    if save and lora_b is None:
        first, second = hidden.new_empty(num_tokens, width), hidden.new_empty((num_tokens, width), dtype=sums)
    elif save:
        first = hidden.new_empty(num_tokens, weight.shape[0])
    return hidden.new_empty(num_tokens, width), hidden.new_empty(num_tokens, dtype=sums), first, second


@torch.library.custom_op("ibkernels::variational_bottleneck_backward", mutates_args=())
def _bottleneck_backward(
    grad_z: Tensor | None,
    grad_kl: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    lora_b: Tensor | None,
    bias: Tensor | None,
    rng: Tensor | None,
    rows: Tensor | None,
    saved0: Tensor,
    saved1: Tensor,
    logvar_min: float,
    logvar_max: float,
    kl_mean: bool,
    needs: Sequence[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    module = backends.implementation("variational_bottleneck", hidden, backend)
    with torch.autocast(hidden.device.type, enabled=False):
        return module.bottleneck_backward(
            grad_z,
            grad_kl,
            hidden,
            weight,
            lora_b,
            bias,
            rng,
            rows,
            (saved0, saved1),
            (logvar_min, logvar_max),
            kl_mean,
            tuple(needs),
        )


@_bottleneck_backward.register_fake
def _(grad_z: Tensor | None, grad_kl: Tensor | None, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden, weight, lora_b, bias, *_, needs, _ = arguments
    return _fake_gradients(hidden, weight, lora_b, bias, needs)


@torch.library.custom_op("ibkernels::encode", mutates_args=())
def _encode(
    hidden: Tensor,
    weight: Tensor,
    lora_b: Tensor | None,
    bias: Tensor | None,
    logvar_min: float,
    logvar_max: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    module = backends.implementation("encode", hidden, backend)
    with torch.autocast(hidden.device.type, enabled=False):
        return module.encode_forward(hidden, weight, lora_b, bias, (logvar_min, logvar_max))


@_encode.register_fake
def _(hidden: Tensor, weight: Tensor, lora_b: Tensor | None, *_: Any) -> tuple[Tensor, Tensor]:
    shape = (hidden.shape[0], (weight if lora_b is None else lora_b).shape[0] // 2)
    return hidden.new_empty(shape, dtype=_sum_dtype(hidden)), hidden.new_empty(shape, dtype=_sum_dtype(hidden))


@torch.library.custom_op("ibkernels::encode_backward", mutates_args=())
def _encode_backward(
    grad_mu: Tensor,
    grad_logvar: Tensor,
    hidden: Tensor,
    weight: Tensor,
    lora_b: Tensor | None,
    bias: Tensor | None,
    logvar_min: float,
    logvar_max: float,
    needs: Sequence[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    module = backends.implementation("encode", hidden, backend)
    with torch.autocast(hidden.device.type, enabled=False):
        return module.encode_backward(
            grad_mu, grad_logvar, hidden, weight, lora_b, bias, (logvar_min, logvar_max), tuple(needs)
        )


@_encode_backward.register_fake
def _(grad_mu: Tensor, grad_logvar: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden, weight, lora_b, bias, *_, needs, _ = arguments
    return _fake_gradients(hidden, weight, lora_b, bias, needs)


def _setup_bottleneck(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.logvar_min, ctx.logvar_max, ctx.kl_mean, _, ctx.backend = inputs
    _, _, *saved = output
    ctx.mark_non_differentiable(*saved)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *saved)


def _backward_bottleneck(
    ctx: Any, grad_z: Tensor | None, grad_kl: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:4])
    if grad_z is None and grad_kl is None:
        return (None,) * 11
    gradients = torch.ops.ibkernels.variational_bottleneck_backward(
        grad_z, grad_kl, *ctx.saved_tensors, ctx.logvar_min, ctx.logvar_max, ctx.kl_mean, needs, ctx.backend
    )
    return (*_where_needed(gradients, needs), *(None,) * 7)


def _setup_encode(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.logvar_min, ctx.logvar_max, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _backward_encode(ctx: Any, grad_mu: Tensor, grad_logvar: Tensor) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:4])
    gradients = torch.ops.ibkernels.encode_backward(
        grad_mu, grad_logvar, *ctx.saved_tensors, ctx.logvar_min, ctx.logvar_max, needs, ctx.backend
    )
    return (*_where_needed(gradients, needs), None, None, None)


_bottleneck.register_autograd(_backward_bottleneck, setup_context=_setup_bottleneck)
_encode.register_autograd(_backward_encode, setup_context=_setup_encode)


def _where_needed(gradients: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    return [gradient if needed else None for gradient, needed in zip(gradients, needs, strict=True)]


def _fake_gradients(
    hidden: Tensor, weight: Tensor, lora_b: Tensor | None, bias: Tensor | None, needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs = (hidden, weight, lora_b, bias)
    gradients = [
        torch.empty_like(tensor, memory_format=torch.contiguous_format)
        if needed and tensor is not None
        else hidden.new_empty(0)
        for tensor, needed in zip(inputs, needs, strict=True)
    ]
    return gradients[0], gradients[1], gradients[2], gradients[3]


def _sum_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
