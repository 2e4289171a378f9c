"""The variational bottleneck in plain PyTorch: encode, sample, per-token KL; and the gradients, by hand.

Products and sums are float32 (float64 for float64 hidden states); weights are first rounded to hidden's dtype.
With `lora_b` the encoder's matrix is lora_b @ weight, weight being lora_a.
"""

import torch
from torch import Tensor

from ibkernels.reference.noise import noise


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
    """z [N, K] in hidden's dtype, kl [N] float32, and what backward needs: (mu, raw logvar), with LoRA (t, empty).

    Backends may leave the last two empty without `save`; this one has them anyway.
    """
    raw, t = _project(hidden, weight, lora_b, bias)
    mu, raw_logvar = raw.chunk(2, dim=1)  # [N, K] each
    logvar = raw_logvar.clamp(*logvar_range)
    z = mu
    if rng is not None:
        z = mu + torch.exp(logvar / 2) * noise(rng, _row_ids(rows, hidden), mu.shape[1], mu.dtype)
    kl = 0.5 * (mu.square() + torch.exp(logvar) - 1 - logvar)
    kl = kl.mean(dim=1) if kl_mean else kl.sum(dim=1)
    z = z.to(hidden.dtype, copy=True)  # an op may not return a view of what it also saves
    if t is not None:
        return z, kl, t, kl.new_empty(0)
    return z, kl, mu.to(hidden.dtype, copy=True), raw_logvar.clone(memory_format=torch.contiguous_format)


def bottleneck_backward(
    grad_z: Tensor | None,  # [N, K]
    grad_kl: Tensor | None,  # [N]
    hidden: Tensor,
    weight: Tensor,
    lora_b: Tensor | None,
    bias: Tensor | None,
    rng: Tensor | None,
    rows: Tensor | None,
    saved: tuple[Tensor, Tensor],  # the last two results of bottleneck_forward
    logvar_range: tuple[float, float],
    kl_mean: bool,
    needs: tuple[bool, bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of (hidden, weight, lora_b, bias); an empty tensor where `needs` says no."""
    dtype = _sum_dtype(hidden)
    if lora_b is None:
        t, mu, raw_logvar = None, saved[0].to(dtype), saved[1]
    else:
        t = saved[0]
        mu, raw_logvar = _add_bias(t.to(dtype) @ _rounded(lora_b, hidden).T, bias).chunk(2, dim=1)
    std = torch.exp(raw_logvar.clamp(*logvar_range) / 2)
    inside = (raw_logvar >= logvar_range[0]) & (raw_logvar <= logvar_range[1])

    grad_mu, grad_logvar = torch.zeros_like(mu), torch.zeros_like(mu)  # [N, K]
    if grad_kl is not None:
        scale = grad_kl.to(dtype)[:, None] / (mu.shape[1] if kl_mean else 1)
        grad_mu += scale * mu
        grad_logvar += 0.5 * scale * (std.square() - 1)
    if grad_z is not None:
        grad_mu += grad_z
        if rng is not None:
            grad_logvar += 0.5 * std * grad_z * noise(rng, _row_ids(rows, hidden), mu.shape[1], dtype)
    grad = torch.cat([grad_mu, grad_logvar * inside], dim=1)  # [N, 2K]
    return _project_backward(grad, hidden, weight, lora_b, bias, t, needs)


def encode_forward(
    hidden: Tensor, weight: Tensor, lora_b: Tensor | None, bias: Tensor | None, logvar_range: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """mu and the clamped logvar, float32 [N, K] each."""
    raw, _ = _project(hidden, weight, lora_b, bias)
    mu, logvar = raw.chunk(2, dim=1)
    return mu.clone(), logvar.clamp(*logvar_range)


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
    """Gradients of (hidden, weight, lora_b, bias); an empty tensor where `needs` says no."""
    raw, t = _project(hidden, weight, lora_b, bias)
    raw_logvar = raw.chunk(2, dim=1)[1]
    inside = (raw_logvar >= logvar_range[0]) & (raw_logvar <= logvar_range[1])
    grad = torch.cat([grad_mu, grad_logvar * inside], dim=1)
    return _project_backward(grad, hidden, weight, lora_b, bias, t, needs)


def _project(
    hidden: Tensor, weight: Tensor, lora_b: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """[mu | raw logvar] [N, 2K], and for LoRA t = hidden A^T [N, R] in hidden's dtype."""
    dtype = _sum_dtype(hidden)
    product = hidden.to(dtype) @ _rounded(weight, hidden).T
    if lora_b is None:
        return _add_bias(product, bias), None
    t = product.to(hidden.dtype)
    return _add_bias(t.to(dtype) @ _rounded(lora_b, hidden).T, bias), t


def _project_backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    lora_b: Tensor | None,
    bias: Tensor | None,
    t: Tensor | None,
    needs: tuple[bool, bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Chain rule through `_project`; grad [N, 2K] is the gradient of [mu | raw logvar]."""
    dtype = grad.dtype
    skipped = [hidden.new_empty(0) for _ in range(4)]
    grad_hidden, grad_weight, grad_lora_b, grad_bias = skipped
    if needs[3] and bias is not None:
        grad_bias = grad.sum(dim=0).to(bias.dtype)
    if lora_b is not None and t is not None:
        if needs[2]:
            grad_lora_b = (grad.T @ t.to(dtype)).to(lora_b.dtype)
        grad = grad @ _rounded(lora_b, hidden)  # [N, R]
    if needs[1]:
        grad_weight = (grad.T @ hidden.to(dtype)).to(weight.dtype)
    if needs[0]:
        grad_hidden = (grad @ _rounded(weight, hidden)).to(hidden.dtype)
    return grad_hidden, grad_weight, grad_lora_b, grad_bias


def _add_bias(raw: Tensor, bias: Tensor | None) -> Tensor:
    return raw if bias is None else raw + bias.to(raw.dtype)


def _rounded(weight: Tensor, hidden: Tensor) -> Tensor:
    return weight.to(hidden.dtype).to(_sum_dtype(hidden))


def _row_ids(rows: Tensor | None, hidden: Tensor) -> Tensor:
    return torch.arange(hidden.shape[0], device=hidden.device) if rows is None else rows


def _sum_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
