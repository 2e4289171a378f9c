"""A file of scores while it is made: batches are appended to NAME.partial, so that a new run goes on; then it is whole.

What is there is gone on with, or taken for the result, only if model, adapter, data and settings are the same. One
command at a time writes.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from ibft.data.memorized import partial_path, read_record, read_scores, record_path
from ibft.errors import InputError
from ibft.memorization.scores import Scores, empty_scores
from ibft.run_folder import flush, write_json

_ANEW = "choose another --output, or pass --overwrite"


class ScoreFile:
    """The scores of `documents` documents. `identity` (JSON-able) is what they depend on, apart from the model.

    `done` [documents] bool tells which are there. Nothing is written before `begin`. InputError for a file that holds
    other scores, and no `overwrite`.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any], documents: int, *, overwrite: bool = False) -> None:
        self.path = path
        self.scores = empty_scores(documents)
        self.done = np.zeros(documents, bool)
        self._identity = dict(identity)
        self._partial = partial_path(path)
        self._overwrite = overwrite
        self._found: tuple[Any, Path] | None = None  # the identity of what is there, and where it was read
        self._file: IO[bytes]  # the partial file, from `begin` on
        self.finished = path.exists() and not overwrite
        if self.finished:
            self._check(read_record(path).get("identity"), path)
            self._check_whole(documents)
        elif self._partial.exists() and not overwrite:
            self._read_partial()

    def check_model(self, model: str) -> None:
        """Takes the model's digest, known once it is loaded, into the identity. InputError for another's scores."""
        self._identity["model"] = model
        if self._found is not None:
            self._check(*self._found)

    @contextmanager
    def begin(self) -> Iterator[None]:
        """Within the block, the partial file is appended to. InputError while another command does so."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._partial.open("ab") as self._file:
            self._lock()
            if self._overwrite:
                self._file.truncate(0)
                for file in (self.path, record_path(self.path)):
                    file.unlink(missing_ok=True)
            self._file.truncate(self._read_partial())  # what a power cut or a full disk left of the last line
            if self._partial.stat().st_size == 0:
                self._append({"identity": self._identity})
            yield

    def add(self, documents: np.ndarray, scores: Scores) -> None:
        """Keeps the scores of these documents (indices), which outlive this process once this returns."""
        columns = {name: column.tolist() for name, column in zip(Scores._fields, scores, strict=True)}
        self._append({"documents": documents.tolist(), **columns})
        self._put(documents, scores)

    def finish(self, table: pa.Table, record: Mapping[str, Any]) -> None:
        """Writes the table as the whole file, with its record beside it, and removes the partial one."""
        whole = self.path.with_name(f".{self.path.name}.partial")
        if self.path.suffix == ".parquet":
            pa.parquet.write_table(table, whole)
        else:
            with whole.open("w", encoding="utf-8", newline="\n") as file:
                file.writelines(json.dumps(row) + "\n" for row in table.to_pylist())
        flush(whole)
        write_json(record_path(self.path), {**record, "identity": self._identity})
        os.replace(whole, self.path)
        flush(self.path.parent)  # before the partial file goes: a power cut must leave one of the two
        self._partial.unlink(missing_ok=True)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"another `ibft memorization score` is writing {self.path}; wait for it, or choose another --output."
            ) from error
        finished = self.path.exists() and not self._overwrite
        if finished and os.fstat(self._file.fileno()).st_size == 0:
            self._partial.unlink(missing_ok=True)  # ours, made a moment ago
        if finished or os.fstat(self._file.fileno()).st_nlink == 0:
            raise InputError(f"another `ibft memorization score` has just written {self.path}; look at it first.")

    def _put(self, documents: np.ndarray, scores: Scores) -> None:
        self.scores.put(documents, scores)
        self.done[documents] = True

    def _append(self, line: Mapping[str, Any]) -> None:
        self._file.write(f"{json.dumps(line)}\n".encode())
        self._file.flush()

    def _read_partial(self) -> int:
        """Takes over what is there; the number of bytes in whole lines."""
        content = self._partial.read_bytes()
        whole = content.rfind(b"\n") + 1
        lines = content[:whole].splitlines()
        if not lines:
            return whole
        try:
            self._check(json.loads(lines[0]).get("identity"), self._partial)
            for line in map(json.loads, lines[1:]):
                self._put(np.array(line["documents"]), Scores(*(np.array(line[name]) for name in Scores._fields)))
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{self._partial} is none that `ibft memorization score` wrote; {_ANEW}.") from error
        return whole

    def _check_whole(self, documents: int) -> None:
        """The record alone does not say that a power cut or a full disk left the file as it was."""
        try:
            table = read_scores(self.path)
        except InputError as error:
            raise InputError(f"{error} To score anew, {_ANEW}.") from error
        scored = table.num_rows - table["example_id"].null_count
        if scored != documents:
            raise InputError(f"{self.path} holds the scores of {scored:,} of {documents:,} rows; {_ANEW}.")

    def _check(self, identity: Any, file: Path) -> None:
        if not isinstance(identity, dict):
            raise InputError(f"{file} exists, and nothing says by which model it was made; {_ANEW}.")
        self._found = identity, file
        for name, wanted in self._identity.items():
            if (found := identity.get(name)) == wanted:
                continue
            if name in ("model", "adapter", "data"):
                raise InputError(f"{file} holds the scores of another {name} than is named now; {_ANEW}.")
            raise InputError(f"{file} holds scores made with --{name} {found}, not {wanted}; {_ANEW}.")
