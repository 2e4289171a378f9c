"""Situations, command lines, and the sentence that each must end in.

Every entry goes through `ibft.cli.main`, as a user's command does. It must end with exit code 2 and a line on stderr
that begins with "ibft: error" and says what was wrong, the value and what is accepted; without a traceback, and with
every file and folder as it was.
"""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from snapshot import contents
from wrong_commands import EXPORT, LAB
from wrong_data import CHAT, DATA
from wrong_inputs import QUICK, Setting, World, weights_of_another_shape
from wrong_runs import FILES, FLAGS, FOLDERS, MODEL

WRONG = DATA | CHAT | MODEL | FILES | FLAGS | FOLDERS | EXPORT | LAB


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_input_is_a_sentence(
    world: World, ibft_command: Callable[[str], int], capsys: pytest.CaptureFixture[str], name: str
) -> None:
    wrong = WRONG[name]
    if wrong.make is not None:
        wrong.make(world)
    before = contents(world.here)
    capsys.readouterr()
    code = ibft_command(wrong.command)
    error = capsys.readouterr().err
    said = [line for line in error.splitlines() if line.startswith("ibft: error")]
    assert (code, len(said)) == (2, 1), error
    assert error.endswith(f"{said[0]}\n"), "the sentence is the last word"
    assert "Traceback" not in error
    assert re.search(wrong.sentence, said[0]), said[0]
    assert len(said[0]) < 900, said[0]
    assert contents(world.here) == before


@pytest.mark.parametrize(
    "command",
    [
        "train --base_model {base} --dataset {here}/none.jsonl --output_dir {out} --debug",
        "export --adapter {here}/none --output_dir {out} --debug",
        "lab --quick --output_dir {out} --workers 0 --debug",
    ],
)
def test_debug_shows_the_traceback(
    ibft_command: Callable[[str], int], capsys: pytest.CaptureFixture[str], command: str
) -> None:
    assert ibft_command(command) == 2
    error = capsys.readouterr().err
    assert error.startswith("Traceback") and error.splitlines()[-1].startswith("ibft: error: ")


def test_the_terminal_shows_the_sentence_and_nothing_else(world: World, tasks_file: Path) -> None:
    """What the libraries log, too, in a process of its own."""
    weights_of_another_shape(world)
    command = f"train --base_model {world.here}/base --dataset {tasks_file} --output_dir {world.here}/out {QUICK}"
    places = os.pathsep.join(path for path in sys.path if path)
    result = subprocess.run(
        [sys.executable, "-m", "ibft", *command.split()],
        env={**os.environ, "PYTHONPATH": places},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    lines = result.stderr.splitlines()
    assert lines[-1].startswith("ibft: error: base_model ") and "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "make",
    [
        lambda world: world.base(tokenizer_config={"pad_token": None}),
        lambda world: world.base(tokenizer_config={"bos_token": None}),
    ],
    ids=["without_pad", "without_bos"],
)
def test_what_a_tokenizer_may_lack(world: World, ibft_command: Callable[[str], int], make: Setting) -> None:
    make(world)
    more = "--packing none --per_device_train_batch_size 3"  # rows of unequal length, which are padded
    assert ibft_command(f"train --base_model {{here}}/base --dataset {{data}} --output_dir {{out}} {QUICK} {more}") == 0
