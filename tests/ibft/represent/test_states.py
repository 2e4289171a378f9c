"""Mean hidden states and the bottleneck's statistics, against transformers' own hidden states and numpy in float64."""

from typing import Any

import numpy as np
import pytest
import torch
from oracle import KINDS, LAYERS, VOCABULARY, tiny_model, wrap
from peft import PromptTuningConfig, get_peft_model
from torch import nn

from ibft import IBConfig, IBModel, InputError
from ibft.data.encoded import Document
from ibft.objective import active_share
from ibft.represent.states import Span, bottleneck_statistics, hidden_means
from ibkernels import variational_bottleneck


class Documents:
    """As much of an EncodedDataset as is needed: documents of random tokens, the second half of each a response."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = np.array(lengths)
        generator = np.random.default_rng(0)
        self._tokens = [generator.integers(VOCABULARY, size=length) for length in lengths]

    def document(self, index: int) -> Document:
        tokens = self._tokens[index]
        return Document(tokens, np.arange(len(tokens)) >= max(1, len(tokens) // 2), index)


DATA: Any = Documents([9, 2, 17, 30, 5, 17, 3])
EVERY = np.arange(len(DATA.lengths))


def states_alone(model: Any, index: int, layer: int, span: Span) -> np.ndarray:
    """[n, H] float64: what transformers returns for one document by itself, without padding."""
    document = DATA.document(index)
    ids = torch.from_numpy(document.tokens)[None]
    with torch.no_grad():
        output = model.eval()(input_ids=ids, output_hidden_states=True, use_cache=False)
    hidden = output.hidden_states[layer][0].double().numpy()
    return hidden[:-1][document.is_label[1:]] if span == "response" else hidden


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.endswith("-tied") or kind == "gpt2-tied"])
def test_means_are_those_of_hidden_states_one_by_one(kind: str) -> None:
    model = tiny_model(kind)
    for layer in range(1, LAYERS + 1):
        for span in ("response", "full"):
            means = hidden_means(model, DATA, EVERY, layer=layer, span=span, batch_tokens=60)
            expected = np.stack([states_alone(model, index, layer, span).mean(0) for index in EVERY])
            assert means.dtype == np.float32
            np.testing.assert_allclose(means, expected, rtol=0, atol=1e-6 * np.abs(expected).max(), err_msg=f"{layer}")


@pytest.mark.parametrize("batch_tokens", [1, 40, 10_000])
def test_batches_change_nothing(batch_tokens: int) -> None:
    model = tiny_model("llama", torch.float32)
    alone = np.concatenate([hidden_means(model, DATA, [index], layer=2) for index in EVERY])
    together = hidden_means(model, DATA, EVERY, layer=2, batch_tokens=batch_tokens)
    np.testing.assert_allclose(together, alone, rtol=0, atol=2e-6 * np.abs(alone).max())


def test_rows_come_in_the_order_asked_for() -> None:
    model = tiny_model("llama")
    means = hidden_means(model, DATA, EVERY, layer=1)
    chosen = [4, 0, 4, 6]
    np.testing.assert_allclose(hidden_means(model, DATA, chosen, layer=1), means[chosen], rtol=0, atol=1e-6)


@pytest.mark.parametrize("layer", [1, 2, LAYERS])
def test_what_lies_above_the_layer_does_not_run(layer: int) -> None:
    model = tiny_model("llama")
    ran: list[str] = []
    handles = [
        module.register_forward_hook(lambda module, inputs, output, name=name: ran.append(name))
        for name, module in [*((f"layer {at}", each) for at, each in enumerate(model.model.layers, 1)),
                             ("head", model.lm_head)]
    ]  # fmt: skip
    hidden_means(model, DATA, [0], layer=layer)
    for handle in handles:
        handle.remove()
    assert ran == [f"layer {at}" for at in range(1, layer + 1)]
    assert not any(module._forward_hooks for module in model.modules())
    assert model(input_ids=torch.zeros(1, 3, dtype=torch.int64)).logits.shape == (1, 3, VOCABULARY)


def test_no_more_than_a_batch_of_states_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the moment a layer runs, no output of an earlier batch is alive."""
    import weakref

    model = tiny_model("llama")
    outputs: list[Any] = []
    alive: list[int] = []

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        alive.append(sum(reference() is not None for reference in outputs))
        outputs.append(weakref.ref(output))

    model.model.layers[0].register_forward_hook(note)
    hidden_means(model, DATA, EVERY, layer=1, batch_tokens=1)
    assert len(alive) == len(EVERY) and max(alive) == 0


def test_adapters_act_and_dropout_does_not() -> None:
    model = wrap(tiny_model("llama"), IBConfig(target_layer=2, bottleneck_dim=8), lora_dropout=0.5)
    model.get_base_model().model.layers[0].eval()  # a caller's own choice, which must survive
    modes = [module.training for module in model.modules()]
    means = hidden_means(model, DATA, EVERY, layer=2)
    assert [module.training for module in model.modules()] == modes and model.training
    with model.disable_adapter():
        without = hidden_means(model, DATA, EVERY, layer=2)
    merged = model.merge_and_unload()
    assert np.abs(means - without).max() > 0.1
    np.testing.assert_allclose(hidden_means(merged, DATA, EVERY, layer=2), means, rtol=0, atol=1e-5)


def test_bfloat16() -> None:
    exact = wrap(tiny_model("llama", torch.float32), IBConfig(target_layer=2, bottleneck_dim=8))
    low = wrap(tiny_model("llama", torch.float32), IBConfig(target_layer=2, bottleneck_dim=8))
    low.load_state_dict(exact.state_dict())
    for name, parameter in low.named_parameters():
        if "lora_" not in name and not name.startswith("bottleneck"):
            parameter.data = parameter.data.bfloat16()
    expected = hidden_means(exact, DATA, EVERY, layer=2)
    means = hidden_means(low, DATA, EVERY, layer=2)
    assert means.dtype == np.float32
    assert np.abs(means - expected).max() < 0.05 * np.abs(expected).max()
    kl = bottleneck_statistics(exact, DATA, EVERY).kl.sum()
    assert abs(bottleneck_statistics(low, DATA, EVERY).kl.sum() - kl) < 0.05 * kl


def with_bottleneck(**changes: Any) -> IBModel:
    model = wrap(tiny_model("llama"), IBConfig(**{"target_layer": 2, "bottleneck_dim": 6, **changes}))
    assert model.bottleneck is not None
    for parameter in model.bottleneck.parameters():
        parameter.data.normal_(std=0.2)
    return model


@pytest.mark.parametrize("span", ["response", "full"])
@pytest.mark.parametrize(
    "changes", [{}, {"encoder": "lora", "encoder_rank": 2}, {"logvar_range": (-0.2, 0.2)}, {"target_layer": LAYERS}]
)
def test_statistics_are_those_of_all_tokens_at_once(changes: dict[str, Any], span: Span) -> None:
    model = with_bottleneck(**changes)
    layer, config = model.bottleneck, model.ib_config
    assert layer is not None and config is not None
    states = [states_alone(model.get_base_model(), index, config.target_layer, span) for index in EVERY]
    hidden = np.concatenate(states)
    weight = layer.lora_b @ layer.lora_a if config.encoder == "lora" else layer.weight
    mu, logvar = np.split(hidden @ weight.detach().numpy().T + layer.bias.detach().numpy(), 2, axis=1)
    logvar = logvar.clip(*config.logvar_range)
    found = bottleneck_statistics(model, DATA, EVERY, span=span, batch_tokens=40)
    assert found.tokens == len(hidden)
    np.testing.assert_allclose(found.mu_mean, mu.mean(0), rtol=0, atol=1e-5)
    np.testing.assert_allclose(found.mu_variance, mu.var(0, ddof=1), rtol=1e-5)
    np.testing.assert_allclose(found.kl, (0.5 * (mu**2 + np.exp(logvar) - 1 - logvar)).mean(0), rtol=1e-5)
    # The criterion and the nats are those of training.
    assert found.active.mean() == active_share(torch.from_numpy(mu)).item()
    kl = variational_bottleneck(torch.from_numpy(hidden), layer.encoder_weight, layer.bias, None,
                                logvar_range=config.logvar_range, kl_reduction="sum")[1]  # fmt: skip
    np.testing.assert_allclose(found.kl.sum(), kl.mean().item(), rtol=1e-5)


def test_merged_groups_are_one() -> None:
    model = with_bottleneck()
    parts = [bottleneck_statistics(model, DATA, chosen) for chosen in ([0, 4], [2], [1, 3, 5, 6])]
    whole = bottleneck_statistics(model, DATA, EVERY)
    merged = parts[0].merged(parts[1]).merged(parts[2])
    assert merged.tokens == whole.tokens
    for name in ("mu_mean", "mu_variance", "kl"):
        np.testing.assert_allclose(getattr(merged, name), getattr(whole, name), rtol=0, atol=1e-6, err_msg=name)


def test_a_collapsed_dimension_and_one_that_is_constant() -> None:
    """mu = 0 with unit variance has no KL; mu = 3 for every token has 9/2 nats, and still tells nothing."""
    model = with_bottleneck(bottleneck_dim=3)
    layer = model.bottleneck
    assert layer is not None and layer.bias is not None
    layer.weight.data.zero_()
    layer.bias.data.zero_()
    layer.bias.data[1] = 3.0
    layer.weight.data[2] = 1.0  # mu of the last dimension is the sum over H
    found = bottleneck_statistics(model, DATA, EVERY)
    np.testing.assert_allclose(found.kl[:2], [0, 4.5], atol=1e-6)
    assert found.active.tolist() == [False, False, True]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"layer": 0}, "target_layer is 0, but the model has 3 layers"),
        ({"layer": LAYERS + 1}, "target_layer is 4, but the model has 3 layers"),
        ({"span": "prompt"}, "span must be 'response' or 'full', not 'prompt'"),
        ({"batch_tokens": 0}, "batch_tokens must be a positive integer, not 0"),
        ({"documents": []}, "at least one"),
    ],
)
def test_wrong_arguments(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        hidden_means(tiny_model("llama"), DATA, **{"documents": [0], "layer": 1, **changes})


def test_models_that_cannot_be_used() -> None:
    with pytest.raises(InputError, match="has no bottleneck"):
        bottleneck_statistics(wrap(tiny_model("llama"), None), DATA, EVERY)
    with pytest.raises(InputError, match="a variance needs two tokens, and the documents have 1"):
        bottleneck_statistics(with_bottleneck(), DATA, [1])
    with pytest.raises(InputError, match="gives no linear output head"):
        hidden_means(nn.Linear(2, 2), DATA, [0], layer=1)
    prompted = get_peft_model(tiny_model("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(InputError, match="learns a prompt"):
        hidden_means(prompted, DATA, [0], layer=1)
    broken = tiny_model("llama")
    broken.model.layers[0].mlp.down_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(InputError, match="hidden states at layer 1 are not finite"):
        hidden_means(broken, DATA, [0], layer=1)


def test_too_little_memory_names_the_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")

    def refuse(*arguments: Any, **named: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(model.model.layers[0], "forward", refuse)
    with pytest.raises(InputError, match="too little memory for 2 rows of 30 tokens at once; use fewer --batch_tokens"):
        hidden_means(model, DATA, EVERY, layer=1, batch_tokens=60)
