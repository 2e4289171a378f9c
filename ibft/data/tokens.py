"""What tokenising a row gives, and how a row of plain text is tokenised (`chat.py` does conversations)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import datasets

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FEATURES = datasets.Features(
    tokens=datasets.Sequence(datasets.Value("int32")),  # empty for a dropped row
    spans=datasets.Sequence(datasets.Value("int32")),  # start, end, start, end, ... of what is learnt; ascending
    example_id=datasets.Value("int64"),
    outcome=datasets.Value("int8"),
)
KEPT, SHORTENED, TOO_LONG, EMPTY = range(4)  # outcomes; the first two are documents


class Tokenized(NamedTuple):
    """One row: its tokens, the flat starts and ends of the spans that are learnt, and its outcome."""

    tokens: list[int]
    spans: list[int]
    outcome: int


def columns_of(rows: list[Tokenized], example_ids: list[int]) -> dict[str, list[Any]]:
    """The rows as the columns of FEATURES."""
    tokens, spans, outcomes = (list(column) for column in zip(*rows, strict=True))
    return {"tokens": tokens, "spans": spans, "example_id": example_ids, "outcome": outcomes}


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """The tokens of each text, without special tokens of the tokenizer's own."""
    # verbose=False: a text may exceed the model's length here, because it is shortened afterwards.
    return tokenizer(
        texts, add_special_tokens=False, padding=False, truncation=False, return_attention_mask=False, verbose=False
    )["input_ids"]


@dataclass(frozen=True)
class TextEncoder:
    """A batch of rows of prompt and response to the columns of FEATURES.

    An object, so that worker processes can receive it.
    """

    tokenizer: PreTrainedTokenizerBase
    bos: bool
    max_length: int
    overlong: str
    separator: str

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        prompts = tokenize(self.tokenizer, [prompt + self.separator for prompt in batch["prompt"]])
        responses = tokenize(self.tokenizer, batch["response"])
        rows = [
            self._row(prompt, response, not text.strip())
            for prompt, response, text in zip(prompts, responses, batch["response"], strict=True)
        ]
        return columns_of(rows, batch["example_id"])

    def _row(self, prompt: list[int], response: list[int], empty: bool) -> Tokenized:
        bos, answer = [self.tokenizer.bos_token_id] * self.bos, [*response, self.tokenizer.eos_token_id]
        excess = len(bos) + len(prompt) + len(answer) - self.max_length
        if empty or not response:
            return Tokenized([], [], EMPTY)
        if excess > 0 and (self.overlong == "drop" or len(answer) >= self.max_length):
            return Tokenized([], [], TOO_LONG)
        context = bos + prompt[max(excess, 0) :]
        tokens = context + answer
        return Tokenized(tokens, [len(context), len(tokens)], SHORTENED if excess > 0 else KEPT)
