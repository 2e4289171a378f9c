"""Every block of code in the README runs, with its placeholder paths replaced by real ones."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from ibft.cli import main

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
PYTHON = [code for language, code in BLOCKS if language == "python"]
COMMANDS = [
    line.removeprefix("ibft ")
    for language, code in BLOCKS
    if language == "bash"
    for line in code.replace("\\\n", " ").splitlines()
    if line.startswith("ibft ")
]


@pytest.fixture
def real_paths(
    base_folder: Path, tasks_file: Path, test_data: Callable[[str], Path], tmp_path: Path
) -> Callable[[str], str]:
    def replace(text: str) -> str:
        paths = {"model": base_folder, "data.jsonl": tasks_file, "run": tmp_path / "run"}
        for name in re.findall(r"path/to/([\w.]+)", text):
            if name == "mbpp.jsonl":
                paths[name] = test_data("mbpp/mbpp.jsonl")
            elif name not in paths:
                paths[name] = test_data(f"../seed_configs/{name}")
            text = text.replace(f"path/to/{name}", str(paths[name]))
        return text

    return replace


def test_the_readme_has_what_these_tests_look_for() -> None:
    assert len(PYTHON) == 3 and len(COMMANDS) == 2


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.split("--")[2].split()[0])
def test_commands(command: str, real_paths: Callable[[str], str]) -> None:
    small = "--target_layer 2 --max_length 256 --max_steps 2"  # the last of a flag counts
    assert main([*real_paths(command).split(), *small.split()]) == 0


def test_python(real_paths: Callable[[str], str]) -> None:
    assert main(real_paths(f"{COMMANDS[0]} --target_layer 2 --max_length 256 --max_steps 1").split()) == 0
    for code in PYTHON:
        exec(compile(real_paths(code), "README.md", "exec"), {})
