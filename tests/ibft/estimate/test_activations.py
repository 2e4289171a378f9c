"""What a layer keeps for backward: by hand, against autograd's own, and what the system gives for a step."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from outlines import SETTING, TINY, cost_of, lora, outline
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from benchmarks.measure import can_measure_memory
from ibft import IBConfig, IBModel
from ibft.architecture import CausalLM
from ibft.document_attention import _KERNEL_TAKES_GROUPS
from ibft.estimate.activations import Activations, measure_activations
from ibft.estimate.cost import ModelCost
from ibft.estimate.step import memory
from ibft.loading import autocast

ROOT = Path(__file__).parents[3]
_PROBE = """
import json, sys, torch
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM
from benchmarks.measure import peak_of
from ibft import IBConfig, IBModel
torch.set_num_threads(1)
model = LlamaForCausalLM(LlamaConfig(**json.loads(sys.argv[1])))
lora = LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear")
model = IBModel.from_base(model, lora, IBConfig(target_layer=2, bottleneck_dim=32)).train()
ids = torch.randint(0, 96, (1, 768))
labels = torch.where(torch.arange(768) >= 384, ids, -100)
def step():
    model(input_ids=ids, labels=labels, return_stats=False).loss.backward()
found = [peak_of(step, lambda: model.zero_grad(set_to_none=True), repeats=1)]
model.enable_input_require_grads()
model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
found.append(peak_of(step, lambda: model.zero_grad(set_to_none=True), repeats=1))
print(json.dumps(found))
"""


@pytest.mark.skipif(not can_measure_memory(), reason="needs /proc/self/clear_refs")
def test_memory_of_a_step_is_what_the_system_gives() -> None:
    """Without and with activation checkpointing, of one process after the other's peak is forgotten."""
    sizes = {"vocab_size": 8192, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 6}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 4}
    pinned = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", _PROBE, json.dumps(sizes)]
    output = subprocess.check_output(command, cwd=ROOT, env=os.environ | pinned, text=True)
    config = LlamaConfig(**sizes)  # type: ignore[arg-type]
    cost = cost_of(config, IBConfig(target_layer=2, bottleneck_dim=32), r=8)
    activations = measure_activations(outline(config, torch.float32), lora(r=8))
    for checkpointing, measured in enumerate(json.loads(output.splitlines()[-1])):
        setting = SETTING.changed(tokens=768, checkpointing=bool(checkpointing), dtype_bytes=4)
        estimated = (memory(cost, activations, setting).step + 4 * cost.trainable) / 2**20  # with gradients
        assert estimated == pytest.approx(measured["peak"] - measured["rest"], rel=0.2)


def test_activations_of_a_layer_by_hand() -> None:
    """float32, without dropout or adapters but one: RMSNorm saves its input's inverse norm [T] and what it scales."""
    activations = measure_activations(outline(TINY, torch.float32), lora(r=4, target_modules=["down_proj"]))
    hidden, keys, inner, rank, heads = 32, 16, 80, 4, 4
    if not _KERNEL_TAKES_GROUPS:
        keys = hidden  # one for each head of queries
    attention = hidden + 2 * keys + hidden + heads  # q, k, v, output, log-sum-exp
    rope = 2 * 8  # cosines and sines, which the first layer, whose input takes no gradient, does not need
    norms = 2 * (hidden + 1)  # the residual stream and 1 / rms
    mlp = 3 * inner  # gate, silu(gate), up
    adapter = inner + rank  # the input of A and of B
    assert activations.layer == pytest.approx(4 * (attention + rope + norms + mlp + adapter), abs=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_the_scores_that_eager_attention_keeps(kind: str, dtype: torch.dtype) -> None:
    """What autograd saves of a layer grows by this for each token when the row does, beside what grows with it."""
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    config = AutoConfig.for_model(kind, **sizes, num_attention_heads=4, num_key_value_heads=2)
    base = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager")
    model = IBModel.from_base(base, lora(r=4), None).train()
    model.enable_input_require_grads()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def kept(length: int) -> int:
        storages: dict[int, Any] = {}

        def keep(tensor: Tensor) -> Tensor:
            if tensor.untyped_storage().data_ptr() not in own:
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        ids = torch.zeros(1, length, dtype=torch.int64)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast(ids.device, dtype):
            CausalLM.of(model.get_base_model()).decode(input_ids=ids)
        return sum(storage.nbytes() for storage in storages.values())

    # a + b T + c T^2 at three lengths gives c.
    squares = (kept(96) - 2 * kept(64) + kept(32)) / (2 * 32**2)
    per_token = Activations(0.0, 0.0).with_scores(ModelCost.of(model), 64, dtype.itemsize).layer
    assert squares == pytest.approx(2 * per_token / 64, rel=0.01)


@pytest.mark.parametrize("kind", ["gemma2", "gpt2"])
def test_models_whose_scores_have_a_softcap_or_dropout_have_an_estimate(kind: str) -> None:
    """Which flash attention by documents refuses; what it keeps is the same."""
    sizes = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model(kind, **sizes)
    assert getattr(config, "attn_logit_softcapping", None) or config.attn_pdrop
    assert measure_activations(outline(config), lora(r=4)).layer > 0
