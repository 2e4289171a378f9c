"""What a training step of 1.3B parameters holds on a GPU, counted without one: SFT, IB-FT, and what `estimate` says."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaConfig

from benchmarks.eager import EagerBottleneck, ib_loss
from ibft import IBConfig, IBModel
from ibft.estimate.activations import Activations, measure_activations
from ibft.estimate.cost import ModelCost
from ibft.estimate.step import Setting, memory
from ibft.loading import autocast, compute_in_base_dtype

pytest.importorskip("triton")

from fake_gpu import Memory, pretend
from outlines import lora, outline

TOKENS, LENGTH, LAYERS = 16384, 1024, 24
LABELS = TOKENS // 2
CONFIG = LlamaConfig(
    vocab_size=32256, hidden_size=2048, intermediate_size=5504, num_hidden_layers=LAYERS, num_attention_heads=16,
    num_key_value_heads=16, max_position_embeddings=TOKENS,
)  # fmt: skip
METHODS: dict[str, IBConfig | None] = {
    "sft": None,
    "ib": IBConfig(target_layer=15, bottleneck_dim=256),
    "ib, lora": IBConfig(target_layer=15, bottleneck_dim=256, encoder="lora"),
}


@pytest.fixture
def on_an_h100(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)


def with_shapes_alone(model: nn.Module) -> None:
    """A model on the meta device becomes, under a FakeTensorMode, one on the CPU; what is trained is float32."""
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and tensor.is_meta:
                    fake = torch.empty(tensor.shape, dtype=torch.float32 if tensor.requires_grad else tensor.dtype)
                    if isinstance(tensor, nn.Parameter):
                        fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
                    tensors[name] = fake  # type: ignore[assignment]


@functools.cache
def peak(method: str, checkpointing: bool, dropout: float = 0.0) -> int:
    """Bytes at the highest point of a step on one packed row, AdamW's moments in it; attention as flash kernels are."""
    model: Any = IBModel.from_base(outline(CONFIG), lora(lora_dropout=dropout), METHODS[method]).train()
    compute_in_base_dtype(model)

    def loss() -> Tensor:
        ids = torch.zeros(1, TOKENS, dtype=torch.int64)
        result: Tensor = model(
            input_ids=ids, position_ids=ids, labels=ids, noise_rows=ids, token_mask=ids.bool(),
            label_indices=torch.zeros(LABELS, dtype=torch.int64), num_items_in_batch=LABELS,
            num_kl_items_in_batch=TOKENS, noise_rng=torch.zeros(2, dtype=torch.int64), return_stats=False, **lengths(),
        ).loss  # fmt: skip
        return result

    return peak_of(model, loss, checkpointing)


@functools.cache
def published_peak(checkpointing: bool) -> int:
    """The same of the published step: all logits twice. One document a row, none of them shorter than the others."""
    model: Any = get_peft_model(outline(CONFIG), lora(lora_dropout=0.0)).train()
    with torch.device("meta"):
        model.branch = EagerBottleneck(CONFIG.hidden_size, 256)

    def loss() -> Tensor:
        ids = torch.zeros(TOKENS // LENGTH, LENGTH, dtype=torch.int64)
        batch = {"input_ids": ids, "position_ids": ids, "labels": ids, "use_cache": False, **lengths()}
        head = model.get_output_embeddings().weight
        return ib_loss(model, model.branch, head, batch, target_layer=15, alpha=0.2, beta=0.01)

    return peak_of(model, loss, checkpointing)


def lengths() -> dict[str, Any]:
    bounds = torch.zeros(TOKENS // LENGTH + 1, dtype=torch.int32)
    return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": LENGTH, "max_length_k": LENGTH}


def peak_of(model: Any, loss: Callable[[], Tensor], checkpointing: bool) -> int:
    """Of forward and backward beside weights and AdamW's moments."""
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with FakeTensorMode(allow_non_fake_inputs=True), Memory() as held:
        with_shapes_alone(model)
        moments = [torch.empty_like(p) for p in model.parameters() if p.requires_grad for _ in range(2)]
        with autocast(torch.device("cpu"), torch.bfloat16):
            result = loss()
        result.backward()
    assert moments
    return held.peak


@pytest.mark.usefixtures("on_an_h100")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_of_ib_holds_no_more_than_one_of_sft_by_2_percent(checkpointing: bool) -> None:
    sft = peak("sft", checkpointing)
    for method in ("ib", "ib, lora"):
        assert sft < peak(method, checkpointing) <= 1.02 * sft


@pytest.mark.usefixtures("on_an_h100")
@pytest.mark.parametrize("dropout", [0.0, 0.05])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_estimate_is_within_5_percent_of_what_is_counted(checkpointing: bool, dropout: float) -> None:
    model = IBModel.from_base(outline(CONFIG), lora(lora_dropout=dropout), METHODS["ib"])
    kept: Activations = measure_activations(outline(CONFIG), lora(lora_dropout=dropout))
    setting = Setting("ddp", 1, TOKENS, LENGTH, 1.0, LABELS / TOKENS, 1, checkpointing, False, 2)
    predicted = memory(ModelCost.of(model), kept, setting)
    assert predicted.total - predicted.reserved == pytest.approx(peak("ib", checkpointing, dropout), rel=0.05)


@pytest.mark.usefixtures("on_an_h100")
def test_the_figures_of_the_documentation() -> None:
    page, readme = (
        " ".join((Path(__file__).parents[2] / name).read_text().split()) for name in ("docs/scaling.md", "README.md")
    )
    for checkpointing in (False, True):
        sft, ib = peak("sft", checkpointing), peak("ib", checkpointing)
        more = f"{100 * (ib / sft - 1):.1f}% more"
        assert f"{ib / 2**30:.1f} GiB, {more} than SFT" in page and more in readme
        assert f"the published step {published_peak(checkpointing) / 2**30:.1f} GiB" in page
