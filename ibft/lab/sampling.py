"""Programs from a model, in large batches, and which of them do what their tasks ask."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from ibft.data.columns import SEPARATOR
from ibft.lab.language import run_program
from ibft.lab.tasks import Task, run_operations

MAX_NEW_TOKENS = 32
_BATCH = 512  # sequences at a time


@torch.inference_mode()
def generate(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    *,
    samples: int = 1,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[list[str]]:
    """`samples` programs for each prompt, greedy ones with temperature 0. The same for the same arguments."""
    texts = [text + SEPARATOR for text in prompts]
    rows = max(1, _BATCH // samples)
    programs: list[list[str]] = []
    torch.manual_seed(seed)
    for first in range(0, len(texts), rows):
        encoded = tokenizer(texts[first : first + rows], return_tensors="pt", padding=True, padding_side="left")
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
        tokens = model.generate(
            input_ids=encoded["input_ids"],
            attention_mask=encoded["attention_mask"],
            max_new_tokens=MAX_NEW_TOKENS,
            num_return_sequences=samples,
            **sampling,
        )
        answers = tokenizer.batch_decode(tokens[:, encoded["input_ids"].shape[1] :], skip_special_tokens=True)
        programs += [answers[start : start + samples] for start in range(0, len(answers), samples)]
    return programs


def probe_lists(*, seed: int = 0, count: int = 24) -> list[list[int]]:
    """Lists of integers that tell programs apart: empty, short and long, with negative numbers and repetitions."""
    rng = random.Random(seed)
    lists: list[list[int]] = [[], [0], [3, 3]]
    return lists + [[rng.randint(-30, 40) for _ in range(rng.randint(1, 14))] for _ in range(count - len(lists))]


_LISTS = probe_lists()


def behaviour(task: Task) -> str:
    """What the task's program returns for the lists that judge it: equal for programs that no judgement tells apart."""
    return str([run_operations(task.operations, xs) for xs in _LISTS])


def judge(task: Task, program: str) -> str:
    """What became of a program: "correct", "wrong", or "invalid" where it is not of the language."""
    returned = run_program(program, _LISTS)
    if returned is None:
        return "invalid"
    return "correct" if returned == [run_operations(task.operations, xs) for xs in _LISTS] else "wrong"
