"""The documents that rows became: views of a memory-mapped Arrow file, where each comes from, and what was dropped."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import datasets
import numpy as np

from ibft.data.tokens import EMPTY, SHORTENED, TOO_LONG
from ibft.errors import InputError


class Document(NamedTuple):
    """One row as tokens. `is_label` tells which of them are learnt; a document's first token never is."""

    tokens: np.ndarray  # [length] int64
    is_label: np.ndarray  # [length] bool
    example_id: int


@dataclass(frozen=True)
class EncodeReport:
    """What became of the rows: rows = kept + dropped_too_long + dropped_empty, and shortened is part of kept.

    `datasets` are (name, rows taken from it in an epoch, its weight). Counted too are the rows `left_out` because they
    say that they are test rows, or as `memorized` (by the scores of `memorized_by`), and `split_conversations` that
    became one for each of their answers.
    """

    rows: int
    kept: int
    shortened: int
    dropped_too_long: int
    dropped_empty: int
    tokens: int
    label_tokens: int
    bos: bool
    max_length: int
    chat: bool = False
    datasets: tuple[tuple[str, int, float], ...] = ()
    left_out: int = 0
    memorized: int = 0
    memorized_by: str = ""
    split_conversations: int = 0

    def lines(self) -> list[str]:
        """For people: what each dataset gives, what became of the rows, and what the documents hold."""
        short = "without their oldest exchanges" if self.chat else "with the prompt shortened from the left"
        empty = "without an answer" if self.chat else "with an empty response"
        lines = []
        if len(self.datasets) > 1 or any(weight != 1 for _, _, weight in self.datasets):
            lines += [f"{name}: {rows:,} rows, weight {weight:g}" for name, rows, weight in self.datasets]
        lines.append(
            f"{self.rows:,} rows: {self.kept:,} kept ({self.shortened:,} of them {short}), "
            f"{self.dropped_too_long:,} dropped as longer than {self.max_length:,} tokens, "
            f"{self.dropped_empty:,} dropped {empty}"
        )
        if self.left_out:
            lines.append(f"{self.left_out:,} rows left out, which say that they are for testing")
        if self.memorized:
            lines.append(f"{self.memorized:,} rows left out as the most memorised, by {self.memorized_by}")
        if self.split_conversations:
            lines.append(
                f"{self.split_conversations:,} conversations became one for each answer, because the chat template "
                "writes earlier answers differently"
            )
        how = "follows the chat template, and" if self.chat else "ends with EOS and"
        lines.append(
            f"{self.tokens:,} tokens, {self.label_tokens:,} of them labels ({self.label_tokens / self.tokens:.0%}); "
            f"every document {how} {'begins' if self.bos else 'does not begin'} with BOS"
        )
        return lines


class Origin(NamedTuple):
    """Where encoded rows come from, for reports and errors; see `EncodeReport`.

    Row i is row source_rows[i] of the dataset names[sources[i]]; [rows] int64 both.
    """

    names: tuple[str, ...]
    sources: np.ndarray
    source_rows: np.ndarray
    datasets: tuple[tuple[str, int, float], ...] = ()
    left_out: int = 0
    memorized: int = 0
    memorized_by: str = ""
    split_conversations: int = 0


class EncodedDataset:
    """The documents in the order of their rows, memory-mapped; dropped rows are skipped.

    `lengths`, `label_tokens`: [documents] int64, tokens and labels of each document (at least 2 and 1). `example_ids`,
    `sources`, `source_rows`: [documents] int64; document i comes from row source_rows[i] of names[sources[i]]. `report`
    says what was dropped or shortened. `prompt_format` (JSON-able) says how a prompt must be built for a model trained
    on this: `kind` "text" or "chat", the text's `separator`, whether documents begin with BOS (`bos`) and EOS is
    appended (`eos`); for "chat", `template` and its `template_sha256`, and the `end_of_turn` at which an answer is
    complete.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        *,
        prompt_format: dict[str, Any],
        max_length: int,
        order: np.ndarray | None = None,
        origin: Origin,
    ) -> None:
        self.prompt_format = prompt_format
        table = dataset.data
        outcome = table.column("outcome").to_numpy()
        if order is None:
            rows = np.flatnonzero(outcome <= SHORTENED)  # [documents]: the row of each document
            self.example_ids = table.column("example_id").to_numpy()[rows]
        else:
            outcome = outcome[order]
            self.example_ids = np.flatnonzero(outcome <= SHORTENED)
            rows = order[self.example_ids]

        self.names = origin.names
        self.sources: np.ndarray = origin.sources[rows]
        self.source_rows: np.ndarray = origin.source_rows[rows]

        # Views of the mapped file: document i is tokens.values[chunk[i]][start[i] : start[i] + lengths[i]].
        self._tokens = _Lists(table.column("tokens"), rows)
        self._spans = _Lists(table.column("spans"), rows)
        self.lengths: np.ndarray = self._tokens.lengths
        self.label_tokens: np.ndarray = self._count_labels()

        counts = np.bincount(outcome, minlength=EMPTY + 1)
        self.report = EncodeReport(
            rows=len(outcome),
            kept=len(self),
            shortened=int(counts[SHORTENED]),
            dropped_too_long=int(counts[TOO_LONG]),
            dropped_empty=int(counts[EMPTY]),
            tokens=int(self.lengths.sum()),
            label_tokens=int(self.label_tokens.sum()),
            bos=prompt_format["bos"],
            max_length=max_length,
            chat=prompt_format["kind"] == "chat",
            datasets=origin.datasets,
            left_out=origin.left_out,
            memorized=origin.memorized,
            memorized_by=origin.memorized_by,
            split_conversations=origin.split_conversations,
        )
        if not len(self):
            empty = "no answer to learn" if self.report.chat else "an empty response"
            advice = ["Raise --max_length."] * bool(counts[TOO_LONG])
            if counts[EMPTY] and self.report.chat:
                advice.append("What is learnt are the assistant's messages after a user's, of weight 1.")
            elif counts[EMPTY]:
                advice.append("Check the columns.")
            raise InputError(
                f"None of the {len(outcome):,} rows can be trained on: {counts[TOO_LONG]:,} do not fit into max_length "
                f"{max_length:,}, {counts[EMPTY]:,} have {empty}. {' '.join(advice)}"
            )

    def __len__(self) -> int:
        return len(self.lengths)

    def document(self, index: int) -> Document:
        tokens = self._tokens[index].astype(np.int64)
        is_label = np.zeros(len(tokens), bool)
        spans = self._spans[index]
        for at in range(0, len(spans), 2):
            is_label[spans[at] : spans[at + 1]] = True
        is_label[0] = False
        return Document(tokens, is_label, int(self.example_ids[index]))

    def places(self, documents: np.ndarray | list[int]) -> str:
        """For people: the dataset and row of documents (indices), as "rows 3, 8 of the dataset", 20 of each at most."""
        most = 20
        parts = []
        for source, name in enumerate(self.names):
            found = np.unique(self.source_rows[documents][self.sources[documents] == source]).tolist()
            if found:
                parts.append(", ".join(map(str, found[:most])) + ", ..." * (len(found) > most) + f" of {name}")
        return f"rows {' and '.join(parts)} (from 0)"

    def _count_labels(self) -> np.ndarray:
        """Labels of each document: the lengths of its spans, less the first token, which is none."""
        spans = self._spans.flat().astype(np.int64)
        sizes = spans[1::2] - np.maximum(spans[::2], 1)
        owner = np.repeat(np.arange(len(self)), self._spans.lengths // 2)
        return np.bincount(owner, weights=sizes, minlength=len(self)).astype(np.int64)

    @property
    def largest_token(self) -> int:
        """The largest id that occurs."""
        return max(int(values.max()) for values in self._tokens.pieces() if len(values))

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) of all lengths, label starts, example ids (int64) and tokens (int32), little-endian.

        All spans follow where some document has more than one, or one that does not reach its end; and where rows
        occur several times, their tokens count each time.
        """
        spans = self._spans.flat().astype(np.int64)
        ends = np.cumsum(self._spans.lengths)
        columns = [self.lengths, spans[ends - self._spans.lengths], self.example_ids]
        if len(spans) > 2 * len(self) or (spans[1::2] != self.lengths).any():
            columns += [self._spans.lengths, spans]
        digest = hashlib.sha256()
        for column in columns:
            digest.update(column.astype("<i8").tobytes())
        for values in self._tokens.pieces():
            digest.update(values.astype("<i4").tobytes())
        return digest.hexdigest()


class _Lists:
    """Some rows' lists of an Arrow column, as views of the mapped file."""

    def __init__(self, column: Any, rows: np.ndarray) -> None:
        chunks = column.chunks
        self._values: list[np.ndarray] = [chunk.values.to_numpy(zero_copy_only=True) for chunk in chunks]
        offsets = [chunk.offsets.to_numpy().astype(np.int64) for chunk in chunks]
        self._chunk = np.repeat(np.arange(len(chunks)), [len(chunk) for chunk in chunks])[rows]
        self._start = _concatenate([offset[:-1] for offset in offsets])[rows]
        self.lengths = _concatenate([np.diff(offset) for offset in offsets])[rows]

    def __getitem__(self, index: int) -> np.ndarray:
        start = self._start[index]
        return self._values[self._chunk[index]][start : start + self.lengths[index]]

    def pieces(self) -> Iterator[np.ndarray]:
        """All lists in order, in as few pieces as lie one behind the other in the file."""
        if not len(self.lengths):
            return
        ends = self._start + self.lengths
        breaks = (self._chunk[1:] != self._chunk[:-1]) | (self._start[1:] != ends[:-1])
        firsts = np.flatnonzero(np.concatenate([[True], breaks]))
        lasts = np.append(firsts[1:], len(ends)) - 1
        for first, last in zip(firsts, lasts, strict=True):
            yield self._values[self._chunk[first]][self._start[first] : ends[last]]

    def flat(self) -> np.ndarray:
        """All lists in order, as one array."""
        return _concatenate(list(self.pieces()))


def _concatenate(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)
