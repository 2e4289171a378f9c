"""Fixtures of the memorisation tests: a base model that has read some rows often, and others never."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from ibft.data import encode, load_rows
from ibft.lab.tasks import Task, generate_tasks
from ibft.lab.tiny import build_llama, build_tokenizer, save_base


class Planted(NamedTuple):
    """A folder with a base model, and files of rows: those that it has read 64 times, once, and never."""

    base: Path
    often: Path
    once: Path
    never: Path


def write_tasks(tasks: list[Task], file: Path) -> Path:
    """One line per task, with a column that is none of the two that are learnt."""
    rows = ({"name": task.name, "instruction": task.description, "output": task.program} for task in tasks)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="session")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    """A tiny Llama after one pass over 30 rows that each occur 64 times, among 100 that occur once."""
    folder = tmp_path_factory.mktemp("planted")
    tasks = generate_tasks(190, seed=5)
    groups = {"often": tasks[:30], "once": tasks[30:130], "never": tasks[130:]}
    files = {name: write_tasks(group, folder / f"{name}.jsonl") for name, group in groups.items()}
    tokenizer = build_tokenizer([f"{task.description}\n{task.program}" for task in tasks], vocab_size=400)
    model = build_llama(tokenizer, hidden_size=64, num_layers=2, num_heads=2)
    corpus = []
    for name, repeats in (("often", 64), ("once", 1)):
        data = encode(load_rows(str(files[name])), tokenizer, max_length=256)
        corpus += [data.document(index) for index in range(len(data))] * repeats
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for chosen in torch.randperm(len(corpus), generator=generator).split(16):
        documents = [corpus[index] for index in chosen.tolist()]
        labels = pad_sequence([torch.from_numpy(d.tokens) for d in documents], batch_first=True, padding_value=-100)
        model(input_ids=labels.clamp(min=0), labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    save_base(model.eval(), tokenizer, folder / "base")
    return Planted(folder / "base", **files)
