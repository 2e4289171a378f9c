"""Local data files as Arrow tables of two text columns: JSON lines, JSON, CSV and Parquet.

Nothing but text is accepted, and nothing is guessed: "007", "null" and "2020-01-01" stay the strings they are. (The
builders of `datasets` infer numbers, dates and nulls, and leave a copy of every file in the user's cache.)
"""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any, TextIO, cast

import pyarrow as pa
import pyarrow.compute
import pyarrow.csv
import pyarrow.parquet

from ibft.errors import InputError

# (columns found, name of the source for messages) -> (prompt column, response column)
ChooseColumns = Callable[[list[str], str], tuple[str, str]]

JSON_BATCH = 10_000  # rows held as Python objects at a time
CSV_BLOCK_BYTES = 64 * 2**20  # no row may be longer


def file_format(path: Path) -> str | None:
    """The key of FORMATS that reads this file, by its name; None when nothing does."""
    stem = path.name.lower()
    suffix = Path(stem.removesuffix(".gz")).suffix
    return suffix if suffix in FORMATS and not (suffix == ".parquet" and stem.endswith(".gz")) else None


def read_file(path: Path, choose: ChooseColumns) -> pa.Table:
    """Columns `prompt` and `response` [rows] of type string, without nulls; InputError for anything else."""
    suffix = file_format(path)
    assert suffix is not None
    if path.stat().st_size == 0:
        return _table([], [])
    try:
        return FORMATS[suffix](path, choose)
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error.reason}); save it as UTF-8.") from None
    except (OSError, EOFError, zlib.error, csv.Error, pa.ArrowException) as error:
        raise InputError(f"{path} could not be read as {suffix}: {error}") from error


def text_columns(table: pa.Table, pair: tuple[str, str], source: str) -> pa.Table:
    """The two columns of a typed table; InputError unless both hold text in every row."""
    return _table(*(_typed_text(table.column(name), name, source) for name in pair))


def _read_json(path: Path, choose: ChooseColumns) -> pa.Table:
    with _open_text(path) as file:
        records = _json_records(file, path)
        first = next(records, None)
        if first is None:
            return _table([], [])
        pair = choose(list(first), str(path))
        records = chain([first], records)
        columns: tuple[list[pa.Array], list[pa.Array]] = ([], [])
        row = 0
        while batch := list(islice(records, JSON_BATCH)):
            for name, chunks in zip(pair, columns, strict=True):
                chunks.append(_json_text(batch, name, path, row))
            row += len(batch)
    return _table(*columns)


def _json_records(file: TextIO, path: Path) -> Iterator[dict[str, Any]]:
    """The objects of JSON lines, or of one list, which a file named .json may be."""
    if path.name.lower().removesuffix(".gz").endswith(".json") and _first_character(file) == "[":
        yield from _json_list(file, path)
        return
    for number, line in enumerate(file, start=1):
        if line.isspace():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(
                f"{path}, line {number} is not valid JSON: {error.msg} at column {error.colno}. "
                "Every line must hold one object (a .json file may also be one list of objects)."
            ) from None
        if not isinstance(record, dict):
            raise InputError(f"{path}, line {number} holds {_described(record)}, not an object with columns.")
        yield record


def _json_list(file: TextIO, path: Path) -> Iterator[dict[str, Any]]:
    try:
        records = json.load(file)
    except json.JSONDecodeError as error:
        where = f"{path}, line {error.lineno}"
        raise InputError(f"{where} is not valid JSON: {error.msg} at column {error.colno}.") from None
    for row, record in enumerate(records):
        if not isinstance(record, dict):
            raise InputError(f"{path}, row {row} holds {_described(record)}, not an object with columns.")
        yield record


def _json_text(batch: list[dict[str, Any]], name: str, path: Path, first_row: int) -> pa.Array:
    cells = [record.get(name) for record in batch]
    try:
        array = pa.array(cells, type=pa.string())
    except (pa.ArrowException, UnicodeEncodeError):
        array = None
    if array is not None and array.null_count == 0:
        return array
    for row, cell in enumerate(cells, start=first_row):
        if not isinstance(cell, str):
            absent = name not in batch[row - first_row]
            raise _not_text(str(path), name, row, "nothing (no such key)" if absent else _described(cell))
        if not cell.isascii() and any("\ud800" <= character <= "\udfff" for character in cell):
            raise _not_text(str(path), name, row, "half a surrogate pair, which is no Unicode character")
    raise AssertionError("Arrow refused a batch of strings")


def _read_csv(path: Path, choose: ChooseColumns) -> pa.Table:
    with _open_text(path) as file:
        pair = choose(next(csv.reader(file), []), str(path))
    table = pa.csv.read_csv(
        path,
        # One thread, so that errors name their row.
        read_options=pa.csv.ReadOptions(use_threads=False, block_size=CSV_BLOCK_BYTES),
        parse_options=pa.csv.ParseOptions(newlines_in_values=True),
        convert_options=pa.csv.ConvertOptions(include_columns=pair, column_types=dict.fromkeys(pair, pa.string())),
    )
    return text_columns(table, pair, str(path))


def _read_parquet(path: Path, choose: ChooseColumns) -> pa.Table:
    with pa.parquet.ParquetFile(path) as file:
        pair = choose(file.schema_arrow.names, str(path))
        return text_columns(file.read(columns=list(pair)), pair, str(path))


FORMATS: dict[str, Callable[[Path, ChooseColumns], pa.Table]] = {
    ".jsonl": _read_json,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def _typed_text(column: pa.ChunkedArray, name: str, source: str) -> pa.ChunkedArray:
    if len(column) == 0:
        return pa.chunked_array([], pa.string())
    kind = column.type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        raise _not_text(source, name, 0, f"{_described(column[0].as_py())}, as Arrow type {kind}")
    if column.null_count:
        row = pa.compute.index(pa.compute.is_null(column), True).as_py()
        raise _not_text(source, name, row, _described(None))
    return column.cast(pa.string())


def _table(prompts: list[pa.Array] | pa.ChunkedArray, responses: list[pa.Array] | pa.ChunkedArray) -> pa.Table:
    columns = [pa.chunked_array(c, pa.string()) if isinstance(c, list) else c for c in (prompts, responses)]
    return pa.table(columns, names=["prompt", "response"])


def _not_text(source: str, name: str, row: int, what: str) -> InputError:
    return InputError(
        f"{source}, row {row} (counted from 0): column {name!r} holds {what}; every prompt and response must be text."
    )


def _described(value: object) -> str:
    shown = repr(value)
    return f"{shown if len(shown) <= 60 else shown[:57] + '...'} ({type(value).__name__})"


def _open_text(path: Path) -> TextIO:
    opened = gzip.open if path.name.lower().endswith(".gz") else open
    return cast(TextIO, opened(path, "rt", encoding="utf-8-sig", newline=""))


def _first_character(file: TextIO) -> str:
    character = file.read(1)
    while character.isspace():
        character = file.read(1)
    file.seek(0)
    return character
