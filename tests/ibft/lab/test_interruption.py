"""`ibft lab` that is interrupted: all its processes end, with one sentence."""

import fcntl
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ibft.cli import main
from ibft.errors import Interrupted
from ibft.lab import experiment
from ibft.lab.experiment import Piece


def holding(file: Path) -> str:
    """What locks a file for as long as its process lives."""
    return (
        f"import fcntl, time; file = open({str(file)!r}, 'w'); fcntl.flock(file, fcntl.LOCK_EX); "
        "print('held', file=file, flush=True); time.sleep(600)"
    )


def wait_until_held(file: Path, process: "subprocess.Popen[str]") -> None:
    while not file.exists() or file.read_text() != "held\n":
        assert process.poll() is None
        time.sleep(0.05)


def wait_until_free(file: Path) -> None:
    """Fails by the test's own time-out if the process that holds it lives on."""
    deadline = time.monotonic() + 60
    with open(file) as held:
        while True:
            try:
                return fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                assert time.monotonic() < deadline, "the process lives on"
                time.sleep(0.05)


def test_a_process_ends_with_the_one_that_started_it(tmp_path: Path) -> None:
    script = (
        "from pathlib import Path; from ibft.lab.experiment import Piece, _run_pieces; "
        f"_run_pieces([Piece(Path({str(tmp_path)!r}), (), exec, ({holding(tmp_path / 'lock')!r}, {{}}), str)], 1)"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], text=True)
    wait_until_held(tmp_path / "lock", parent)
    parent.kill()
    parent.wait()
    wait_until_free(tmp_path / "lock")


def test_ctrl_c_ends_all_processes_with_one_sentence(tmp_path: Path) -> None:
    done = f"open({str(tmp_path / 'result.json')!r}, 'w').write('{{}}')"  # whose process then has nothing to do
    script = (
        "import sys; from ibft.cli import main; from ibft.lab import experiment; "
        "experiment._pieces = lambda plan, output: "
        f"iter([experiment.Piece(output / '..', (), exec, ({done!r}, {{}}), str), "
        f"experiment.Piece(output, (), exec, ({holding(tmp_path / 'lock')!r}, {{}}), str)]); "
        f"sys.exit(main(['lab', '--quick', '--output_dir', {str(tmp_path / 'out')!r}, '--workers', '2']))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    wait_until_held(tmp_path / "lock", process)
    while not (tmp_path / "result.json").exists():
        time.sleep(0.05)
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, error = process.communicate(timeout=60)
    assert error == "ibft: interrupted; the same command goes on where it stopped.\n"
    assert process.returncode == 128 + signal.SIGINT
    wait_until_free(tmp_path / "lock")


def test_ctrl_c_while_the_processes_start_prints_nothing_else(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ibft", "lab", "--quick", "--output_dir", str(tmp_path / "out")]
    process = subprocess.Popen(
        command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    assert process.stdout is not None and "19 of them to do" in process.stdout.readline()
    time.sleep(0.7)  # they import PyTorch then
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert error == "ibft: interrupted; the same command goes on where it stopped.\n"
    assert process.returncode == 128 + signal.SIGINT


def test_a_piece_that_is_interrupted_says_how_the_experiment_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    again = pickle.loads(pickle.dumps(Interrupted("stopped; --resume goes on.", signal.SIGTERM)))
    assert (str(again), again.number) == ("stopped; --resume goes on.", signal.SIGTERM)
    code = "from ibft.errors import Interrupted; raise Interrupted('stopped; --resume goes on.', 15)"
    monkeypatch.setattr(experiment, "_pieces", lambda *_: iter([Piece(tmp_path, (), exec, (code, {}), str)]))
    assert main(["lab", "--quick", "--output_dir", str(tmp_path), "--workers", "1"]) == 128 + 15
    assert capsys.readouterr().err == "ibft: interrupted; the same command goes on where it stopped.\n"
