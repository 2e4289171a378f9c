"""Evaluation on held-out rows while training: the plain loss, when it was asked for, and without a trace in the run."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from ibft.cli import main
from ibft.lab.tasks import generate_tasks, write_jsonl

QUICK = "--max_length 128 --bottleneck_dim 16 --lora_r 4 --logging_steps 100 --use_cpu"


@pytest.fixture
def held_out(tmp_path: Path) -> Path:
    file = tmp_path / "held-out.jsonl"
    write_jsonl(generate_tasks(7, seed=9), file)
    return file


@pytest.fixture
def run(base_folder: Path, tasks_file: Path, tmp_path: Path) -> Callable[[str, str], list[dict[str, Any]]]:
    """`run("out", "--flag value ...")`: trains into tmp_path/out, returns the records of metrics.jsonl."""

    def train(name: str, more: str) -> list[dict[str, Any]]:
        command = (
            f"train --base_model {base_folder} --dataset {tasks_file} --output_dir {tmp_path / name} {QUICK} {more}"
        )
        assert main(command.split()) == 0
        return read(tmp_path / name)

    return train


def read(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def loss_of(base_folder: Path, adapter: Path, rows: Path) -> float:
    """The mean cross-entropy of the responses' tokens, row by row with PEFT and transformers alone."""
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_folder), adapter).eval()
    total = count = 0.0
    for line in rows.read_text().splitlines():
        row = json.loads(line)
        prompt = tokenizer(row["instruction"] + "\n", add_special_tokens=False)["input_ids"]
        response = tokenizer(row["output"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        ids = torch.tensor([prompt + response])
        labels = torch.tensor([[-100] * len(prompt) + response])
        with torch.no_grad():
            total += model(input_ids=ids, labels=labels).loss.item() * len(response)
        count += len(response)
    return total / count


@pytest.mark.parametrize("packing", ["none", "best-fit"])
def test_it_is_the_mean_over_the_held_out_labels(
    run: Callable[..., Any], base_folder: Path, held_out: Path, tmp_path: Path, packing: str
) -> None:
    records = run("out", f"--max_steps 3 --learning_rate 1e-2 --packing {packing} --validation_dataset {held_out}")
    assert records[-1]["eval_loss"] == pytest.approx(loss_of(base_folder, tmp_path / "out", held_out), rel=1e-5)
    result = json.loads((tmp_path / "out" / "ibft.json").read_text())["result"]
    assert result["eval_loss"] == records[-1]["eval_loss"]


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ("--max_steps 5 --eval_steps 2", [2, 4, 5]),
        ("--max_steps 4 --eval_steps 9", [4]),
        ("--num_train_epochs 2", [12, 24]),  # 24 rows, two a step, and no --eval_steps: once an epoch
    ],
)
def test_when_it_happens(run: Callable[..., Any], held_out: Path, more: str, expected: list[int]) -> None:
    records = run("out", f"{more} --packing none --validation_dataset {held_out}")
    assert [record["step"] for record in records if record["eval_loss"] is not None] == expected


def test_it_leaves_no_trace_in_the_run(run: Callable[..., Any], held_out: Path, tmp_path: Path) -> None:
    """Dropout and noise are on: a random number drawn, or a mode not put back, would show."""
    without = run("without", "--max_steps 4")
    records = run("with", f"--max_steps 4 --eval_steps 1 --validation_dataset {held_out}")
    assert [record["loss"] for record in records] == [record["loss"] for record in without]
    name = "adapter_model.safetensors"
    assert (tmp_path / "with" / name).read_bytes() == (tmp_path / "without" / name).read_bytes()


def test_two_processes_evaluate_as_one(
    run: Callable[..., Any], base_folder: Path, tasks_file: Path, held_out: Path, tmp_path: Path
) -> None:
    """Seven rows: one rank has a batch less, and pads."""
    settings = f"{QUICK} --max_steps 2 --lora_dropout 0 --packing none --validation_dataset {held_out}"
    one = run("one", f"{settings} --per_device_train_batch_size 2")
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "-m",
        "ibft.train",
    ]
    arguments = f"--base_model {base_folder} --dataset {tasks_file} --output_dir {tmp_path / 'two'} {settings}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [*launch, *arguments.split(), "--per_device_train_batch_size", "1"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert read(tmp_path / "two")[-1]["eval_loss"] == pytest.approx(one[-1]["eval_loss"], rel=1e-5)
