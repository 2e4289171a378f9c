"""The tasks' data as it is, a task of one's own, and what is wrong with a file, in a sentence."""

from __future__ import annotations

import ast
import gzip
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest

from ibft.errors import InputError
from ibft.evaluate.problems import (
    PYTHON_STOP,
    TASKS,
    VERILOG_STOP,
    Problem,
    generation_defaults,
    load_problems,
)

FILES = {
    "humaneval": "humaneval/HumanEval.jsonl.gz",
    "mbpp": "mbpp/mbpp.jsonl",
    "verilogeval-human": "verilogeval_v1/VerilogEval_Human.jsonl",
    "verilogeval-machine": "verilogeval_v1/VerilogEval_Machine.jsonl",
}
COUNTS = {"humaneval": 164, "mbpp": 974, "verilogeval-human": 156, "verilogeval-machine": 143}


@pytest.mark.parametrize("task", FILES)
def test_the_data_itself(task: str, test_data: Callable[[str], Path]) -> None:
    file = test_data(FILES[task])
    problems = load_problems(task, file)
    assert len(problems) == COUNTS[task] == len({problem.task_id for problem in problems})
    assert load_problems(task, file.parent) == problems == load_problems(task, file.parent.parent)
    opened = gzip.open if file.suffix == ".gz" else open
    with opened(file, "rt", encoding="utf-8", newline="") as lines:
        rows = [json.loads(line) for line in lines]
    for row, problem in zip(rows, problems, strict=True):
        assert problem.task_id == str(row["task_id"]) and problem.language == TASKS[task].language
        assert problem.canonical_solution == row["code" if task == "mbpp" else "canonical_solution"]
        if task == "mbpp":
            assert problem.tests == tuple(row["test_list"]) and problem.setup == row["test_setup_code"]
            assert row["text"] in ast.literal_eval(problem.prompt.strip())  # a docstring, whatever the text holds
            assert (problem.test, problem.entry_point) == ("", None)
        else:
            assert (problem.prompt, problem.test) == (row["prompt"], row["test"])
            assert problem.entry_point == row.get("entry_point")
    if task != "humaneval":
        assert all(problem.description for problem in problems)


def test_verilog_descriptions_are_those_of_the_set(test_data: Callable[[str], Path]) -> None:
    """The same problem is described differently in the two sets."""
    human, machine = (
        {problem.task_id: problem for problem in load_problems(task, test_data(FILES[task]))}
        for task in ("verilogeval-human", "verilogeval-machine")
    )
    assert "2-1 multiplexer" in human["mux2to1v"].description
    assert "simple multiplexer that takes" in machine["mux2to1v"].description
    assert sum(human[name].test != problem.test for name, problem in machine.items()) == 7


@pytest.mark.parametrize(
    ("split", "count"), [("test", 500), ("train", 374), ("validation", 90), ("prompt", 10), ("all", 974)]
)
def test_the_splits_of_mbpp(split: Any, count: int, test_data: Callable[[str], Path]) -> None:
    assert len(load_problems("mbpp", test_data(FILES["mbpp"]), split)) == count


def test_from_the_hub(test_data: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every split of the data set is asked for; no network here, so what the Hub holds is played."""
    rows = datasets.load_dataset("json", data_files=str(test_data(FILES["mbpp"])), split="train")
    asked = []

    def load_dataset(*arguments: Any) -> dict[str, datasets.Dataset]:
        asked.append(arguments)
        return {"train": rows.select(range(600, 974)), "test": rows.select(range(10, 510))}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    problems = load_problems("mbpp", None, "test")
    assert asked == [("google-research-datasets/mbpp", "full")]
    assert problems == load_problems("mbpp", test_data(FILES["mbpp"]), "test")
    load_problems("mbpp", "someone/mbpp-copy")
    assert asked[1] == ("someone/mbpp-copy", None)


def test_a_hub_that_is_not_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: Any) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(InputError, match=r"'openai/openai_humaneval': no network\. --data names a file or a folder"):
        load_problems("humaneval")


OWN = {"task_id": 7, "prompt": "def f(x):\n", "test": "def check(c):\n    assert c(1)\n", "entry_point": "f"}
LISTED = {"task_id": "a", "prompt": "Write g.\n", "test_list": ["assert g() == 1"], "test_setup_code": "import os"}
HARDWARE = {"task_id": "m", "language": "Verilog", "prompt": "module top_module();\n", "test": "module tb;"}


def written(folder: Path, *rows: Any, name: str = "tasks.jsonl") -> str:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / name)


class TestOwnTasks:
    def test_forms(self, tmp_path: Path) -> None:
        assert load_problems(written(tmp_path, OWN, LISTED)) == [
            Problem("7", "python", "def f(x):\n", "", test=OWN["test"], entry_point="f"),
            Problem("a", "python", "Write g.\n", "", setup="import os", tests=("assert g() == 1",)),
        ]
        assert load_problems(written(tmp_path, HARDWARE)) == [
            Problem("m", "verilog", "module top_module();\n", "", test="module tb;")
        ]

    def test_packed_and_as_an_array(self, tmp_path: Path) -> None:
        plain = load_problems(written(tmp_path, OWN, LISTED))
        (tmp_path / "tasks.json").write_text("\ufeff" + json.dumps([OWN, LISTED]))
        (tmp_path / "packed.jsonl.gz").write_bytes(gzip.compress(Path(written(tmp_path, OWN, LISTED)).read_bytes()))
        assert load_problems(str(tmp_path / "tasks.json")) == load_problems(str(tmp_path / "packed.jsonl.gz")) == plain

    def test_what_is_generated(self, tmp_path: Path) -> None:
        for row, stop in ((OWN, PYTHON_STOP), (LISTED, TASKS["mbpp"].stop), (HARDWARE, VERILOG_STOP)):
            task = written(tmp_path, row)
            assert generation_defaults(task, load_problems(task))[0] == stop
        assert (
            generation_defaults("humaneval", [])[1] == 512 and generation_defaults("verilogeval-human", [])[1] == 1024
        )

    @pytest.mark.parametrize(
        ("rows", "sentence"),
        [
            ([OWN, OWN], "line 2: task_id '7' occurs a second time"),
            ([OWN, {**OWN, "task_id": "7"}], "line 2: task_id '7' occurs a second time"),
            ([], "holds no problem"),
            ([{**OWN, "task_id": None}], "line 1 has no 'task_id'"),
            ([{**OWN, "task_id": ""}], "line 1: 'task_id' is empty"),
            ([{**OWN, "task_id": 1.5}], r"'task_id' holds 1.5 \(float\)"),
            ([{"task_id": "a", "prompt": "p"}], "neither 'test' nor 'test_list'"),
            ([{**OWN, **LISTED}], "both 'test' and 'test_list'"),
            ([{key: OWN[key] for key in ("task_id", "prompt", "test")}], "has no 'entry_point'; it has 'task_id'"),
            ([{**OWN, "prompt": 3}], r"'prompt' holds 3 \(int\); it must be text"),
            ([{**LISTED, "test_list": "assert True"}], "it must be a list of texts"),
            ([{**OWN, "language": "cobol"}], "language 'cobol' is not supported; 'python' and 'verilog' are"),
            ([OWN, HARDWARE], "problems in python and verilog; give each a file of its own"),
            (["text"], r"line 1: 'text' \(str\) is no JSON object"),
        ],
    )
    def test_what_is_refused(self, rows: list[Any], sentence: str, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=sentence):
            load_problems(written(tmp_path, *rows))

    @pytest.mark.parametrize(
        ("content", "sentence"),
        [
            (json.dumps(OWN).encode() + b'\n{"task_id": 2, "pro', "line 2: the file is cut off in this line, its last"),
            (b'{"task_id": 1, }\n{"task_id": 2}\n', r"line 1: no JSON \(.*Each line must be one JSON object"),
            (b"a,b\n1,2\n", "line 1: no JSON"),
            (b"[{}", "cannot be read as JSON"),
            (b"[1]", r"element 1: 1 \(int\) is no JSON object"),
            (b"\xff\xfe\x00", "is no UTF-8 text"),
        ],
    )
    def test_a_file_that_is_none(self, content: bytes, sentence: str, tmp_path: Path) -> None:
        (tmp_path / "tasks.jsonl").write_bytes(content)
        with pytest.raises(InputError, match=sentence):
            load_problems(str(tmp_path / "tasks.jsonl"))

    def test_a_packed_file_that_is_cut_off_or_none(self, tmp_path: Path) -> None:
        whole = gzip.compress(json.dumps(OWN).encode() * 100)
        for content, sentence in ((whole[:-20], "is cut off"), (b"plain text", "cannot be read"), (b"", "no problem")):
            (tmp_path / "tasks.jsonl.gz").write_bytes(content)
            with pytest.raises(InputError, match=sentence):
                load_problems(str(tmp_path / "tasks.jsonl.gz"))


class TestNames:
    @pytest.mark.parametrize(
        ("arguments", "sentence"),
        [
            (("humanevl",), "'humanevl' is not a task, nor a file; there are humaneval, .* Did you mean 'humaneval'"),
            (("HumanEval",), "Did you mean 'humaneval'"),
            (("no/such.jsonl",), "There is no file 'no/such.jsonl'"),
            (("verilogeval-human",), "is not on the Hub; name its file or folder with --data"),
            (("humaneval", "no/such/folder"), "there is no such file or folder"),
            (("humaneval", "tasks.jsonl"), "there is no such file or folder"),
            (("humaneval", None, "test"), "--split test: humaneval is not divided"),
        ],
    )
    def test_what_is_not_there(
        self, arguments: tuple[Any, ...], sentence: str, tmp_path: Path, monkeypatch: Any
    ) -> None:
        monkeypatch.chdir(tmp_path)
        with pytest.raises(InputError, match=sentence):
            load_problems(*arguments)

    def test_folders(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"holds no HumanEval.jsonl.gz; it is in github.com/openai/human-eval"):
            load_problems("humaneval", tmp_path)
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
            written(tmp_path / name, OWN, name="HumanEval.jsonl")
        with pytest.raises(InputError, match=r"several files of humaneval \(a/HumanEval.jsonl, b/HumanEval.jsonl\)"):
            load_problems("humaneval", tmp_path)

    def test_another_tasks_data(self, tmp_path: Path, test_data: Callable[[str], Path]) -> None:
        with pytest.raises(InputError, match=r"mbpp.jsonl, line 1 has no 'prompt'; it has 'text', 'code'"):
            load_problems("humaneval", test_data(FILES["mbpp"]))
        with pytest.raises(InputError, match=r"line 1: task_id 'HumanEval/0' is no number, as MBPP's are"):
            load_problems("mbpp", test_data(FILES["humaneval"]))

    def test_data_for_a_task_of_ones_own(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="is for the tasks that have a name"):
            load_problems(written(tmp_path, OWN), tmp_path)

    def test_descriptions_are_optional(self, tmp_path: Path, test_data: Callable[[str], Path]) -> None:
        file = test_data(FILES["verilogeval-human"])
        shutil.copy(file, tmp_path)
        bare = load_problems("verilogeval-human", tmp_path)
        assert bare == [replace(problem, description="") for problem in load_problems("verilogeval-human", file)]
