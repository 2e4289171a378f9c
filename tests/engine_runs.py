"""What the tests of the engines ask for in common: sizes, flags, and where a test needs DeepSpeed."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
ENGINES = ["ddp", "fsdp2", "zero2", "zero3"]
ROWS = 9  # with 4 rows a step, the last step has one: every rank but the first is idle
LEFT = ("adapter_model.safetensors", "ib_head.safetensors")
STEPS = "--packing none --num_train_epochs 1 --logging_steps 1 --save_strategy no"
SIZES = "--max_length 128 --bottleneck_dim 16 --lora_r 4 --lora_dropout 0 --alpha 1"


class Step(dict[str, Tensor]):
    """The gradients of a step, by parameter name."""


Train = Callable[..., tuple[list[Step], list[dict[str, Any]], dict[str, Tensor]]]


def flags(engine: str, folder: Path) -> str:
    """The flags that ask for an engine."""
    if engine.startswith("zero"):
        return f"--engine deepspeed --deepspeed_config {folder}/{engine}.json"
    return f"--engine {engine}" if engine != "one process" else ""


def needs_deepspeed(engine: str) -> None:
    if engine.startswith("zero") and not HAS_DEEPSPEED:
        pytest.skip("DeepSpeed is not installed")
