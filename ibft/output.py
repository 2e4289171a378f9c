"""What `IBModel` returns for labels, in the shapes that transformers.Trainer and trl.SFTTrainer read."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from transformers.utils import ModelOutput

from ibft.architecture import CausalLM
from ibft.errors import InputError


@dataclass
class IBOutput(ModelOutput):
    """All but `loss` and `log_probs` is detached; all but `logits` are scalars.

    Args:
        loss: float32, what is trained.
        logits: [B, T, V] in float32, computed if something reads them (`DeferredLogits`).
        ce, kl, ce_ib: float32, the loss's terms, normalised as in it; kl and ce_ib in training alone.
        active_share: see `objective.active_share`; only where it was asked for.
        num_valid_tokens, num_correct_tokens: int64, this batch's label positions, and those predicted; entropy_sum:
            nats, over them. What trl < 1.15 logs.
        log_probs, label_mask, entropy, is_top1: what later versions of trl read, see `fused_head_output`.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    ce: Tensor | None = None
    kl: Tensor | None = None
    ce_ib: Tensor | None = None
    active_share: Tensor | None = None
    num_valid_tokens: Tensor | None = None
    entropy_sum: Tensor | None = None
    num_correct_tokens: Tensor | None = None
    log_probs: Tensor | None = None
    label_mask: Tensor | None = None
    entropy: Tensor | None = None
    is_top1: Tensor | None = None


def fused_head_output(output: IBOutput) -> IBOutput:
    """The answer to `forward(..., fused_lm_head=True)`, as trl.SFTTrainer calls its model from 1.15 on.

    trl takes the loss as -log_probs.sum() / (number of labels), and the sums of label_mask, entropy and is_top1: here
    each is one number, the sum itself. The loss must have been divided by this batch's own number of labels.
    """
    assert output.loss is not None and output.num_valid_tokens is not None
    values = dict(output)  # as items: accelerate's mixed precision passes on nothing else
    values["log_probs"] = (-output.loss * output.num_valid_tokens).as_subclass(_NegatedLossSum)
    values["label_mask"], values["entropy"] = output.num_valid_tokens, output.entropy_sum
    return IBOutput(**values, is_top1=output.num_correct_tokens)


class _NegatedLossSum(Tensor):
    """A sum over tokens, which trl's loss_type="dft" would take for the log-probability of one token."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.exp:
            raise InputError(
                'loss_type="dft" weighs every token by its own probability, and IBModel sums over the tokens in its '
                'kernels; take loss_type="nll".'
            )
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


class DeferredLogits(Tensor):
    """Logits [B, T, V], float32, computed anew by each operation on them, and never where there is none.

    For what cannot do without: `compute_metrics` in Trainer's evaluation, trl < 1.15 with loss_type="nll".
    """

    _hidden: Tensor  # [B, T, H]
    _parts: CausalLM

    @staticmethod
    def __new__(cls, hidden: Tensor, parts: CausalLM) -> "DeferredLogits":
        shape = (*hidden.shape[:-1], parts.head.weight.shape[0])
        logits = Tensor._make_wrapper_subclass(cls, shape, dtype=torch.float32, device=hidden.device)
        logits._hidden, logits._parts = hidden.detach(), parts
        return logits

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        def computed(value: Any) -> Any:
            return value._parts.logits(value._hidden) if isinstance(value, cls) else value

        return func(*tree_map(computed, args), **tree_map(computed, kwargs or {}))

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]  # Tensor's would compute them
        return f"DeferredLogits(shape={tuple(self.shape)})"
