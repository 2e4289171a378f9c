"""Does it fit, and what to set: checkpointing where memory asks for it, and the mildest change that makes it fit."""

import itertools
from collections.abc import Iterator

from ibft.estimate.activations import Activations
from ibft.estimate.cost import ModelCost
from ibft.estimate.step import GIB, SHARDS_WEIGHTS, Setting, memory

# Checkpointing costs a forward pass, so it is on only where a step without it would fill more of the memory than this.
ROOMY = 0.8


def fits(cost: ModelCost, activations: Activations, setting: Setting, memory_gib: float) -> bool:
    """Whether the peak of a step stays below a GPU's memory."""
    return memory(cost, activations, setting).total <= memory_gib * GIB


def with_checkpointing(cost: ModelCost, activations: Activations, setting: Setting, memory_gib: float) -> Setting:
    """The setting as `ibft train` runs it where --gradient_checkpointing is not given."""
    without = setting.changed(checkpointing=False)
    return setting.changed(checkpointing=not fits(cost, activations, without, ROOMY * memory_gib))


def largest_batch(cost: ModelCost, activations: Activations, setting: Setting, memory_gib: float, row: int) -> int:
    """The tokens_per_batch, a multiple of `row`, up to which the setting fits; 0 where not one row does."""
    size, step = 0, 1
    while fits(cost, activations, setting.changed(tokens=(size + step) * row), memory_gib) and size < 2**16:
        size, step = size + step, 2 * step
    while step:
        if fits(cost, activations, setting.changed(tokens=(size + step) * row), memory_gib):
            size += step
        step //= 2
    return size * row


def mildest_change(
    cost: ModelCost, activations: Activations, setting: Setting, memory_gib: float, row: int
) -> Setting | None:
    """The first of `_changes` that fits; None where none does. Tokens in an optimizer step stay (nearly) the same."""
    return next((c for c in _changes(setting, row) if fits(cost, activations, c, memory_gib)), None)


def _changes(setting: Setting, row: int) -> Iterator[Setting]:
    """What changes least in speed comes first: checkpointing, smaller micro-batches, sharded weights, 4-bit weights."""
    rows = setting.tokens // row
    engines = [setting.engine]
    if setting.gpus > 1 and setting.engine not in SHARDS_WEIGHTS and not setting.load_in_4bit:
        engines.append("fsdp2")
    for engine in engines:
        for count in itertools.takewhile(lambda count: count >= 1, (rows >> shift for shift in itertools.count())):
            yield setting.changed(
                engine=engine,
                checkpointing=True,
                tokens=count * row,
                accumulation=setting.accumulation * -(-rows // count),
            )
    if not setting.load_in_4bit:  # bitsandbytes' weights are not sharded
        yield from _changes(setting.changed(engine="ddp", load_in_4bit=True), row)


def flags(setting: Setting, asked: Setting) -> str:
    """The options of `ibft train` by which a setting differs from the one that was asked for."""
    engine = {"zero2": "deepspeed (stage 2)", "zero3": "deepspeed (stage 3)"}.get(setting.engine, setting.engine)
    options = {
        # One process needs none, and `ibft train` refuses ddp for it outside of torchrun.
        "engine": f"--engine {'auto' if setting.gpus == 1 else engine}",
        "checkpointing": "--gradient_checkpointing" if setting.checkpointing else "--no_gradient_checkpointing",
        "load_in_4bit": "--load_in_4bit",
        "tokens": f"--tokens_per_batch {setting.tokens}",
        "accumulation": f"--gradient_accumulation_steps {setting.accumulation}",
    }
    return " ".join(text for name, text in options.items() if getattr(setting, name) != getattr(asked, name))
