"""A file of samples: what a model wrote for each problem, as `ibft eval generate` or anyone else stored it."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ibft.errors import InputError
from ibft.evaluate.extraction import Extraction
from ibft.evaluate.jsonl import Row, read_rows, shown, task_id_field, text_field
from ibft.evaluate.problems import Problem


@dataclass(frozen=True)
class Sample:
    """One completion of one problem; (task_id, temperature, sample) differ between the samples of a file."""

    task_id: str
    sample: int  # index among the samples of the problem at this temperature
    completion: str  # code, as the assembly takes it
    temperature: float | None = None  # None where the file does not say


def read_samples(path: str | Path, problems: Sequence[Problem], extraction: Extraction | None = None) -> list[Sample]:
    """The samples of a file of JSON lines, in its order; at least one.

    A line needs `task_id` and `completion`. `sample` numbers the samples of a problem; without it, the order of the
    lines does. With `extraction`, the code is extracted anew from the `raw` text that every line must then have.
    InputError for a line that is cut off or lacks a field, a problem that is not among `problems`, and a sample that
    occurs twice.
    """
    path = Path(path).expanduser()
    known = {problem.task_id: problem for problem in problems}
    found: dict[tuple[str, float | None, int], int] = {}  # to the line
    samples: list[Sample] = []
    order: Counter[tuple[str, float | None]] = Counter()
    numbered: bool | None = None
    for number, row in read_rows(path):
        where = f"{path}, line {number}"
        task_id = task_id_field(row, where)
        if task_id not in known:
            raise InputError(f"{where}: there is no problem {task_id!r} in this task.{_closest(task_id, known)}")
        temperature = _temperature(row, where)
        if numbered is None:
            numbered = "sample" in row
        if numbered != ("sample" in row):
            raise InputError(f"{where} has {'no' if numbered else 'a'} 'sample', unlike the lines before it.")
        index = _index(row, where) if numbered else order[task_id, temperature]
        order[task_id, temperature] += 1
        identity = (task_id, temperature, index)
        if identity in found:
            raise InputError(
                f"{where}: sample {index} of {task_id!r} occurs a second time, after line {found[identity]}; number "
                "the samples of a problem 0, 1, 2, ..., or leave 'sample' out."
            )
        found[identity] = number
        if extraction is None:
            completion = text_field(row, "completion", where)
        else:
            completion = extraction(text_field(row, "raw", where), known[task_id])
        samples.append(Sample(task_id, index, completion, temperature))
    if not samples:
        raise InputError(f"{path} holds no sample.")
    if None in (temperatures := {sample.temperature for sample in samples}) and len(temperatures) > 1:
        raise InputError(
            f"{path}: some lines have a 'temperature' and others none; samples of both cannot be told apart."
        )
    return samples


def by_temperature(samples: Sequence[Sample]) -> dict[float | None, list[Sample]]:
    """The samples of each temperature, which are evaluated apart; ascending, None first."""
    groups: dict[float | None, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.temperature, []).append(sample)
    return dict(sorted(groups.items(), key=lambda item: -1.0 if item[0] is None else item[0]))


def _temperature(row: Row, where: str) -> float | None:
    value = row.get("temperature")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
        raise InputError(f"{where}: 'temperature' holds {shown(value)}; it must be a number of at least 0.")
    return float(value)


def _index(row: Row, where: str) -> int:
    value = row["sample"]
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise InputError(f"{where}: 'sample' holds {shown(value)}; it must be an integer of at least 0.")
    return value


def _closest(task_id: str, known: Mapping[str, Problem]) -> str:
    close = difflib.get_close_matches(task_id, known, n=1) or list(known)[:1]
    return f" Its problems have names such as {close[0]!r}; do --task and --data (and --split) fit the samples?"
