"""What to set: whether to checkpoint, the largest batch, the mildest change that fits."""

from typing import Any

from outlines import SETTING

from ibft.estimate.activations import Activations
from ibft.estimate.advice import fits, flags, largest_batch, mildest_change, with_checkpointing
from ibft.estimate.cost import ModelCost
from ibft.estimate.step import GIB, Setting, memory


def test_checkpointing_is_on_only_where_memory_asks_for_it(seven_billion: tuple[ModelCost, Activations]) -> None:
    cost, activations = seven_billion
    without = memory(cost, activations, SETTING).total / GIB
    assert not with_checkpointing(cost, activations, SETTING, without / 0.79).checkpointing
    assert with_checkpointing(cost, activations, SETTING, without / 0.81).checkpointing


def test_the_largest_batch_fits_and_one_row_more_does_not(seven_billion: tuple[ModelCost, Activations]) -> None:
    cost, activations = seven_billion
    for gib in (14, 24, 40, 80):
        most = largest_batch(cost, activations, SETTING.changed(checkpointing=True), gib, 512)
        assert most % 512 == 0 and (most > 0) == (gib > 14)
        at = [SETTING.changed(checkpointing=True, tokens=tokens) for tokens in (most, most + 512)]
        assert not most or fits(cost, activations, at[0], gib)
        assert not fits(cost, activations, at[1], gib)


def test_the_mildest_change(seven_billion: tuple[ModelCost, Activations]) -> None:
    cost, activations = seven_billion

    def change(gib: float, **changes: Any) -> Setting | None:
        asked = SETTING.changed(tokens=8192, **changes)
        found = mildest_change(cost, activations, asked, gib, 2048)
        assert found is None or fits(cost, activations, found, gib)
        assert found is None or found.tokens * found.accumulation == 8192
        return found

    asked = SETTING.changed(tokens=8192)
    found = change(40)
    assert found is not None and flags(found, asked) == "--gradient_checkpointing"
    found = change(17)
    assert found is not None
    assert flags(found, asked) == ("--gradient_checkpointing --tokens_per_batch 2048 --gradient_accumulation_steps 4")
    found = change(10, gpus=8)
    assert found is not None and found.engine == "fsdp2" and not found.load_in_4bit
    found = change(10)
    assert found is not None and found.load_in_4bit and "--load_in_4bit" in flags(found, asked)
    assert "--engine" not in flags(found, asked)
    # `ibft train` refuses --engine ddp outside of torchrun, which one process has no need of.
    assert flags(found, asked.changed(engine="fsdp2")).startswith("--engine auto --gradient_checkpointing --load")
    eight = asked.changed(gpus=8)
    assert "--engine deepspeed (stage 3)" in flags(eight.changed(engine="zero3"), eight)
    assert change(2) is None
