"""A file of scores while it is made: batches are appended to NAME.partial, so that a new run goes on; then it is whole.

What is there is gone on with, or taken for the result, only if model, adapter, data and settings are the same.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from ibft.data.memorized import partial_path, read_record, record_path
from ibft.errors import InputError
from ibft.memorization.scores import Scores, empty_scores

_ANEW = "choose another --output, or pass --overwrite"


class ScoreFile:
    """The scores of `documents` documents. `identity` (JSON-able) is what they depend on.

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
        self.finished = path.exists() and not overwrite
        if self.finished:
            self._check(read_record(path).get("identity"), path)
        elif self._partial.exists() and not overwrite:
            self._read_partial()

    def begin(self) -> None:
        """Makes the partial file ready to be appended to."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self._overwrite:
            for file in (self.path, record_path(self.path), self._partial):
                file.unlink(missing_ok=True)
        if not self._partial.exists() or self._partial.stat().st_size == 0:
            self._append({"identity": self._identity})

    def add(self, documents: np.ndarray, scores: Scores) -> None:
        """Keeps the scores of these documents (indices); they are the system's to keep once this returns."""
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
        text = json.dumps({**record, "identity": self._identity}, indent=2) + "\n"
        record_path(self.path).write_text(text, encoding="utf-8")
        os.replace(whole, self.path)
        self._partial.unlink(missing_ok=True)

    def _put(self, documents: np.ndarray, scores: Scores) -> None:
        self.scores.put(documents, scores)
        self.done[documents] = True

    def _append(self, line: Mapping[str, Any]) -> None:
        with self._partial.open("a", encoding="utf-8", newline="\n") as file:
            file.write(json.dumps(line) + "\n")

    def _read_partial(self) -> None:
        with self._partial.open("rb+") as file:
            content = file.read()
            whole = content.rfind(b"\n") + 1
            file.truncate(whole)  # what a power cut or a full disk left of the last line
        lines = content[:whole].splitlines()
        if not lines:
            return
        try:
            self._check(json.loads(lines[0]).get("identity"), self._partial)
            for line in map(json.loads, lines[1:]):
                self._put(np.array(line["documents"]), Scores(*(np.array(line[name]) for name in Scores._fields)))
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{self._partial} is none that `ibft memorization score` wrote; {_ANEW}.") from error

    def _check(self, identity: Any, file: Path) -> None:
        if not isinstance(identity, dict):
            raise InputError(f"{file} exists, and nothing says by which model it was made; {_ANEW}.")
        for name, wanted in self._identity.items():
            if (found := identity.get(name)) == wanted:
                continue
            if name in ("model", "adapter", "data"):
                raise InputError(f"{file} holds the scores of another {name} than is named now; {_ANEW}.")
            raise InputError(f"{file} holds scores made with --{name} {found}, not {wanted}; {_ANEW}.")
