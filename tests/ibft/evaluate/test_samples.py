"""Files of samples: real ones, those without a number, and what is wrong with one, in a sentence."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ibft.errors import InputError
from ibft.evaluate.extraction import Extraction
from ibft.evaluate.problems import Problem, load_problems
from ibft.evaluate.samples import Sample, by_temperature, read_samples

PROBLEMS = [Problem(name, "python", "def f():\n", "", entry_point="f") for name in ("a", "b", "7")]


def read(folder: Path, *rows: Any, extraction: Extraction | None = None) -> list[Sample]:
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_samples(folder / "samples.jsonl", PROBLEMS, extraction)


def test_real_samples(test_data: Callable[[str], Path]) -> None:
    problems = load_problems("verilogeval-human", test_data("verilogeval_v1"))
    file = test_data("vericoder_samples/origen_t_0.9_verilog_eval_human_results.jsonl")
    samples = read_samples(file, problems)
    assert len(samples) == 1560
    assert Counter(sample.task_id for sample in samples) == dict.fromkeys([p.task_id for p in problems], 10)
    assert {sample.sample for sample in samples} == set(range(10))
    assert list(by_temperature(samples)) == [None]


def test_numbers_are_the_order_of_the_lines(tmp_path: Path) -> None:
    rows = [{"task_id": name, "completion": str(line)} for line, name in enumerate(["a", "b", "a", 7, "a"])]
    assert [(s.task_id, s.sample, s.completion) for s in read(tmp_path, *rows)] == [
        ("a", 0, "0"),
        ("b", 0, "1"),
        ("a", 1, "2"),
        ("7", 0, "3"),
        ("a", 2, "4"),
    ]


def test_temperatures_are_apart(tmp_path: Path) -> None:
    rows = [{"task_id": "a", "completion": "", "sample": n, "temperature": t} for t in (1, 0.2) for n in (0, 1)]
    groups = by_temperature(read(tmp_path, *rows))
    assert {temperature: len(samples) for temperature, samples in groups.items()} == {0.2: 2, 1.0: 2}
    assert list(groups) == [0.2, 1.0]


def test_extraction_redone(tmp_path: Path) -> None:
    row = {"task_id": "a", "completion": "old", "raw": "    return 1\n\nprint(f())"}
    assert read(tmp_path, row)[0].completion == "old"
    assert read(tmp_path, row, extraction=Extraction())[0].completion == "    return 1\n"
    with pytest.raises(InputError, match="line 1 has no 'raw'"):
        read(tmp_path, {"task_id": "a", "completion": ""}, extraction=Extraction())


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([], "holds no sample"),
        ([{"task_id": "a"}], "line 1 has no 'completion'; it has 'task_id'"),
        ([{"completion": "x"}], "line 1 has no 'task_id'"),
        ([{"task_id": "a", "completion": ["x"]}], r"'completion' holds \['x'\] \(list\); it must be text"),
        ([{"task_id": "c", "completion": ""}], "there is no problem 'c' in this task. Its problems have names such as"),
        (
            [{"task_id": "a", "completion": "", "sample": 1}, {"task_id": "a", "completion": "", "sample": 1}],
            "line 2: sample 1 of 'a' occurs a second time, after line 1",
        ),
        (
            [{"task_id": "a", "completion": "", "sample": 1}, {"task_id": "a", "completion": ""}],
            "line 2 has no 'sample', unlike the lines before it",
        ),
        ([{"task_id": "a", "completion": "", "sample": -1}], r"'sample' holds -1 \(int\); .* at least 0"),
        ([{"task_id": "a", "completion": "", "sample": "0"}], "'sample' holds '0'"),
        (
            [{"task_id": "a", "completion": "", "temperature": 1}, {"task_id": "a", "completion": ""}],
            "some lines have a 'temperature' and others none",
        ),
        ([{"task_id": "a", "completion": "", "temperature": "hot"}], "'temperature' holds 'hot'"),
    ],
)
def test_what_is_refused(rows: list[Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=sentence):
        read(tmp_path, *rows)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="There is no file"):
        read_samples(tmp_path / "none.jsonl", PROBLEMS)
    with pytest.raises(InputError, match="is a folder; name a file of JSON lines"):
        read_samples(tmp_path, PROBLEMS)
    (tmp_path / "half.jsonl").write_text('{"task_id": "a", "completion": "x"}\n{"task_id": "a", "compl')
    with pytest.raises(InputError, match="line 2: the file is cut off in this line, its last"):
        read_samples(tmp_path / "half.jsonl", PROBLEMS)


def test_lines_that_are_nested_too_deep(tmp_path: Path) -> None:
    for text, sentence in (("{}\n" + "[" * 100_000, "line 2 is nested too deep"), ("[" * 100_000, "cannot be read")):
        (tmp_path / "deep.jsonl").write_text(text.replace("{}", '{"task_id": "a", "completion": "x"}'))
        with pytest.raises(InputError, match=sentence):
            read_samples(tmp_path / "deep.jsonl", PROBLEMS)
