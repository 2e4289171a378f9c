"""Parameters against published sizes, FLOPs against torch's counter, pairs of attention by brute force."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from outlines import SIZES, TINY, cost_of, lora, published
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from ibft import IBConfig, IBModel, InputError
from ibft.architecture import CausalLM
from ibft.estimate.cost import ModelCost


@pytest.mark.parametrize("name", SIZES)
def test_parameters_are_those_of_the_published_models(name: str) -> None:
    config = published(name)
    cost = cost_of(config, target_modules=["q_proj"], layers_to_transform=[0])  # few adapters: the wrapping is slow
    hidden, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    keys = config.num_key_value_heads * config.head_dim
    linear = layers * (2 * hidden * hidden + 2 * hidden * keys + 3 * hidden * inner)
    root = 2 * config.vocab_size * hidden + hidden
    assert cost.num_parameters == SIZES[name][1] == linear + root + layers * 2 * hidden
    assert cost.linear_parameters == linear and cost.root_parameters == root
    assert cost.adapter_parameters == cost.adapter_linear == 32 * 2 * hidden
    assert cost.attention_width == hidden and cost.num_layers == layers and cost.widest_linear == inner


def test_parameters_of_adapter_and_bottleneck() -> None:
    ib = IBConfig(target_layer=2, bottleneck_dim=8)
    cost = cost_of(TINY, ib, r=4)
    shapes = [(32, 32), (32, 16), (32, 16), (32, 32), (32, 80), (32, 80), (80, 32)]  # q, k, v, o, gate, up, down
    assert cost.adapter_parameters == 3 * sum(4 * (inputs + outputs) for inputs, outputs in shapes)
    assert cost.bottleneck_parameters == 16 * 32 + 16 + 32 * 8 + 32
    assert cost.trainable == cost.adapter_parameters + cost.bottleneck_parameters


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_tied_head_is_counted_once(kind: str) -> None:
    config = TINY
    if kind == "gpt2":
        config = AutoConfig.for_model("gpt2", vocab_size=96, n_embd=32, n_layer=2, n_head=2)
    config.tie_word_embeddings = True
    with torch.device("meta"):
        expected = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    assert cost_of(config, r=4).num_parameters == expected
    config.tie_word_embeddings = False


def counted(step: Any) -> tuple[int, int]:
    """FLOPs of `step()`, which gives a tensor, and of its backward, as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        result = step()
        forward = counter.get_total_flops()
        result.sum().backward()
    return forward, counter.get_total_flops() - forward


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_decoder_flops_are_those_that_torch_counts(kind: str) -> None:
    config = TINY
    if kind == "gpt2":
        config = AutoConfig.for_model("gpt2", vocab_size=96, n_embd=32, n_layer=2, n_head=2)
    base = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model = IBModel.from_base(base, lora(r=4), None).train()
    model.enable_input_require_grads()  # else the first layer's inputs take no gradient
    cost, rows, length = ModelCost.of(model), 2, 24
    parts, ids = CausalLM.of(model.get_base_model()), torch.randint(0, 96, (rows, length))
    forward, backward = counted(lambda: parts.decode(input_ids=ids))
    if kind == "llama":  # transformers up to 5.17 makes the angles of RoPE by a product, which is not counted
        with FlopCounterMode(display=False) as angles:
            base.model.rotary_emb(torch.ones(1), torch.arange(length)[None])
        forward -= angles.get_total_flops()
    # eager attention computes all pairs, the masked ones too
    flops = cost.flops(rows * length, 0, [rows * length**2] * cost.num_layers)
    assert (flops.decoder_forward, flops.decoder_backward) == (forward, backward)
    assert flops.head == 0 and flops.model == forward + backward


@pytest.mark.parametrize("encoder", ["linear", "lora"])
@pytest.mark.parametrize("absorbed", [True, False])
def test_head_and_bottleneck_flops_are_those_that_torch_counts(encoder: Any, absorbed: bool) -> None:
    tokens, labels, width, rank, hidden, vocabulary = 40, (30 if absorbed else 4), 4, 32, 32, 96
    ib = IBConfig(target_layer=2, bottleneck_dim=width, encoder=encoder, encoder_rank=rank)
    flops = cost_of(TINY, ib, r=4).flops(tokens, labels, [0.0] * 3)

    def parameter(*shape: int) -> Tensor:
        return torch.randn(*shape, requires_grad=True)

    head, states = torch.randn(vocabulary, hidden), parameter(tokens, hidden)
    assert sum(counted(lambda: F.linear(states[:labels], head))) == flops.head
    full, low, high = parameter(2 * width, hidden), parameter(rank, hidden), parameter(2 * width, rank)
    up = parameter(hidden, width)

    def branch() -> Tensor:
        encoded = F.linear(states, full) if encoder == "linear" else F.linear(F.linear(states, low), high)
        z = encoded[:labels, :width]
        return F.linear(z, head @ up) if absorbed else F.linear(F.linear(z, up), head)

    assert sum(counted(branch)) == flops.bottleneck


def test_pairs_by_brute_force_and_by_layer() -> None:
    lengths = np.array([1, 4, 5, 9])
    sizes = {"num_hidden_layers": 4, "vocab_size": 96, "hidden_size": 32, "num_attention_heads": 2, "head_dim": 16}
    sizes |= {"num_key_value_heads": 2, "intermediate_size": 48, "sliding_window": 4}
    cost = cost_of(AutoConfig.for_model("mistral", **sizes), r=4)
    assert cost.windows == (4,) * 4

    def seen(window: int) -> int:
        return sum(0 <= q - k < window for length in lengths for q in range(length) for k in range(length))

    assert cost.pairs(lengths) == [seen(4)] * 4
    mixed = cost_of(AutoConfig.for_model("gemma3_text", **sizes, sliding_window_pattern=2), r=4)
    assert set(mixed.windows) == {4, None}
    assert [seen(99 if window is None else 4) for window in mixed.windows] == mixed.pairs(lengths)
    assert cost_of(AutoConfig.for_model("qwen2", **sizes), r=4).windows == (None,) * 4  # has one, and does not use it


def test_a_mixture_of_experts_is_refused() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model("mixtral", vocab_size=96, num_key_value_heads=2, num_local_experts=4, **sizes)
    with pytest.raises(InputError, match="MixtralForCausalLM is a mixture of experts"):
        cost_of(config, target_modules=["q_proj"])
