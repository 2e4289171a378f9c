"""From what the user names (a file, a folder or a Hub dataset) to rows of prompt, response and example id.

Which columns those are is settled here; `readers.py` knows the file formats.
"""

from __future__ import annotations

import difflib
import re
import uuid
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
from datasets.table import InMemoryTable

from ibft.data.readers import FORMATS, ChooseColumns, file_format, read_file, text_columns
from ibft.errors import InputError

KNOWN_COLUMNS = {
    "OriGen": ("Instruction", "Response"),
    "Evol-CodeAlpaca": ("instruction", "output"),
    "MBPP": ("text", "code"),
}
# A folder's files belong to the split that a word of their relative path names, as on the Hub.
SPLIT_WORDS = {
    **dict.fromkeys(["train", "training"], "train"),
    **dict.fromkeys(["validation", "valid", "val", "dev"], "validation"),
    **dict.fromkeys(["test", "testing", "eval", "evaluation"], "test"),
}
ACCEPTED = (
    f"Accepted are files ending in {', '.join(FORMATS)} (the first three also with .gz), a folder of such files, "
    "a folder written by Dataset.save_to_disk, or the name of a dataset on the Hub."
)


def load_rows(
    dataset: str, *, split: str = "train", prompt_column: str | None = None, response_column: str | None = None
) -> datasets.Dataset:
    """The rows of a dataset as columns `prompt` and `response` (strings) and `example_id` (int64).

    `dataset` is a local file or folder (see ACCEPTED) or else a Hub name, loaded with the token in HF_TOKEN if it needs
    one. `example_id` is the row's index in the source, in file order; a folder's files count in the order of their
    paths. `split` selects from what has splits; a single file has only "train". Columns are recognised by name
    (KNOWN_COLUMNS, exact case) unless both are given. Anything that cannot be used raises InputError.
    """
    if (prompt_column is None) != (response_column is None):
        missing, given = ("response", prompt_column) if response_column is None else ("prompt", response_column)
        raise InputError(f"--{missing}_column is missing: column {given!r} was named, and either both or none must be.")
    if prompt_column is not None and prompt_column == response_column:
        raise InputError(f"--prompt_column and --response_column both name {prompt_column!r}; they must differ.")
    named = (prompt_column, response_column) if prompt_column is not None and response_column is not None else None
    choose = partial(_choose_columns, named=named)

    path = Path(dataset).expanduser()
    if path.exists():
        table = _local_rows(path, split, choose)
    elif _looks_local(dataset):
        missing = "" if path.parent.is_dir() else f" There is no folder {str(path.parent)!r} either."
        raise InputError(f"There is no file or folder {dataset!r}.{missing}{_near_by(path)} {ACCEPTED}")
    else:
        table = _dataset_rows(_from_hub(dataset, split), choose, dataset)
    if table.num_rows == 0:
        raise InputError(f"{dataset!r} has no rows (split {split!r}); at least one is needed.")
    table = table.append_column("example_id", pa.array(np.arange(table.num_rows)))
    # The fingerprint is given because computing one serialises the whole table; it names nothing that is cached.
    return datasets.Dataset(InMemoryTable(table), fingerprint=uuid.uuid4().hex)


def _choose_columns(columns: list[str], source: str, named: tuple[str, str] | None) -> tuple[str, str]:
    found = f"{source} has the columns {_quoted(columns)}"
    if named is not None:
        for name in named:
            if name not in columns:
                raise InputError(f"{found}, not {name!r}.{_did_you_mean(name, columns)}")
        return named
    matches = {label: pair for label, pair in KNOWN_COLUMNS.items() if set(pair) <= set(columns)}
    if len(matches) == 1:
        return next(iter(matches.values()))
    verdict, pairs = ("more than one", matches) if matches else ("none", KNOWN_COLUMNS)
    raise InputError(
        f"{found}; among them is {verdict} of the known pairs {_pairs(pairs)}. "
        "Name yours with --prompt_column and --response_column."
    )


def _local_rows(path: Path, split: str, choose: ChooseColumns) -> pa.Table:
    if path.is_file():
        if file_format(path) is None:
            raise InputError(f"{str(path)!r} is not a kind of file that can be read. {ACCEPTED}")
        _check_split(split, ["train"], path)
        return read_file(path, choose)
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        return _dataset_rows(_saved(path, split), choose, str(path))
    files = _files_by_split(path)
    if not files:
        raise InputError(f"The folder {str(path)!r} holds no data. {ACCEPTED}")
    _check_split(split, files, path)
    return pa.concat_tables([read_file(file, choose) for file in files[split]])


def _files_by_split(folder: Path) -> dict[str, list[Path]]:
    """Data files below `folder` in the order of their paths; one whose path names no split belongs to "train"."""
    files: dict[str, list[Path]] = {}
    for file in sorted(folder.rglob("*")):
        relative = file.relative_to(folder).as_posix().lower()
        hidden = any(part.startswith(".") for part in relative.split("/"))
        if hidden or not file.is_file() or file_format(file) is None or file.name == "dataset_infos.json":
            continue
        words = re.split(r"[^a-z]+", relative)
        split = next((SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS), "train")
        files.setdefault(split, []).append(file)
    return files


def _saved(path: Path, split: str) -> datasets.Dataset:
    try:
        loaded = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise InputError(f"The folder {str(path)!r} could not be read as a saved dataset: {error}") from error
    if isinstance(loaded, datasets.DatasetDict):
        _check_split(split, loaded, path)
        return loaded[split]
    _check_split(split, {"train", str(loaded.split or "train")}, path)
    return loaded


def _from_hub(name: str, split: str) -> datasets.Dataset:
    try:
        return datasets.load_dataset(name, split=split)
    except Exception as error:  # network, access, configuration, split, format: the library has no common base class
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise InputError(
            f"{name!r} is no local file or folder, and split {split!r} of a Hub dataset of that name could not be "
            f"loaded: {reason}.{_near_by(Path(name))} Check the name, the connection and, if it is private, HF_TOKEN."
        ) from error


def _dataset_rows(dataset: datasets.Dataset, choose: ChooseColumns, source: str) -> pa.Table:
    pair = choose(dataset.column_names, source)
    return text_columns(dataset.select_columns(list(pair)).with_format("arrow")[:], pair, source)


def _check_split(split: str, splits: Iterable[str], path: Path) -> None:
    if split not in splits:
        raise InputError(f"{str(path)!r} has no split {split!r}; --dataset_split can be {_quoted(sorted(splits))}.")


def _looks_local(name: str) -> bool:
    """Whether a name that does not exist here was meant as a path: no Hub name, or the ending of a data file."""
    hub_name = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name, re.ASCII)
    return hub_name is None or name.lower().endswith((*FORMATS, ".gz", ".txt", ".tsv", ".arrow", ".xlsx", ".zip"))


def _near_by(path: Path) -> str:
    siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    names = difflib.get_close_matches(path.name, siblings, n=3)
    return f" Near by there is {_quoted(names)}." if names else ""


def _did_you_mean(name: str, columns: list[str]) -> str:
    lowered = {column.lower(): column for column in columns}
    close = difflib.get_close_matches(name.lower(), lowered, n=1)
    return f" Did you mean {lowered[close[0]]!r}?" if close else ""


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(repr(str(name)) for name in names)


def _pairs(pairs: dict[str, tuple[str, str]]) -> str:
    return ", ".join(f"{prompt!r} + {response!r} ({label})" for label, (prompt, response) in pairs.items())
