"""The objective's weights: free bits, alpha's warm-up, and the KL weight that holds a rate."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import eager_terms, gradients, random_batch, tiny_model, wrap

from ibft import IBConfig, IBModel, InputError
from ibft.objective import Objective, dual_step, free_nats

RNG = torch.tensor([3, 5])


def config(**changes: Any) -> IBConfig:
    return IBConfig(**{"target_layer": 2, "bottleneck_dim": 10, "alpha": 0.7, "beta": 0.3, **changes})


def trainable(model: IBModel) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


# --- free bits


def test_free_nats_cost_nothing_and_pull_at_nothing() -> None:
    kl = torch.tensor([0.0, 0.7, 1.5, 1.6, 40.0], dtype=torch.float64, requires_grad=True)
    paid = free_nats(kl, 1.5)
    torch.testing.assert_close(paid.detach(), torch.tensor([0.0, 0.0, 0.0, 0.1, 38.5], dtype=torch.float64))
    paid.sum().backward()
    assert kl.grad is not None and kl.grad.tolist() == [0, 0, 0, 1, 1]


@pytest.mark.parametrize("kl_reduction", ["mean", "sum"])
def test_free_bits_are_nats_of_a_token_whatever_the_reduction(kl_reduction: str) -> None:
    """Some tokens have less KL, and some more: the term is the mean of what is over. `kl` stays the rate."""
    batch = random_batch()
    model = wrap(tiny_model("llama"), config(kl_reduction=kl_reduction, beta=0.0))
    states = model.get_base_model()(input_ids=batch["input_ids"], output_hidden_states=True).hidden_states
    mu, logvar = model.bottleneck.encode(states[2].flatten(0, 1))
    nats = (mu**2 + logvar.exp() - 1 - logvar).sum(-1) / 2  # [N]
    free = nats.median().item()
    assert nats.min() < free < nats.max()

    model = wrap(tiny_model("llama"), config(kl_reduction=kl_reduction, beta=0.0, free_bits=free))
    output = model(**batch, noise_rng=RNG)
    scale = 10 if kl_reduction == "mean" else 1
    torch.testing.assert_close(output.kl, nats.mean().detach() / scale, rtol=1e-6, atol=0)
    paid = (output.loss - output.ce).detach() / 0.7 * scale
    torch.testing.assert_close(paid, (nats - free).clamp(min=0).mean().detach(), rtol=1e-6, atol=0)


def test_where_all_is_free_the_kl_has_no_gradient() -> None:
    batch = random_batch()
    free = wrap(tiny_model("llama"), config(free_bits=1e3))
    free(**batch, noise_rng=RNG).loss.backward()
    without = wrap(tiny_model("llama"), config(kl_weight=0.0))
    without(**batch, noise_rng=RNG).loss.backward()
    expected = gradients(without)
    assert all(torch.equal(gradient, expected[name]) for name, gradient in gradients(free).items())


# --- alpha's warm-up


def test_alpha_rises_linearly_from_0_and_stays() -> None:
    objective = Objective(config(alpha=0.6, alpha_warmup_steps=4))
    course = []
    for _ in range(7):
        course.append(objective.alpha)
        objective.step()
    assert course == pytest.approx([0, 0.15, 0.3, 0.45, 0.6, 0.6, 0.6], abs=1e-15)
    assert course[-1] == 0.6  # to the bit: after the warm-up a run is as one without
    assert Objective(config(alpha=0.6)).alpha == 0.6


def test_the_loss_follows_alpha() -> None:
    ib = config(alpha_warmup_steps=2)
    model, batch = wrap(tiny_model("llama"), ib), random_batch()
    terms = eager_terms(model, batch, RNG)
    ce, kl, ce_ib = terms.ce / terms.num_labels, terms.kl / terms.num_tokens, terms.ce_ib / terms.num_labels
    for alpha in (0.0, 0.35, 0.7, 0.7):
        expected = ce + alpha * (kl + 0.3 * ce_ib)
        torch.testing.assert_close(model(**batch, noise_rng=RNG).loss, expected, rtol=0, atol=1e-9)
        model.step_objective()


# --- the rate's target


@pytest.mark.parametrize(
    ("rate", "multiplier", "expected"),
    [
        (3.0, 2.0, (2.0, 2.0)),  # on target
        (3.3, 2.0, (2 * 1.1**0.1, 2 * 1.1**4.1)),
        (2.4, 2.0, (2 * 0.8**0.1, 2 * 0.8**4.1)),
        (90.0, 2.0, (2 * 2**0.1, 2 * 2**4.1)),  # the ratio is clamped
        (0.0, 2.0, (2 * 2**-0.1, 2 * 2**-4.1)),
        (math.inf, 2.0, (2 * 2**0.1, 2 * 2**4.1)),
        (math.nan, 2.0, (2.0, 2.0)),
        (90.0, 49.0, (50.0, 50 * 16.0)),  # and the multiplier
        (0.0, 0.101, (0.1, 0.1 / 16)),
    ],
)
def test_a_step_of_dual_ascent(rate: float, multiplier: float, expected: tuple[float, float]) -> None:
    found = dual_step(torch.tensor(multiplier), torch.tensor(rate), 3.0, (0.1, 50.0))
    assert [value.item() for value in found] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kl_tokens", ["all", "labels"])
@pytest.mark.parametrize("kl_reduction", ["mean", "sum"])
def test_the_rate_is_that_of_the_whole_step_in_nats(kl_tokens: str, kl_reduction: str) -> None:
    """Over micro-batches of unlike numbers of tokens and labels, whatever num_items_in_batch says."""
    ib = config(kl_tokens=kl_tokens, kl_reduction=kl_reduction, ib_rate_target=12.0, kl_weight=0.5)
    model, batches = wrap(tiny_model("llama"), ib), [random_batch(2, 11), random_batch(1, 17)]
    total, count = torch.zeros((), dtype=torch.float64), 0
    for batch in batches:
        terms = eager_terms(model, batch, RNG)
        total += terms.kl.detach() * (10 if kl_reduction == "mean" else 1)
        count += terms.num_tokens if kl_tokens == "all" else terms.num_labels
    for batch in batches:
        model(**batch, noise_rng=RNG, num_items_in_batch=40).loss.backward()
    with torch.no_grad():
        model(**batches[0], noise_rng=RNG)  # measures nothing
    model.step_objective()
    ratio = (total / count / 12).clamp(0.5, 2).item()
    assert ratio not in (0.5, 2)
    assert model.objective.varying()["kl_weight"].item() == pytest.approx(0.5 * ratio**4.1, rel=1e-5)


def test_the_weights_are_read_back_to_the_bit(tmp_path: Path) -> None:
    ib = config(alpha_warmup_steps=9, ib_rate_target=4.0)
    model, batch = wrap(tiny_model("llama"), ib), random_batch()
    for _ in range(3):
        model(**batch, noise_rng=RNG)
        model.step_objective()
    model.save_pretrained(tmp_path)
    loaded = IBModel.from_pretrained(tiny_model("llama"), tmp_path, is_trainable=True).double().train()
    assert loaded.objective.alpha == model.objective.alpha == 0.7 * 3 / 9
    for _ in range(2):
        assert loaded.objective.kl_weight.dtype == torch.float32  # double() is for the parameters
        assert torch.equal(loaded.objective.kl_weight, model.objective.kl_weight)
        for one in (model, loaded):
            one.objective.observe(torch.tensor(0.31), torch.tensor(7), one.bottleneck.up_weight)
            one.step_objective()


def test_what_does_not_vary_leaves_no_file(tmp_path: Path) -> None:
    model = wrap(tiny_model("llama"), config(free_bits=2.0, kl_weight=0.5))
    model.save_pretrained(tmp_path)
    model.step_objective()
    assert not (tmp_path / "ib_state.json").exists()
    assert model.objective.varying() == {}
    wrap(tiny_model("llama"), None).step_objective()  # plain fine-tuning has nothing to move


def test_a_file_of_an_earlier_version(tmp_path: Path) -> None:
    """It lacks what came later, which is then off."""
    earlier = {
        **{"target_layer": 2, "bottleneck_dim": 256, "encoder": "linear", "encoder_rank": 32, "alpha": 0.2},
        **{"beta": 0.01, "kl_tokens": "all", "kl_reduction": "mean", "logvar_range": [-4.0, 4.0], "sample": True},
    }
    (tmp_path / "ib_config.json").write_text(json.dumps(earlier))
    found = IBConfig.load(tmp_path / "ib_config.json")
    assert found == IBConfig(target_layer=2)
    assert (found.alpha_warmup_steps, found.kl_weight, found.free_bits, found.ib_rate_target) == (0, 1.0, 0.0, None)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("varying", [{"alpha_warmup_steps": 5}, {"ib_rate_target": 2.0}])
def test_steps_that_the_objective_is_not_told_of_are_noticed(varying: dict[str, Any], fused: bool) -> None:
    model, batch = wrap(tiny_model("llama"), config(**varying)), random_batch()
    optimizer = torch.optim.AdamW(trainable(model), fused=fused)
    model(**batch)
    torch.autograd.grad(model(**batch).loss, trainable(model))  # whoever looks at gradients takes no step
    copy.deepcopy(model)(**batch).loss.backward()
    for _ in range(2):  # micro-batches of one step
        model(**batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    with pytest.raises(InputError, match=r"call model\.step_objective\(\) after each optimizer\.step\(\)"):
        model(**batch)


def test_a_told_objective_goes_on() -> None:
    model, batch = wrap(tiny_model("llama"), config(alpha_warmup_steps=5)), random_batch()
    optimizer = torch.optim.AdamW(trainable(model))
    for _ in range(3):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.step_objective()


def test_another_alpha_needs_no_other_graph() -> None:
    model, batch = wrap(tiny_model("llama"), config(alpha_warmup_steps=20)), random_batch()
    optimizer, graphs = torch.optim.AdamW(trainable(model)), []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend)
    seen = []
    for _ in range(5):
        compiled(**batch, noise_rng=torch.tensor([0, 0])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.step_objective()
        seen.append(len(graphs))
    assert seen == [seen[0]] * 5


def rates(ib: IBConfig, encoder_scale: float, steps: int = 250) -> list[float]:
    """Nats per token in each step of training a tiny model to continue sequences that count on from a random token."""
    model = wrap(tiny_model("llama", torch.float32), ib)
    model.bottleneck.weight.data.mul_(encoder_scale)
    optimizer = torch.optim.AdamW(trainable(model), lr=3e-3, weight_decay=0.0)
    found = []
    for step in range(steps):
        ids = (torch.randint(0, 101, (4, 1)) + 7 * torch.arange(12)) % 101
        output = model(input_ids=ids, labels=ids, noise_rng=torch.tensor([0, step]))
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable(model), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        model.step_objective()
        found.append(output.kl.item() * ib.nats_scale)
    return found


@pytest.mark.parametrize(("encoder_scale", "kl_weight"), [(1.0, 0.01), (0.1, 1.0)], ids=["from-above", "from-below"])
def test_the_rate_converges_to_its_target(encoder_scale: float, kl_weight: float) -> None:
    """From where a fixed weight leads far away: 0.01 lets the rate rise, 1 ends in collapse."""
    ib = config(bottleneck_dim=16, alpha=0.2, beta=0.01, kl_weight=kl_weight, ib_rate_target=2.0)
    held = rates(ib, encoder_scale)
    assert held[0] > 3 * 2.0 if encoder_scale == 1 else held[0] < 2.0 / 3
    assert all(abs(sum(held[start : start + 25]) / 25 / 2.0 - 1) < 0.1 for start in range(150, 250, 25))


def test_without_a_target_the_same_weight_collapses() -> None:
    """Else the test above would show nothing."""
    free = rates(config(bottleneck_dim=16, alpha=0.2, beta=0.01), 0.1)
    assert sum(free[-25:]) / 25 < 0.2
