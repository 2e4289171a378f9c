"""Fixtures of the evaluation tests: a task of one's own, and what its samples are judged by."""

import json
import os
import shutil
from pathlib import Path
from typing import Any, NoReturn

import pytest

from ibft.errors import InputError
from ibft.evaluate.python_verdict import INTERPRETER
from ibft.evaluate.sandbox import Sandbox, choose_sandbox, readable_folders
from ibft.evaluate.verilog_verdict import PROGRAMS


@pytest.fixture(scope="session")
def own_rows() -> list[dict[str, Any]]:
    """Six problems whose prompts differ in length."""
    return [
        {
            "task_id": f"add/{number}",
            "prompt": f'def add_{number}(x):\n    """Add {"one and " * number}none."""\n',
            "canonical_solution": f"    return x + {number}\n",
            "test": f"def check(candidate):\n    assert candidate(1) == {1 + number}\n",
            "entry_point": f"add_{number}",
        }
        for number in range(6)
    ]


@pytest.fixture(scope="session")
def own_task(own_rows: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of those problems, as `--task` takes it."""
    file = tmp_path_factory.mktemp("task") / "own.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in own_rows))
    return file


@pytest.fixture(scope="session")
def sandbox() -> Sandbox:
    """The safest tier that works here; the test is skipped where there is none, or fails if there must be one."""
    try:
        return choose_sandbox(readable=readable_folders(INTERPRETER))
    except InputError as error:
        _missing(str(error))


@pytest.fixture(scope="session")
def iverilog() -> None:
    """Skips where there is no Icarus Verilog, or fails if it must be there."""
    if any(shutil.which(name) is None for name in PROGRAMS):
        _missing("Icarus Verilog is not installed")


def _missing(reason: str) -> NoReturn:
    if os.environ.get("IBFT_REQUIRE_SANDBOX") == "1":
        pytest.fail(reason)
    pytest.skip(reason)
