"""`--dry_run`: says what a run would do, finds what is wrong with it, and leaves nothing behind."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import ibft.estimate.checkpointing
import ibft.train
from ibft.cli import main
from ibft.run import Run

QUICK = "--max_length 128 --bottleneck_dim 16 --lora_r 4 --max_steps 4 --logging_steps 2"


@pytest.fixture
def run(base_folder: Path, tasks_file: Path, tmp_path: Path) -> Callable[..., int]:
    """`run("--flag value ...")`: trains into tmp_path/out, or not; returns the exit code."""

    def train(more: str = "", base: Path = base_folder) -> int:
        command = f"train --base_model {base} --dataset {tasks_file} --output_dir {tmp_path / 'out'} {QUICK} {more}"
        return main(command.split())

    return train


def contents(*folders: Path) -> dict[str, str]:
    """Every file and folder below, with what it holds and when that changed."""
    return {
        str(
            path
        ): f"{path.stat().st_mtime_ns} {hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ''}"
        for folder in folders
        for path in [folder, *folder.rglob("*")]
    }


def described(printed: str) -> list[str]:
    """The description, without what a dry run must say differently."""
    start = printed.index("base model")
    lines = printed[start : printed.index("configuration", start)].splitlines()
    return [line for line in lines if not line.startswith("resuming")]


@pytest.mark.parametrize(
    "more",
    [
        "",
        "--method sft",
        "--encoder lora --encoder_rank 4 --target_layer 2 --gradient_checkpointing",
        "--packing none --attn_implementation eager --lora_target_modules q_proj,down_proj --dtype bfloat16",
        "--num_train_epochs 2 --max_steps -1 --per_device_train_batch_size 3 --gradient_accumulation_steps 2",
    ],
)
def test_it_describes_the_run_that_would_follow_and_writes_nothing(
    run: Callable[..., int],
    more: str,
    tmp_path: Path,
    base_folder: Path,
    tasks_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    watched = (tmp_path, base_folder, tasks_file.parent)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    before = contents(*watched)
    assert run(f"{more} --dry_run") == 0
    assert contents(*watched) == before
    dry = capsys.readouterr().out
    assert dry.rstrip().endswith("dry run: nothing was trained, and nothing written")
    assert f"dataset=['{tasks_file}']" in dry  # in one piece, however long
    assert "not checked" in dry and ("apart" in dry.partition("not checked")[2]) == ("--packing none" not in more)
    assert run(more) == 0  # the folder is still free
    assert described(dry) == described(capsys.readouterr().out)


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("memory_is_tight", [False, True])
def test_an_adapter_that_begins_from_the_weights(
    run: Callable[..., int],
    tmp_path: Path,
    init: str,
    memory_is_tight: bool,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if memory_is_tight:  # where activation checkpointing is chosen by an outline's activations
        monkeypatch.setattr(ibft.estimate.checkpointing, "_memory_gib", lambda device: 1e-4)
    file = tmp_path / "adapter.json"
    file.write_text(json.dumps({"r": 4, "target_modules": ["q_proj"], "init_lora_weights": init}))
    assert run(f"--adapter_config {file} --dry_run") == 0
    dry = capsys.readouterr().out
    assert run(f"--adapter_config {file}") == 0
    assert described(dry) == described(capsys.readouterr().out)
    record = json.loads((tmp_path / "out" / "ibft.json").read_text())
    assert record["adapter"]["init_lora_weights"] == init


def test_it_does_not_read_the_weights(
    run: Callable[..., int], base_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(base_folder, tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").unlink()
    assert run("--dry_run", base=tmp_path / "base") == 0
    assert "weights can be loaded" in capsys.readouterr().out
    assert run(base=tmp_path / "base") == 2


def test_a_tied_head_is_counted_once(
    run: Callable[..., int], base_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    shutil.copytree(base_folder, tmp_path / "base")
    config = AutoConfig.from_pretrained(base_folder, tie_word_embeddings=True)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    assert run("--dry_run", base=tmp_path / "base") == 0
    dry = capsys.readouterr().out
    assert run(base=tmp_path / "base") == 0
    assert described(dry) == described(capsys.readouterr().out)


@pytest.mark.parametrize(
    "more",
    [
        "--dataset missing.jsonl",
        "--base_model ./nowhere",
        "--target_layer 20",
        "--prompt_column Question --response_column output",
        "--max_length 4",
        "--lora_target_modules q_proj,lm_head",
        "--lora_target_modules nothing_of_that_name",
        "--attn_implementation flash_attention_2 --packing none",
        "--resume",
        "--alpha -1",
        "--output_dir {file}/below",
        "--output_dir {file}",
    ],
)
def test_it_finds_what_the_run_would_find(
    run: Callable[..., int], more: str, tasks_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = more.format(file=tasks_file)
    before = contents(tmp_path)
    assert run(f"{more} --dry_run") == 2
    dry = capsys.readouterr().err
    assert contents(tmp_path) == before
    assert run(more) == 2
    assert dry == capsys.readouterr().err and dry.startswith("ibft: error: ")


def test_a_folder_that_holds_a_run_is_refused_and_overwrite_leaves_it(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run() == 0
    before = contents(tmp_path)
    assert run("--dry_run") == 2
    assert "holds a finished run" in capsys.readouterr().err
    assert run("--dry_run --overwrite") == 0
    assert contents(tmp_path) == before


def test_a_resumed_run_says_from_which_step(
    run: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = ibft.train.save_checkpoint

    def stop_at_three(run: Run, step: int) -> None:
        if step == 3:
            raise KeyboardInterrupt
        real(run, step)

    monkeypatch.setattr(ibft.train, "save_checkpoint", stop_at_three)
    assert run("--save_steps 1") == 130
    before = contents(tmp_path)
    assert run("--save_steps 1 --resume --dry_run") == 0
    printed = capsys.readouterr().out
    assert re.search(r"resuming +after step 2$", printed, re.MULTILINE)
    assert "that it is the base model of the checkpoint" in " ".join(printed.split())
    assert run("--save_steps 1 --resume --dry_run --learning_rate 3e-4") == 2
    assert "learning_rate was 0.0001, is 0.0003" in capsys.readouterr().err
    assert contents(tmp_path) == before
    monkeypatch.setattr(ibft.train, "save_checkpoint", real)
    assert run("--save_steps 1 --resume") == 0  # dry_run is no difference of the run's


def test_trackers_are_looked_for_but_not_started(
    run: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ibft.tracking.find_spec", lambda name: None)
    monkeypatch.setattr(ibft.train, "start_trackers", lambda *_, **__: pytest.fail("started"))
    assert run("--dry_run --report_to trackio") == 0
    assert "note: report_to names trackio, which is not installed" in capsys.readouterr().out


def test_a_name_that_no_module_bears_is_said(run: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--dry_run --lora_target_modules q_proj,k_porj") == 0
    assert "no module of the model is named k_porj: no adapter there" in capsys.readouterr().out
    assert run("--dry_run --lora_target_modules q_proj,self_attn.k_proj") == 0
    assert "no module of the model" not in capsys.readouterr().out


def test_a_large_model_takes_no_memory(
    run: Callable[..., int], base_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(base_folder, tmp_path / "base")
    file = tmp_path / "base" / "config.json"
    sizes = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 40, "num_attention_heads": 64}
    values = {**json.loads(file.read_text()), **sizes, "num_key_value_heads": 8, "head_dim": 128}
    file.write_text(json.dumps(values))
    assert run("--dry_run", base=tmp_path / "base") == 0
    assert re.search(r"\(3\d\.\dB parameters", capsys.readouterr().out)
    assert not torch.cuda.is_initialized()
