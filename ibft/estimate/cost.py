"""What a model costs, read off its modules: parameters, FLOPs of a step. The model may be on the meta device."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from torch import nn
from transformers.pytorch_utils import Conv1D

from ibft.architecture import CausalLM
from ibft.engines import num_elements
from ibft.errors import InputError
from ibft.model import IBModel
from ibft.objective import IBConfig
from ibkernels import absorbs


class Flops(NamedTuple):
    """Of one optimizer step, over all its documents. A multiplication and an addition are two."""

    decoder_forward: float
    decoder_backward: float
    head: float  # of the cross-entropy, forward and backward
    bottleneck: float  # of encoder and CE_ib, forward and backward

    @property
    def model(self) -> float:
        """What the mathematics needs, and what the MFU is made of: nothing that is only computed again."""
        return sum(self)

    def hardware(self, checkpointing: bool) -> float:
        """With the forward pass that activation checkpointing repeats."""
        return self.model + self.decoder_forward * checkpointing


@dataclass(frozen=True)
class ModelCost:
    """Sizes of a base model with its adapter and bottleneck. Multiplications are counted per token of the decoder."""

    hidden_size: int
    vocabulary: int
    num_parameters: int  # of the base model; a tied head once
    root_parameters: int  # of those, outside the decoder's layers: embeddings, head, last norm
    linear_parameters: int  # of the decoder's linear layers, each multiplied with every token
    widest_linear: int  # outputs of the widest of them
    adapter_parameters: int
    adapter_linear: int  # of those, in matrices
    bottleneck_parameters: int
    attention_width: int  # of the queries of all heads of a layer
    attention_heads: int
    attention_softcap: bool  # whether the scores have one
    windows: tuple[int | None, ...]  # of every layer's attention; None: the whole document
    ib: IBConfig | None

    @classmethod
    def of(cls, model: IBModel) -> "ModelCost":
        """Raises InputError for a mixture of experts, whose cost depends on where its router sends the tokens."""
        parts = CausalLM.of(model.get_base_model())
        config = model.get_base_model().config.get_text_config()
        if any(parameter.dim() == 3 for parameter in parts.layers.parameters()):
            raise InputError(
                f"{type(model.get_base_model()).__name__} is a mixture of experts, whose cost depends on where its "
                "router sends the tokens; there is no estimate for it."
            )
        linear = [module for module in parts.layers.modules() if isinstance(module, (nn.Linear, Conv1D))]
        frozen = [_shape(module) for module in linear if not module.weight.requires_grad]
        trained = [_shape(module) for module in linear if module.weight.requires_grad]
        counts = {id(p): (name, p) for name, p in model.named_parameters()}  # a tied head once
        trainable = {name: num_elements(p) for name, p in counts.values() if p.requires_grad}
        bottleneck = sum(size for name, size in trainable.items() if name.startswith("bottleneck."))
        base = sum(num_elements(p) for _, p in counts.values()) - sum(trainable.values())
        layers = sum(num_elements(p) for p in parts.layers.parameters() if not p.requires_grad)
        heads = config.num_attention_heads
        width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
        return cls(
            hidden_size=parts.head.weight.shape[1],
            vocabulary=parts.head.weight.shape[0],
            num_parameters=base,
            root_parameters=base - layers,
            linear_parameters=sum(inputs * outputs for inputs, outputs in frozen),
            widest_linear=max(outputs for _, outputs in frozen),
            adapter_parameters=sum(trainable.values()) - bottleneck,
            adapter_linear=sum(inputs * outputs for inputs, outputs in trained),
            bottleneck_parameters=bottleneck,
            attention_width=width,
            attention_heads=heads,
            attention_softcap=bool(getattr(config, "attn_logit_softcapping", None)),
            windows=_windows(config, parts.num_layers),
            ib=model.ib_config,
        )

    @property
    def num_layers(self) -> int:
        """Of the decoder."""
        return len(self.windows)

    @property
    def trainable(self) -> int:
        """Parameters of adapter and bottleneck."""
        return self.adapter_parameters + self.bottleneck_parameters

    def flops(self, num_tokens: int, num_labels: int, pairs: Sequence[float]) -> Flops:
        """Of a step over documents of `num_tokens` tokens together, where `pairs` (query, key) meet in each layer.

        Frozen linear layers have a gradient of their input alone: as many FLOPs again as forward, adapters twice as
        many. The gradient of attention is four products where forward is two.
        """
        attention = 4 * self.attention_width * sum(pairs)
        linear, adapter = 2.0 * num_tokens * self.linear_parameters, 2.0 * num_tokens * self.adapter_linear
        head = 2.0 * num_labels * self.vocabulary * self.hidden_size
        return Flops(
            decoder_forward=linear + adapter + attention,
            decoder_backward=linear + 2 * adapter + 2 * attention,
            head=2 * head,
            bottleneck=self._bottleneck_flops(num_tokens, num_labels, head),
        )

    def _bottleneck_flops(self, num_tokens: int, num_labels: int, head: float) -> float:
        """Encoder [2K, H] and up-projection, trained; the head behind is frozen, and absorbed where that is cheaper."""
        if self.ib is None:
            return 0.0
        width = self.ib.bottleneck_dim
        encoded = num_tokens if self.ib.kl_tokens == "all" else num_labels
        per_token = 2 * width * self.hidden_size
        if self.ib.encoder == "lora":
            per_token = self.ib.encoder_rank * (self.hidden_size + 2 * width)
        encoder = 6.0 * encoded * per_token
        if absorbs(num_labels, self.hidden_size, width):
            once = 4.0 * self.vocabulary * self.hidden_size * width  # M = W_head W_up, and dW_up
            return encoder + once + 6.0 * num_labels * self.vocabulary * width  # logits, dz, dM
        return encoder + 2 * head + 6.0 * num_labels * width * self.hidden_size

    def pairs(self, lengths: np.ndarray) -> list[float]:
        """The (query, key) pairs of causal attention within documents of these lengths, by layer."""
        found = {window: _pairs(lengths.astype(np.float64), window) for window in set(self.windows)}
        return [found[window] for window in self.windows]


def _shape(module: Any) -> tuple[int, int]:
    """(inputs, outputs); by the attributes, for 4-bit weights and ZeRO-3's are of another shape."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    return tuple(module.weight.shape)


def _windows(config: Any, num_layers: int) -> tuple[int | None, ...]:
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * num_layers
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _pairs(lengths: np.ndarray, window: int | None) -> float:
    seen = lengths if window is None else np.minimum(lengths, window)
    # The first `seen` tokens see 1, 2, ..., seen; each later one sees the whole window.
    return float((seen * (seen + 1) / 2 + (lengths - seen) * seen).sum())
