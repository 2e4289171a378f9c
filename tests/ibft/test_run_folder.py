"""A folder is one run's at a time; what a killed run leaves of that keeps nobody out."""

import errno
import fcntl
import multiprocessing
import os
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path

import planted
import pytest
from processes import Training

from ibft.cli import main
from ibft.errors import InputError
from ibft.run_folder import (
    LOCK_NAME,
    RECORD_NAME,
    clear_output,
    hold_output,
    prepare_output,
    trim_metrics,
    write_json,
)
from ibft.tracking import TENSORBOARD_FOLDER

QUICK = "--max_length 64 --bottleneck_dim 8 --lora_r 2 --max_steps 4"


@pytest.mark.parametrize("more", ["--resume", "--overwrite"])
def test_a_second_run_is_told_of_the_first(
    base_folder: Path, tasks_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: str
) -> None:
    out = tmp_path / "out"
    line = f"--base_model {base_folder} --dataset {tasks_file} --output_dir {out} {QUICK}"
    first = Training(line, tmp_path / "log", before=planted.hang, before_arguments=(2, str(tmp_path / "hanging")))
    while not (tmp_path / "hanging").exists():
        assert first.processes[0].is_alive(), first.output()
        time.sleep(0.05)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert main(["train", *line.split(), more]) == 2
    error = capsys.readouterr().err
    assert f"is being written to by another run (process {first.processes[0].pid} on " in error
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    first.kill()
    assert main(["train", *line.split(), more]) == 0
    assert not (out / LOCK_NAME).exists()


def test_what_a_killed_run_had_started_keeps_nobody_out(tmp_path: Path) -> None:
    """Processes that tokenise may outlive the one that forked them."""
    context = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe()

    def run(connection: Connection) -> None:
        with hold_output(tmp_path, overwrite=False, resume=False):
            child = context.Process(target=time.sleep, args=(60,))
            child.start()
            connection.send(child.pid)
            child.join()

    process = context.Process(target=run, args=(theirs,))
    process.start()
    child = mine.recv()
    try:
        process.kill()
        process.join()
        os.kill(child, 0)  # it lives
        with hold_output(tmp_path, overwrite=False, resume=False):
            assert (tmp_path / LOCK_NAME).read_text().startswith(f"process {os.getpid()} on ")
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_lock_that_has_just_been_removed_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a third run would make the file anew, and two would write."""
    lockf = fcntl.lockf

    def late(*arguments: int) -> None:
        (tmp_path / LOCK_NAME).unlink()
        lockf(*arguments)

    monkeypatch.setattr(fcntl, "lockf", late)
    with pytest.raises(InputError, match="which has just begun"), hold_output(tmp_path, overwrite=False, resume=False):
        pass


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with hold_output(tmp_path / "out", overwrite=False, resume=False):
        assert (tmp_path / "out").is_dir()
    assert not list((tmp_path / "out").iterdir())


def test_a_full_disk_is_named_before_anything_expensive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, content: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    out = tmp_path / "out"
    with (
        pytest.raises(InputError, match=f"output_dir {out} cannot be written to: No space left on device"),
        hold_output(out, overwrite=False, resume=False),
    ):
        raise AssertionError("the run must not begin")
    assert not out.exists()


def test_a_run_that_ended_before_its_first_checkpoint(tmp_path: Path) -> None:
    write_json(tmp_path / RECORD_NAME, {"result": None})
    with pytest.raises(
        InputError, match=r"holds a run that ended before its first checkpoint; pass --resume or --over"
    ):
        prepare_output(tmp_path, overwrite=False, resume=False)
    prepare_output(tmp_path, overwrite=False, resume=True)


def test_an_earlier_runs_events_are_removed_and_nothing_beside_them(tmp_path: Path) -> None:
    folder = tmp_path / TENSORBOARD_FOLDER
    folder.mkdir()
    for name in ("events.out.tfevents.1", "other"):
        (folder / name).touch()
    clear_output(tmp_path)
    assert [path.name for path in folder.iterdir()] == ["other"]


@pytest.mark.parametrize("last", ["", '{"step": 3, "lo', '{"step": 3}\n{"step": 4}\n'])
def test_metrics_end_where_a_resumed_run_begins(tmp_path: Path, last: str) -> None:
    file = tmp_path / "metrics.jsonl"
    trim_metrics(file, 2)
    assert not file.exists()
    file.write_text('{"step": 1}\n{"step": 2}\n' + last)
    trim_metrics(file, 2)
    assert file.read_text() == '{"step": 1}\n{"step": 2}\n'
