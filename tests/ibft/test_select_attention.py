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
from ibft.attention import REGISTERED, VARLEN, Attention, select_attention

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LLAMA = LlamaConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=2)


def select(requested: str = "auto", device: torch.device = CUDA, config: Any = LLAMA, **changes: Any) -> Attention:
    settings = {"packing": "best-fit", "dtype": torch.float32 if device == CPU else torch.bfloat16, **changes}
    return select_attention(requested, device=device, base_config=config, **settings)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`gpu((9, 0), "flash_attention_2")`: a GPU of that compute capability, and flash-attn packages."""

    def pretend(capability: tuple[int, int], *installed: str, softcap: bool = True) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.version, "hip", None)
        for name, module in ibft.attention.FLASH.items():
            monkeypatch.setattr(
                ibft.attention, f"is_flash_attn_{name[-1]}_available", lambda name=name: name in installed
            )
            fake: Any = ModuleType(module)
            fake.flash_attn_varlen_func = (lambda q, softcap=0.0: q) if softcap else (lambda q: q)
            monkeypatch.setitem(sys.modules, module, fake)

    return pretend


def test_the_order_on_a_gpu(gpu: Callable[..., None]) -> None:
    gpu((9, 0), "flash_attention_3", "flash_attention_2")
    assert select() == (REGISTERED["flash_attention_3"], "installed, and made for this GPU")
    assert select().label == "flash_attention_3" and select().takes_lengths
    gpu((8, 0), "flash_attention_3", "flash_attention_2")
    assert select().label == "flash_attention_2"
    gpu((9, 0), "flash_attention_2")
    assert select().label == "flash_attention_2"
    gpu((9, 0))
    assert select().implementation == VARLEN
    assert "of torch" in select().reason and "flash-attn 2 is not installed" in select().reason
    assert select(dtype=torch.float32) == (
        "sdpa",
        "documents of a packed row kept apart by its mask; varlen: it computes in bfloat16, and the model is float32",
    )
    assert select(dtype=torch.float32, packing="none").reason.startswith("one padded document per row; varlen: ")
    gpu((7, 5))
    assert select().implementation == "sdpa" and "Ampere" in select().reason


def test_the_order_on_a_cpu() -> None:
    chosen = select(device=CPU)
    assert chosen == (VARLEN, "document by document") and chosen.label == "varlen" and chosen.takes_lengths
    compiled = select(device=CPU, compiled=True)
    assert compiled.implementation == "sdpa" and "--compile" in compiled.reason and not compiled.takes_lengths


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
        ("varlen", {"dtype": torch.float32}, "computes in bfloat16, and the model is float32; sdpa would work here"),
        ("varlen", {"device": torch.device("mps")}, "needs a CUDA GPU, and this run is on the mps; sdpa would work"),
        ("varlen", {"config": LlamaConfig(attention_dropout=0.1)}, "no attention dropout, which .* sdpa would work"),
        ("varlen", {"config": LlamaConfig(head_dim=512)}, "multiple of 8 dimensions up to 256, not 512"),
        ("varlen", {"config": LlamaConfig(head_dim=4)}, "multiple of 8 dimensions up to 256, not 4"),
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


def test_a_softcap_goes_to_what_has_one(gpu: Callable[..., None]) -> None:
    gemma = AutoConfig.for_model("gemma2")
    assert select(device=CPU, config=gemma).implementation == "eager"
    gpu((8, 0), "flash_attention_2")
    assert select(config=gemma).label == "flash_attention_2"
    gpu((8, 0), "flash_attention_2", softcap=False)
    assert select(config=gemma).implementation == "eager"
    with pytest.raises(InputError, match=r"this flash-attn 2 has no softcap .*; eager would work here"):
        select("flash_attention_2", config=gemma)
    for requested in ("varlen", "sdpa"):
        with pytest.raises(InputError, match=f"{requested}: .*; eager would work here"):
            select(requested, config=gemma)


def test_sinks_and_an_old_torch_are_left_to_others(gpu: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    gpu((9, 0), "flash_attention_2")
    sinks = AutoConfig.for_model("gpt_oss")
    assert select(config=sinks).implementation == "eager"  # what else it takes, transformers would download
    gpu((9, 0))
    monkeypatch.setattr(ibft.attention, "varlen_attn", lambda query, is_causal=False: query)
    assert select().implementation == "sdpa" and "varlen_attn has no scale" in select().reason
