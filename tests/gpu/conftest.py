"""The ops on a GPU (`make gpu`), or the same tests at toy sizes in Triton's interpreter (`make gpu DRY=1`).

Elsewhere, as in a plain `make test`, they are skipped. IBKERNELS_DRY=1 asks for the dry mode.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.gpu_problems import DRY, keep_regimes_apart

if DRY:
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic library GEMMs ask for

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32}
# What a backend may err beyond twice plain torch, relative to a tensor's largest value: one rounding to the dtype (of
# the factors, for tf32), and in float32 the order of sums over thousands of terms.
FLOOR = {"bf16": 2**-9, "fp16": 2**-12, "tf32": 2**-11, "fp32": 2**-20}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = None
    if not DRY and not torch.cuda.is_available():
        reason = "needs a GPU, or IBKERNELS_DRY=1: see `make gpu`"
    elif not DRY and os.environ.get("TRITON_INTERPRET") == "1":
        reason = "Triton interprets its kernels in this process; `make gpu` runs them on the GPU"
    for item in items:
        if reason and Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One seed, nothing overridden, exact float32 products; afterwards the GPU's memory is given back."""
    monkeypatch.delenv("IBKERNELS_BACKEND", raising=False)
    monkeypatch.delenv("IBKERNELS_AUTOTUNE", raising=False)  # the timings may search; a test that does says so
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(0)
    if DRY:
        from ibkernels.gpu import heads

        monkeypatch.setattr(heads, "_is_narrow", heads._is_narrow)  # puts it back afterwards
        keep_regimes_apart()
    yield
    torch.backends.cuda.matmul.allow_tf32 = False
    if not DRY:
        torch.cuda.empty_cache()


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN, so that an element nobody wrote shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.fixture
def dtype(surroundings: None, precision: str) -> torch.dtype:
    """That of the test's `precision`, with torch's own switch for TF32 set to it."""
    if DRY and precision in ("bf16", "tf32"):
        pytest.skip(f"Triton's interpreter does not round to {precision} as a GPU does")
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    return DTYPES[precision]


@pytest.fixture(scope="session")
def assert_accurate() -> Callable[..., None]:
    """Each tensor's largest and RMS error to `exact` are at most twice torch's in the same precision, plus FLOOR."""

    def check(ours: dict[str, Tensor], torchs: dict[str, Tensor], exact: dict[str, Tensor], precision: str) -> None:
        assert ours.keys() == torchs.keys() == exact.keys()
        faults = []
        for name, truth in exact.items():
            assert ours[name].shape == truth.shape, f"{name}: {tuple(ours[name].shape)}, not {tuple(truth.shape)}"
            scale = truth.abs().max().item()
            for what, error, torch_error in zip(
                ("max", "RMS"), _errors(ours[name], truth), _errors(torchs[name], truth), strict=True
            ):
                if not error <= 2 * torch_error + FLOOR[precision] * scale:
                    faults.append(f"{name}: {what} error {error:.2e}, torch's {torch_error:.2e}, largest {scale:.2e}")
        assert not faults, "\n".join(faults)

    return check


def _errors(tensor: Tensor, truth: Tensor) -> tuple[float, float]:
    """The largest and the RMS error; one copy in float64, of what may be the gradient of a large head."""
    error = tensor.to(torch.float64, copy=True).sub_(truth).abs_()
    return error.max().item(), error.square_().mean().sqrt().item()
