"""Memory and time of a training step on one of several GPUs: what is sharded, what is kept, what is sent."""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from ibft.engines.base import Kind
from ibft.estimate.activations import Activations
from ibft.estimate.cost import Flops, ModelCost
from ibft.estimate.devices import NETWORK, Device
from ibkernels import absorbs

SHARDS_WEIGHTS = ("fsdp2", "zero3")
# Numbers that are kept of a trained parameter, on every GPU and spread over them: its value, gradient and two moments.
# DeepSpeed also keeps a copy of the value, spread, which the optimizer steps, and on every GPU the buffer in which
# gradients are reduced, as large as they are.
_KEPT: dict[Kind, tuple[int, int]] = {
    "ddp": (4, 0),
    "fsdp2": (0, 4),
    "zero1": (3, 3),
    "zero2": (2, 4),
    "zero3": (1, 5),
}

GIB = 2**30
_FLOAT32 = 4
_NF4 = 4.127 / 8  # bytes per weight: 4 bits and, in double quantisation, 0.127 for the scales
_ZERO3_LIVE = 1e9  # parameters that DeepSpeed keeps gathered by default (stage3_max_live_parameters)
_RESERVED = 1.0 * GIB  # the driver's context, libraries' workspaces, buffers of collectives
_FRAGMENTED = 0.04  # of what the allocator hands out

# Shares of the data sheet that large matrix products, memory-bound passes and collectives commonly reach. Assumptions,
# which `--measured` replaces by what a run had.
MATMUL, STREAM, LINK = 0.6, 0.8, 0.7
_PASSES = 3  # times that a saved byte crosses the memory bus: written, read, and what is not saved
_LATENCY = 20e-6  # seconds of a collective, for each doubling of the GPUs


@dataclass(frozen=True)
class Setting:
    """How a model is trained."""

    engine: Kind
    gpus: int
    tokens: int  # positions of one micro-batch of one GPU
    length: int  # of a document
    filled: float  # share of the positions that hold data
    labels: float  # share of the tokens that are labels
    accumulation: int
    checkpointing: bool
    load_in_4bit: bool
    dtype_bytes: int  # of the base model and the activations
    logits_bytes: int = 256 * 2**20  # of a block of float32 logits in the kernels of a GPU

    def changed(self, **changes: object) -> "Setting":
        """Another setting that differs in these."""
        return replace(self, **changes)  # type: ignore[arg-type]


class Memory(NamedTuple):
    """Bytes of one GPU at the peak of a step."""

    weights: float  # the base model's, or the shard of them
    gathered: float  # of other GPUs' shards, while a layer runs
    adapter: float  # adapter and bottleneck with gradients, AdamW's moments and DeepSpeed's copies
    activations: float
    workspace: float  # of the loss or of backward, whichever is larger; of a layer that is computed again, too
    reserved: float

    @property
    def step(self) -> float:
        """What a step needs beyond the weights and the optimizer."""
        return self.gathered + self.activations + self.workspace

    @property
    def total(self) -> float:
        """The peak."""
        return sum(self)


class Time(NamedTuple):
    """Seconds of an optimizer step. Communication overlaps with the rest, as far as it goes."""

    matmul: float
    stream: float
    communication: float

    @property
    def step(self) -> float:
        """All of it."""
        return max(self.matmul + self.stream, self.communication)


def memory(cost: ModelCost, activations: Activations, setting: Setting) -> Memory:
    """The peak of a step.

    Weights as they are loaded; adapter and bottleneck float32 with gradient and two moments, 16 bytes each, and what
    DeepSpeed adds, sharded as `_KEPT` has it. Without checkpointing every layer's saved tensors are there when the loss
    is computed and backward begins. With it only every layer's input is, and in backward all of one layer.
    """
    size, tokens, shards = setting.dtype_bytes, setting.tokens, setting.gpus
    linear = cost.linear_parameters * (_NF4 if setting.load_in_4bit else size)
    weights = linear + (cost.num_parameters - cost.linear_parameters) * size
    gathered = 0.0
    everywhere, spread = _KEPT[setting.engine]
    adapter = _FLOAT32 * cost.trainable * (everywhere + spread / shards)
    if setting.engine in SHARDS_WEIGHTS and shards > 1:
        block = (cost.num_parameters - cost.root_parameters) / cost.num_layers
        # FSDP2: embeddings and head for the whole step, the layer at work and the next. ZeRO-3: a fixed budget.
        live = cost.root_parameters + 2 * block if setting.engine == "fsdp2" else min(_ZERO3_LIVE, cost.num_parameters)
        gathered = live * size * (1 - 1 / shards)
        weights /= shards
    layer, backward = activations.layer * tokens, 3.0 * cost.widest_linear * size * tokens
    saved = layer * cost.num_layers + activations.around * tokens
    if setting.checkpointing:
        saved, backward = cost.num_layers * cost.hidden_size * size * float(tokens), layer + backward
    return Memory(
        weights=weights,
        gathered=gathered,
        adapter=adapter,
        activations=saved,
        workspace=max(backward, _loss_bytes(cost, setting)),
        reserved=_RESERVED + _FRAGMENTED * (gathered + saved + backward),
    )


def _loss_bytes(cost: ModelCost, setting: Setting) -> float:
    """The gathered hidden states and their gradient, blocks of logits, and the bottleneck's part."""
    labels = setting.tokens * setting.filled * setting.labels
    total = min(setting.logits_bytes, _FLOAT32 * labels * cost.vocabulary)
    total += labels * cost.hidden_size * (setting.dtype_bytes + _FLOAT32)
    if cost.ib is not None:
        width = cost.ib.bottleneck_dim
        total += setting.tokens * width * (2 * setting.dtype_bytes + _FLOAT32)  # z, mu, log-variance
        if absorbs(round(labels), cost.hidden_size, width):
            total += cost.vocabulary * width * (setting.dtype_bytes + _FLOAT32)  # the absorbed head and its gradient
    return total


def logits_avoided(cost: ModelCost, setting: Setting) -> float:
    """Bytes of the float32 logits [tokens, V] that an ordinary loss would keep: one of CE, one of CE_ib."""
    return _FLOAT32 * setting.tokens * cost.vocabulary * (1 if cost.ib is None else 2)


def step_flops(cost: ModelCost, setting: Setting) -> Flops:
    """Of one GPU's share of an optimizer step."""
    tokens = setting.tokens * setting.filled * setting.accumulation
    lengths = np.full(max(1, round(tokens / setting.length)), setting.length)
    return cost.flops(round(tokens), round(tokens * setting.labels), cost.pairs(lengths))


def step_time(cost: ModelCost, activations: Activations, setting: Setting, device: Device) -> Time:
    """From the data sheet and the assumptions above: within a factor of 1.5, not more."""
    flops = step_flops(cost, setting).hardware(setting.checkpointing)
    saved = activations.layer * cost.num_layers * setting.tokens * setting.accumulation
    passes = _PASSES * (1.5 if setting.checkpointing else 1)
    return Time(
        matmul=flops / (MATMUL * device.tflops * 1e12),
        stream=passes * saved / (STREAM * device.bandwidth * 1e9),
        communication=_communication(cost, setting, device),
    )


def _communication(cost: ModelCost, setting: Setting, device: Device) -> float:
    """Gradients of what is trained, once; sharded weights gathered for every forward and every backward pass."""
    if setting.gpus == 1:
        return 0.0
    bandwidth = device.link if setting.gpus <= device.node else min(device.link, NETWORK)
    others = (setting.gpus - 1) / setting.gpus
    sent, collectives = 2.0 * _FLOAT32 * cost.trainable * others, 2
    if setting.engine in SHARDS_WEIGHTS:
        gathers = 2 * setting.accumulation
        sent += gathers * cost.num_parameters * setting.dtype_bytes * others
        collectives += gathers * cost.num_layers
    return sent / (LINK * bandwidth * 1e9) + collectives * _LATENCY * math.log2(setting.gpus)
