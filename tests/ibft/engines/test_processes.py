"""Processes that train together: what was asked for is what runs, and where one fails, all end with a sentence."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import planted
import pytest
import torch
from engine_runs import ROWS, SIZES, flags, needs_deepspeed
from processes import Training

from ibft.lab.tasks import generate_tasks, write_jsonl


@pytest.mark.parametrize(("engine", "share"), [("fsdp2", 0.5), ("zero3", 0.5)])
def test_the_model_is_spread_over_the_processes(
    bases: dict[str, Path], folder: Path, tmp_path: Path, engine: str, share: float
) -> None:
    """What is frozen, too: else a large model would not fit, and nothing else would tell."""
    needs_deepspeed(engine)
    Training(
        f"--base_model {bases['untied']} --dataset {folder}/rows.jsonl --output_dir {tmp_path / 'out'} --max_steps 1 "
        f"{SIZES} {flags(engine, folder)}",
        tmp_path / "log",
        world_size=2,
        before=planted.measure_share,
        before_arguments=(str(tmp_path / "share"),),
    ).succeed()
    assert float((tmp_path / "share").read_text()) == pytest.approx(share, abs=0.02)


@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_processes_that_build_another_model_are_told(
    bases: dict[str, Path], folder: Path, tmp_path: Path, engine: str
) -> None:
    """Where the weights' file gives a model that its config.json does not: a broadcast would mix up its tensors."""
    needs_deepspeed(engine)
    training = Training(
        f"--base_model {bases['untied']} --dataset {folder}/rows.jsonl --output_dir {tmp_path / 'out'} --max_steps 1 "
        f"{SIZES} {flags(engine, folder)}",
        tmp_path / "log",
        world_size=2,
        before=planted.another_outline,
    )
    assert training.wait() == [2, 2]
    assert "do not give the model that its config.json describes (process 1 has " in training.output()


@pytest.mark.parametrize(
    ("options", "codes", "sentence"),
    [
        ({"dataset": ["{folder}/other.jsonl"]}, [2, 2], r"\(data is one of fingerprint \w{12}, and one of fingerprint"),
        ({"validation_split": "3"}, [2, 2], r"\(validation_split is '3', and '2' in the main process\)"),
        ({"save_steps": 7}, [2, 2], r"\(save_steps is 7, and 500 in the main process\); all processes must be started"),
        ({"dataset": ["{folder}/none.jsonl"]}, [1, 2], r"(?s)another process could not go on.*none.jsonl"),
    ],
    ids=["other_data", "other_rows_held_out", "another_option", "data_that_is_missing"],
)
def test_processes_that_were_started_otherwise_are_told(
    bases: dict[str, Path], folder: Path, tmp_path: Path, options: dict[str, Any], codes: list[int], sentence: str
) -> None:
    """Before anything is trained: they would wait for each other, or count other tokens in a step."""
    write_jsonl(generate_tasks(ROWS, seed=3), folder / "other.jsonl")
    if "dataset" in options:
        options = {"dataset": [options["dataset"][0].format(folder=folder)]}
    training = Training(
        f"--base_model {bases['untied']} --dataset {folder}/rows.jsonl --output_dir {tmp_path / 'out'} --max_steps 1 "
        f"{SIZES} --validation_split 2",
        tmp_path / "log",
        world_size=2,
        before=planted.start_otherwise,
        before_arguments=(1, options),
    )
    assert training.wait() == codes, training.output()
    assert re.search(sentence, training.output()), training.output()
    assert "Traceback" not in training.output() and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["clear_output", "Metrics.write"])
def test_where_the_main_process_alone_fails_all_end_with_a_sentence(
    bases: dict[str, Path], folder: Path, tmp_path: Path, name: str
) -> None:
    training = Training(
        f"--base_model {bases['untied']} --dataset {folder}/rows.jsonl --output_dir {tmp_path / 'out'} --max_steps 4 "
        f"{SIZES} --logging_steps 1",
        tmp_path / "log",
        world_size=2,
        before=planted.fill_the_disk,
        before_arguments=(name, 1 if name == "clear_output" else 2),
    )
    assert training.wait() == [1, 1], training.output()
    main, other = (log.read_text() for log in training.logs)
    assert "could not be written: No space left on device." in main
    assert other.splitlines()[-1] == ("ibft: error (process 1): another process could not go on; its message says why.")
    assert "Traceback" not in main + other


def test_where_the_process_that_reads_the_weights_cannot_all_end_with_a_sentence(
    bases: dict[str, Path], folder: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(bases["untied"], base)
    (base / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes()[:1000])
    training = Training(
        f"--base_model {base} --dataset {folder}/rows.jsonl --output_dir {tmp_path / 'out'} {SIZES} --engine fsdp2",
        tmp_path / "log",
        world_size=2,
    )
    assert training.wait() == [2, 1], training.output()
    assert "another process could not go on" in training.output() and "Traceback" not in training.output()


def test_nothing_but_python_holds_the_process_group_when_it_is_left(
    bases: dict[str, Path], folder: Path, tmp_path: Path
) -> None:
    """DDP's reducer would wait for gloo's threads with the GIL held, which they may need: processes never ended."""
    Training(
        f"--base_model {bases['untied']} --dataset {folder}/rows.jsonl --output_dir {tmp_path / 'out'} --max_steps 1 "
        f"{SIZES} --engine ddp",
        tmp_path / "log",
        before=planted.count_owners_of_reducer,
        before_arguments=(str(tmp_path / "owners"),),
    ).succeed()
    assert json.loads((tmp_path / "owners").read_text()) == [0, 0]


@pytest.mark.parametrize(
    "engine", ["fsdp2", "zero2", *(pytest.param(engine, marks=pytest.mark.slow) for engine in ("ddp", "zero3"))]
)
def test_a_step_that_is_not_finite_moves_no_weight(
    bases: dict[str, Path], folder: Path, tmp_path: Path, engine: str
) -> None:
    """On one of the processes alone; both stop, with the sentence of one process."""
    needs_deepspeed(engine)
    line = (
        f"--base_model {bases['untied']} --dataset {folder}/rows.jsonl --max_steps 3 --logging_steps 3 {SIZES} "
        f"--warmup_ratio 0 --learning_rate 1e-3 {flags(engine, folder)} --output_dir {tmp_path / 'out'}"
    )
    training = Training(
        line,
        tmp_path / "log",
        world_size=2,
        before=planted.spoil_gradient,
        before_arguments=(1, 2, str(tmp_path / "w")),
    )
    assert training.wait() == [1, 1], training.output()
    assert "step 2 is not finite" in training.output()
    before, after = torch.load(tmp_path / "w.2"), torch.load(tmp_path / "w.3")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    moved = [weight.abs().max() > 0 for name, weight in before.items() if "lora_B" in name]
    assert any(moved), "the first step was not taken"
