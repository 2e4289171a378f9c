"""Models without weights for the tests of `ibft estimate`, of published sizes and a tiny one, and a setting."""

from typing import Any

import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, LlamaConfig

from ibft import IBConfig, IBModel
from ibft.estimate.activations import OUTLINE
from ibft.estimate.cost import ModelCost
from ibft.estimate.step import Setting

SIZES: dict[str, tuple[dict[str, int], int]] = {  # and the parameters, of the published files
    "llama-2-7b": ({"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}, 6_738_415_616),
    "llama-2-70b": (
        {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
        68_976_648_192,
    ),
    "deepseek-coder-1.3b": (
        {"hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": 24, "num_attention_heads": 16},
        1_346_471_936,
    ),
    "deepseek-coder-6.7b": ({"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}, 6_740_512_768),
    "deepseek-coder-33b": (
        {"hidden_size": 7168, "intermediate_size": 19200, "num_hidden_layers": 62, "num_attention_heads": 56},
        33_342_991_360,
    ),
}
GROUPED = {"llama-2-70b": 8, "deepseek-coder-33b": 8}  # heads of keys and values
TINY = LlamaConfig(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
)
SETTING = Setting("ddp", 1, 2048, 2048, 1.0, 0.5, 1, False, False, 2)


def published(name: str) -> LlamaConfig:
    sizes = dict(SIZES[name][0])
    heads = sizes.setdefault("num_attention_heads", 32)
    return LlamaConfig(
        vocab_size=32000 if name.startswith("llama") else 32256, num_key_value_heads=GROUPED.get(name, heads), **sizes
    )


def lora(**changes: Any) -> LoraConfig:
    return LoraConfig(**{"task_type": "CAUSAL_LM", "r": 32, "target_modules": "all-linear", **changes})


def outline(config: Any, dtype: torch.dtype = torch.bfloat16) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=OUTLINE)


def cost_of(config: Any, ib: IBConfig | None = None, **changes: Any) -> ModelCost:
    return ModelCost.of(IBModel.from_base(outline(config), lora(**changes), ib))
