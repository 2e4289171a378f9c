"""Every engine takes the steps of one process: gradients, losses, and the adapter that it leaves."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_runs import ENGINES, Train, needs_deepspeed


def assert_same_run(actual: Any, expected: Any) -> None:
    """Gradients to 1e-6, which is what issue-sized models need to end alike; losses and weights to what that leaves."""
    assert len(actual[0]) == len(expected[0]) >= 2
    for mine, theirs in zip(actual[0], expected[0], strict=True):
        assert mine.keys() == theirs.keys()
        for name, gradient in theirs.items():
            assert (mine[name] - gradient).abs().max() <= 1e-6, name
    for mine, theirs in zip(actual[1], expected[1], strict=True):
        for term in ("loss", "ce", "kl", "ce_ib", "grad_norm", "learning_rate"):
            assert mine[term] == pytest.approx(theirs[term], abs=2e-6), term
        assert mine["tokens"] == theirs["tokens"]
    assert actual[2].keys() == expected[2].keys()
    for name, weight in expected[2].items():
        torch.testing.assert_close(actual[2][name], weight, rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("base", "world_size", "method"), [("untied", 2, "ib"), ("tied", 4, "ib")])
def test_an_engine_equals_one_process(train: Train, engine: str, base: str, world_size: int, method: str) -> None:
    """With accumulation on two processes, a ragged last step, and ranks that have no token in it."""
    needs_deepspeed(engine)
    rows, accumulation = 1, 4 // world_size
    dealt = f"--per_device_train_batch_size {rows} --gradient_accumulation_steps {accumulation} --method {method}"
    expected = train(base, "one process", 1, f"--per_device_train_batch_size 4 --method {method}")
    assert len(expected[0]) == 3
    assert_same_run(train(base, engine, world_size, dealt), expected)


@pytest.mark.parametrize("engine", ["one process", *ENGINES])
def test_weights_that_vary_take_the_rate_of_all_processes(train: Train, engine: str) -> None:
    """Of the whole step, with accumulation, and a last step in which one process has no token."""
    needs_deepspeed(engine)
    more = "--alpha_warmup_steps 2 --ib_rate_target 0.16 --kl_weight 0.5 --beta 0.1 --kl_reduction sum"
    expected = train("untied", "one process", 1, f"--per_device_train_batch_size 4 {more}")
    world_size = 1 if engine == "one process" else 2
    dealt = f"--per_device_train_batch_size 1 --gradient_accumulation_steps {4 // world_size} {more}"
    actual = train("untied", engine, world_size, dealt)
    assert_same_run(actual, expected)
    weight, found = 0.5, [record["kl_weight"] for record in expected[1]]
    assert found[0] == 0.5
    for record, following in zip(expected[1], found[1:], strict=False):  # the formula, from the rates in metrics.jsonl
        ratio = record["kl_nats"] / 0.16
        assert 0.5 < ratio < 2 and abs(ratio - 1) > 1e-3
        weight *= ratio**0.1
        assert following == pytest.approx(weight * ratio**4, rel=1e-5)
    for mine, theirs in zip(actual[1], expected[1], strict=True):
        assert mine["alpha"] == theirs["alpha"] == min(1, (theirs["step"] - 1) / 2)
        assert mine["kl_weight"] == pytest.approx(theirs["kl_weight"], rel=1e-5)


@pytest.mark.parametrize("engine", ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_free_bits_on_two_processes(train: Train, engine: str) -> None:
    more = "--free_bits 0.09 --beta 0 --kl_reduction sum"
    expected = train("untied", "one process", 1, f"--per_device_train_batch_size 4 {more}")
    dealt = f"--per_device_train_batch_size 1 --gradient_accumulation_steps 2 {more}"
    assert_same_run(train("untied", engine, 2, dealt), expected)
    for record in expected[1]:  # some tokens pay, and not for all they have
        assert 0 < record["loss"] - record["ce"] < record["kl"]
        assert "alpha" not in record and "kl_weight" not in record


@pytest.mark.slow
@pytest.mark.parametrize("engine", [*ENGINES, "zero1"])
@pytest.mark.parametrize("base", ["untied", "tied"])
@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize(
    "more",
    [
        "--method ib",
        "--method sft",
        "--method ib --packing best-fit --kl_tokens labels --target_layer 2 --encoder lora",
        "--method ib --gradient_checkpointing --validation_split 2 --max_grad_norm 0 --weight_decay 0.1",
    ],
)
def test_every_engine_on_two_and_four_processes(
    train: Train, engine: str, base: str, world_size: int, more: str
) -> None:
    needs_deepspeed(engine)
    more = f"--num_train_epochs 3 {more}"
    expected = train(base, "one process", 1, f"--per_device_train_batch_size 8 {more}")
    dealt = f"--per_device_train_batch_size 1 --gradient_accumulation_steps {8 // world_size} {more}"
    assert_same_run(train(base, engine, world_size, dealt), expected)
    for mine, theirs in zip(train(base, engine, world_size, dealt)[1], expected[1], strict=True):
        assert mine["eval_loss"] == pytest.approx(theirs["eval_loss"], abs=2e-6)


def test_offloaded_to_the_cpu_deepspeed_takes_the_same_steps(train: Train, folder: Path) -> None:
    """ZeRO-Offload with our own AdamW."""
    needs_deepspeed("zero")
    settings = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    (folder / "offload.json").write_text(json.dumps({"zero_optimization": settings}))
    expected = train("untied", "one process", 1, "--per_device_train_batch_size 4 --method ib")
    more = "--per_device_train_batch_size 2 --method ib"
    mine = train("untied", "zero2", 2, f"{more} --deepspeed_config {folder}/offload.json")
    assert [record["loss"] for record in mine[1]] == pytest.approx([record["loss"] for record in expected[1]], abs=2e-6)
    for name, weight in expected[2].items():
        torch.testing.assert_close(mine[2][name], weight, rtol=0, atol=1e-5, msg=name)
