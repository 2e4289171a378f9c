"""`ibft estimate`: parameters against published sizes, FLOPs against torch's counter, memory against the system."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

import ibft.estimate.checkpointing
from benchmarks.measure import can_measure_memory
from ibft import IBConfig, IBModel, InputError
from ibft.architecture import CausalLM
from ibft.attention import VARLEN, Attention
from ibft.cli import main
from ibft.config import TrainConfig
from ibft.engines import Engine
from ibft.estimate.activations import OUTLINE, Activations, measure_activations
from ibft.estimate.advice import fits, flags, largest_batch, mildest_change, with_checkpointing
from ibft.estimate.checkpointing import Checkpointing, choose_checkpointing
from ibft.estimate.cost import ModelCost
from ibft.estimate.devices import DEVICES, find_device
from ibft.estimate.step import GIB, Setting, memory, step_flops, step_time
from ibft.loading import autocast

ROOT = Path(__file__).parents[2]
SIZES: dict[str, tuple[dict[str, int], int]] = {  # and the parameters, of the published files
    "llama-2-7b": ({"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}, 6_738_415_616),
    "llama-2-70b": (
        {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
        68_976_648_192,
    ),
    "deepseek-coder-1.3b": (
        {"hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": 24, "num_attention_heads": 16},
        1_346_471_936,
    ),
    "deepseek-coder-6.7b": ({"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}, 6_740_512_768),
    "deepseek-coder-33b": (
        {"hidden_size": 7168, "intermediate_size": 19200, "num_hidden_layers": 62, "num_attention_heads": 56},
        33_342_991_360,
    ),
}
GROUPED = {"llama-2-70b": 8, "deepseek-coder-33b": 8}  # heads of keys and values
TINY = LlamaConfig(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
)
SETTING = Setting("ddp", 1, 2048, 2048, 1.0, 0.5, 1, False, False, 2)


def published(name: str) -> LlamaConfig:
    sizes = dict(SIZES[name][0])
    heads = sizes.setdefault("num_attention_heads", 32)
    return LlamaConfig(
        vocab_size=32000 if name.startswith("llama") else 32256, num_key_value_heads=GROUPED.get(name, heads), **sizes
    )


def lora(**changes: Any) -> LoraConfig:
    return LoraConfig(**{"task_type": "CAUSAL_LM", "r": 32, "target_modules": "all-linear", **changes})


def outline(config: Any, dtype: torch.dtype = torch.bfloat16) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=OUTLINE)


def cost_of(config: Any, ib: IBConfig | None = None, **changes: Any) -> ModelCost:
    return ModelCost.of(IBModel.from_base(outline(config), lora(**changes), ib))


@pytest.fixture(scope="module")
def seven_billion() -> tuple[ModelCost, Activations]:
    config = published("deepseek-coder-6.7b")
    return cost_of(config, IBConfig(target_layer=20)), measure_activations(outline(config), lora(lora_dropout=0.05))


# ---------------------------------------------------------------------------------------------------------------------
# Parameters and FLOPs


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


# ---------------------------------------------------------------------------------------------------------------------
# Memory

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


def test_checkpointing_keeps_the_inputs_of_layers_and_one_layer(seven_billion: tuple[ModelCost, Activations]) -> None:
    cost, activations = seven_billion
    with_it, without = (memory(cost, activations, SETTING.changed(checkpointing=on)) for on in (True, False))
    assert with_it.activations == 32 * 4096 * 2 * 2048
    assert with_it.workspace == activations.layer * 2048 + 3 * 11008 * 2 * 2048
    assert without.activations == activations.layer * 2048 * 32 + activations.around * 2048
    assert without.step > 5 * with_it.step


def test_what_each_engine_shards(seven_billion: tuple[ModelCost, Activations]) -> None:
    cost, activations = seven_billion

    def at(engine: Any, gpus: int, **changes: Any) -> Any:
        return memory(cost, activations, SETTING.changed(engine=engine, gpus=gpus, **changes))

    whole, trained = 2 * cost.num_parameters, 16 * cost.trainable
    assert at("ddp", 8) == at("ddp", 1) == at("fsdp2", 1)
    assert (at("ddp", 8).weights, at("ddp", 8).adapter) == (whole, trained)
    # DeepSpeed: value, gradient, two moments, the master copy; and whole the buffer in which gradients are reduced.
    assert at("zero2", 8).weights == whole and at("zero2", 8).adapter == 4 * cost.trainable * (1 + 4 / 8 + 1)
    assert at("zero1", 8).weights == whole and at("zero1", 8).adapter == 4 * cost.trainable * (2 + 3 / 8 + 1)
    assert at("fsdp2", 8).adapter == trained / 8 and at("zero3", 8).adapter == 4 * cost.trainable * (5 / 8 + 1)
    for engine in ("fsdp2", "zero3"):
        assert at(engine, 8).weights == whole / 8 and 0 < at(engine, 8).gathered < whole
    assert at("fsdp2", 1024).total < at("fsdp2", 8).total < at("ddp", 8).total
    four = at("ddp", 1, load_in_4bit=True).weights
    assert four == pytest.approx(whole - cost.linear_parameters * (2 - 4.127 / 8))


# ---------------------------------------------------------------------------------------------------------------------
# Time, and what to set


def test_time_grows_with_work_and_network(seven_billion: tuple[ModelCost, Activations]) -> None:
    cost, activations = seven_billion
    gpu = DEVICES["h100-80gb"]

    def at(**changes: Any) -> Any:
        return step_time(cost, activations, SETTING.changed(**changes), gpu)

    assert at(accumulation=2).step == pytest.approx(2 * at().step, rel=0.01)
    assert at(checkpointing=True).step > at().step and at().communication == 0
    model = step_flops(cost, SETTING)
    assert model.model < model.hardware(True) == model.model + model.decoder_forward
    assert at().matmul == pytest.approx(model.model / (0.6 * 989e12))
    assert at(engine="fsdp2", gpus=8).communication > at(engine="ddp", gpus=8).communication > 0
    assert at(engine="fsdp2", gpus=1024).communication > at(engine="fsdp2", gpus=8).communication
    assert 0.2 < model.model / at(tokens=16384).step / 989e12 * 8 < 0.6  # MFU as such runs report it


def test_checkpointing_is_on_only_where_memory_asks_for_it(seven_billion: tuple[ModelCost, Activations]) -> None:
    cost, activations = seven_billion
    without = memory(cost, activations, SETTING).total / GIB
    assert not with_checkpointing(cost, activations, SETTING, without / 0.79).checkpointing
    assert with_checkpointing(cost, activations, SETTING, without / 0.81).checkpointing


def test_the_largest_batch_fits_and_one_row_more_does_not(seven_billion: tuple[ModelCost, Activations]) -> None:
    cost, activations = seven_billion
    for gib in (14, 24, 40, 80):
        most = largest_batch(cost, activations, SETTING.changed(checkpointing=True), gib, 512)
        assert most % 512 == 0 and (most > 0) == (gib > 14)
        at = [SETTING.changed(checkpointing=True, tokens=tokens) for tokens in (most, most + 512)]
        assert not most or fits(cost, activations, at[0], gib)
        assert not fits(cost, activations, at[1], gib)


def test_the_mildest_change(seven_billion: tuple[ModelCost, Activations]) -> None:
    cost, activations = seven_billion

    def change(gib: float, **changes: Any) -> Setting | None:
        asked = SETTING.changed(tokens=8192, **changes)
        found = mildest_change(cost, activations, asked, gib, 2048)
        assert found is None or fits(cost, activations, found, gib)
        assert found is None or found.tokens * found.accumulation == 8192
        return found

    asked = SETTING.changed(tokens=8192)
    found = change(40)
    assert found is not None and flags(found, asked) == "--gradient_checkpointing"
    found = change(17)
    assert found is not None
    assert flags(found, asked) == ("--gradient_checkpointing --tokens_per_batch 2048 --gradient_accumulation_steps 4")
    found = change(10, gpus=8)
    assert found is not None and found.engine == "fsdp2" and not found.load_in_4bit
    found = change(10)
    assert found is not None and found.load_in_4bit and "--load_in_4bit" in flags(found, asked)
    assert "--engine" not in flags(found, asked)
    # `ibft train` refuses --engine ddp outside of torchrun, which one process has no need of.
    assert flags(found, asked.changed(engine="fsdp2")).startswith("--engine auto --gradient_checkpointing --load")
    eight = asked.changed(gpus=8)
    assert "--engine deepspeed (stage 3)" in flags(eight.changed(engine="zero3"), eight)
    assert change(2) is None


def test_a_run_chooses_for_itself(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    published("deepseek-coder-1.3b").save_pretrained(tmp_path)
    cost = cost_of(published("deepseek-coder-1.3b"), target_modules=["q_proj"])

    def choose(
        gib: float, cost: ModelCost | None = cost, engine: Engine | None = None, eager: bool = False, **changes: Any
    ) -> Checkpointing:
        monkeypatch.setattr(ibft.estimate.checkpointing, "_memory_gib", lambda device: gib)
        config = TrainConfig(base_model=str(tmp_path), dataset=["rows.jsonl"], max_length=2048, **changes)
        return choose_checkpointing(
            config,
            cost,
            lora(),
            num_parameters=1_346_471_936,
            dtype=torch.bfloat16,
            engine=engine or Engine(torch.device("cuda")),
            attention=Attention("eager" if eager else VARLEN, ""),
        )

    assert choose(1000) == (False, "there is room")
    on = choose(12, tokens_per_batch=8192)
    assert on.on and re.fullmatch(r"a step without it would take about \d+ GiB of 12", on.reason)
    assert not choose(60, tokens_per_batch=8192).on
    assert choose(12, tokens_per_batch=8192, gradient_checkpointing=False) == (False, "asked for")
    assert choose(1000, gradient_checkpointing=True) == (True, "asked for")
    assert choose(1000, cost=None).on
    # Eager attention keeps the scores, 16 heads x 2048^2 for each row and layer, in float32 and in bfloat16.
    assert choose(60, tokens_per_batch=8192, eager=True).on and not choose(200, tokens_per_batch=8192, eager=True).on
    # What an engine shards is its own.
    several = Engine(torch.device("cuda"))
    several.kind, several.world_size = "zero2", 16
    seen: list[Setting] = []
    monkeypatch.setattr(
        ibft.estimate.checkpointing, "memory", lambda c, a, setting: seen.append(setting) or memory(c, a, setting)
    )
    choose(12, tokens_per_batch=8192, engine=several)
    assert [(setting.engine, setting.gpus) for setting in seen] == [("zero2", 16)]


@pytest.mark.parametrize(
    ("driver_name", "name"),
    [
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA H100 80GB HBM3", "h100-80gb"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA A10", "a10"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("AMD Instinct MI300X", "mi300x"),
        ("NVIDIA A10G", None),
        ("NVIDIA GH200 480GB", None),
        ("Tesla T4", None),
    ],
)
def test_names_that_drivers_give(driver_name: str, name: str | None) -> None:
    assert find_device(driver_name) == (None if name is None else DEVICES[name])


# ---------------------------------------------------------------------------------------------------------------------
# The command


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder with nothing but a config.json; what fits and what does not, and the options that make it fit."""
    published("deepseek-coder-1.3b").save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    command = f"estimate --base_model {tmp_path} --max_length 2048 --tokens_per_batch 65536 --gpus 16 --gpu l4 h200"
    assert main(command.split()) == 0
    printed = capsys.readouterr().out
    assert "1.35B parameters, 24 layers of 2048, 32,256 words, bfloat16" in printed
    assert "= 1,048,576 tokens; ddp" in printed and "15.8 GiB a GPU are never made" in printed
    assert re.search(r"^l4 +yes +2\d\.\d of 22 +on ", printed, re.MULTILINE)
    assert re.search(r"^h200 +yes +\d+\.\d of 140 +on ", printed, re.MULTILINE)
    assert main(f"{command} --no_gradient_checkpointing --method sft".split()) == 0
    printed = capsys.readouterr().out
    assert "0 of bottleneck" in printed and "7.9 GiB a GPU are never made" in printed
    assert re.search(r"^l4 +no ", printed, re.MULTILINE)
    flash, eager = (
        float(re.search(r"^without checkpointing.* ([\d.]+)$", text, re.MULTILINE)[1])  # type: ignore[index]
        for text in (printed, eager_of(f"{command} --method sft", capsys))
    )
    # 24 layers of 16 heads of 2048 scores a token, in float32 and in bfloat16; and of what is handed out 4% is lost.
    assert eager - flash == pytest.approx(1.04 * 24 * 16 * 2048 * 6 * 65536 / GIB, rel=0.01)
    assert "l4: does not fit as it is; it does with --gradient_checkpointing." in printed


def eager_of(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(f"{command} --attn_implementation eager".split()) == 0
    return capsys.readouterr().out


def test_every_size_up_to_a_thousand_gpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    published("llama-2-70b").save_pretrained(tmp_path)
    command = f"estimate --base_model {tmp_path} --gpus 1024 --gpu h100-80gb --engine"
    few = "--lora_target_modules q_proj"  # the wrapping of 560 modules takes seconds
    for engine, fit in (("fsdp2", "yes"), ("zero3", "yes"), ("zero2", "no"), ("ddp", "no")):
        assert main(f"{command} {engine} {few}".split()) == 0
        assert re.search(rf"^h100-80gb +{fit} ", capsys.readouterr().out, re.MULTILINE), engine


def test_measured_beside_estimated(capsys: pytest.CaptureFixture[str]) -> None:
    """The record in benchmarks/: every variant's memory within 5%, and what IB-FT adds to the time within 10%."""
    assert main(f"estimate --measured {ROOT / 'benchmarks' / 'results' / 'step.json'}".split()) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert len(lines) == 3
    for line in lines:
        error, flops, seconds = re.fullmatch(r".* ([+-][\d.]+)% +([\d.]+) +([\d.]+) +\d+", line).groups()  # type: ignore[union-attr]
        assert abs(float(error)) < 5 and abs(float(flops) / float(seconds) - 1) < 0.1


def test_measured_of_a_run(
    base_folder: Path, tasks_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = "--max_length 128 --bottleneck_dim 8 --lora_r 2 --max_steps 4 --logging_steps 2 --peak_tflops 0.5"
    command = f"train --base_model {base_folder} --dataset {tasks_file} --output_dir {tmp_path / 'out'} {small}"
    assert main(command.split()) == 0
    capsys.readouterr()
    assert main(f"estimate --measured {tmp_path / 'out'}".split()) == 0
    printed = capsys.readouterr().out
    assert "steps         3 to 4 of" in printed and "of 0.5 TFLOP/s" in printed and "% padding" in printed
    record = json.loads((tmp_path / "out" / "ibft.json").read_text())
    (tmp_path / "out" / "ibft.json").write_text(json.dumps({**record, "device": "NVIDIA H200"}))
    assert main(f"estimate --measured {tmp_path / 'out'}".split()) == 0
    assert re.search(r"allocated at the peak, [\d.]+ estimated", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("", "give --base_model, to estimate a training, or --measured, to compare with one"),
        ("--base_model {tmp} --measured x", "give --base_model, to estimate a training, or --measured"),
        ("--base_model ./nowhere", "base_model './nowhere' is not a folder"),
        ("--base_model {tmp}", "is a folder without config.json"),
        ("--base_model x --gpu h100", r"--gpu takes a10, .* not 'h100'\. Did you mean h200\?|Did you mean h100"),
        ("--base_model x --gpus 1025", "--gpus must be between 1 and 1,024, not 1025"),
        ("--base_model x --engine zero1", "--engine takes ddp or fsdp2 or zero2 or zero3, not 'zero1'"),
        ("--base_model x --tokens_per_batch 3000", r"must be a multiple of --max_length \(2048\), not 3000"),
        ("--base_model x --document_length 4096", r"must be at most --max_length \(2048\), not 4096"),
        ("--base_model x --load_in_4bit --engine fsdp2 --gpus 2", "fsdp2 cannot shard bitsandbytes' weights"),
        ("--measured {tmp}/nothing.json", "nothing.json' cannot be read: No such file"),
        ("--measured {tmp}", "metrics.jsonl' cannot be read: No such file"),
        ("--measured {tmp}/other.json", "holds neither the metrics of a run nor a record"),
        ("--base_modle x", "Did you mean --base_model"),
    ],
)
def test_wrong_inputs(line: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if "other" in line:
        (tmp_path / "other.json").write_text('{"seconds": 3}')
    assert main(["estimate", *line.format(tmp=tmp_path).split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("ibft: error: ") and error.count("\n") == 1 and re.search(sentence, error)


def test_an_adapter_that_does_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    TINY.save_pretrained(tmp_path)
    assert main(f"estimate --base_model {tmp_path} --lora_target_modules nothing".split()) == 2
    assert "the adapter does not fit the base model" in capsys.readouterr().err
