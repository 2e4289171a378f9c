"""A dataset's rows as they were found, with all their columns, to be written again as JSON lines or as Parquet."""

from __future__ import annotations

import datetime
import decimal
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet

from ibft.data.readers import csv_table, file_format, json_records, open_text
from ibft.data.sources import find_rows
from ibft.errors import InputError


def write_rows(dataset: str, split: str, keep: np.ndarray, output: Path) -> None:
    """Writes the rows that `keep` [rows] bool marks, in their order: whole, or not at all.

    Rows of a .jsonl file stay the lines that they were in another one; anything else becomes what its values are.
    InputError where a value cannot be written in the format that the output's ending names.
    """
    found = find_rows(dataset, split)
    pieces: list[Any] = [found] if isinstance(found, datasets.Dataset) else list(found)
    partial = output.with_name(f".{output.name}.partial")
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        if output.suffix == ".parquet":
            table = _table([_piece_table(piece) for piece in pieces], dataset)
            pa.parquet.write_table(table.filter(pa.array(keep)), partial)
        else:
            lines = (line for piece in pieces for line in _piece_lines(piece))
            with partial.open("w", encoding="utf-8", newline="\n") as file:
                file.writelines(f"{line}\n" for line, kept in zip(lines, keep, strict=True) if kept)
        os.replace(partial, output)
    finally:
        partial.unlink(missing_ok=True)


def _piece_lines(piece: Path | datasets.Dataset) -> Iterator[str]:
    """The rows of a file or dataset, each as one line of JSON."""
    if isinstance(piece, Path) and file_format(piece) == ".jsonl":
        with open_text(piece) as file:
            yield from (line.rstrip("\r\n") for line in file if not line.isspace())
    elif isinstance(piece, Path) and file_format(piece) == ".json":
        with open_text(piece) as file:
            yield from map(json.dumps, json_records(file, piece))
    else:
        for batch in _piece_table(piece).to_batches(max_chunksize=10_000):
            yield from (json.dumps(row, default=_plain) for row in batch.to_pylist())


def _piece_table(piece: Path | datasets.Dataset) -> pa.Table:
    """The rows of a file or dataset, as its types are, or as JSON's values are."""
    if isinstance(piece, datasets.Dataset):
        return piece.with_format("arrow")[:]
    form = file_format(piece)
    if piece.stat().st_size == 0:
        return pa.table({})
    if form == ".parquet":
        return pa.parquet.read_table(piece)
    if form == ".csv":
        return csv_table(piece)
    with open_text(piece) as file:
        records = list(json_records(file, piece))
    names = dict.fromkeys(name for record in records for name in record)
    columns = {}
    for name in names:
        try:
            columns[name] = pa.array([record.get(name) for record in records])
        except pa.ArrowException as error:
            raise InputError(
                f"{piece}: column {name!r} holds values of several types, which no Parquet file does ({error}); write "
                "to a .jsonl file."
            ) from error
    return pa.table(columns)


def _table(tables: list[pa.Table], dataset: str) -> pa.Table:
    try:
        return pa.concat_tables([table for table in tables if table.num_columns], promote_options="default")
    except pa.ArrowException as error:
        raise InputError(
            f"the files of {dataset!r} have columns of different types, which no Parquet file can hold ({error}); "
            "write to a .jsonl file."
        ) from error


def _plain(value: Any) -> str:
    """What JSON has no type for, as text where that says the same."""
    if isinstance(value, (datetime.date, datetime.time, decimal.Decimal)):
        return str(value)
    raise InputError(f"JSON cannot hold the value {value!r:.60} ({type(value).__name__}); write to a .parquet file.")
