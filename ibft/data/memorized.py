"""Rows that a training leaves out because the base model already knows them: their scores, and which are dropped.

`ibft memorization score` writes the scores. Each carries the digest of its row's text, so that it finds that row
wherever it lies now, and no other.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.json
import pyarrow.parquet

from ibft.config_file import read_json_object
from ibft.data.chat import pair_cell
from ibft.data.readers import Source
from ibft.errors import InputError

if TYPE_CHECKING:
    from ibft.config import Measure

SCHEMA = pa.schema(
    [
        ("example_id", pa.int64()),  # of the document; null for a row that gave none, which has no scores either
        ("source", pa.string()),  # the dataset, as it was named
        ("row", pa.int64()),  # from 0
        ("digest", pa.string()),
        ("min_k", pa.float64()),
        ("min_k_plus_plus", pa.float64()),
        ("mean_log_prob", pa.float64()),
        ("tokens", pa.int64()),
    ]
)
_EXAMPLES = "10%, 200, or 'above -0.5'"


@dataclass(frozen=True)
class Drop:
    """Which rows are dropped: the highest scores, by a share of all, by their number, or above a threshold."""

    kind: Literal["share", "count", "above"]
    value: float

    @classmethod
    def read(cls, text: str, label: str) -> Drop:
        """ "10%", "200" or "above -0.5". InputError, with `label` for the flag's name, for anything else."""
        words = text.strip()
        found: Drop | None = None
        if words.endswith("%"):
            found = cls("share", _number(words[:-1]) / 100)
        elif words.startswith("above"):
            found = cls("above", _number(words.removeprefix("above")))
        elif words.isascii() and words.isdigit():
            found = cls("count", int(words))
        if found is None or math.isnan(found.value) or (found.kind == "share" and not 0 < found.value < 1):
            raise InputError(
                f"{label} takes a share of the rows, their number, or the score above which they are dropped "
                f"({_EXAMPLES}), not {text!r}."
            )
        return found

    def choose(self, scores: np.ndarray, label: str) -> np.ndarray:
        """The places of the dropped rows, highest score first, among scores [rows], NaN where a row has none.

        A share is one of the rows with a score, rounded down; of equal scores, the earlier row goes first. InputError
        where nothing would be dropped, or nothing kept.
        """
        order = np.argsort(-scores, kind="stable")  # NaN comes last
        scored = int(np.isfinite(scores).sum())
        if self.kind == "above":
            count = int((scores > self.value).sum())
        else:
            count = int(self.value * scored + 1e-9) if self.kind == "share" else int(self.value)
        if not count:
            highest = f"; the highest score is {scores[order[0]]:.4g}" if scored and self.kind == "above" else ""
            raise InputError(f"{label} drops none of the {scored:,} rows that have a score{highest}.")
        if count >= len(scores) or count > scored:
            raise InputError(
                f"{label} drops {count:,} rows; there are {len(scores):,}, of which {scored:,} have a score, and at "
                "least one must be left."
            )
        return order[:count]


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        return math.nan
    return value if math.isfinite(value) else math.nan


def row_digests(source: Source) -> list[str]:
    """The digest of every row's text, the same whether a pair is read as text or as a conversation; 32 hex digits."""
    if "messages" in source.table.column_names:
        cells = source.table["messages"].to_pylist()
    else:
        pairs = (source.table[name].to_pylist() for name in ("prompt", "response"))
        cells = [pair_cell(prompt, response) for prompt, response in zip(*pairs, strict=True)]
    # Keys of a message come in another order from another format of file.
    return [hashlib.sha256(json.dumps(json.loads(cell), sort_keys=True).encode()).hexdigest()[:32] for cell in cells]


class ScoreTable:
    """A file of scores: its columns as `table`, and as `record` what is known of how they were made, or {}."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.table = read_scores(path)
        self.record = read_record(path)

    def of_digests(self, measure: Measure) -> dict[str, float]:
        """The score of each row by its digest, NaN where the row gave no document.

        A row that gave several documents has their mean, each weighed by its tokens.
        """
        columns = (self.table[name].to_pylist() for name in ("digest", measure, "tokens"))
        totals: dict[str, tuple[float, int]] = {}
        for digest, score, tokens in zip(*columns, strict=True):
            total, count = totals.get(digest, (0.0, 0))
            totals[digest] = (total, count) if score is None else (total + score * tokens, count + tokens)
        return {digest: total / count if count else math.nan for digest, (total, count) in totals.items()}


def read_scores(path: Path) -> pa.Table:
    """The columns of SCHEMA. InputError for a file that is not there, or that no score command wrote."""
    if not path.is_file():
        unfinished = partial_path(path).is_file()
        again = "the same `ibft memorization score`, without --overwrite, goes on"
        hint = f" Its scoring has not finished: {again}." if unfinished else ""
        raise InputError(f"There is no file of scores {str(path)!r}.{hint}")
    try:
        if path.suffix == ".parquet":
            table = pa.parquet.read_table(path)
        else:  # with null where a line lacks a column
            table = pa.json.read_json(path, parse_options=pa.json.ParseOptions(explicit_schema=SCHEMA))
        absent = [name for name in SCHEMA.names if name not in table.column_names]
        if absent or table["digest"].null_count:
            raise InputError(
                f"{path} is no file of `ibft memorization score`: not every row has a {(absent or ['digest'])[0]!r}."
            )
        return table.select(SCHEMA.names).cast(SCHEMA)
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path} cannot be read as a file of `ibft memorization score`: {reason[:200]}") from error


def partial_path(path: Path) -> Path:
    """What scores are appended to before the file is whole."""
    return path.with_name(f"{path.name}.partial")


def record_path(path: Path) -> Path:
    """Where the record of a file of scores lies: by which model, how, and of what."""
    return path.with_name(f"{path.name}.record.json")


def read_record(path: Path) -> dict[str, Any]:
    """The record beside a file of scores; {} where there is none."""
    file = record_path(path)
    return read_json_object(file) if file.is_file() else {}


def scores_of_rows(
    table: ScoreTable, measure: Measure, named: Sequence[tuple[str, Source]], rows: Sequence[np.ndarray]
) -> np.ndarray:
    """The scores of the given rows ([n] int64 indices) of each dataset, one dataset after the other; NaN for none.

    InputError where a row is not in the table.
    """
    known = table.of_digests(measure)
    scores = []
    for (name, source), chosen in zip(named, rows, strict=True):
        digests = row_digests(source._replace(table=source.table.take(pa.array(chosen))))
        if missing := [row for row, digest in zip(chosen.tolist(), digests, strict=True) if digest not in known]:
            raise InputError(
                f"{table.path} has no score of {len(missing):,} of the {len(chosen):,} rows of {name!r}, the first "
                f"being row {missing[0]} (counted from 0): its scores are of other data, or of other columns."
            )
        scores += [known[digest] for digest in digests]
    return np.array(scores, np.float64)


def leave_out_memorized(
    path: str, drop: str, measure: Measure, named: Sequence[tuple[str, Source]], rows: Sequence[np.ndarray]
) -> tuple[list[np.ndarray], str]:
    """For `--drop_memorized`: the given rows of each dataset without the most memorised ones of all together, and the
    scores that say which those are, in words.

    InputError where a row is not in the file of scores, or `drop` leaves nothing out, or nothing over.
    """
    table = ScoreTable(Path(path))
    scores = scores_of_rows(table, measure, named, rows)
    keep = np.ones(len(scores), bool)
    keep[Drop.read(drop, "--drop_memorized").choose(scores, f"--drop_memorized {drop}")] = False
    masks = np.split(keep, np.cumsum([len(chosen) for chosen in rows])[:-1])
    return [chosen[mask] for chosen, mask in zip(rows, masks, strict=True)], _whose(table, measure)


def _whose(table: ScoreTable, measure: Measure) -> str:
    record = table.record
    if record.get("model") is None:
        return f"{measure} in {str(table.path)!r}, which no record says the model of"
    adapter = f" with {record['adapter']!r}" if record.get("adapter") else ""
    how = f" (k {record.get('k')}, span {record.get('span')})"
    return f"{measure}{how} under {record['model']!r}{adapter}"
