"""JSON lines as people have them: one object a line, read with an error that names the line."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ibft.errors import InputError

Row = dict[str, Any]


def read_rows(path: Path, *, appended: bool = False) -> Iterator[tuple[int, Row]]:
    """The objects of a `.jsonl` or `.jsonl.gz` file, or of a JSON array, each with its line (or place), from 1.

    Blank lines are passed over. In a file that rows are `appended` to, what follows the last end of a line was never
    finished, and is passed over too. InputError for a file that is not there, is no text, is cut off, or holds anything
    that is no object.
    """
    text = read_text(path)
    if appended:
        text = text[: text.rfind("\n") + 1]
    if text.lstrip()[:1] == "[":
        yield from _array(text, path)
        return
    lines = text.split("\n")
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield number, _object(line, f"{path}, line {number}", last=number == len(lines))


def read_text(path: Path) -> str:
    """The whole file, unpacked if its name ends in .gz. InputError if it cannot be read as UTF-8."""
    if path.is_dir():
        raise InputError(f"{str(path)!r} is a folder; name a file of JSON lines.")
    try:
        packed = path.read_bytes()
        return (gzip.decompress(packed) if path.name.endswith(".gz") else packed).decode("utf-8-sig")
    except FileNotFoundError as error:
        raise InputError(f"There is no file {str(path)!r}.") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is no UTF-8 text (byte {error.start}), so no file of JSON lines.") from error
    except EOFError as error:
        raise InputError(f"{path} is cut off: the packed file ends before its end; copy it again.") from error
    except (OSError, gzip.zlib.error) as error:  # type: ignore[attr-defined]
        raise InputError(f"{path} cannot be read: {error}.") from error


def text_field(row: Row, name: str, where: str, default: str | None = None) -> str:
    """A text of the row; InputError if it is missing (without `default`) or anything but text."""
    value = row.get(name, default)
    if value is None:
        raise InputError(f"{where} has no {name!r}; it has {', '.join(map(repr, row)) or 'no field'}.")
    if not isinstance(value, str):
        raise InputError(f"{where}: {name!r} holds {shown(value)}; it must be text.")
    return value


def task_id_field(row: Row, where: str) -> str:
    """The row's `task_id`: text or an integer, as text."""
    value = row.get("task_id")
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if value == "":
        raise InputError(f"{where}: 'task_id' is empty.")
    return text_field(row, "task_id", where)


def shown(value: object) -> str:
    """A value for people, cut to a length that fits into a sentence, with its type."""
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"


def _array(text: str, path: Path) -> Iterator[tuple[int, Row]]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}.") from error
    for number, value in enumerate(values, start=1):
        if not isinstance(value, dict):
            raise InputError(f"{path}, element {number}: {shown(value)} is no JSON object.")
        yield number, value


def _object(line: str, where: str, last: bool) -> Row:
    """`last`: no end of a line follows, as in a file that is whole, or that was cut off."""
    try:
        value = json.loads(line)
    except RecursionError as error:
        raise InputError(f"{where} is nested too deep. Each line must be one JSON object.") from error
    except ValueError as error:
        if last and line.startswith("{"):
            raise InputError(f"{where}: the file is cut off in this line, its last; copy or make it again.") from error
        raise InputError(f"{where}: no JSON ({error}). Each line must be one JSON object.") from error
    if not isinstance(value, dict):
        raise InputError(f"{where}: {shown(value)} is no JSON object.")
    return value
