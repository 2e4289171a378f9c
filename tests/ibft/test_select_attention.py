"""Which attention is taken, and why; what cannot be had is refused."""

import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, LlamaConfig

import ibft.attention
from ibft import InputError
from ibft.attention import Attention, select_attention
from ibft.document_attention import BY_DOCUMENT, FLASH, KERNELS, VARLEN

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LLAMA = LlamaConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=2)
DROPOUT = AutoConfig.for_model("starcoder2", hidden_size=64, num_attention_heads=4, attention_dropout=0.1)


def select(requested: str = "auto", device: torch.device = CUDA, config: Any = LLAMA, **changes: Any) -> Attention:
    settings = {"packing": "best-fit", "dtype": torch.float32 if device == CPU else torch.bfloat16, **changes}
    return select_attention(requested, device=device, base_config=config, **settings)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`gpu((9, 0), "flash_attention_2")`: a GPU of that compute capability, and flash-attn packages."""

    def pretend(capability: tuple[int, int], *installed: str, options: bool = True) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.version, "hip", None)
        for name, module in FLASH.items():
            monkeypatch.setattr(
                ibft.attention, f"is_flash_attn_{name[-1]}_available", lambda name=name: name in installed
            )
            fake: Any = ModuleType(module)
            fake.flash_attn_varlen_func = (lambda q, softcap=0.0, dropout_p=0.0: q) if options else (lambda q: q)
            monkeypatch.setitem(sys.modules, module, fake)

    return pretend


def test_the_order_on_a_gpu(gpu: Callable[..., None]) -> None:
    gpu((9, 0), "flash_attention_3", "flash_attention_2")
    assert select() == (KERNELS["flash_attention_3"], "installed, and made for this GPU")
    assert select().label == "flash_attention_3" and select().lengths == "device"
    gpu((8, 0), "flash_attention_3", "flash_attention_2")
    assert select().label == "flash_attention_2"
    gpu((9, 0), "flash_attention_2")
    assert select().label == "flash_attention_2"
    gpu((9, 0))
    assert select().implementation == VARLEN and select().lengths == "device"
    assert "of torch" in select().reason and "flash-attn 2 is not installed" in select().reason


def test_where_no_kernel_serves_documents_are_taken_one_by_one(gpu: Callable[..., None]) -> None:
    gpu((9, 0))
    chosen = select(dtype=torch.float32)
    assert chosen == (
        BY_DOCUMENT,
        "document by document; flash_attention_2: it computes in bfloat16, and the model is float32",
    )
    assert chosen.label == "varlen" and chosen.lengths == "host"
    asked = select("varlen", dtype=torch.float32)
    assert asked.implementation == BY_DOCUMENT and "asked for; document by document; torch's kernel: it" in asked.reason
    compiled = select(dtype=torch.float32, compiled=True)
    assert compiled.implementation == "sdpa" and compiled.lengths is None
    assert compiled.reason == (
        "documents of a packed row kept apart by a mask; varlen: a loop over documents, which --compile cannot take "
        "in; torch's kernel: it computes in bfloat16, and the model is float32"
    )
    alone = select(dtype=torch.float32, compiled=True, packing="none")
    assert alone.reason.startswith("one padded document per row; varlen: ")
    assert select(compiled=True).implementation == VARLEN
    assert select(device=torch.device("mps")).implementation == BY_DOCUMENT
    gpu((7, 5))
    assert select().implementation == BY_DOCUMENT and "Ampere" in select().reason


def test_on_rocm_documents_are_taken_one_by_one(gpu: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    gpu((9, 0))
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert select().implementation == BY_DOCUMENT and "torch's kernel: not tried on ROCm" in select().reason


@pytest.mark.parametrize(("config", "what"), [(AutoConfig.for_model("gemma2"), "softcap"), (DROPOUT, "dropout")])
def test_what_torchs_kernel_does_not_know_goes_to_flash_attn_or_the_loop(
    config: Any, what: str, gpu: Callable[..., None]
) -> None:
    assert select(device=CPU, config=config) == (BY_DOCUMENT, "document by document")
    gpu((8, 0), "flash_attention_2")
    assert select(config=config).label == "flash_attention_2"
    gpu((8, 0), "flash_attention_2", options=False)  # of a version that has neither
    assert select(config=config).implementation == BY_DOCUMENT
    assert f"torch's kernel: it has no {what} on attention scores" in select(config=config).reason
    with pytest.raises(InputError, match=rf"flash.* has no {what} on attention scores.*; varlen would work here"):
        select("flash_attention_2", config=config)
    assert select(config=config, compiled=True).implementation == ("eager" if what == "softcap" else "sdpa")


def test_the_order_on_a_cpu() -> None:
    chosen = select(device=CPU)
    assert chosen == (BY_DOCUMENT, "document by document") and chosen.label == "varlen" and chosen.lengths == "host"
    compiled = select(device=CPU, compiled=True)
    assert compiled.implementation == "sdpa" and "--compile" in compiled.reason and compiled.lengths is None
    with pytest.raises(InputError, match=r"varlen: a loop over documents, which --compile .*; sdpa would work here"):
        select("varlen", device=CPU, compiled=True)


@pytest.mark.parametrize("requested", ["flash_attention_3", "flash_attention_2", "varlen", "sdpa", "eager"])
def test_what_was_asked_for_comes_first(requested: str, gpu: Callable[..., None]) -> None:
    gpu((8, 0), "flash_attention_3", "flash_attention_2")
    assert select(requested).label == requested and select(requested).reason.startswith("asked for")


@pytest.mark.parametrize(
    ("requested", "settings", "sentence"),
    [
        ("flash_attention_2", {"device": CPU}, "needs a CUDA GPU, and this run is on the cpu; varlen would work"),
        ("flash_attention_2", {}, r"flash-attn 2 is not installed \(pip install .*\); varlen would work here"),
        ("flash_attention_3", {}, r"flash-attn 3 is not installed \(build it"),
        ("varlen", {"config": AutoConfig.for_model("gpt_oss")}, "attention in a way of its own; eager would work"),
        ("sdpa", {"config": AutoConfig.for_model("gemma2")}, "no softcap on attention scores, .*; varlen would work"),
    ],
)
def test_a_request_that_cannot_be_served(
    requested: str, settings: dict[str, Any], sentence: str, gpu: Callable[..., None]
) -> None:
    gpu((8, 0))
    with pytest.raises(InputError, match=f"--attn_implementation {requested}: .*{sentence}"):
        select(requested, **settings)


def test_a_package_built_for_another_torch(gpu: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    gpu((8, 0), "flash_attention_2")

    def broken(name: str) -> None:
        raise ImportError("undefined symbol: _ZN3c10")

    monkeypatch.setattr(ibft.attention, "importlib", SimpleNamespace(import_module=broken))
    assert select().implementation == VARLEN and "cannot be imported (undefined symbol" in select().reason
    with pytest.raises(InputError, match="undefined symbol"):
        select("flash_attention_2")


@pytest.mark.parametrize("width", [512, 4])
def test_heads_that_torchs_kernel_does_not_take(width: int, gpu: Callable[..., None]) -> None:
    gpu((8, 0))
    chosen = select(config=LlamaConfig(head_dim=width))
    assert chosen.implementation == BY_DOCUMENT
    assert f"its kernel takes heads of a multiple of 8 dimensions up to 256, not {width}" in chosen.reason


def test_values_of_another_width_are_taken_one_by_one(gpu: Callable[..., None]) -> None:
    gpu((8, 0))
    chosen = select(config=AutoConfig.for_model("deepseek_v3"))
    assert chosen.implementation == BY_DOCUMENT and "it needs keys and values of the same width" in chosen.reason


def test_sinks_are_left_to_eager(gpu: Callable[..., None]) -> None:
    gpu((9, 0), "flash_attention_2")
    sinks = AutoConfig.for_model("gpt_oss")
    assert select(config=sinks).implementation == "eager"  # what else it takes, transformers would download
