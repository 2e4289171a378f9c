"""`variational_bottleneck` and `encode` on the GPU: which kernel serves which encoder, under the backends' names."""

import torch
from torch import Tensor

from ibkernels.gpu import bottleneck_linear, bottleneck_lora, bottleneck_lora_bwd
from ibkernels.gpu.launch import mm_float32


def bottleneck_forward(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [2K, H], or lora_a [R, H]
    lora_b: Tensor | None,  # [2K, R]
    bias: Tensor | None,  # [2K]
    rng: Tensor | None,  # int64 [2]; None: z = mu
    rows: Tensor | None,  # int64 [N]; None: 0..N-1
    logvar_range: tuple[float, float],
    kl_mean: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `reference.bottleneck_forward`."""
    hidden, width = _rows_contiguous(hidden), (weight if lora_b is None else lora_b).shape[0] // 2
    bias, rng, rows = (_contiguous(tensor) for tensor in (bias, rng, rows))
    kl_scale = 1 / width if kl_mean else 1.0
    if lora_b is None:
        z, kl, *saved = bottleneck_linear.forward(hidden, weight, bias, rng, rows, logvar_range, kl_scale, save)
    elif bottleneck_lora.holds(hidden, weight.shape[0]):
        z, kl, t = bottleneck_lora.forward(hidden, weight, lora_b, bias, rng, rows, logvar_range, kl_scale, save)
        saved = [t, kl.new_empty(0)]
    else:  # of a high rank: a linear encoder behind a library GEMM
        t = mm_float32(hidden, weight.to(hidden.dtype).T).to(hidden.dtype)
        z, kl, *_ = bottleneck_linear.forward(t, lora_b, bias, rng, rows, logvar_range, kl_scale, False)
        saved = [t, kl.new_empty(0)]
    return z, kl, saved[0], saved[1]


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
    hidden = _rows_contiguous(hidden)
    bias, rng, rows, grad_z, grad_kl = (_contiguous(tensor) for tensor in (bias, rng, rows, grad_z, grad_kl))
    width = (weight if lora_b is None else lora_b).shape[0] // 2
    kl_scale = 1 / width if kl_mean else 1.0
    upstream = (grad_z, grad_kl, hidden)
    if lora_b is None:
        grad_hidden, grad_weight, grad_bias = bottleneck_linear.backward(
            *upstream, weight, bias, rng, rows, saved, logvar_range, kl_scale, (needs[0], needs[1], needs[3])
        )
        grad_b = None
    elif bottleneck_lora.holds(hidden, weight.shape[0]):
        grad_hidden, grad_weight, grad_b, grad_bias = bottleneck_lora_bwd.backward(
            *upstream, weight, lora_b, bias, rng, rows, saved[0], logvar_range, kl_scale, needs
        )
    else:
        t = saved[0]
        _, _, *encoded = bottleneck_linear.forward(t, lora_b, bias, None, rows, logvar_range, kl_scale, True)
        grad_t, grad_b, grad_bias = bottleneck_linear.backward(
            grad_z, grad_kl, t, lora_b, bias, rng, rows, (encoded[0], encoded[1]), logvar_range, kl_scale,
            (needs[0] or needs[1], needs[2], needs[3]),
        )  # fmt: skip
        grad_hidden = grad_weight = None
        if grad_t is not None:
            grad_hidden = grad_t @ weight.to(hidden.dtype) if needs[0] else None
            grad_weight = mm_float32(grad_t.T, hidden) if needs[1] else None
    return (
        _or_empty(grad_hidden, hidden, hidden.dtype),
        _or_empty(grad_weight, hidden, weight.dtype),
        _or_empty(grad_b, hidden, weight.dtype if lora_b is None else lora_b.dtype),
        _or_empty(grad_bias, hidden, weight.dtype if bias is None else bias.dtype),
    )


def encode_forward(
    hidden: Tensor, weight: Tensor, lora_b: Tensor | None, bias: Tensor | None, logvar_range: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """As `reference.encode_forward`, by library GEMMs: nothing is left to fuse where mu and logvar are the outputs."""
    raw, _ = _project(hidden, weight, lora_b, bias)
    mu, raw_logvar = raw.chunk(2, dim=1)
    return mu.clone(), raw_logvar.clamp(*logvar_range)


def encode_backward(
    grad_mu: Tensor,
    grad_logvar: Tensor,
    hidden: Tensor,
    weight: Tensor,
    lora_b: Tensor | None,
    bias: Tensor | None,
    logvar_range: tuple[float, float],
    needs: tuple[bool, bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `reference.encode_backward`."""
    raw, t = _project(hidden, weight, lora_b, bias)
    raw_logvar = raw.chunk(2, dim=1)[1]
    inside = (raw_logvar >= logvar_range[0]) & (raw_logvar <= logvar_range[1])
    exact = torch.cat([grad_mu, grad_logvar * inside], dim=1)  # float32 [N, 2K]
    grad, low = exact.to(hidden.dtype), hidden.dtype
    grad_b = None
    if lora_b is not None and t is not None:
        grad_b = mm_float32(grad.T, t) if needs[2] else None
        grad = grad @ lora_b.to(low)  # [N, R]
    return (
        _or_empty(grad @ weight.to(low) if needs[0] else None, hidden, low),
        _or_empty(mm_float32(grad.T, hidden) if needs[1] else None, hidden, weight.dtype),
        _or_empty(grad_b, hidden, weight.dtype if lora_b is None else lora_b.dtype),
        _or_empty(
            exact.sum(dim=0) if needs[3] and bias is not None else None,
            hidden,
            weight.dtype if bias is None else bias.dtype,
        ),
    )


def _project(
    hidden: Tensor, weight: Tensor, lora_b: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    raw = mm_float32(hidden, weight.to(hidden.dtype).T)
    t = None
    if lora_b is not None:
        t = raw.to(hidden.dtype)
        raw = mm_float32(t, lora_b.to(hidden.dtype).T)
    return raw if bias is None else raw + bias.float(), t


def _rows_contiguous(hidden: Tensor) -> Tensor:
    """hidden itself where each of its rows lies in one piece, else a copy: kernels step from row to row by a stride."""
    return hidden if hidden.stride(-1) == 1 or not hidden.numel() else hidden.contiguous()


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _or_empty(gradient: Tensor | None, like: Tensor, dtype: torch.dtype) -> Tensor:
    return like.new_empty(0) if gradient is None else gradient.to(dtype)
