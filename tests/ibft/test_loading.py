"""Options that load or change the base model: 4 bits, Liger's layers, and float32 adapters over a bfloat16 model."""

import json
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from oracle import random_batch, tiny_model, wrap
from peft.tuners.lora import LoraLayer
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

import ibft.loading
from ibft import IBConfig, InputError
from ibft.cli import main
from ibft.loading import (
    autocast,
    cast_weights,
    check_optional_packages,
    compute_in_base_dtype,
    load_base_model,
    use_liger_layers,
)

CPU = torch.device("cpu")


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`installed(bitsandbytes="0.50.0")`: these packages and no others, as far as their versions tell."""

    def pretend(**versions: str) -> None:
        def version(name: str) -> str:
            if (found := versions.get(name.replace("-", "_"))) is None:
                raise PackageNotFoundError(name)
            return found

        monkeypatch.setattr(ibft.loading, "version", version)
        fake: Any = ModuleType("liger_kernel.transformers.monkey_patch")
        fake.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": None}
        for name in ("liger_kernel", "liger_kernel.transformers", fake.__name__):
            monkeypatch.setitem(sys.modules, name, fake)

    return pretend


@pytest.mark.parametrize(
    ("versions", "options", "config", "sentence"),
    [
        ({}, {"liger": True}, LlamaConfig(), r'--liger needs liger-kernel, .* pip install "ibft\[liger\]"'),
        ({"liger_kernel": "0.5.9"}, {"liger": True}, LlamaConfig(), "needs liger-kernel 0.6 or newer, and 0.5.9 is"),
        ({"liger_kernel": "0.8.5"}, {"liger": True}, LlamaConfig(model_type="opt"), "no kernels for .* type 'opt'"),
        ({}, {"load_in_4bit": True}, LlamaConfig(), r'needs bitsandbytes, .* pip install "ibft\[quantized\]"'),
        ({"bitsandbytes": "0.41.0"}, {"load_in_4bit": True}, LlamaConfig(), "needs bitsandbytes 0.46.1 or newer"),
        (
            {"bitsandbytes": "0.50.2"},
            {"load_in_4bit": True},
            LlamaConfig(quantization_config={"quant_method": "gptq", "bits": 4}),
            "the base model is quantized already",
        ),
    ],
)
def test_what_an_option_lacks(
    versions: dict[str, str], options: dict[str, bool], config: Any, sentence: str, installed: Callable[..., None]
) -> None:
    installed(**versions)
    if sentence.startswith("no kernels"):
        config.model_type = "opt"
    with pytest.raises(InputError, match=sentence):
        check_optional_packages(**{"liger": False, "load_in_4bit": False, **options}, base_config=config)
    check_optional_packages(liger=False, load_in_4bit=False, base_config=config)


def test_what_an_option_needs(installed: Callable[..., None]) -> None:
    installed(bitsandbytes="0.50.2", liger_kernel="0.8.5")
    check_optional_packages(liger=True, load_in_4bit=True, base_config=LlamaConfig())


def test_liger_gets_the_layers_and_not_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(ibft.loading, "apply_liger_kernel", lambda *arguments: calls.append(arguments))
    model = tiny_model("llama")
    use_liger_layers(model)
    ((patched, options),) = calls
    assert patched is model and options == {"cross_entropy": False, "fused_linear_cross_entropy": False}


def test_how_four_bits_are_asked_for(base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    class Loader:
        @staticmethod
        def from_pretrained(name: str, **options: Any) -> str:
            asked.update(options)
            return "a model"

    monkeypatch.setattr(ibft.loading, "AutoModelForCausalLM", Loader)
    assert load_base_model(str(base_folder), torch.bfloat16, "sdpa", CPU, load_in_4bit=True) == "a model"
    settings = asked["quantization_config"]
    assert settings.load_in_4bit and settings.bnb_4bit_use_double_quant and settings.bnb_4bit_quant_type == "nf4"
    assert settings.bnb_4bit_compute_dtype == torch.bfloat16 and asked["device_map"] == {"": CPU}


def test_training_in_four_bits(base_folder: Path, tasks_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    command = f"train --base_model {base_folder} --dataset {tasks_file} --output_dir {tmp_path / 'out'}"
    small = "--max_length 128 --bottleneck_dim 8 --lora_r 2 --max_steps 2 --load_in_4bit --dtype bfloat16"
    assert main(f"{command} {small} --gradient_checkpointing".split()) == 0
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_adapters_compute_in_the_dtype_of_the_base_model() -> None:
    """Nothing of the width of a layer is float32: no copy of a LoRA's input, nor its product."""
    model = wrap(tiny_model("llama", torch.bfloat16), IBConfig(target_layer=2, bottleneck_dim=8))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    seen: list[tuple[torch.dtype, torch.dtype]] = []
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.lora_A["default"].register_forward_hook(lambda _, x, y: seen.append((x[0].dtype, y.dtype)))
    batch = random_batch()

    def step() -> set[torch.dtype]:
        seen.clear()
        with autocast(CPU, torch.bfloat16):
            model(**batch).loss.backward()
        assert len(seen) == 21
        return {dtype for pair in seen for dtype in pair}

    assert torch.float32 in step()  # as PEFT does it
    compute_in_base_dtype(model)
    assert step() == {torch.bfloat16}
    trained = {p.dtype for p in model.parameters() if p.requires_grad}
    assert trained == {torch.float32} == {p.grad.dtype for p in model.parameters() if p.grad is not None}
    assert not autocast(CPU, torch.float32)._enabled  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("kind", "settings", "expected"),
    [
        ("llama", {}, "sdpa"),
        ("gemma2", {"query_pre_attn_scalar": 8, "attn_logit_softcapping": 0.05}, "eager"),
        ("gpt_oss", {"num_local_experts": 2, "num_experts_per_tok": 1}, "eager"),  # attention sinks
    ],
)
def test_a_model_is_loaded_with_an_attention_that_computes_it(
    kind: str, settings: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 50, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = AutoConfig.for_model(kind, **sizes, **heads, **settings)
    AutoModelForCausalLM.from_config(config, attn_implementation="eager").save_pretrained(tmp_path)
    loaded = load_base_model(str(tmp_path), "auto", None, CPU)
    assert loaded.config._attn_implementation == expected
    eager = load_base_model(str(tmp_path), "auto", "eager", CPU)
    tokens = torch.arange(20)[None]
    torch.testing.assert_close(loaded(tokens).logits, eager(tokens).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_model_is_the_one_that_is_loaded_in_that_dtype(base_folder: Path, dtype: torch.dtype) -> None:
    """Rotary frequencies stay float32, which `.to` would round."""
    loaded = load_base_model(str(base_folder), dtype, "sdpa", torch.device("cpu"))
    cast = cast_weights(load_base_model(str(base_folder), "auto", "sdpa", torch.device("cpu")), dtype)
    assert next(cast.parameters()).dtype == dtype and cast.model.rotary_emb.inv_freq.dtype == torch.float32
    assert cast.lm_head.weight is not cast.model.embed_tokens.weight or loaded.config.tie_word_embeddings
    for tensors in ("named_parameters", "named_buffers"):
        expected = dict(getattr(loaded, tensors)())
        for name, tensor in getattr(cast, tensors)():
            assert tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name]), name


def test_bfloat16_learns_what_float32_does(base_folder: Path, tasks_file: Path, tmp_path: Path) -> None:
    losses = {}
    for dtype in ("float32", "bfloat16"):
        out = tmp_path / dtype
        command = f"train --base_model {base_folder} --dataset {tasks_file} --output_dir {out} --dtype {dtype}"
        small = "--max_length 128 --bottleneck_dim 8 --lora_r 4 --max_steps 8 --learning_rate 1e-2 --lora_dropout 0"
        assert main(f"{command} {small} --validation_split 4".split()) == 0
        records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        losses[dtype] = [record["ce"] for record in records] + [records[-1]["eval_loss"]]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.01) and losses["float32"] != losses["bfloat16"]
    assert losses["float32"][-1] < losses["float32"][0] - 0.1
