"""Every architecture that IB-FT is promised for: the same suite over tiny models of each, tied and untied."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import KINDS, LAYERS, assert_same_gradients, eager_terms, gradients, random_batch, tiny_model, wrap
from peft import PeftModel
from torch import nn

from ibft import IBConfig, IBModel, InputError
from ibft.architecture import CausalLM, LayerTap

RNG = torch.tensor([3, 5])


def config(**changes: Any) -> IBConfig:
    return IBConfig(**{"target_layer": 2, "bottleneck_dim": 10, "alpha": 0.7, "beta": 0.3, **changes})


@pytest.mark.parametrize("kind", KINDS)
def test_tap_is_hidden_states_of_that_layer(kind: str) -> None:
    model, ids = tiny_model(kind).eval(), random_batch()["input_ids"]
    parts = CausalLM.of(model)
    expected = model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
    assert len(expected) == LAYERS + 1
    for layer in range(1, LAYERS):
        tap = LayerTap()
        tap.attach(parts.layers[layer - 1])
        with tap.armed(True):
            last = parts.decode(input_ids=ids)
        hidden = tap.take()
        tap.remove()
        assert hidden is not None
        torch.testing.assert_close(hidden, expected[layer], rtol=0, atol=0)
        torch.testing.assert_close(last, expected[LAYERS], rtol=0, atol=0)


@pytest.mark.parametrize("layer", range(1, LAYERS + 1))
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_equal_the_eager_formulas(kind: str, layer: int) -> None:
    ib = config(target_layer=layer)
    model, batch = wrap(tiny_model(kind), ib), random_batch()
    expected = eager_terms(model, batch, RNG)
    expected.loss(ib).backward()
    expected_gradients = gradients(model)

    output = model(**batch, noise_rng=RNG)
    output.loss.backward()
    torch.testing.assert_close(output.loss, expected.loss(ib), rtol=0, atol=1e-9)
    torch.testing.assert_close(output.ce, expected.ce.detach() / expected.num_labels, rtol=0, atol=1e-9)
    torch.testing.assert_close(output.kl, expected.kl.detach() / expected.num_tokens, rtol=0, atol=1e-9)
    torch.testing.assert_close(output.ce_ib, expected.ce_ib.detach() / expected.num_labels, rtol=0, atol=1e-9)
    assert len(expected_gradients) > 8
    assert_same_gradients(gradients(model), expected_gradients, 1e-9)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_activation_checkpointing_changes_nothing(kind: str, reentrant: bool) -> None:
    model, batch = wrap(tiny_model(kind), config()), random_batch()
    model(**batch, noise_rng=RNG).loss.backward()
    expected = gradients(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model(**batch, noise_rng=RNG).loss.backward()
    assert_same_gradients(gradients(model), expected, 1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_is_deterministic_and_reports_plain_cross_entropy(kind: str) -> None:
    model, batch = wrap(tiny_model(kind), config()).eval(), random_batch()
    with torch.no_grad():
        first, second = model(**batch), model(**batch)
        expected = eager_terms(model, batch, None)
        logits = model.get_base_model()(input_ids=batch["input_ids"]).logits
    assert first.loss == second.loss == first.ce
    assert first.kl is None and first.ce_ib is None
    torch.testing.assert_close(first.loss, expected.ce / expected.num_labels, rtol=0, atol=1e-9)
    torch.testing.assert_close(first.logits.argmax(-1), logits.argmax(-1), rtol=0, atol=0)
    torch.testing.assert_close(first.logits[..., :-1, :], logits[..., :-1, :].float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_documents_are_kept_apart(kind: str) -> None:
    model = wrap(tiny_model(kind), config())
    parts = CausalLM.of(model.get_base_model())
    parts.check_packing()
    ids = random_batch(1, 9)["input_ids"]
    packed = parts.decode(input_ids=ids, position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]))
    alone = parts.decode(input_ids=ids[:, 4:], position_ids=torch.arange(5)[None])
    torch.testing.assert_close(packed[:, 4:], alone, rtol=0, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_again_it_is_the_same(tmp_path: Path, kind: str) -> None:
    model, batch = wrap(tiny_model(kind), config(encoder="lora")), random_batch()
    model.save_pretrained(tmp_path)
    expected = model(**batch, noise_rng=RNG)

    loaded = IBModel.from_pretrained(tiny_model(kind), tmp_path, is_trainable=True).double().train()
    assert loaded.ib_config == model.ib_config
    torch.testing.assert_close(loaded(**batch, noise_rng=RNG).loss, expected.loss, rtol=0, atol=1e-7)
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    plain = PeftModel.from_pretrained(tiny_model(kind), tmp_path).eval()
    ids = batch["input_ids"]
    torch.testing.assert_close(plain.double()(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_merging_leaves_no_trace(kind: str) -> None:
    model, ids = wrap(tiny_model(kind), config()).eval(), random_batch()["input_ids"]
    base_names = set(tiny_model(kind).state_dict())
    expected = model(input_ids=ids).logits
    layer = CausalLM.of(model.get_base_model()).layers[1]
    assert layer._forward_hooks
    merged = model.merge_and_unload()
    assert not layer._forward_hooks
    assert set(merged.state_dict()) == base_names
    torch.testing.assert_close(merged(input_ids=ids).logits, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_without_labels_it_is_the_ordinary_model(kind: str) -> None:
    base, batch = tiny_model(kind).eval(), random_batch()
    model = wrap(copy.deepcopy(base), config()).eval()
    model.disable_adapter_layers()
    ids = batch["input_ids"]
    torch.testing.assert_close(model(input_ids=ids).logits, base(input_ids=ids).logits)
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(input_ids=ids, **settings), base.generate(input_ids=ids, **settings))


# ---------------------------------------------------------------------------------------------------------------------
# Models whose parts are not found: what was looked for is in the sentence


def test_a_model_without_an_output_head() -> None:
    with pytest.raises(InputError, match=r"LlamaModel\.get_output_embeddings\(\) gives no linear output head"):
        wrap(tiny_model("llama").model, config())


def test_a_model_without_a_decoder() -> None:
    model = tiny_model("llama")
    model.get_decoder = lambda: model  # what transformers answers where it knows of none
    with pytest.raises(InputError, match=r"LlamaForCausalLM\.get_decoder\(\) gives no decoder below the output head"):
        wrap(model, config())


def test_a_decoder_without_a_list_of_layers() -> None:
    model = tiny_model("llama")
    model.config.num_hidden_layers = 2  # the list has three
    with pytest.raises(InputError, match=r"LlamaModel has no ModuleList of config\.num_hidden_layers = 2 layers"):
        wrap(model, config(target_layer=1))


def test_a_head_of_another_kind() -> None:
    model = tiny_model("llama")

    class Twice(nn.Linear):
        pass

    head = model.lm_head
    model.lm_head = Twice(head.in_features, head.out_features, bias=False, dtype=torch.float64)
    with pytest.raises(InputError, match=r"the output head is a .*\.Twice, not a plain Linear"):
        wrap(model, config())
