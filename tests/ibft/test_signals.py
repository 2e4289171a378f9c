"""SIGTERM, SIGINT and SIGUSR1: the step is finished, everything is saved by all ranks together, and the run goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import planted
import pytest
from processes import Training

from ibft.run_folder import checkpoints
from ibft.signals import StopSignals

SIZES = "--max_length 64 --bottleneck_dim 8 --lora_r 2 --target_layer 1 --lora_dropout 0.1 --max_steps 8"
LEFT = ("adapter_model.safetensors", "ib_head.safetensors")


@pytest.fixture
def line(base_folder: Path, tasks_file: Path, tmp_path: Path) -> str:
    """A training into tmp_path/out."""
    return f"--base_model {base_folder} --dataset {tasks_file} --output_dir {tmp_path / 'out'} {SIZES}"


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("number", "world_size", "times"), [(signal.SIGTERM, 2, 1), (signal.SIGINT, 1, 2), (signal.SIGUSR1, 1, 1)]
)
def test_a_signal_saves_and_the_run_goes_on_to_the_same_end(
    line: str, tmp_path: Path, number: signal.Signals, world_size: int, times: int
) -> None:
    """Told to one rank alone; SIGINT twice at once, as torchrun and a terminal send it. No checkpoint was due."""
    told = world_size - 1
    training = Training(
        line, tmp_path / "log", world_size=world_size, before=planted.receive, before_arguments=(told, 3, number, times)
    )
    assert training.wait() == [128 + number] * world_size, training.output()
    [checkpoint] = checkpoints(tmp_path / "out")
    assert checkpoint.name == "checkpoint-3"  # the step that it came in was finished, and no other begun
    printed = training.output()
    assert f"stopped by {number.name} after step 3 of 8, and saved to {checkpoint}; " in printed
    assert printed.count("with --resume") == 1  # the main process speaks for all
    marker = json.loads((tmp_path / "out" / "interrupted.json").read_text())
    assert (marker["signal"], marker["step"], marker["steps"]) == (number.name, 3, 8) and "--resume" in marker["resume"]

    Training(f"{line} --resume", tmp_path / "log", world_size=world_size).succeed()
    assert not (tmp_path / "out" / "interrupted.json").exists()
    whole = line.replace(f"{tmp_path / 'out'}", f"{tmp_path / 'whole'}")
    Training(whole, tmp_path / "log", world_size=world_size).succeed()
    for name in LEFT:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_second_interrupt_ends_at_once(line: str, tmp_path: Path) -> None:
    """In the middle of a step that would go on for ten minutes."""
    training = Training(line, tmp_path / "log", before=planted.hang, before_arguments=(2, str(tmp_path / "hanging")))
    while not (tmp_path / "hanging").exists():
        assert training.processes[0].is_alive(), training.output()
        time.sleep(0.05)
    training.signal(signal.SIGINT)
    training.processes[0].join(1.5)
    assert training.processes[0].is_alive()  # one interrupt waits for the step
    training.signal(signal.SIGINT)
    assert training.wait(20) == [130]


def test_a_signal_in_the_last_step_changes_nothing(line: str, tmp_path: Path) -> None:
    training = Training(line, tmp_path / "log", before=planted.receive, before_arguments=(0, 8, signal.SIGTERM))
    training.succeed()
    assert not (tmp_path / "out" / "interrupted.json").exists() and not checkpoints(tmp_path / "out")


@pytest.mark.parametrize(("world_size", "engine"), [(1, ""), (2, "--engine fsdp2")])
def test_a_signal_ends_an_evaluation_and_everything_is_saved(
    line: str, tmp_path: Path, world_size: int, engine: str
) -> None:
    """Told to one rank alone, with the second of four batches: who stops a job does not wait for the others."""
    line = f"{line} {engine} --packing none --per_device_train_batch_size {2 // world_size} --eval_steps 3"
    line += " --validation_split 8 --logging_steps 100 --learning_rate 1e-3"
    told, loaded = world_size - 1, tmp_path / "loaded"
    training = Training(
        line,
        tmp_path / "log",
        world_size=world_size,
        before=planted.receive_in_validation,
        before_arguments=(told, 2, signal.SIGTERM, str(loaded)),
    )
    assert training.wait() == [128 + signal.SIGTERM] * world_size, training.output()
    assert loaded.read_text().split() == ["1", "2"]
    [checkpoint] = checkpoints(tmp_path / "out")
    assert checkpoint.name == "checkpoint-3"
    assert [values["eval_loss"] for values in metrics(tmp_path / "out")] == [None] * 3

    Training(f"{line} --resume", tmp_path / "log", world_size=world_size).succeed()
    whole = line.replace(f"{tmp_path / 'out'}", f"{tmp_path / 'whole'}")
    Training(whole, tmp_path / "log", world_size=world_size).succeed()
    for name in LEFT:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    evaluated = [values["eval_loss"] for values in metrics(tmp_path / "whole")]
    assert [step for step, loss in enumerate(evaluated, start=1) if loss is not None] == [3, 6, 8]
    assert [values["eval_loss"] for values in metrics(tmp_path / "out")][3:] == evaluated[3:]


def test_a_signal_in_the_last_evaluation_ends_it_and_the_run_is_finished(line: str, tmp_path: Path) -> None:
    loaded = tmp_path / "loaded"
    training = Training(
        f"{line} --packing none --validation_split 8",
        tmp_path / "log",
        before=planted.receive_in_validation,
        before_arguments=(0, 1, signal.SIGTERM, str(loaded)),
    )
    training.succeed()
    assert loaded.read_text().split() == ["1"]
    assert json.loads((tmp_path / "out" / "ibft.json").read_text())["result"]["eval_loss"] is None
    assert not (tmp_path / "out" / "interrupted.json").exists() and not checkpoints(tmp_path / "out")


def test_handlers_are_given_back_and_only_the_first_signal_counts() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    with StopSignals() as signals:
        assert signals.received == 0
        os.kill(os.getpid(), signal.SIGUSR1)
        deadline = time.monotonic() + 10
        while not signals.received and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
        assert signals.received == signal.SIGUSR1
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)] == before


def test_torchrun_told_to_stop_leaves_a_checkpoint_and_a_marker(line: str, tmp_path: Path) -> None:
    """torchrun itself exits with 1 whatever its processes do: the marker tells."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    long = f"{line} --max_steps 100000 --logging_steps 1"
    out = tmp_path / "out"
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [*torchrun, "-m", "ibft.train", *long.split()], env=environment, stdout=log, stderr=log
        )
        while not (out / "metrics.jsonl").exists() or not (out / "metrics.jsonl").read_text():
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.1)
        process.terminate()
        assert process.wait(60) == 1
    marker = json.loads((out / "interrupted.json").read_text())
    [checkpoint] = checkpoints(out)
    assert marker["signal"] == "SIGTERM" and checkpoint.name == f"checkpoint-{marker['step']}"
