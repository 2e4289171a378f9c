"""What metrics.jsonl says of speed: padding and FLOPs by brute force, phases that add up, the MFU, a trace."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import ibft.speed
import ibft.train
from ibft.cli import main
from ibft.data import BatchPlan, collate
from ibft.data.encoded import Document
from ibft.speed import MEASURED, PHASES, Peak, Speedometer, peak_of

QUICK = "--max_length 128 --bottleneck_dim 16 --lora_r 4 --max_steps 4 --logging_steps 2"


@pytest.fixture
def run(base_folder: Path, tasks_file: Path, tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """`run("--flag value ...")`: the metrics of a short run into tmp_path/out."""

    def train(more: str = "") -> list[dict[str, Any]]:
        command = f"train --base_model {base_folder} --dataset {tasks_file} --output_dir {tmp_path / 'out'}"
        assert main(f"{command} {QUICK} --overwrite {more}".split()) == 0
        return [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]

    return train


def test_every_step_says_how_fast_it_was(
    run: Callable[..., list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kept: dict[str, Any] = {}
    real = ibft.train.describe_run
    monkeypatch.setattr(ibft.train, "describe_run", lambda current: kept.update(run=current) or real(current))
    records = run("--peak_tflops 0.25 --gradient_accumulation_steps 2")
    current = kept["run"]
    for values in records:
        assert all(values[name] is not None for name in MEASURED) and values["peak_memory_gib"] > 0.1
        assert values["masked"] == pytest.approx(1 - values["label_tokens"] / values["tokens"])
        micro_batches = current.plan.micro_batches(values["step"] - 1, 0)
        shapes = [(len(rows), max(current.data.lengths[row].sum() for row in rows)) for rows in micro_batches]
        assert values["padding"] == pytest.approx(1 - values["tokens"] / sum(rows * size for rows, size in shapes))
        documents = current.plan.documents(values["step"] - 1)
        lengths = current.data.lengths[documents]
        attention = [float((lengths * (lengths + 1) // 2).sum())] * 2
        flops = current.cost.flops(values["tokens"], values["label_tokens"], attention)
        assert values["flops"] == flops.model > 1e6
        assert sum(values[f"{phase}_seconds"] for phase in PHASES) == pytest.approx(values["seconds"], rel=0.2)
        assert all(values[f"{phase}_seconds"] > 0 for phase in PHASES)
    for first, second in ((0, 1), (2, 3)):  # times are those of a logging window
        window = records[first : second + 1]
        seconds = 2 * window[0]["seconds"]
        assert all(window[0][name] == window[1][name] for name in MEASURED)
        assert window[0]["tokens_per_second"] == pytest.approx(sum(v["tokens"] for v in window) / seconds, abs=0.1)
        assert window[0]["mfu"] == pytest.approx(sum(v["flops"] for v in window) / seconds / 0.25e12)
    printed = capsys.readouterr().out
    assert "peak          0.25 TFLOP/s a device (--peak_tflops), for the MFU" in printed
    assert "memory        activation checkpointing off (there is room)" in printed


def test_no_peak_no_mfu(run: Callable[..., list[dict[str, Any]]], capsys: pytest.CaptureFixture[str]) -> None:
    assert all(values["mfu"] is None and values["flops"] > 0 for values in run())
    assert "no MFU: the peak FLOP/s are not known for this device" in capsys.readouterr().out


def test_the_peak_of_a_gpu_is_its_data_sheets(monkeypatch: pytest.MonkeyPatch) -> None:
    from ibft.config import TrainConfig

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    config, gpu = TrainConfig(base_model="m", dataset=["d"]), torch.device("cuda")
    assert peak_of(config, gpu, torch.bfloat16) == (989, "H100 SXM 80 GB, dense bf16")
    assert peak_of(config, gpu, torch.float32).tflops is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    assert peak_of(config, gpu, torch.bfloat16).tflops is None
    given = TrainConfig(base_model="m", dataset=["d"], peak_tflops=65)
    assert peak_of(given, gpu, torch.bfloat16) == (65, "--peak_tflops")


def test_evaluating_and_saving_are_not_the_speed_of_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock by hand: a second a phase, and a minute between two windows."""
    clock = [0.0]
    monkeypatch.setattr(ibft.speed.time, "perf_counter", lambda: clock[0])

    class Run:
        class engine:
            device, world_size, is_main = torch.device("cpu"), 2, True
            highest = staticmethod(lambda value: value)

        class cost:
            pairs = staticmethod(lambda lengths: [])
            flops = staticmethod(lambda *_: SimpleNamespace(model=4e12))

        data = SimpleNamespace(lengths=np.array([10]))
        peak = Peak(1.0, "test")

    class Record:
        step, num_tokens, num_labels, positions, documents = 1, 10, 5, 20, np.array([0])

    meter = Speedometer(Run)  # type: ignore[arg-type]
    for _ in range(2):
        for phase in PHASES:
            clock[0] += 1
            meter.mark(phase)
        (values,) = meter.read([Record])  # type: ignore[list-item]
        assert values["seconds"] == 4 and values["tokens_per_second"] == 2.5
        assert [values[f"{phase}_seconds"] for phase in PHASES] == [1, 1, 1, 1]
        assert values["padding"] == values["masked"] == 0.5
        assert values["flops"] == 4e12 and values["mfu"] == 0.5  # of two processes' TFLOP/s, for four seconds
        clock[0] += 60
        meter.restart()


def test_what_only_the_main_process_writes_only_it_counts() -> None:
    engine = SimpleNamespace(device=torch.device("cpu"), is_main=False, highest=lambda value: value)
    run = SimpleNamespace(engine=engine)
    assert Speedometer(run).read([object(), object()]) == [{}, {}]  # type: ignore[arg-type, list-item]


def test_the_dataset_is_packed_once_an_epoch(
    run: Callable[..., list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a logging window over every boundary, and evaluations, which ask how long an epoch is."""
    packed: list[tuple[int, int]] = []
    real = BatchPlan._pack
    monkeypatch.setattr(BatchPlan, "_pack", lambda plan, epoch: packed.append((id(plan), epoch)) or real(plan, epoch))
    records = run("--validation_split 4 --packing none --num_train_epochs 3 --max_steps -1 --logging_steps 7")
    assert records[-1]["epoch"] == 2 and len({plan for plan, _ in packed}) == 2
    assert len(packed) == len(set(packed)) == 4


@pytest.mark.parametrize("packing", ["best-fit", "none"])
def test_positions_are_those_of_all_ranks_batches(packing: Any) -> None:
    lengths = np.random.default_rng(0).integers(1, 40, 13)  # of 12 rows a step: one is left for three ranks
    documents = [Document(np.ones(size, np.int64), np.ones(size, bool), 0) for size in lengths]
    plan = BatchPlan(lengths, max_length=40, packing=packing, rows_per_batch=2, accumulation=2, world_size=3, seed=1)
    for step in range(plan.steps_in_epoch(0)):  # the ragged last one, with its dummy batches, too
        made = [
            collate([[documents[i] for i in row] for row in rows], pad_token_id=0, max_length=40, packing=packing)
            for rank in range(3)
            for rows in plan.micro_batches(step, rank)
        ]
        assert plan.positions(step) == sum(batch["input_ids"].numel() for batch in made)


def test_a_trace_of_three_steps(run: Callable[..., list[dict[str, Any]]], tmp_path: Path) -> None:
    run("--profile --max_steps 6")
    with gzip.open(tmp_path / "out" / "profile" / "trace-0.json.gz", "rt") as file:
        names = [event.get("name", "") for event in json.load(file)["traceEvents"]]
    steps = {name for name in names if name.startswith("ProfilerStep#")}
    assert steps == {"ProfilerStep#2", "ProfilerStep#3", "ProfilerStep#4"}  # from 0
    assert any("linear_cross_entropy" in name for name in names) and any("Optimizer.step" in name for name in names)
    run()
    assert not (tmp_path / "out" / "profile" / "trace-1.json.gz").exists()
