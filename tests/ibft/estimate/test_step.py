"""Memory of a step by engine and checkpointing, and its time by work and network."""

from typing import Any

import pytest
from outlines import SETTING

from ibft.estimate.activations import Activations
from ibft.estimate.cost import ModelCost
from ibft.estimate.devices import DEVICES
from ibft.estimate.step import memory, step_flops, step_time


def test_checkpointing_keeps_the_inputs_of_layers_and_one_layer(seven_billion: tuple[ModelCost, Activations]) -> None:
    cost, activations = seven_billion
    with_it, without = (memory(cost, activations, SETTING.changed(checkpointing=on)) for on in (True, False))
    assert with_it.activations == 32 * 4096 * 2 * 2048
    assert with_it.workspace == activations.layer * 2048 + 3 * 11008 * 2 * 2048
    assert without.activations == activations.layer * 2048 * 32 + activations.around * 2048
    assert without.step > 5 * with_it.step


def test_what_each_engine_shards(seven_billion: tuple[ModelCost, Activations]) -> None:
    cost, activations = seven_billion

    def at(engine: Any, gpus: int, **changes: Any) -> Any:
        return memory(cost, activations, SETTING.changed(engine=engine, gpus=gpus, **changes))

    whole, trained = 2 * cost.num_parameters, 16 * cost.trainable
    assert at("ddp", 8) == at("ddp", 1) == at("fsdp2", 1)
    assert (at("ddp", 8).weights, at("ddp", 8).adapter) == (whole, trained)
    # DeepSpeed: value, gradient, two moments, the master copy; and whole the buffer in which gradients are reduced.
    assert at("zero2", 8).weights == whole and at("zero2", 8).adapter == 4 * cost.trainable * (1 + 4 / 8 + 1)
    assert at("zero1", 8).weights == whole and at("zero1", 8).adapter == 4 * cost.trainable * (2 + 3 / 8 + 1)
    assert at("fsdp2", 8).adapter == trained / 8 and at("zero3", 8).adapter == 4 * cost.trainable * (5 / 8 + 1)
    for engine in ("fsdp2", "zero3"):
        assert at(engine, 8).weights == whole / 8 and 0 < at(engine, 8).gathered < whole
    assert at("fsdp2", 1024).total < at("fsdp2", 8).total < at("ddp", 8).total
    four = at("ddp", 1, load_in_4bit=True).weights
    assert four == pytest.approx(whole - cost.linear_parameters * (2 - 4.127 / 8))


def test_time_grows_with_work_and_network(seven_billion: tuple[ModelCost, Activations]) -> None:
    cost, activations = seven_billion
    gpu = DEVICES["h100-80gb"]

    def at(**changes: Any) -> Any:
        return step_time(cost, activations, SETTING.changed(**changes), gpu)

    assert at(accumulation=2).step == pytest.approx(2 * at().step, rel=0.01)
    assert at(checkpointing=True).step > at().step and at().communication == 0
    model = step_flops(cost, SETTING)
    assert model.model < model.hardware(True) == model.model + model.decoder_forward
    assert at().matmul == pytest.approx(model.model / (0.6 * 989e12))
    assert at(engine="fsdp2", gpus=8).communication > at(engine="ddp", gpus=8).communication > 0
    assert at(engine="fsdp2", gpus=1024).communication > at(engine="fsdp2", gpus=8).communication
    assert 0.2 < model.model / at(tokens=16384).step / 989e12 * 8 < 0.6  # MFU as such runs report it
