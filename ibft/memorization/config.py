"""The flags of `ibft memorization`, command by command. Those that say what the data is are `ibft train`'s own."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ibft.config import FIELDS, DataFlags, Measure, as_in_train
from ibft.errors import InputError
from ibft.flags import AT_LEAST_1, NOT_EMPTY, REQUIRED, Check, check_fields, flag

_ABOVE_0_TO_1: Check = (lambda v: 0 < v <= 1, "greater than 0 and at most 1, as 0.2 for Min-20%")


@dataclass(frozen=True, kw_only=True)
class _Flags:
    """Checked when made."""

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, kw_only=True)
class ModelFlags(_Flags):
    """The model that scores."""

    model: str | None = flag(
        "model",
        None,
        "Hub name or folder of a causal language model; not given: the one the adapter names",
        NOT_EMPTY,
        path=True,
    )
    adapter: str | None = flag(
        "model", None, "folder that `ibft train` wrote, or a checkpoint in it", NOT_EMPTY, path=True
    )
    dtype: Literal["float32", "bfloat16", "float16"] = flag(
        "model", "float32", "of the model; the others need half the memory, and round what they predict"
    )
    use_cpu: bool = flag("model", False, "leave a GPU alone")


@dataclass(frozen=True, kw_only=True)
class ScoreFlags(DataFlags, ModelFlags):
    """`ibft memorization score`."""

    k: float = flag("scores", 0.2, "share of a row's tokens, the least probable ones, that Min-K% takes", _ABOVE_0_TO_1)
    span: Literal["response", "full"] = flag("scores", "response", "the tokens that are learnt, or all of a row")
    batch_tokens: int = flag("scores", 8192, "padded tokens of a forward pass", AT_LEAST_1)
    output: str = flag(
        "output", REQUIRED, "file of scores, .jsonl or .parquet; stopped, it goes on there", NOT_EMPTY, path=True
    )
    overwrite: bool = flag("output", False, "score anew what the output file holds")
    debug: bool = flag("output", False, "show the traceback of an error")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model is None and self.adapter is None:
            raise InputError("--model must be given, or an --adapter that names its base model.")
        check_suffix(self.output)

    @property
    def again(self) -> str:
        """What goes on where this command stopped, in words: with --overwrite it would remove what there is."""
        return "the same command without --overwrite" if self.overwrite else "the same command"


@dataclass(frozen=True, kw_only=True)
class PlotFlags(_Flags):
    """`ibft memorization plot`."""

    output: str | None = flag(
        "output", None, "figure, .png, .svg or .pdf; not given: the numbers alone", NOT_EMPTY, path=True
    )
    labels: list[str] = flag(  # noqa: RUF009
        "output", [], "of the files, in their order; not given: what tells model and data apart", verbatim=True
    )
    measure: Measure = flag("output", "min_k", "the score that is shown")  # noqa: RUF009
    json: bool = flag("output", False, "print one JSON object, and nothing else, on stdout")
    debug: bool = flag("output", False, "show the traceback of an error")


@dataclass(frozen=True, kw_only=True)
class FilterFlags(_Flags):
    """`ibft memorization filter`."""

    scores: str = flag(
        "scores", REQUIRED, "file that `ibft memorization score` wrote for the dataset", NOT_EMPTY, path=True
    )
    drop_top: str = flag("scores", REQUIRED, "how many of the rows known best: 10%, 200, or 'above -0.5'", NOT_EMPTY)
    measure: Measure = flag("scores", "min_k", "the score that counts")  # noqa: RUF009
    dataset: str = flag("data", REQUIRED, FIELDS["dataset"].metadata["help"].partition(";")[0], NOT_EMPTY, path=True)
    dataset_split: str = flag("data", "train", "split to filter", NOT_EMPTY)
    prompt_column: str | None = as_in_train("prompt_column")
    response_column: str | None = as_in_train("response_column")
    output: str = flag("output", REQUIRED, "file for the rows that are left, .jsonl or .parquet", NOT_EMPTY, path=True)
    overwrite: bool = flag("output", False, "replace the output file")
    json: bool = flag("output", False, "print one JSON object, and nothing else, on stdout")
    debug: bool = flag("output", False, "show the traceback of an error")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_suffix(self.output)


def check_output(output: Path, datasets: Sequence[str], files: Sequence[str] = ()) -> None:
    """InputError where the file cannot be written, is what is read, or would be read as data by the next command."""
    if output.is_dir():
        raise InputError(f"--output {str(output)!r} is a folder; name a file.")
    for needed in (*datasets, *files):
        if output.exists() and os.path.exists(needed) and output.samefile(needed):
            raise InputError(f"--output {str(output)!r} is what is read; name another file.")
    for dataset in datasets:
        folder = Path(dataset)
        if folder.is_dir() and folder.resolve() in output.resolve().parents:
            raise InputError(
                f"--output {str(output)!r} lies in the folder of the dataset {dataset!r}, and would be read as its "
                "data; name a file elsewhere."
            )
    nearest = next(folder for folder in output.absolute().parents if folder.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise InputError(f"--output {str(output)!r} cannot be written to.")


def check_suffix(output: str) -> None:
    """InputError unless the file can be written in one of the two formats."""
    if Path(output).suffix not in (".jsonl", ".parquet"):
        raise InputError(f"--output takes a file that ends in .jsonl or .parquet, not {output!r}.")
