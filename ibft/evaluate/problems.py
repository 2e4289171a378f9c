"""The tasks: which problems there are, where their data comes from, and what each problem asks and tests.

A task is one of `TASKS`, or a file of JSON lines of the user's own, with a prompt and tests in every line.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ibft.errors import InputError
from ibft.evaluate.jsonl import Row, read_rows, shown, task_id_field, text_field

Language = Literal["python", "verilog"]
Split = Literal["all", "train", "validation", "test", "prompt"]

# What ends a completion: at the start of a line, code that is no part of a program that answers, of one that answers a
# docstring (where the next question would begin), or of a function's body.
PROGRAM_STOP = ("\nassert ", "\nprint(", "\nif __name__", "\n```")
MBPP_STOP = ('\n"""', *PROGRAM_STOP)
PYTHON_STOP = ("\ndef ", "\nclass ", "\n@", "\n#", *PROGRAM_STOP)
VERILOG_STOP = ("endmodule",)
# The task_ids of MBPP's splits, by its authors' convention.
MBPP_SPLITS = {"prompt": (1, 10), "test": (11, 510), "validation": (511, 600), "train": (601, 974)}


@dataclass(frozen=True)
class Problem:
    """One problem. What a field of a kind that the task does not have holds is "", () or None."""

    task_id: str
    language: Language
    prompt: str  # what a body continues: the text up to a function's body, or a Verilog module's header
    canonical_solution: str  # in the form of a body where the prompt opens one; "" where the task has none
    test: str = ""  # Python: source that defines check(candidate); Verilog: the testbench
    entry_point: str | None = None  # the name that `test` gives to check
    description: str = ""  # in natural language
    setup: str = ""  # Python, with `tests`: source that runs before them
    tests: tuple[str, ...] = ()  # Python: statements that assert, in place of `test`


@dataclass(frozen=True)
class Task:
    """Where a task's data is, and how its completions are generated unless told otherwise."""

    name: str
    language: Language
    files: tuple[str, ...]  # names that its data has in a folder
    hub: tuple[str, str | None] | None  # a data set on the Hub, and its configuration
    source: str  # where to get the data, for people
    stop: tuple[str, ...]
    max_new_tokens: int


_VERILOG_EVAL = "branch release/1.0.0 of github.com/NVlabs/verilog-eval, folder data"
TASKS = {
    task.name: task
    for task in (
        Task(
            "humaneval",
            "python",
            ("HumanEval.jsonl.gz", "HumanEval.jsonl"),
            ("openai/openai_humaneval", None),
            "github.com/openai/human-eval, folder data",
            PYTHON_STOP,
            512,
        ),
        Task(
            "mbpp",
            "python",
            ("mbpp.jsonl", "mbpp.jsonl.gz", "sanitized-mbpp.json"),
            ("google-research-datasets/mbpp", "full"),
            "github.com/google-research/google-research, folder mbpp",
            MBPP_STOP,
            512,
        ),
        Task(
            "verilogeval-human",
            "verilog",
            ("VerilogEval_Human.jsonl", "VerilogEval_Human.jsonl.gz"),
            None,
            _VERILOG_EVAL,
            VERILOG_STOP,
            1024,
        ),
        Task(
            "verilogeval-machine",
            "verilog",
            ("VerilogEval_Machine.jsonl", "VerilogEval_Machine.jsonl.gz"),
            None,
            _VERILOG_EVAL,
            VERILOG_STOP,
            1024,
        ),
    )
}


def generation_defaults(task: str, problems: Sequence[Problem]) -> tuple[tuple[str, ...], int]:
    """Stop sequences and max_new_tokens of a task; those of the named task that the user's own is most like."""
    if task in TASKS:
        return TASKS[task].stop, TASKS[task].max_new_tokens
    if problems[0].language == "verilog":
        return TASKS["verilogeval-human"].stop, TASKS["verilogeval-human"].max_new_tokens
    alike = TASKS["humaneval" if problems[0].entry_point else "mbpp"]
    return alike.stop, alike.max_new_tokens


def load_problems(task: str, data: str | Path | None = None, split: Split = "all") -> list[Problem]:
    """The problems of a task, in the order of their file; at least one, with task_ids that differ.

    `task`: a name in TASKS, or the path of a file of JSON lines: `task_id`, `prompt`, and `test` with `entry_point`, or
    `test_list`; optional are `language` ("python" if it is not given), `canonical_solution`, `description` and
    `test_setup_code`. `data`: the task's file, a folder that holds it at any depth, or a data set on the Hub; None: the
    task's own on the Hub. `split`: "all", or one of MBPP's. InputError for whatever cannot be used.
    """
    known = TASKS.get(task)
    if known is None:
        return _own_problems(task, data, split)
    if split != "all" and known.name != "mbpp":
        raise InputError(f"--split {split}: {task} is not divided; only mbpp is.")
    path = _data_file(known, data)
    if path is None:
        name, rows = _hub_rows(known, data)
    else:
        name, rows = str(path), ((f"{path}, line {number}", row) for number, row in read_rows(path))
    read = {"humaneval": _humaneval, "mbpp": _mbpp}.get(known.name, _verilog)
    problems = _distinct((read(row, where), where) for where, row in rows)
    if known.name == "mbpp" and split != "all":
        first, last = MBPP_SPLITS[split]
        problems = [problem for problem in problems if first <= int(problem.task_id) <= last]
    if not problems:
        raise InputError(f"{name} holds no problem of {task}" + f" (split {split})" * (split != "all") + ".")
    return _described(problems, path) if known.language == "verilog" and path is not None else problems


def tasks_in(data: str | Path) -> list[str]:
    """The tasks whose file is in the folder, at any depth. InputError if there is none."""
    path = Path(data).expanduser()
    found = [task.name for task in TASKS.values() if any(next(path.rglob(name), None) for name in task.files)]
    if not found:
        raise InputError(f"--data {str(data)!r} is no folder with the file of a task ({', '.join(TASKS)}) in it.")
    return found


def _own_problems(task: str, data: str | Path | None, split: str) -> list[Problem]:
    path = Path(task).expanduser()
    if not path.exists() and (not task.endswith((".jsonl", ".jsonl.gz", ".json")) or "/" not in task):
        near = difflib.get_close_matches(task.lower(), TASKS, n=1, cutoff=0.5)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise InputError(f"{task!r} is not a task, nor a file; there are {', '.join(TASKS)}.{hint}")
    if data is not None:
        raise InputError(f"--data {str(data)!r} is for the tasks that have a name; {task!r} holds its own problems.")
    if split != "all":
        raise InputError(f"--split {split}: a task of your own is not divided; only mbpp is.")
    places = ((f"{path}, line {number}", row) for number, row in read_rows(path))
    problems = _distinct((_own(row, where), where) for where, row in places)
    if not problems:
        raise InputError(f"{path} holds no problem; each line must be one JSON object.")
    languages = {problem.language for problem in problems}
    if len(languages) > 1:
        raise InputError(f"{path} holds problems in {' and '.join(sorted(languages))}; give each a file of its own.")
    return problems


def _distinct(problems: Iterable[tuple[Problem, str]]) -> list[Problem]:
    found: dict[str, Problem] = {}
    for problem, where in problems:
        if problem.task_id in found:
            raise InputError(f"{where}: task_id {problem.task_id!r} occurs a second time; each problem needs its own.")
        found[problem.task_id] = problem
    return list(found.values())


def _data_file(task: Task, data: str | Path | None) -> Path | None:
    """The task's file in what the user named; None for a data set on the Hub."""
    if data is None:
        if task.hub is None:
            raise InputError(
                f"{task.name} is not on the Hub; name its file or folder with --data (from {task.source})."
            )
        return None
    path = Path(data).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        found = [file for name in task.files for file in sorted(path.rglob(name))]
        if not found:
            raise InputError(f"The folder {str(path)!r} holds no {task.files[0]}; it is in {task.source}.")
        if len(found) > 1:
            names = ", ".join(str(file.relative_to(path)) for file in found)
            raise InputError(f"The folder {str(path)!r} holds several files of {task.name} ({names}); name one.")
        return found[0]
    text = str(data)
    if text.startswith(("/", ".", "~")) or text.count("/") != 1 or path.suffix in (".jsonl", ".json", ".gz"):
        raise InputError(f"--data {text!r}: there is no such file or folder.")
    return None


def _hub_rows(task: Task, data: str | Path | None) -> tuple[str, Iterator[tuple[str, Row]]]:
    """The rows of a data set on the Hub, of all its splits."""
    import datasets  # takes a second

    name, configuration = (str(data), None) if data is not None else task.hub or ("", None)
    try:
        splits = datasets.load_dataset(name, configuration)
    except Exception as error:  # network, access, configuration, format: the library has no common base class
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise InputError(
            f"{task.name} could not be loaded from the Hub's data set {name!r}: {reason}. --data names a file or a "
            f"folder instead (from {task.source})."
        ) from error
    rows = (
        (f"{name}, split {split}, row {number}", row)
        for split, dataset in splits.items()
        for number, row in enumerate(dataset)
    )
    return f"the Hub's data set {name!r}", rows


def _humaneval(row: Row, where: str) -> Problem:
    return Problem(
        task_id=task_id_field(row, where),
        language="python",
        prompt=text_field(row, "prompt", where),
        canonical_solution=text_field(row, "canonical_solution", where),
        test=text_field(row, "test", where),
        entry_point=text_field(row, "entry_point", where),
    )


def _mbpp(row: Row, where: str) -> Problem:
    task_id = task_id_field(row, where)
    if not task_id.isdigit():
        raise InputError(f"{where}: task_id {task_id!r} is no number, as MBPP's are.")
    description = text_field(row, "text" if "text" in row else "prompt", where)
    tests = _statements(row, "test_list", where)
    setup = text_field(row, "test_setup_code", where, "") or "\n".join(_statements(row, "test_imports", where, ()))
    return Problem(
        task_id=task_id,
        language="python",
        prompt=_docstring(description, tests),
        canonical_solution=text_field(row, "code", where),
        description=description,
        setup=setup,
        tests=tests,
    )


def _verilog(row: Row, where: str) -> Problem:
    return Problem(
        task_id=task_id_field(row, where),
        language="verilog",
        prompt=text_field(row, "prompt", where),
        canonical_solution=text_field(row, "canonical_solution", where, ""),
        test=text_field(row, "test", where),
        description=text_field(row, "description", where, ""),
    )


def _own(row: Row, where: str) -> Problem:
    language = text_field(row, "language", where, "python").lower()
    if language == "verilog":
        return _verilog(row, where)
    if language != "python":
        raise InputError(f"{where}: language {language!r} is not supported; 'python' and 'verilog' are.")
    tests = _statements(row, "test_list", where, ())
    if bool(tests) == bool(row.get("test")):
        both = "both 'test' and 'test_list'" if tests else "neither 'test' nor 'test_list'"
        raise InputError(f"{where} has {both}; a problem is tested by one of them.")
    return Problem(
        task_id=task_id_field(row, where),
        language="python",
        prompt=text_field(row, "prompt", where),
        canonical_solution=text_field(row, "canonical_solution", where, ""),
        test="" if tests else text_field(row, "test", where),
        entry_point=None if tests else text_field(row, "entry_point", where),
        description=text_field(row, "description", where, ""),
        setup=text_field(row, "test_setup_code", where, ""),
        tests=tests,
    )


def _statements(row: Row, name: str, where: str, default: Any = None) -> tuple[str, ...]:
    value = row.get(name, default)
    if not isinstance(value, (list, tuple)) or not all(isinstance(item, str) for item in value):
        raise InputError(f"{where}: {name!r} holds {shown(value)}; it must be a list of texts.")
    return tuple(value)


def _docstring(description: str, tests: tuple[str, ...]) -> str:
    """MBPP's question as the text that code follows: the tests name the function and show its arguments."""
    lines = "\n".join((description, *tests)).replace("\\", "\\\\").replace('"""', '\\"\\"\\"')
    return f'"""\n{lines}\n"""\n'


def _described(problems: list[Problem], path: Path) -> list[Problem]:
    """VerilogEval keeps its descriptions in a file of their own, beside the problems."""
    file = path.with_name(path.name.removesuffix(".gz").replace("VerilogEval_", "VerilogDescription_"))
    if not file.name.startswith("VerilogDescription_") or not file.is_file():
        return problems
    descriptions = {
        task_id_field(row, where): text_field(row, "detail_description", where)
        for number, row in read_rows(file)
        for where in [f"{file}, line {number}"]
    }
    return [replace(problem, description=descriptions.get(problem.task_id, "")) for problem in problems]
