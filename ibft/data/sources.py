"""From what the user names (a file, a folder or a Hub dataset) to rows of prompt, response and example id.

`columns.py` chooses the columns, `readers.py` knows the file formats.
"""

from __future__ import annotations

import difflib
import os
import re
import uuid
from collections.abc import Iterable
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
from datasets.table import InMemoryTable

from ibft.data.chat import pair_cell
from ibft.data.columns import ColumnChoice, Format, quoted
from ibft.data.readers import FORMATS, Source, file_format, holds_lists, read_columns, read_file
from ibft.errors import InputError

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
    dataset: str,
    *,
    split: str = "train",
    prompt_column: str | None = None,
    response_column: str | None = None,
    format: Format = "auto",
) -> datasets.Dataset:
    """The rows of a dataset: `prompt` and `response` (strings), or `messages` (JSON text); and `example_id` (int64).

    `dataset` is a local file or folder (see ACCEPTED) or else a Hub name, loaded with the token in HF_TOKEN if it needs
    one. `example_id` is the row's index in the source, in file order; a folder's files count in the order of their
    paths. `split` selects from what has splits; a single file has only "train". Columns are recognised by name and
    cells (see `columns.py`) unless both are given. Anything that cannot be used raises InputError. `load_data` is what
    a run uses: it also mixes datasets and knows how each pair is joined.
    """
    table = load_source(dataset, choice(prompt_column, response_column, format), split=split).table
    table = table.append_column("example_id", pa.array(np.arange(table.num_rows)))
    return as_dataset(table)


def choice(
    prompt_column: str | None,
    response_column: str | None,
    format: Format = "auto",
    separator: str | None = None,
    split_column: str | None = None,
) -> ColumnChoice:
    """How columns are to be chosen; InputError unless both or none of the pair are named, and differ."""
    if (prompt_column is None) != (response_column is None):
        missing, given = ("response", prompt_column) if response_column is None else ("prompt", response_column)
        raise InputError(f"--{missing}_column is missing: column {given!r} was named, and either both or none must be.")
    if prompt_column is not None and prompt_column == response_column:
        raise InputError(f"--prompt_column and --response_column both name {prompt_column!r}; they must differ.")
    named = (prompt_column, response_column) if prompt_column is not None and response_column is not None else None
    return ColumnChoice(named, format, separator, split_column)


def load_source(dataset: str, choose: ColumnChoice, *, split: str) -> Source:
    """The rows of a dataset as they are read; with format "chat", a pair of text has become a conversation.

    InputError for whatever cannot be used, and where there is no row.
    """
    found = find_rows(dataset, split)
    if isinstance(found, datasets.Dataset):
        source: Source | None = _dataset_rows(found, choose, os.path.expanduser(dataset))
    else:
        source = _rows_of_files(found, choose)
    if source is None or source.table.num_rows == 0:
        raise InputError(f"{dataset!r} has no rows (split {split!r}); at least one is needed.")
    if choose.format == "chat" and source.layout.pair_of_text:
        return _as_conversations(source)
    return source


def find_rows(dataset: str, split: str) -> list[Path] | datasets.Dataset:
    """Where the rows of a split lie: data files, in the order of their rows, or a saved or Hub dataset.

    InputError for what is not there or cannot be read.
    """
    path = Path(dataset).expanduser()
    if path.exists():
        return _local_rows(path, split)
    if _looks_local(dataset):
        missing = "" if path.parent.is_dir() else f" There is no folder {str(path.parent)!r} either."
        raise InputError(f"There is no file or folder {dataset!r}.{missing}{_near_by(path)} {ACCEPTED}")
    return _from_hub(dataset, split)


def refuse_among_data(folder: Path, dataset: str) -> None:
    """InputError for a folder to write to among the files of a dataset: what is written would be read as its rows."""
    place = Path(dataset).expanduser()
    saved = any((place / name).exists() for name in ("dataset_dict.json", "state.json"))
    if saved or not place.is_dir() or not folder.resolve().is_relative_to(place.resolve()):
        return
    if not any(part.startswith(".") for part in folder.resolve().relative_to(place.resolve()).parts):  # not read
        raise InputError(
            f"output_dir {folder} lies in the dataset {dataset!r}, whose files are all read as data, so that the run "
            "could not be resumed; choose another folder."
        )


def as_dataset(table: pa.Table) -> datasets.Dataset:
    """The table as a Dataset."""
    # The fingerprint is given because computing one serialises the whole table; it names nothing that is cached.
    return datasets.Dataset(InMemoryTable(table), fingerprint=uuid.uuid4().hex)


def _as_conversations(source: Source) -> Source:
    cells = zip(source.table["prompt"], source.table["response"], strict=True)
    messages = pa.array((pair_cell(prompt.as_py(), response.as_py()) for prompt, response in cells), pa.string())
    table = source.table.drop_columns(["prompt", "response"]).append_column("messages", messages)
    return Source(table, source.layout._replace(pair_of_text=False))


def splits_of(dataset: str) -> list[str] | None:
    """The splits that a local dataset has; None for a Hub name, whose splits only the Hub knows."""
    path = Path(dataset).expanduser()
    if not path.exists():
        return None
    if (path / "dataset_dict.json").exists():
        return sorted(_saved(path))
    if path.is_dir() and not (path / "state.json").exists():
        return sorted(_files_by_split(path))
    return ["train"]


def _local_rows(path: Path, split: str) -> list[Path] | datasets.Dataset:
    if path.is_file():
        if file_format(path) is None:
            raise InputError(f"{str(path)!r} is not a kind of file that can be read. {ACCEPTED}")
        _check_split(split, ["train"], path)
        return [path]
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        loaded = _saved(path)
        if isinstance(loaded, datasets.DatasetDict):
            _check_split(split, loaded, path)
            return loaded[split]
        _check_split(split, {"train", str(loaded.split or "train")}, path)
        return loaded
    files = _files_by_split(path)
    if not files:
        raise InputError(f"The folder {str(path)!r} holds no data. {ACCEPTED}")
    _check_split(split, files, path)
    return files[split]


def _rows_of_files(files: list[Path], choose: ColumnChoice) -> Source | None:
    """The rows of files that hold rows of one form; None where no file has any."""
    found = [(file, read_file(file, choose)) for file in files]
    sources = [(file, source) for file, source in found if source is not None]
    for file, source in sources[1:]:
        first = sources[0][1]
        if (source.layout.pair_of_text, source.layout.separator) != (first.layout.pair_of_text, first.layout.separator):
            raise InputError(
                f"{sources[0][0]} and {file} hold rows of different form, in the columns "
                f"{quoted(first.layout.columns)} and {quoted(source.layout.columns)}; give them as separate datasets."
            )
    if not sources:
        return None
    return Source(pa.concat_tables([source.table for _, source in sources]), sources[0][1].layout)


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


def _saved(path: Path) -> datasets.Dataset | datasets.DatasetDict:
    try:
        return datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise InputError(f"The folder {str(path)!r} could not be read as a saved dataset: {error}") from error


def _from_hub(name: str, split: str) -> datasets.Dataset:
    try:
        return datasets.load_dataset(name, split=split)
    except Exception as error:  # network, access, configuration, split, format: the library has no common base class
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise InputError(
            f"{name!r} is no local file or folder, and split {split!r} of a Hub dataset of that name could not be "
            f"loaded: {reason}.{_near_by(Path(name))} Check the name, the connection and, if it is private, HF_TOKEN."
        ) from error


def _dataset_rows(dataset: datasets.Dataset, choose: ColumnChoice, source: str) -> Source:
    names = dataset.column_names
    layout = choose(names, holds_lists(dataset.features.arrow_schema), source)
    columns = dataset.select_columns(layout.names_to_read(names)).with_format("arrow")[:]
    return read_columns(columns, layout, source)


def _check_split(split: str, splits: Iterable[str], path: Path) -> None:
    if split not in splits:
        raise InputError(f"{str(path)!r} has no split {split!r}; --dataset_split can be {quoted(sorted(splits))}.")


def _looks_local(name: str) -> bool:
    """Whether a name that does not exist here was meant as a path: no Hub name, or the ending of a data file."""
    hub_name = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name, re.ASCII)
    return hub_name is None or name.lower().endswith((*FORMATS, ".gz", ".txt", ".tsv", ".arrow", ".xlsx", ".zip"))


def _near_by(path: Path) -> str:
    siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    names = difflib.get_close_matches(path.name, siblings, n=3)
    return f" Near by there is {quoted(names)}." if names else ""
