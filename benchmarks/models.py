"""The models that steps are measured on: a random Llama under SFT or IB-FT, eager PyTorch's or this project's.

All variants of a size have the same weights.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.eager import EagerBottleneck
from ibft.model import IBModel
from ibft.objective import IBConfig

VARIANTS = ("eager-sft", "eager-ib", "ibft-sft", "ibft-ib")
ALPHA, BETA = 0.2, 0.01
SEED = 0


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """A Llama, its LoRA rank and the layer that the bottleneck taps."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocabulary: int
    lora_rank: int
    target_layer: int


class Variant(NamedTuple):
    """`parameters` are the trainable ones, of the same names in the eager variant and in ours."""

    model: Any  # a PEFT model, or an IBModel
    layer: EagerBottleneck | None  # of eager-ib
    parameters: dict[str, nn.Parameter]


def build_variant(
    variant: str,
    size: ModelSize,
    bottleneck_dim: int,
    *,
    max_length: int,
    dtype: torch.dtype = torch.float32,
    sample: bool = True,
) -> Variant:
    """One of VARIANTS, in training mode. sample=False: IBModel takes no noise."""
    if variant not in VARIANTS:
        raise ValueError(f"the variant is {variant!r}; it must be one of {', '.join(VARIANTS)}.")
    base, lora = build_base(size, max_length).to(dtype), lora_config(size)
    layer = EagerBottleneck(size.hidden, bottleneck_dim).to(dtype)  # the last to draw, so that all models agree
    torch.manual_seed(SEED)
    if variant.startswith("eager"):
        model: Any = get_peft_model(base, lora)
    else:
        config = IBConfig(
            target_layer=size.target_layer, bottleneck_dim=bottleneck_dim, alpha=ALPHA, beta=BETA, sample=sample
        )
        model = IBModel.from_base(base, lora, config if variant == "ibft-ib" else None)
        if variant == "ibft-ib":
            model.bottleneck.to(dtype).load_state_dict(layer.state_dict())
    named = dict(model.named_parameters())
    if variant == "eager-ib":
        named |= {f"bottleneck.{name}": parameter for name, parameter in layer.named_parameters()}
    parameters = {name: parameter for name, parameter in named.items() if parameter.requires_grad}
    return Variant(model.train(), layer if variant == "eager-ib" else None, parameters)


def lora_config(size: ModelSize) -> LoraConfig:
    """Both factors random: with the usual zero in B, the gradient of A would be zero and its check empty."""
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=size.lora_rank,
        lora_alpha=size.lora_rank,
        lora_dropout=0.0,
        target_modules="all-linear",
        init_lora_weights=False,
    )


def build_base(size: ModelSize, max_length: int) -> LlamaForCausalLM:
    """A Llama with random weights, the same ones every time, in float32."""
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        max_position_embeddings=max_length,
        use_cache=False,
    )
    return LlamaForCausalLM(config)
