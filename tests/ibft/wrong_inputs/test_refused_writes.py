"""What the system refuses on the way: exit code 1, because the same command is right another time."""

import errno
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from snapshot import contents
from wrong_inputs import QUICK, World, fill_the_disk

import ibft.cli
import ibft.tracking
import ibft.train
from ibft.cli import main


def refusing(world: World, module: Any, name: str, call: int, error: OSError) -> None:
    """From its `call`th call on, a function of the module raises this error."""
    real, calls = getattr(module, name), []

    def function(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        if len(calls) >= call:
            raise error
        return real(*args, **kwargs)

    world.monkeypatch.setattr(module, name, function)


def full_at(world: World, name: str, call: int, size: int) -> None:
    """The disk is full from the `call`th call of a function of ibft.train on: no file may have more than `size`."""
    real, calls = getattr(ibft.train, name), []

    def function(*args: Any) -> Any:
        calls.append(name)
        if len(calls) >= call:
            fill_the_disk(size)
        return real(*args)

    world.monkeypatch.setattr(ibft.train, name, function)


NO_SPACE = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
DENIED = PermissionError(errno.EACCES, os.strerror(errno.EACCES))
REFUSALS = {
    "torch_writes_a_checkpoint": ("MiB are free", lambda world: full_at(world, "save_checkpoint", 2, 20_000)),
    "safetensors_writes_a_checkpoint": ("File too large", lambda world: full_at(world, "save_checkpoint", 2, 7000)),
    "a_checkpoint_is_renamed": ("Permission denied", lambda world: refusing(world, Path, "rename", 2, DENIED)),
    "metrics_are_written": (
        "No space left",
        lambda world: refusing(world, ibft.tracking.Metrics, "write", 5, NO_SPACE),
    ),
    "the_adapter_is_written": ("File too large", lambda world: full_at(world, "save_result", 1, 7000)),
    "the_tokenizer_is_written": ("File too large", lambda world: full_at(world, "save_result", 1, 14_000)),
    "the_adapter_is_put_in_place": ("No space left", lambda world: refusing(world, os, "replace", 3, NO_SPACE)),
}
LONGER = f"{QUICK} --max_steps 6"
LEFT = ("adapter_model.safetensors", "ib_head.safetensors", "adapter_config.json", "metrics.jsonl")


@pytest.fixture(scope="module")
def whole_run(base_folder: Path, tasks_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What six steps leave that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    command = f"train --base_model {base_folder} --dataset {tasks_file} --output_dir {folder} {LONGER}"
    assert main(command.split()) == 0
    return without_times(folder)


def without_times(folder: Path) -> dict[str, str]:
    found = {name: value for name, value in contents(folder).items() if name in LEFT}
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    measured = re.compile(r"tokens_per_second|mfu|peak_memory_gib|.*seconds")
    records = [{k: v for k, v in json.loads(line).items() if not measured.fullmatch(k)} for line in lines]
    return {**found, "metrics.jsonl": str(records)}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_run_that_can_no_longer_write_goes_on_from_its_checkpoint(
    world: World,
    ibft_command: Callable[[str], int],
    capsys: pytest.CaptureFixture[str],
    whole_run: dict[str, str],
    name: str,
) -> None:
    reason, make = REFUSALS[name]
    command = f"train --base_model {{base}} --dataset {{data}} --output_dir {{out}} {LONGER}"
    with world.monkeypatch.context() as patched:
        make(World(world.here, world.base_folder, world.run_folder, patched))
        code = ibft_command(command)
    error = capsys.readouterr().err
    newest = max(path.name for path in (world.here / "out").glob("checkpoint-*"))
    assert code == 1 and "Traceback" not in error
    assert error.splitlines()[-1].startswith(
        f"ibft: error: the run stopped, because {world.here / 'out'} could not be written: "
    )
    assert reason in error and f"{newest} is whole: when this is mended, --resume continues from it." in error
    assert not list((world.here / "out").glob(".*.partial")), "half-written files fill the disk"

    assert ibft_command(f"{command} --resume") == 0
    assert without_times(world.here / "out") == whole_run


def test_a_disk_that_is_full_before_the_first_checkpoint(
    world: World, ibft_command: Callable[[str], int], capsys: pytest.CaptureFixture[str]
) -> None:
    full_at(world, "save_checkpoint", 1, 2000)
    assert ibft_command(f"train --base_model {{base}} --dataset {{data}} --output_dir {{out}} {QUICK}") == 1
    assert "No checkpoint had been written, so --resume starts over." in capsys.readouterr().err


def test_an_export_that_finds_the_disk_full(
    world: World, ibft_command: Callable[[str], int], capsys: pytest.CaptureFixture[str]
) -> None:
    world.run()
    before = contents(world.here)
    fill_the_disk(9000)
    assert ibft_command("export --adapter {here}/run --output_dir {out} --merge") == 2
    error = capsys.readouterr().err
    assert "cannot be written: " in error and "too large" in error and "Traceback" not in error
    assert contents(world.here) == before


def test_what_the_system_refuses_elsewhere_is_a_sentence_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def command(argv: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/secret")

    assert ibft.cli.run_command(command, []) == 1
    assert capsys.readouterr().err == (
        "ibft: error: the system refused: '/secret': Permission denied. --debug shows where.\n"
    )
    assert ibft.cli.run_command(command, ["--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_only_training_speaks_of_resume_when_it_is_interrupted(capsys: pytest.CaptureFixture[str]) -> None:
    def command(argv: Any) -> None:
        raise KeyboardInterrupt

    assert ibft.cli.run_command(command, []) == 130
    assert capsys.readouterr().err == "ibft: interrupted.\n"
    assert ibft.cli.run_command(command, [], interrupted=ibft.train.INTERRUPTED) == 130
    assert "`--resume` continues" in capsys.readouterr().err


@pytest.mark.parametrize("bug", [RuntimeError("a bug"), KeyError("a bug"), OSError("without an errno")])
def test_bugs_keep_their_traceback(bug: Exception) -> None:
    def command(argv: Any) -> None:
        raise bug

    with pytest.raises(type(bug)):
        ibft.cli.run_command(command, [])
