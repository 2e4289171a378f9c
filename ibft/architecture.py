"""What IB-FT needs to know of a causal language model: its decoder, layers, output head, and how logits are scaled.

Everything else is the model's own business. A model that does not fit is refused with what was looked for.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ibft.errors import InputError


@dataclass(frozen=True)
class CausalLM:
    """The parts of a causal language model. logits = softcap(logit_scale * head(decoder(...)))."""

    decoder: nn.Module
    head: nn.Linear
    num_layers: int
    softcap: float | None
    logit_scale: float
    router_loss: bool  # a mixture of experts whose configuration adds the router's auxiliary loss

    @classmethod
    def of(cls, model: Any) -> "CausalLM":
        """The parts of a model as they are now. Raises InputError naming the part that was not found."""
        name = type(model).__name__
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        if not isinstance(head, nn.Module) or not isinstance(getattr(head, "weight", None), Tensor):
            raise InputError(
                f"{name}.get_output_embeddings() gives no linear output head; IB-FT needs a causal language model."
            )
        decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
        if not isinstance(decoder, nn.Module) or decoder is model:
            raise InputError(f"{name}.get_decoder() gives no decoder below the output head.")
        config = model.config.get_text_config()
        granite, cohere = getattr(config, "logits_scaling", None), getattr(config, "logit_scale", None)
        return cls(
            decoder=decoder,
            head=cast(nn.Linear, head),  # a LoRA layer or another wrapper: see check_head_is_plain
            num_layers=config.num_hidden_layers,
            softcap=getattr(config, "final_logit_softcapping", None),
            logit_scale=1 / granite if granite else (cohere or 1.0),
            router_loss=bool(getattr(config, "output_router_logits", False)),
        )

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder's layers. Raises InputError when it keeps no list of them."""
        for module in self.decoder.modules():
            if isinstance(module, nn.ModuleList) and len(module) == self.num_layers:
                return module
        raise InputError(
            f"{type(self.decoder).__name__} has no ModuleList of config.num_hidden_layers = {self.num_layers} layers."
        )

    def decode(self, **inputs: Any) -> Tensor:
        """The hidden states under the output head, [B, T, H]."""
        return self.decoder(**{**inputs, "use_cache": False})[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., H], what the head reads -> logits [..., V], float32."""
        logits = self.logit_scale * self.head(hidden).float()
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def check_layer(self, target_layer: int) -> None:
        """Raises InputError unless hidden_states[target_layer] exists."""
        if not 1 <= target_layer <= self.num_layers:
            raise InputError(
                f"target_layer is {target_layer}, but the model has {self.num_layers} layers; "
                f"it must be in 1..{self.num_layers} (the published choice, 20 of 32, would be "
                f"{default_target_layer(self.num_layers)} here)."
            )

    def check_router_loss(self, asked: bool = False) -> None:
        """Raises InputError where the configuration, or the call that `asked`, wants the router's auxiliary loss."""
        if self.router_loss or asked:
            raise InputError(
                "output_router_logits asks for the auxiliary loss of a mixture of experts' router, which IBModel does "
                "not compute: set model.config.output_router_logits = False, in trl SFTConfig(router_aux_loss_coef=0)."
            )

    def check_head_is_plain(self) -> None:
        """Raises InputError for an adapter or a trained copy on the output head: the loss reads its weight directly."""
        if (kind := type(self.head)) is not nn.Linear:
            raise InputError(
                f"the output head is a {kind.__module__}.{kind.__name__}, not a plain Linear. An adapter on the head "
                "is not supported: take it out of the LoRA configuration's target_modules and modules_to_save "
                '(target_modules="all-linear" leaves it out); a tied head has its embedding\'s trainable_token_indices.'
            )

    @property
    def _has_weights(self) -> bool:
        """Without them (on the meta device, or sharded) the checks that run the model are skipped."""
        return not self.head.weight.is_meta and self.head.weight.numel() > 0

    @torch.no_grad()
    def check_causal(self) -> None:
        """Raises InputError when a token's hidden state depends on the next one, as an encoder's does."""
        if not self._has_weights:
            return
        with evaluating(self.decoder):
            hidden = self.decode(input_ids=torch.tensor([[0, 1], [0, 2]], device=self.head.weight.device))
        if (hidden[0, 0] - hidden[1, 0]).abs().max() > 0.02 * hidden.abs().max():
            raise InputError(
                f"{type(self.decoder).__name__} lets a token see the ones after it, as an encoder does; base_model "
                "must be a causal language model."
            )

    @torch.no_grad()
    def check_logits(self, model: nn.Module) -> None:
        """Raises InputError when the model computes its logits in a way that this class does not describe.

        Two tokens through the model and through the parts.
        """
        if not self._has_weights:
            return
        ids = torch.tensor([[0, 1]], device=self.head.weight.device)
        with evaluating(model):
            expected = model(input_ids=ids, use_cache=False).logits.float()
            logits = self.logits(self.decode(input_ids=ids))
        error, size = (logits - expected).abs().max().item(), expected.abs().max().item()
        if not error <= 0.02 * size:
            raise InputError(
                f"{type(model).__name__} does not compute its logits as softcap(logit_scale * head(hidden)) with the "
                f"softcap {self.softcap} and logit_scale {self.logit_scale} of its configuration (largest difference "
                f"{error:.3g} of {size:.3g}); its loss would be wrong, so it is not supported."
            )

    @torch.no_grad()
    def check_packing(self, lengths: dict[str, Any] | None = None) -> None:
        """Raises InputError when documents of a packed row see each other, as in models that ignore position_ids.

        A document of two tokens behind another one must have the hidden states that it has alone. lengths: for an
        attention that takes them, `document_lengths` of 2 and 2.
        """
        if not self._has_weights:
            return
        device = self.head.weight.device
        with evaluating(self.decoder):
            packed = self.decode(
                input_ids=torch.tensor([[1, 2, 3, 4]], device=device),
                position_ids=torch.tensor([[0, 1, 0, 1]], device=device),
                **{k: v.to(device) if isinstance(v, Tensor) else v for k, v in (lengths or {}).items()},
            )[:, 2:]
            alone = self.decode(
                input_ids=torch.tensor([[3, 4]], device=device), position_ids=torch.tensor([[0, 1]], device=device)
            )
        if not (packed - alone).abs().max() <= 0.02 * alone.abs().max():
            raise InputError(
                f"{type(self.decoder).__name__} does not keep the documents of a packed row apart; use --packing none."
            )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout, and afterwards each module in the mode that it had: a caller may have frozen some of them."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def able_to_run(model: Any) -> Iterator[None]:
    """flash-attn runs on a GPU alone, where a trainer may yet have to take the model: eager attention until then."""
    asked = getattr(model.config, "_attn_implementation", None) or ""
    if "flash" not in asked or next(model.parameters()).device.type != "cpu":
        yield
        return
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(asked)


def default_target_layer(num_layers: int) -> int:
    """The published relative depth, layer 20 of 32, in a model of another size."""
    return max(1, round(num_layers * 20 / 32))


class LayerTap:
    """Keeps the output of one layer. Its hook stays for good behind a flag: arming hooks in forward breaks compile.

    Captures overwrite, because a recompute under activation checkpointing may fire the hook again.
    """

    def __init__(self) -> None:
        self.enabled = False
        self.hidden: Tensor | None = None
        self.handle: Any = None

    @property
    def attached(self) -> bool:
        """Whether a layer is listened to."""
        return self.handle is not None

    def attach(self, layer: nn.Module) -> None:
        """Starts listening to a decoder layer."""
        self.handle = layer.register_forward_hook(self)

    def remove(self) -> None:
        """Leaves the layer as it was."""
        if self.handle is not None:
            self.handle.remove()
            self.handle = None

    @contextmanager
    def armed(self, enabled: bool) -> Iterator[None]:
        """Captures within the block."""
        self.enabled = enabled
        try:
            yield
        finally:
            self.enabled = False

    def take(self) -> Tensor | None:
        """The captured output, let go of here so that it lives no longer than the graph needs."""
        hidden, self.hidden = self.hidden, None
        return hidden

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> None:
        """The forward hook."""
        if self.enabled:
            self.hidden = output[0] if isinstance(output, tuple) else output
