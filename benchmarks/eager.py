"""What the project is compared with: the same mathematics in plain PyTorch, written from the formulas alone.

Every logit is materialised, as in the published code; nothing here uses `ibkernels` or `ibft`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class EagerBottleneck(nn.Module):
    """The published bottleneck and its up-projection; parameters are named as those of `VariationalBottleneck`."""

    def __init__(self, hidden_size: int, bottleneck_dim: int) -> None:
        super().__init__()
        encoder, up = nn.Linear(hidden_size, 2 * bottleneck_dim), nn.Linear(bottleneck_dim, hidden_size)
        self.weight, self.bias = encoder.weight, encoder.bias
        self.up_weight, self.up_bias = up.weight, up.bias


def sft_loss(model: nn.Module, batch: dict[str, Tensor], counts: tuple[int, int] | None = None) -> Tensor:
    """Supervised fine-tuning through a PEFT model: full logits, then the loss that transformers computes.

    counts: as in `ib_loss`.
    """
    return model(**batch, num_items_in_batch=None if counts is None else torch.tensor(counts[0])).loss


def ib_loss(
    model: nn.Module,
    layer: EagerBottleneck,
    head_weight: Tensor,  # [V, H]
    batch: dict[str, Tensor],
    *,
    target_layer: int,
    alpha: float,
    beta: float,
    eps: Tensor | None = None,  # [B, T, K]
    counts: tuple[int, int] | None = None,
) -> Tensor:
    """The published loss, CE + alpha * (KL + beta * CE_ib), over two full logit tensors; KL averages all positions.

    batch: input_ids, attention_mask and labels, [B, T] each. eps: the noise; None: drawn with torch.randn.
    counts: the labels and the real tokens of all micro-batches of a step, by which their sums are divided; KL then
    leaves padding out, unlike the published code, so that a step's gradients are those of any layout.
    """
    if counts is not None:
        batch = {**batch, "num_items_in_batch": torch.tensor(counts[0])}
    output: Any = model(**batch, output_hidden_states=True)
    hidden = output.hidden_states[target_layer]  # [B, T, H]
    z, kl = bottleneck(hidden, layer.weight, layer.bias, eps)
    logits = F.linear(F.linear(z, layer.up_weight, layer.up_bias), head_weight)  # [B, T, V]
    reduction = "mean" if counts is None else "sum"
    ce_ib = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction=reduction)
    if counts is None:
        return output.loss + alpha * (kl.mean() + beta * ce_ib)
    kl_mean = (kl * batch["attention_mask"]).sum() / counts[1]
    return output.loss + alpha * (kl_mean + beta * ce_ib / counts[0])


def encode(hidden: Tensor, weight: Tensor | tuple[Tensor, Tensor], bias: Tensor) -> tuple[Tensor, Tensor]:
    """mu and the clamped logvar, [..., K] each; weight is [2K, H], or the LoRA pair ([R, H], [2K, R])."""
    if isinstance(weight, Tensor):
        raw = F.linear(hidden, weight, bias)
    else:
        raw = F.linear(F.linear(hidden, weight[0]), weight[1], bias)
    mu, logvar = raw.chunk(2, dim=-1)
    return mu, logvar.clamp(-4, 4)


def bottleneck(
    hidden: Tensor, weight: Tensor | tuple[Tensor, Tensor], bias: Tensor, eps: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """z [..., K] and the KL to the standard normal per position [...], a mean over K."""
    mu, logvar = encode(hidden, weight, bias)
    z = mu + torch.exp(0.5 * logvar) * (torch.randn_like(mu) if eps is None else eps)
    kl = 0.5 * (mu.square() + logvar.exp() - 1 - logvar).mean(dim=-1)
    return z, kl
