"""--compile, and that our own code neither breaks a graph nor makes the host wait for the device within a step."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import planted
import pytest
import torch
from processes import Training
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import ibft.run
import ibft.train
from ibft.cli import main

ROOT = Path(__file__).resolve().parents[2]
OURS, TORCH = (f"{ROOT}/ibft/", f"{ROOT}/ibkernels/"), str(Path(torch.__file__).parent)
SIZES = "--max_length 128 --bottleneck_dim 8 --lora_r 2 --lora_dropout 0 --save_strategy no"
# What gives the host a value that the device has computed, and so waits for it.
SYNCHRONISING = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "_unique2", "bincount")


@pytest.fixture
def train(base_folder: Path, tasks_file: Path, tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """`train("out", "--flag value ...")`: four steps in this process, and their records."""

    def train(name: str, more: str) -> list[dict[str, Any]]:
        out = tmp_path / name
        line = f"train --base_model {base_folder} --dataset {tasks_file} --output_dir {out} {SIZES} {more}"
        assert main(line.split()) == 0
        return [json.loads(record) for record in (out / "metrics.jsonl").read_text().splitlines()]

    return train


@pytest.mark.parametrize("more", ["--gradient_checkpointing", pytest.param("", marks=pytest.mark.slow)])
def test_compiled_layers_take_the_same_steps_in_unbroken_graphs(
    train: Callable[..., list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch, more: str
) -> None:
    """With the tap on a layer, an adapter in it, packed rows of many lengths, and validation in between."""
    more += " --validation_split 4 --eval_steps 2 --max_steps 2"
    expected = train("plain", f"{more} --attn_implementation sdpa")
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: real(function, backend="aot_eager"))
    torch._dynamo.reset()
    counters.clear()
    compiled = train("compiled", f"{more} --compile")
    assert not counters["graph_break"]
    assert 1 <= counters["frames"]["ok"] == counters["frames"]["total"] <= 12
    for mine, theirs in zip(compiled, expected, strict=True):
        for term in ("loss", "ce", "kl", "ce_ib", "grad_norm", "eval_loss"):
            assert mine[term] == pytest.approx(theirs[term], abs=1e-5), term


@pytest.fixture
def windowed_base(base_folder: Path, tmp_path: Path) -> Path:
    """A model of 12 layers, every other one with a window: more variants than torch compiles by itself."""
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 12}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 16}
    config = AutoConfig.for_model("gemma3_text", **sizes, sliding_window_pattern=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "windowed")
    tokenizer.save_pretrained(tmp_path / "windowed")
    return tmp_path / "windowed"


WINDOWED = "--packing none --per_device_train_batch_size 3 --lora_target_modules q_proj --attn_implementation sdpa"


def test_no_layer_of_many_runs_uncompiled(
    train: Callable[..., list[dict[str, Any]]], windowed_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: real(function, backend="eager"))
    torch._dynamo.reset()
    counters.clear()
    more = f"--base_model {windowed_base} {WINDOWED} --validation_split 4 --eval_steps 4 --max_steps 8 --compile"
    train("compiled", more)
    assert 8 < counters["frames"]["ok"] == counters["frames"]["total"] <= 48
    assert torch._dynamo.config.recompile_limit == 8  # elsewhere it is as it was


def test_layers_without_end_to_their_variants_are_an_error(
    windowed_base: Path,
    tasks_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: real(function, backend="eager"))
    monkeypatch.setattr(ibft.run, "_VARIANTS", 2)
    torch._dynamo.reset()
    line = (
        f"train --base_model {windowed_base} --dataset {tasks_file} --output_dir {tmp_path / 'out'} {SIZES} {WINDOWED}"
    )
    assert main(f"{line} --max_steps 4 --compile".split()) == 2
    assert "--compile: the decoder's layers were compiled 2 times" in capsys.readouterr().err


@pytest.mark.slow
def test_compiled_layers_under_fsdp2(base_folder: Path, tasks_file: Path, tmp_path: Path) -> None:
    """Whose hooks stay outside of the graphs."""
    found = {}
    for name, more, world_size in (("one", "", 1), ("two", "--engine fsdp2 --compile", 2)):
        rows = 4 // world_size
        Training(
            f"--base_model {base_folder} --dataset {tasks_file} --output_dir {tmp_path / name} {SIZES} {more} "
            f"--max_steps 4 --per_device_train_batch_size {rows} --attn_implementation sdpa",
            tmp_path / "log",
            world_size=world_size,
            before=planted.compiled_gradients,
            before_arguments=(str(tmp_path / f"{name}.pt"),),
        ).succeed()
        found[name] = torch.load(tmp_path / f"{name}.pt")
    for mine, theirs in zip(found["two"], found["one"], strict=True):
        for parameter, gradient in theirs.items():
            assert (mine[parameter] - gradient).abs().max() <= 1e-6, parameter


class Waits(TorchDispatchMode):
    """Notes which functions of ours made the host wait; the base model's own code, transformers', is not ours."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in SYNCHRONISING or _is_masked_index(func, args):
            caller = next(frame for frame in _frames() if not frame.f_code.co_filename.startswith((TORCH, __file__)))
            if caller.f_code.co_filename.startswith(OURS):
                self.places.append(f"{Path(caller.f_code.co_filename).name}:{caller.f_code.co_name}")
        return func(*args, **(kwargs or {}))


def _is_masked_index(func: Any, args: Any) -> bool:
    """x[mask], whose result has as many rows as the mask is true."""
    indices = args[1] if func is torch.ops.aten.index.Tensor else ()
    return any(index is not None and index.dtype == torch.bool for index in indices)


def _frames() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


@pytest.mark.parametrize("method", ["ib", "sft"])
def test_no_step_waits_for_the_device(
    train: Callable[..., list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """But for the log, every fourth step here, and what it asks the bottleneck for."""
    waits, loop = Waits(), ibft.train._loop

    def watched(*arguments: Any) -> Any:
        with waits:
            return loop(*arguments)

    monkeypatch.setattr(ibft.train, "_loop", watched)
    train(
        "out", f"--method {method} --max_steps 4 --logging_steps 4 --attn_implementation sdpa --gradient_checkpointing"
    )
    # The share of active dimensions, asked for in the logged step alone.
    assert waits.places == (["model.py:forward", "step_records.py:to_host"] if method == "ib" else [])
