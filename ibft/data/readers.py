"""Local data files as Arrow tables of text columns, or of conversations: JSON lines, JSON, CSV and Parquet.

Nothing but text is accepted (a conversation is kept as its JSON text), and nothing is guessed: "007", "null" and
"2020-01-01" stay the strings they are. (The builders of `datasets` infer numbers, dates and nulls, and leave a copy of
every file in the user's cache.)
"""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple, TextIO, cast

import pyarrow as pa
import pyarrow.compute
import pyarrow.csv
import pyarrow.parquet

from ibft.data.chat import conversation_cell
from ibft.data.columns import ColumnChoice, Layout
from ibft.errors import InputError

BATCH = 10_000  # rows held as Python objects at a time
CSV_BLOCK_BYTES = 64 * 2**20  # no row may be longer


def file_format(path: Path) -> str | None:
    """The key of FORMATS that reads this file, by its name; None when nothing does."""
    stem = path.name.lower()
    suffix = Path(stem.removesuffix(".gz")).suffix
    return suffix if suffix in FORMATS and not (suffix == ".parquet" and stem.endswith(".gz")) else None


class Source(NamedTuple):
    """Rows as read. The columns of `table` [rows] are of type string, without nulls.

    They are `prompt` and `response`, or `messages`: a conversation as JSON text (see `conversation_cell`); and `split`
    if the layout names a column for it.
    """

    table: pa.Table
    layout: Layout


def read_file(path: Path, choose: ColumnChoice) -> Source | None:
    """The rows of a file, or None if it has none; InputError for anything but text or messages."""
    suffix = file_format(path)
    assert suffix is not None
    if path.stat().st_size == 0:
        return None
    try:
        return FORMATS[suffix](path, choose)
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error.reason}); save it as UTF-8.") from None
    except (OSError, EOFError, zlib.error, csv.Error, pa.ArrowException) as error:
        raise InputError(f"{path} could not be read as {suffix}: {error}") from error


def read_columns(table: pa.Table, layout: Layout, source: str) -> Source:
    """The columns of a typed table; InputError unless every row of them holds text, or messages."""
    columns = [table.column(name) for name in layout.columns]
    found: list[pa.ChunkedArray]
    if layout.pair_of_text:
        found = [_typed_text(column, name, source) for name, column in zip(layout.columns, columns, strict=True)]
    else:
        if "tools" in table.column_names:
            _refuse_tools(table.column("tools").to_pylist(), source, 0)
        found = [_typed_conversations(columns, layout, source)]
    if layout.split_column is not None:
        found.append(_typed_text(table.column(layout.split_column), layout.split_column, source))
    return _source(found, layout)


def holds_lists(schema: pa.Schema) -> Callable[[str], bool]:
    """Whether a column of this schema holds lists."""
    return lambda name: pa.types.is_nested(schema.field(name).type)


def _read_json(path: Path, choose: ColumnChoice) -> Source | None:
    with open_text(path) as file:
        records = json_records(file, path)
        first = next(records, None)
        if first is None:
            return None
        layout = choose(list(first), lambda name: isinstance(first[name], (list, dict)), str(path))
        records = chain([first], records)
        batches: list[list[pa.Array]] = []
        while batch := list(islice(records, BATCH)):
            batches.append(_json_columns(batch, layout, path, len(batches) * BATCH))
    return _source([pa.chunked_array(chunks) for chunks in zip(*batches, strict=True)], layout)


def _json_columns(batch: list[dict[str, Any]], layout: Layout, path: Path, first_row: int) -> list[pa.Array]:
    if layout.pair_of_text:
        columns = [_json_text(batch, name, path, first_row) for name in layout.columns]
    else:
        _refuse_tools((record.get("tools") for record in batch), str(path), first_row)
        cells = ([record.get(name) for name in layout.columns] for record in batch)
        columns = [_conversations(cells, layout, str(path), first_row)]
    if layout.split_column is not None:
        columns.append(_json_text(batch, layout.split_column, path, first_row))
    return columns


def json_records(file: TextIO, path: Path) -> Iterator[dict[str, Any]]:
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
        except RecursionError:
            raise InputError(f"{path}, line {number} is nested too deeply.") from None
        if not isinstance(record, dict):
            raise InputError(f"{path}, line {number} holds {_described(record)}, not an object with columns.")
        yield record


def _json_list(file: TextIO, path: Path) -> Iterator[dict[str, Any]]:
    try:
        records = json.load(file)
    except json.JSONDecodeError as error:
        where = f"{path}, line {error.lineno}"
        raise InputError(f"{where} is not valid JSON: {error.msg} at column {error.colno}.") from None
    except RecursionError:
        raise InputError(f"{path} is nested too deeply.") from None
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


def _read_csv(path: Path, choose: ColumnChoice) -> Source:
    with open_text(path) as file:
        header = next(csv.reader(file), [])
    if len(header) == 1 and (other := next((mark for mark in ";\t|" if mark in header[0]), None)):
        raise InputError(
            f"{path}: the columns in its first line, {header[0]!r}, are separated by {other!r}; only commas are "
            "understood. Save it with commas, or as .jsonl."
        )
    layout = choose(header, lambda name: False, str(path))
    if not layout.pair_of_text:
        raise InputError(f"{path}: the cells of a CSV file are text and hold no messages; use .jsonl or .parquet.")
    return read_columns(csv_table(path, layout.names_to_read([])), layout, str(path))


def csv_table(path: Path, names: list[str] | None = None) -> pa.Table:
    """These columns of a CSV file, or all, as text."""
    if names is None:
        with open_text(path) as file:
            names = next(csv.reader(file), [])
    return pa.csv.read_csv(
        path,
        # One thread, so that errors name their row.
        read_options=pa.csv.ReadOptions(use_threads=False, block_size=CSV_BLOCK_BYTES),
        parse_options=pa.csv.ParseOptions(newlines_in_values=True),
        convert_options=pa.csv.ConvertOptions(include_columns=names, column_types=dict.fromkeys(names, pa.string())),
    )


def _read_parquet(path: Path, choose: ColumnChoice) -> Source:
    with pa.parquet.ParquetFile(path) as file:
        schema = file.schema_arrow
        layout = choose(schema.names, holds_lists(schema), str(path))
        return read_columns(file.read(columns=layout.names_to_read(schema.names)), layout, str(path))


FORMATS: dict[str, Callable[[Path, ColumnChoice], Source | None]] = {
    ".jsonl": _read_json,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def _typed_conversations(columns: list[pa.ChunkedArray], layout: Layout, source: str) -> pa.ChunkedArray:
    table = pa.table(columns, names=list(layout.columns))
    chunks = []
    for first_row in range(0, len(table), BATCH):
        cells = zip(*(column.to_pylist() for column in table.slice(first_row, BATCH).columns), strict=True)
        chunks.append(_conversations(map(list, cells), layout, source, first_row))
    return pa.chunked_array(chunks, pa.string())


def _conversations(cells: Iterable[list[Any]], layout: Layout, source: str, first_row: int) -> pa.Array:
    names = " + ".join(map(repr, layout.columns))
    return pa.array(
        [
            conversation_cell(parts, f"{source}, row {row} (counted from 0): column {names}")
            for row, parts in enumerate(cells, start=first_row)
        ],
        pa.string(),
    )


def _refuse_tools(cells: Iterable[Any], source: str, first_row: int) -> None:
    """A template would show the model the tools of a row; without them it would learn calls out of nowhere."""
    for row, tools in enumerate(cells, start=first_row):
        if tools:
            raise InputError(
                f"{source}, row {row} (counted from 0): column 'tools' holds {_described(tools)}; tools are not "
                "supported. Leave the column out, or write the tools into the system message."
            )


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


def _source(columns: list[pa.ChunkedArray], layout: Layout) -> Source:
    names = ["prompt", "response"] if layout.pair_of_text else ["messages"]
    return Source(pa.table(columns, names=[*names, *(["split"] if layout.split_column is not None else [])]), layout)


def _not_text(source: str, name: str, row: int, what: str) -> InputError:
    return InputError(
        f"{source}, row {row} (counted from 0): column {name!r} holds {what}; every cell of it must be text."
    )


def _described(value: object) -> str:
    shown = repr(value)
    return f"{shown if len(shown) <= 60 else shown[:57] + '...'} ({type(value).__name__})"


def open_text(path: Path) -> TextIO:
    """A file of text, packed or not, without its byte order mark; line ends are left as they are."""
    opened = gzip.open if path.name.lower().endswith(".gz") else open
    return cast(TextIO, opened(path, "rt", encoding="utf-8-sig", newline=""))


def _first_character(file: TextIO) -> str:
    character = file.read(1)
    while character.isspace():
        character = file.read(1)
    file.seek(0)
    return character
