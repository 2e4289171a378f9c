"""Fixtures of the ibft tests: a base model and data on disk, made on the spot."""

from pathlib import Path

import pytest
import torch

from ibft.cli import main
from ibft.lab.tasks import generate_tasks, write_jsonl
from ibft.lab.tiny import build_llama, build_tokenizer, save_base


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Llama and its tokenizer, as `--base_model` takes it."""
    folder = tmp_path_factory.mktemp("base")
    tasks = generate_tasks(50, seed=1)
    tokenizer = build_tokenizer([f"{task.description}\n{task.program}" for task in tasks], vocab_size=400)
    save_base(build_llama(tokenizer, hidden_size=32, num_layers=2, num_heads=2), tokenizer, folder)
    return folder


@pytest.fixture(scope="session")
def tasks_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 rows of instruction and output."""
    file = tmp_path_factory.mktemp("data") / "tasks.jsonl"
    write_jsonl(generate_tasks(24, seed=2), file)
    return file


@pytest.fixture(scope="session")
def adapter_folder(base_folder: Path, tasks_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of `ibft train` with a bottleneck, its adapter strong enough to change what the base model predicts."""
    folder = tmp_path_factory.mktemp("adapter") / "run"
    options = "--max_length 128 --target_layer 1 --bottleneck_dim 8 --lora_r 4 --max_steps 8 --learning_rate 3e-2"
    command = f"train --base_model {base_folder} --dataset {tasks_file} --output_dir {folder} {options} --use_cpu"
    assert main(command.split()) == 0
    return folder
