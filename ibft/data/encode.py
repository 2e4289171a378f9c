"""Rows → token documents `[BOS] prompt "\\n" response EOS`, of which the response and EOS are learnt.

The result lies in a memory-mapped Arrow file of its own, never in a cache that could serve another run's tokens.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import datasets
import numpy as np

from ibft.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SEPARATOR = "\n"  # between prompt and response; belongs to the prompt
PROGRESS_BAR_ROWS = 10_000  # fewer rows are tokenised before a bar would be read

FEATURES = datasets.Features(
    tokens=datasets.Sequence(datasets.Value("int32")),  # empty for a dropped row
    label_start=datasets.Value("int32"),
    example_id=datasets.Value("int64"),
    outcome=datasets.Value("int8"),
)
KEPT, SHORTENED, TOO_LONG, EMPTY = range(4)  # outcomes; the first two are documents


class Document(NamedTuple):
    """One row as tokens. Labels are the tokens from `label_start` on, except that a document's first token never is."""

    tokens: np.ndarray  # [length] int64
    label_start: int
    example_id: int


@dataclass(frozen=True)
class EncodeReport:
    """What became of the rows: rows = kept + dropped_too_long + dropped_empty, and shortened is part of kept."""

    rows: int
    kept: int
    shortened: int
    dropped_too_long: int
    dropped_empty: int
    tokens: int
    label_tokens: int
    bos: bool
    max_length: int

    def lines(self) -> list[str]:
        return [
            f"{self.rows:,} rows: {self.kept:,} kept ({self.shortened:,} of them with the prompt shortened from the "
            f"left), {self.dropped_too_long:,} dropped as longer than {self.max_length:,} tokens, "
            f"{self.dropped_empty:,} dropped with an empty response",
            f"{self.tokens:,} tokens, {self.label_tokens:,} of them labels ({self.label_tokens / self.tokens:.0%}); "
            f"every document ends with EOS and {'begins' if self.bos else 'does not begin'} with BOS",
        ]


def encode(
    rows: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    bos: Literal["auto", "yes", "no"] = "auto",
    overlong: Literal["shorten", "drop"] = "shorten",
    num_proc: int | None = None,
) -> EncodedDataset:
    """Tokenise what `load_rows` gave; at most `max_length` tokens (>= 2) a document.

    Prompt and separator are tokenised apart from the response, without special tokens. EOS always closes a document,
    BOS opens it if `bos` says so ("auto": if the tokenizer does that by itself). An overlong document loses the start
    of its prompt (never BOS, never a token of the response) until it fits, with at least one token left before the
    response; where that is impossible, or with overlong="drop", the row is dropped. A row whose response is empty or
    white space is dropped too.

    `num_proc` > 1 tokenises in that many processes (a fast tokenizer uses every core without them), to the same
    documents. Tokens are written to the folder for temporary files (TMPDIR). InputError: a bad argument, a tokenizer
    without EOS, or without BOS for bos="yes", no row left.
    """
    if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 2:
        raise InputError(f"max_length must be an integer of at least 2, not {max_length!r}.")
    if overlong not in ("shorten", "drop"):
        raise InputError(f"overlong must be 'shorten' or 'drop', not {overlong!r}.")
    if num_proc is not None and (isinstance(num_proc, bool) or not isinstance(num_proc, int) or num_proc < 1):
        raise InputError(f"num_proc must be a positive integer or None, not {num_proc!r}.")
    if len(rows) == 0:
        raise InputError("There are no rows to encode; at least one is needed.")
    name = tokenizer.name_or_path or type(tokenizer).__name__
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"The tokenizer {name!r} has no EOS token, so the model could never learn to stop. Use a tokenizer that "
            "has one, or set tokenizer.eos_token to a token of its vocabulary and save it with the base model."
        )
    with_bos = _puts_bos(tokenizer, bos, name)
    row_encoder = _RowEncoder(tokenizer, with_bos, max_length, overlong)
    directory = tempfile.TemporaryDirectory(prefix="ibft-tokens-")
    dataset = _map(rows, row_encoder, num_proc, Path(directory.name) / "tokens.arrow")
    return EncodedDataset(dataset, bos=with_bos, max_length=max_length, directory=directory)


class EncodedDataset:
    """The documents in the order of their rows, memory-mapped; dropped rows are skipped.

    `lengths`, `label_tokens`: [documents] int64, tokens and labels of each document (at least 2 and 1). `report` says
    what was dropped or shortened, `prompt_format` how a prompt must be built for a model trained on this.
    """

    def __init__(
        self, dataset: datasets.Dataset, *, bos: bool, max_length: int, directory: tempfile.TemporaryDirectory[str]
    ) -> None:
        self._directory = directory  # holds the memory-mapped file; removed together with this object
        table = dataset.data
        outcome = table.column("outcome").to_numpy()
        documents = outcome <= SHORTENED
        self._label_starts = table.column("label_start").to_numpy()[documents].astype(np.int64)
        self._example_ids = table.column("example_id").to_numpy()[documents]

        # Views of the mapped file: document i is values[chunk[i]][start[i] : start[i] + lengths[i]].
        chunks = table.column("tokens").chunks
        self._values: list[np.ndarray] = [chunk.values.to_numpy(zero_copy_only=True) for chunk in chunks]
        offsets = [chunk.offsets.to_numpy().astype(np.int64) for chunk in chunks]
        self._chunk = np.repeat(np.arange(len(chunks)), [len(chunk) for chunk in chunks])[documents]
        self._start = _concatenate([offset[:-1] for offset in offsets])[documents]
        self.lengths: np.ndarray = _concatenate([np.diff(offset) for offset in offsets])[documents]
        self.label_tokens: np.ndarray = self.lengths - np.maximum(self._label_starts, 1)

        counts = np.bincount(outcome, minlength=EMPTY + 1)
        self.report = EncodeReport(
            rows=len(outcome),
            kept=len(self),
            shortened=int(counts[SHORTENED]),
            dropped_too_long=int(counts[TOO_LONG]),
            dropped_empty=int(counts[EMPTY]),
            tokens=int(self.lengths.sum()),
            label_tokens=int(self.label_tokens.sum()),
            bos=bos,
            max_length=max_length,
        )
        if not len(self):
            raise InputError(
                f"None of the {len(outcome):,} rows can be trained on: {counts[TOO_LONG]:,} do not fit into max_length "
                f"{max_length:,}, {counts[EMPTY]:,} have an empty response. Raise --max_length or check the columns."
            )

    def __len__(self) -> int:
        return len(self.lengths)

    def document(self, index: int) -> Document:
        start = self._start[index]
        tokens = self._values[self._chunk[index]][start : start + self.lengths[index]].astype(np.int64)
        return Document(tokens, int(self._label_starts[index]), int(self._example_ids[index]))

    @property
    def prompt_format(self) -> dict[str, Any]:
        return {"separator": SEPARATOR, "bos": self.report.bos, "eos": True}

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) of all lengths, label starts, example ids (int64) and tokens (int32), little-endian."""
        digest = hashlib.sha256()
        for column in (self.lengths, self._label_starts, self._example_ids):
            digest.update(column.astype("<i8").tobytes())
        # Dropped rows hold no tokens, so a chunk's documents lie one behind the other.
        for chunk, values in enumerate(self._values):
            first, after = np.searchsorted(self._chunk, [chunk, chunk + 1])
            if first < after:
                end = self._start[after - 1] + self.lengths[after - 1]
                digest.update(values[self._start[first] : end].astype("<i4").tobytes())
        return digest.hexdigest()


def _puts_bos(tokenizer: PreTrainedTokenizerBase, bos: str, name: str) -> bool:
    if bos not in ("auto", "yes", "no"):
        raise InputError(f"bos must be 'auto', 'yes' or 'no', not {bos!r}.")
    if bos == "yes" and tokenizer.bos_token_id is None:
        raise InputError(f"bos='yes' needs a tokenizer with a BOS token, and {name!r} has none; use 'auto' or 'no'.")
    if bos != "auto":
        return bos == "yes"
    return tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


@dataclass(frozen=True)
class _RowEncoder:
    """A batch of rows to the columns of FEATURES; an object, so that worker processes can receive it."""

    tokenizer: PreTrainedTokenizerBase
    bos: bool
    max_length: int
    overlong: str

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        prompts = self._tokenize([prompt + SEPARATOR for prompt in batch["prompt"]])
        responses = self._tokenize(batch["response"])
        encoded = [
            self._row(prompt, response, not text.strip())
            for prompt, response, text in zip(prompts, responses, batch["response"], strict=True)
        ]
        tokens, label_starts, outcomes = (list(column) for column in zip(*encoded, strict=True))
        return {"tokens": tokens, "label_start": label_starts, "example_id": batch["example_id"], "outcome": outcomes}

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        # verbose=False: a prompt may exceed the model's length here, because it is shortened below.
        return self.tokenizer(
            texts, add_special_tokens=False, padding=False, truncation=False, return_attention_mask=False, verbose=False
        )["input_ids"]

    def _row(self, prompt: list[int], response: list[int], empty: bool) -> tuple[list[int], int, int]:
        bos, answer = [self.tokenizer.bos_token_id] * self.bos, [*response, self.tokenizer.eos_token_id]
        excess = len(bos) + len(prompt) + len(answer) - self.max_length
        if empty or not response:
            return [], 0, EMPTY
        if excess > 0 and (self.overlong == "drop" or len(answer) >= self.max_length):
            return [], 0, TOO_LONG
        context = bos + prompt[max(excess, 0) :]
        return context + answer, len(context), SHORTENED if excess > 0 else KEPT


def _map(rows: datasets.Dataset, row_encoder: _RowEncoder, num_proc: int | None, file: Path) -> datasets.Dataset:
    processes = min(num_proc or 1, len(rows))
    with _progress_bar(len(rows) >= PROGRESS_BAR_ROWS), _tokenizer_threads(processes == 1):
        return rows.map(
            row_encoder,
            batched=True,
            remove_columns=rows.column_names,
            features=FEATURES,
            num_proc=processes if processes > 1 else None,
            cache_file_name=str(file),  # in a fresh folder, so that nothing is ever taken from a cache
            new_fingerprint=uuid.uuid4().hex,  # otherwise the tokenizer is pickled to compute one
            desc="Tokenising",
        )


@contextmanager
def _progress_bar(wanted: bool) -> Iterator[None]:
    if wanted or datasets.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()


@contextmanager
def _tokenizer_threads(wanted: bool) -> Iterator[None]:
    """Threads of the tokenizers library do not survive a fork: off while there are worker processes, or it warns."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    if not wanted:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is not None:
            os.environ["TOKENIZERS_PARALLELISM"] = before
        elif not wanted:
            del os.environ["TOKENIZERS_PARALLELISM"]


def _concatenate(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)
