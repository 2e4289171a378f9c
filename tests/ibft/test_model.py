"""IBModel against the formulas written out eagerly, and as the PEFT model that it is."""

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from oracle import (
    HIDDEN,
    LAYERS,
    VOCABULARY,
    assert_same_gradients,
    eager_terms,
    gradients,
    random_batch,
    tiny_model,
    wrap,
)
from packaging.version import Version
from peft import AdaLoraConfig, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

from ibft import IBConfig, IBModel, InputError
from ibft.architecture import CausalLM

RNG = torch.tensor([3, 5])


def config(**changes: Any) -> IBConfig:
    return IBConfig(**{"target_layer": 2, "bottleneck_dim": 10, "alpha": 0.7, "beta": 0.3, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {"encoder": "lora", "encoder_rank": 3},
        {"kl_tokens": "labels"},
        {"kl_reduction": "sum"},
        {"sample": False},
        {"logvar_range": (-0.1, 0.1)},
        {"kl_tokens": "labels", "encoder": "lora", "kl_reduction": "sum"},
        {"bottleneck_dim": 40},  # wider than half of H: the head is not absorbed
        {"alpha": 0.0},
        {"kl_weight": 2.5},
        {"kl_weight": 0.0},
        {"free_bits": 1.5},
        {"free_bits": 1.5, "kl_reduction": "sum", "kl_tokens": "labels", "kl_weight": 0.4},
    ],
)
def test_every_setting_of_the_bottleneck_equals_the_eager_formulas(changes: dict[str, Any]) -> None:
    ib = config(**changes)
    model, batch = wrap(tiny_model("llama"), ib), random_batch()
    expected = eager_terms(model, batch, RNG if ib.sample else None).loss(ib)
    expected.backward()
    expected_gradients = gradients(model)
    output = model(**batch, noise_rng=RNG)
    output.loss.backward()
    torch.testing.assert_close(output.loss, expected, rtol=0, atol=1e-9)
    assert_same_gradients(gradients(model), expected_gradients, 1e-9)


def test_float32_equals_the_float64_formulas() -> None:
    ib = config()
    exact, batch = wrap(tiny_model("llama"), ib), random_batch(4, 24)
    single = copy.deepcopy(exact).float()
    expected = eager_terms(exact, batch, RNG).loss(ib)
    expected.backward()
    output = single(**batch, noise_rng=RNG)
    output.loss.backward()
    assert output.loss.dtype == torch.float32
    torch.testing.assert_close(output.loss.double(), expected, rtol=1e-5, atol=0)
    assert_same_gradients({n: g.double() for n, g in gradients(single).items()}, gradients(exact), 1e-5)


def test_sft_is_the_same_loss_without_a_bottleneck() -> None:
    model, batch = wrap(tiny_model("qwen2"), None), random_batch()
    output = model(**batch)
    output.loss.backward()
    assert not any(name.startswith("bottleneck") for name, _ in model.named_parameters())
    own = gradients(model)
    logits = model.get_base_model()(input_ids=batch["input_ids"]).logits
    expected = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    expected.backward()
    torch.testing.assert_close(output.loss, expected, rtol=0, atol=1e-9)
    assert_same_gradients(own, gradients(model), 1e-9)


def test_statistics_count_the_label_positions() -> None:
    model, batch = wrap(tiny_model("llama"), config()), random_batch()
    output = model(**batch, noise_rng=RNG, return_stats=True, return_active_share=True)
    labels = batch["labels"][:, 1:]
    counted = labels != -100
    log_probs = model.get_base_model()(input_ids=batch["input_ids"]).logits[:, :-1][counted].log_softmax(-1)
    assert output.num_valid_tokens == counted.sum()
    assert output.num_correct_tokens == (log_probs.argmax(-1) == labels[counted]).sum()
    torch.testing.assert_close(output.entropy_sum, -(log_probs.exp() * log_probs).sum().detach())
    assert 0 <= output.active_share <= 1


def test_no_tensor_of_logits_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """The head's forward is never called, nor are all hidden states asked for."""
    model, batch = wrap(tiny_model("llama"), config()), random_batch()

    def refuse(*_: Any) -> None:
        raise AssertionError("the output head ran")

    model.get_base_model().lm_head.register_forward_pre_hook(refuse)
    model(**batch, noise_rng=RNG).loss.backward()


def test_only_labels_are_given_to_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    import ibft.model

    seen = []
    real = ibft.model.linear_cross_entropy
    monkeypatch.setattr(
        ibft.model, "linear_cross_entropy", lambda x, *rest, **kw: seen.append(len(x)) or real(x, *rest, **kw)
    )
    model, batch = wrap(tiny_model("llama"), config()), random_batch()
    model(**batch, noise_rng=RNG)
    assert seen == [(batch["labels"][:, 1:] != -100).sum()]


def test_an_all_masked_batch_is_a_connected_zero() -> None:
    model, batch = wrap(tiny_model("llama"), config(kl_tokens="labels")), random_batch()
    batch["labels"].fill_(-100)
    output = model(**batch, noise_rng=RNG)
    output.loss.backward()
    found = gradients(model)
    assert output.loss == 0
    assert len(found) == sum(p.requires_grad for p in model.parameters())
    assert all((gradient == 0).all() for gradient in found.values())


# ---------------------------------------------------------------------------------------------------------------------
# As a PEFT model


@pytest.mark.parametrize("encoder", ["linear", "lora"])
@pytest.mark.parametrize("bias", ["none", "all"])
def test_saved_adapter_is_what_peft_would_write(tmp_path: Path, encoder: str, bias: str) -> None:
    lora = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", "bias": bias}
    plain = get_peft_model(tiny_model("qwen2"), LoraConfig(**lora))  # type: ignore[arg-type]
    plain.save_pretrained(tmp_path / "plain")
    wrap(tiny_model("qwen2"), config(encoder=encoder), **lora).save_pretrained(tmp_path / "ib")

    expected = load_file(tmp_path / "plain" / "adapter_model.safetensors")
    found = load_file(tmp_path / "ib" / "adapter_model.safetensors")
    assert {name: t.shape for name, t in found.items()} == {name: t.shape for name, t in expected.items()}

    def settings(folder: str) -> dict[str, Any]:
        values = json.loads((tmp_path / folder / "adapter_config.json").read_text())
        return {**values, "target_modules": sorted(values["target_modules"])}

    assert settings("ib") == settings("plain")


def test_saved_and_loaded_again_it_is_the_same(tmp_path: Path) -> None:
    model, batch = wrap(tiny_model("llama"), config(encoder="lora")), random_batch()
    model.save_pretrained(tmp_path)
    expected = model(**batch, noise_rng=RNG)

    loaded = IBModel.from_pretrained(tiny_model("llama"), tmp_path, is_trainable=True).double().train()
    assert loaded.ib_config == model.ib_config
    torch.testing.assert_close(loaded(**batch, noise_rng=RNG).loss, expected.loss, rtol=0, atol=1e-7)
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    frozen = IBModel.from_pretrained(tiny_model("llama"), tmp_path)
    assert not any(parameter.requires_grad for parameter in frozen.parameters())

    plain = PeftModel.from_pretrained(tiny_model("llama"), tmp_path).eval()
    ids = batch["input_ids"]
    torch.testing.assert_close(plain.double()(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


def test_load_adapter_restores_the_bottleneck(tmp_path: Path) -> None:
    model = wrap(tiny_model("llama"), config())
    model.save_pretrained(tmp_path)
    other = wrap(tiny_model("llama"), config())
    other.bottleneck.reset_parameters()
    other.load_adapter(tmp_path, "default", is_trainable=True)
    for name, parameter in model.bottleneck.named_parameters():
        assert torch.equal(parameter, other.bottleneck.get_parameter(name))


def test_a_plain_adapter_loads_as_sft_and_not_as_ib(tmp_path: Path) -> None:
    wrap(tiny_model("llama"), None).save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("ib")) == []
    assert IBModel.from_pretrained(tiny_model("llama"), tmp_path).bottleneck is None
    with pytest.raises(InputError, match=r"has no ib_head\.safetensors"):
        wrap(tiny_model("llama"), config()).load_adapter(tmp_path, "default")


def test_bottleneck_is_float32_over_a_low_precision_base() -> None:
    model = IBModel.from_base(
        tiny_model("llama", torch.bfloat16),
        LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
        config(),
    )
    batch = random_batch()
    model.train()(**batch, noise_rng=RNG).loss.backward()
    for name, gradient in gradients(model).items():
        assert gradient.dtype == torch.float32 and gradient.isfinite().all(), name


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize("layer", [LAYERS + 1, 20])
def test_target_layer_out_of_range(layer: int) -> None:
    with pytest.raises(InputError, match=rf"target_layer is {layer}, but the model has 3 layers"):
        wrap(tiny_model("llama"), config(target_layer=layer))


@pytest.mark.parametrize(
    "lora",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
)
def test_an_adapter_on_the_head(lora: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"the output head is a .*, not a plain Linear"):
        wrap(tiny_model("llama"), config(), **lora)


def test_a_model_already_wrapped() -> None:
    wrapped = get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(InputError, match="already carries a PEFT adapter"):
        wrap(wrapped, config())


@pytest.mark.skipif(
    Version(peft.__version__) < Version("0.19.1"), reason="transformers loads adapters with PEFT 0.19.1"
)
def test_a_base_folder_that_holds_an_adapter(tmp_path: Path) -> None:
    """transformers loads it without a word."""
    base = tiny_model("llama")
    base.save_pretrained(tmp_path)
    get_peft_model(base, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="the base model's folder holds an adapter"):
        wrap(AutoModelForCausalLM.from_pretrained(tmp_path), config())


def test_unloaded_the_base_model_is_as_it_was() -> None:
    base = tiny_model("llama")
    names, ids = set(base.state_dict()), random_batch()["input_ids"]
    logits = base(ids).logits
    model = wrap(base, config())
    assert model.unload() is base
    assert set(base.state_dict()) == names and torch.equal(base(ids).logits, logits)
    assert not any(module._forward_hooks for module in base.modules())


def test_layers_that_were_replaced() -> None:
    model = wrap(tiny_model("llama"), config())
    layers = CausalLM.of(model.get_base_model()).layers
    layers[1] = copy.deepcopy(layers[0])
    with pytest.raises(RuntimeError, match=r"the target layer did not run; were the decoder's layers replaced"):
        model(**random_batch(), noise_rng=RNG)


def test_logits_that_the_head_alone_does_not_give() -> None:
    class Shifted(type(tiny_model("llama"))):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * 1.5
            return output

    model = tiny_model("llama")
    model.__class__ = Shifted
    with pytest.raises(InputError, match="does not compute its logits as"):
        wrap(model, config())


def test_a_model_with_flash_attn_may_be_on_the_cpu_until_a_trainer_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it cannot run."""

    def on_a_gpu_alone(*_: Any, **__: Any) -> Any:
        raise RuntimeError("FlashAttention only supports CUDA tensors")

    model = tiny_model("gemma2")
    monkeypatch.setattr(type(model), "_check_and_adjust_attn_implementation", lambda self, name, **_: name)
    monkeypatch.setitem(AttentionInterface._global_mapping, "flash_attention_2", on_a_gpu_alone)
    model.set_attn_implementation("flash_attention_2")
    wrapped = wrap(model, None)
    assert model.config._attn_implementation == "flash_attention_2"
    with pytest.raises(RuntimeError, match="CUDA tensors"):
        wrapped(**random_batch())


def test_tapped_states_without_gradient() -> None:
    model = wrap(
        tiny_model("llama"), config(), target_modules=["q_proj"], layers_to_transform=[2]
    )  # the tap is below the only adapter
    with pytest.raises(InputError, match="the tapped hidden states take no gradient"):
        model(**random_batch(), noise_rng=RNG)


def test_adapters_whose_forward_our_loss_would_pass_by() -> None:
    """AdaLoRA adds a term to the loss there, aLoRA tells its layers where to begin, a prompt is input."""
    base = tiny_model("llama")
    names = set(base.state_dict())
    adalora = AdaLoraConfig(total_step=10, target_modules=["q_proj"], task_type="CAUSAL_LM")
    with pytest.raises(InputError, match="AdaLoraModel changes what the model's forward returns"):
        IBModel.from_base(base, adalora, config())
    with pytest.raises(InputError, match=r"peft_type .*PROMPT_TUNING learns a prompt"):
        IBModel.from_base(base, PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"), config())
    with pytest.raises(InputError, match="alora_invocation_tokens"):
        wrap(base, None, target_modules=["q_proj"], alora_invocation_tokens=[7])
    assert set(base.state_dict()) == names


def test_a_routers_auxiliary_loss() -> None:
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": LAYERS, "num_local_experts": 2}
    settings = AutoConfig.for_model("mixtral", vocab_size=VOCABULARY, num_attention_heads=4, **sizes)
    settings.num_key_value_heads = 2
    base = AutoModelForCausalLM.from_config(settings)
    base.config.output_router_logits = True
    with pytest.raises(InputError, match="output_router_logits asks for the auxiliary loss"):
        wrap(base, config())
    base.config.output_router_logits = False
    model, batch = wrap(base, config()), random_batch()
    assert model(**batch).loss.isfinite()
    with pytest.raises(InputError, match="output_router_logits asks for the auxiliary loss"):
        model(**batch, output_router_logits=True)  # as trl does


def test_an_unreachable_hub_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """To take it for "no bottleneck" would train on without one."""

    def unreachable(*_: Any, **__: Any) -> None:
        raise LocalEntryNotFoundError("no connection, and not in the cache")

    monkeypatch.setattr("ibft.model.hf_hub_download", unreachable)
    with pytest.raises(InputError, match=r"whether owner/name has a bottleneck cannot be told: ib_config\.json"):
        IBModel.from_pretrained(tiny_model("llama"), "owner/name")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_layer": 0}, "target_layer is 0"),
        ({"bottleneck_dim": 0}, "bottleneck_dim is 0"),
        ({"alpha": -1.0}, "alpha is -1.0"),
        ({"beta": float("nan")}, "beta is nan"),
        ({"kl_weight": -0.5}, "kl_weight is -0.5; it must be a finite number, not negative"),
        ({"free_bits": float("inf")}, "free_bits is inf"),
        ({"alpha_warmup_steps": -1}, "alpha_warmup_steps is -1; it must be an integer, at least 0"),
        ({"alpha_warmup_steps": 1.5}, "alpha_warmup_steps is 1.5"),
        ({"ib_rate_target": 0.0}, "ib_rate_target is 0.0; it must be a finite number of nats per token, above 0"),
        ({"ib_rate_target": float("nan")}, "ib_rate_target is nan"),
        ({"ib_rate_target": 3.0, "alpha": 0.0}, "ib_rate_target 3 needs alpha above 0"),
        ({"ib_rate_target": 3.0, "kl_weight": 0.0}, "ib_rate_target 3 needs kl_weight above 0"),
        ({"ib_rate_target": 3.0, "beta": 0.0}, "ib_rate_target 3 needs beta above 0"),
        ({"ib_rate_target": 3.0, "free_bits": 1.0}, "ib_rate_target 3 and free_bits 1 exclude each other"),
        ({"encoder": "mlp"}, "encoder is 'mlp'; it must be one of linear, lora"),
        ({"kl_tokens": "some"}, "kl_tokens is 'some'; it must be one of all, labels"),
        ({"kl_reduction": "max"}, "kl_reduction is 'max'"),
        ({"logvar_range": (4.0, -4.0)}, "logvar_range is"),
    ],
)
def test_settings_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        config(**changes)


def test_settings_of_a_later_version(tmp_path: Path) -> None:
    config().save(tmp_path)
    file = tmp_path / "ib_config.json"
    assert IBConfig.load(file) == config()
    file.write_text(json.dumps({**json.loads(file.read_text()), "prior": "vamp"}))
    with pytest.raises(InputError, match="unknown settings prior"):
        IBConfig.load(file)


def test_sizes_of_the_oracle() -> None:
    """The oracle's models have the sizes that these tests speak of."""
    parts = CausalLM.of(tiny_model("llama"))
    assert (parts.num_layers, *parts.head.weight.shape) == (LAYERS, VOCABULARY, HIDDEN)
