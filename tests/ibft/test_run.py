"""A run made ready where its weights are loaded to the CPU and go to GPUs in parts, as FSDP2 and ZeRO-3 have it."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import ibft.loading
import ibft.run
from ibft import InputError
from ibft.architecture import CausalLM
from ibft.attention import Attention
from ibft.config import TrainConfig
from ibft.document_attention import registered
from ibft.engines import Engine


def on_a_gpu_alone(*arguments: Any, **options: Any) -> Any:
    """A kernel of flash-attn or Liger, called with tensors of the CPU."""
    raise ValueError("Pointer argument (at 0) cannot be accessed from Triton (cpu tensor?)")


@pytest.fixture
def config(base_folder: Path, tasks_file: Path, tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        base_model=str(base_folder),
        dataset=[str(tasks_file)],
        output_dir=str(tmp_path / "out"),
        max_length=128,
        bottleneck_dim=8,
        lora_r=2,
        liger=True,
        max_steps=1,
    )


@pytest.fixture
def made_for_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """flash-attn is what the run's GPU gets, and Liger is installed."""
    package: Any = ModuleType("flash_attn")
    package.flash_attn_varlen_func = on_a_gpu_alone
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    attention = Attention(registered("flash_attention_2"), "installed")
    monkeypatch.setattr(ibft.run, "select_attention", lambda *_, **__: attention)

    def apply(model: Any, options: Any) -> None:
        for layer in model.model.layers:
            layer.mlp.forward = on_a_gpu_alone

    monkeypatch.setattr(ibft.loading, "apply_liger_kernel", apply)
    monkeypatch.setattr(ibft.run, "check_optional_packages", lambda **_: None)


@pytest.mark.usefixtures("made_for_gpus")
def test_a_model_is_tried_on_the_cpu_before_it_gets_what_a_gpu_needs(config: TrainConfig) -> None:
    run = ibft.run.set_up(config, Engine(torch.device("cpu")))
    base = run.model.get_base_model()
    assert run.attention.label == "flash_attention_2" and base.config._attn_implementation == "ibft_fa2"
    assert base.model.layers[0].mlp.forward is on_a_gpu_alone


@pytest.mark.usefixtures("made_for_gpus")
def test_each_trial_is_made_once(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    for name in ("check_causal", "check_logits", "check_packing"):
        real = getattr(CausalLM, name)

        def counted(*arguments: Any, name: str = name, real: Any = real) -> None:
            made.append(name)
            real(*arguments)

        monkeypatch.setattr(CausalLM, name, counted)
    ibft.run.set_up(config, Engine(torch.device("cpu")))
    assert made == ["check_causal", "check_logits", "check_packing"]


def test_a_model_that_mixes_documents_up_is_still_refused(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the adapter around it."""
    real = CausalLM.decode

    def mixed(self: CausalLM, **inputs: Any) -> torch.Tensor:
        hidden = real(self, **inputs)
        return hidden + hidden[:, :1] if "position_ids" in inputs else hidden

    monkeypatch.setattr(CausalLM, "decode", mixed)
    monkeypatch.setattr(ibft.run, "check_optional_packages", lambda **_: None)
    with pytest.raises(InputError, match="does not keep the documents of a packed row apart; use --packing none"):
        ibft.run.set_up(config, Engine(torch.device("cpu")))
