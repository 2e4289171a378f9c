"""The lab's base models: small Llamas that read programs under their names, some of them again and again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from ibft.data import BatchPlan, EncodedDataset, collate, encode, load_rows
from ibft.lab.tasks import Task, generate_tasks
from ibft.lab.tiny import build_tokenizer

ROW_LENGTH = 128  # tokens in a row of packed documents
# No token crosses these: digits and syllables of names stand alone, and a phrase or a line of code may be one token.
_BOUNDARIES = r"\d|\n|[A-Z][aeiou]|, then |: |\."


def lab_tokenizer() -> PreTrainedTokenizerFast:
    """The same for every base: documents are then short, and small models quick."""
    texts = [f"{task.name}\n{task.description}\n{task.program}" for task in generate_tasks(3000, seed=0)]
    return build_tokenizer(texts, vocab_size=1024, boundaries=_BOUNDARIES)


def prompt(task: Task, *, described: bool) -> str:
    """What stands before a program: its name, and in fine-tuning the description above it."""
    return f"{task.description}\n{task.name}" if described else task.name


def write_rows(tasks: Sequence[Task], file: Path, *, described: bool) -> None:
    """Adds rows of `instruction` and `output`, as `ibft train` reads them, to the file."""
    with open(file, "a", encoding="utf-8", newline="\n") as out:
        for task in tasks:
            row = {"instruction": prompt(task, described=described), "output": task.program}
            out.write(json.dumps(row) + "\n")


def encode_tasks(
    tasks: Sequence[Task], tokenizer: PreTrainedTokenizerFast, file: Path, *, described: bool
) -> EncodedDataset:
    """The tasks as documents, of which the programs are learnt; the rows are left in the file."""
    write_rows(tasks, file, described=described)
    return encode(load_rows(str(file)), tokenizer, max_length=ROW_LENGTH)


def read(
    model: LlamaForCausalLM,
    data: EncodedDataset,
    order: np.ndarray,
    *,
    rows_per_step: int,
    learning_rate: float,
    seed: int,
) -> list[dict[str, Any]]:
    """Trains all weights on the documents `order` (indices, which may repeat), shuffled; the loss over the steps."""
    plan = BatchPlan(
        data.lengths[order],
        max_length=ROW_LENGTH,
        rows_per_batch=rows_per_step,
        accumulation=1,
        world_size=1,
        seed=seed,
    )
    steps = plan.steps_in_epoch(0)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, steps, pct_start=0.1)
    pad = model.config.pad_token_id
    model.train()
    curve, window = [], []
    for step in range(steps):
        documents = [[data.document(int(order[index])) for index in row] for row in plan.micro_batches(step, 0)[0]]
        batch = collate(documents, pad_token_id=pad, max_length=ROW_LENGTH, packing="best-fit")
        loss = model(**{name: batch[name] for name in ("input_ids", "labels", "position_ids")}, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        window.append(loss.item())
        if (step + 1) % 10 == 0 or step + 1 == steps:
            curve.append({"step": step + 1, "loss": float(np.mean(window))})
            window = []
    model.eval()
    return curve
