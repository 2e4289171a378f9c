"""The GPU's path for wide heads, at the width of a test: blocks of logits, and the fused kernel on them."""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

import ibkernels

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="with a GPU, tests/gpu does this")
N, V, D = 37, 50, 24
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "smoothing": {"label_smoothing": 0.2},
    "z-loss": {"z_loss": 0.1},
    "softcap": {"softcap": 3.0},
    "scale": {"logit_scale": 0.3},
    "all": {"label_smoothing": 0.1, "z_loss": 0.05, "softcap": 2.0, "logit_scale": 1.7, "reduction": "none"},
}


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every head is wide, and a block of logits holds 16 rows, so that there are three, the last of them ragged."""
    from ibkernels.gpu import configs, wide_cross_entropy

    monkeypatch.setattr(configs, "widest", lambda *_: 0)
    monkeypatch.setattr(wide_cross_entropy, "LOGITS_BYTES", 16 * 4 * V)
    monkeypatch.setattr(wide_cross_entropy, "_WEIGHT_ROWS", 16)


def tensors(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    made = {
        name: torch.randn(size, generator=generator, dtype=torch.float64)
        for name, size in {"x": (N, D), "weight": (V, D), "bias": (V,)}.items()
    }
    return {name: tensor.to(torch.float16).to(dtype).requires_grad_() for name, tensor in made.items()}


def run(dtype: torch.dtype, backend: str, trained: bool, **options: Any) -> dict[str, torch.Tensor]:
    own = tensors(dtype)
    own["weight"].requires_grad_(trained)
    generator = torch.Generator().manual_seed(2)
    labels = torch.randint(0, V, (N,), generator=generator)
    labels[::5] = -100
    weights = torch.rand(N, generator=generator).to(torch.float16).to(dtype)
    loss, stats = ibkernels.linear_cross_entropy(
        own["x"], own["weight"], labels, bias=own["bias"], token_weight=weights, backend=backend, return_stats=True,
        **options,
    )  # fmt: skip
    upstream = torch.linspace(0.5, 1.5, loss.numel(), dtype=torch.float64).reshape(loss.shape).to(loss.dtype)
    loss.backward(upstream)
    assert trained or own["weight"].grad is None
    gradients = {f"gradient of {name}": t.grad for name, t in own.items() if t.grad is not None}
    counted = {"entropy": stats.entropy_sum, "correct": stats.num_correct.double(), "lse": stats.lse}
    return {"loss": loss.detach(), **counted, **gradients}


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("case", [*OPTIONS, "a block wider than a row"])
def test_it_equals_the_float64_reference(
    case: str, dtype: torch.dtype, trained: bool, assert_accurate: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    if case not in OPTIONS:
        from ibkernels.gpu import configs

        monkeypatch.setitem(configs._INTERPRETED, "BV", 128)
    options = OPTIONS.get(case, {})
    results = run(dtype, "triton", trained, **options)
    low, exact = (run(d, "reference", trained, **options) for d in (dtype, torch.float64))
    # Half-precision gradients of logits are rounded once, before the library's products.
    term = max(tensor.abs().max().item() for name, tensor in exact.items() if name.startswith("gradient"))
    assert_accurate(results, low, exact, dtype, largest_term=term)
