"""Whether a run recomputes its activations: what was asked for, else what the estimate says of the device's memory."""

import os
from typing import NamedTuple

import torch
from peft import LoraConfig

from ibft.attention import Attention
from ibft.config import TrainConfig
from ibft.engines import Engine
from ibft.estimate.activations import OUTLINE, Activations, measure_activations
from ibft.estimate.advice import ROOMY, fits
from ibft.estimate.cost import ModelCost
from ibft.estimate.step import GIB, Setting, memory
from ibft.loading import load_base_outline

_LARGE = 1e9  # parameters of a model that there is no estimate for, from which on it is better on


class Checkpointing(NamedTuple):
    """Whether it is on, and the reason printed beside it."""

    on: bool
    reason: str


def choose_checkpointing(
    config: TrainConfig,
    cost: ModelCost | None,
    adapter: LoraConfig,
    *,
    num_parameters: int,
    dtype: torch.dtype,
    engine: Engine,
    attention: Attention,
) -> Checkpointing:
    """On where a step without it would fill more than 80% of the device's memory; cost: None where it is not known."""
    if config.gradient_checkpointing is not None:
        return Checkpointing(config.gradient_checkpointing, "asked for")
    if cost is None:
        return Checkpointing(num_parameters >= _LARGE, "by the size of the model, which there is no estimate for")
    setting = Setting(
        engine=engine.kind,
        gpus=engine.world_size,
        tokens=config.rows_per_batch * config.max_length,
        length=config.max_length,
        filled=1.0,
        labels=1.0,
        accumulation=config.gradient_accumulation_steps,
        checkpointing=False,
        load_in_4bit=config.load_in_4bit,
        dtype_bytes=dtype.itemsize,
    )
    available = _memory_gib(engine.device) / (1 if engine.device.type == "cuda" else engine.world_size)

    def whole(activations: Activations) -> Activations:
        if attention.implementation != "eager":
            return activations
        return activations.with_scores(cost, config.max_length, dtype.itemsize)

    # More than any layer saves; only where this might not fit is it worth a closer look.
    bound = whole(Activations(layer=48.0 * cost.widest_linear * dtype.itemsize, around=0.0))
    if fits(cost, bound, setting, ROOMY * available):
        return Checkpointing(False, "there is room")
    outline = load_base_outline(config.base_model, dtype, OUTLINE)
    peak = memory(cost, whole(measure_activations(outline, adapter)), setting).total / GIB
    reason = f"a step without it would take about {peak:.0f} GiB of {available:.0f}"
    return Checkpointing(peak > ROOMY * available, reason)


def _memory_gib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / GIB
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB
