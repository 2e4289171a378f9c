"""One op suite over the backends: `target` runs a test for each backend and dtype that serve the ops of its marker.

A backend that `ibkernels.backends` gains is tested without a line changed here. Uninitialised memory is NaN throughout.
"""

import importlib.util
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from ibkernels import backends

# What a backend may err even where plain torch happens to be exact, relative to a tensor's largest value: one rounding
# to a low-precision dtype, four in float32, whose sums every backend may order as it likes.
FLOOR = {torch.float32: 2**-22, torch.bfloat16: 2**-9, torch.float16: 2**-12}


class Target(NamedTuple):
    """The backend (as `backend=` takes it) and the dtype of the activations."""

    backend: str
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.backend}-{str(self.dtype).removeprefix('torch.')}"


def targets(ops: tuple[str, ...]) -> list[Target]:
    """Where all of `ops` are served on the CPU."""
    dtypes = (torch.float32,) if "noise" in ops else backends.FLOATS
    return [
        Target(backend.name, dtype)
        for backend in backends._BACKENDS
        for dtype in dtypes
        if all(backend.refusal(op, "cpu", dtype) is None for op in ops)
    ]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "ops(*names): the ops whose backends and dtypes `target` goes through")
    config.addinivalue_line(
        "markers", "large: too large for Triton's interpreter, or about memory that it is not the one to use"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "target" in metafunc.fixturenames:
        marker = metafunc.definition.get_closest_marker("ops")
        assert marker is not None, "a test of `target` needs the marker ops(...)"
        large = metafunc.definition.get_closest_marker("large") is not None
        chosen = [target for target in targets(marker.args) if not (large and target.backend == "triton")]
        metafunc.parametrize("target", chosen, ids=str)


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """The tensors are small: threads would only wait for one another, most of all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN (the largest value, for integers), so that an element nobody wrote shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.fixture(autouse=True)
def watched() -> Iterator[None]:
    """Kernels that run in Triton's interpreter use no memory that they would not on a GPU, whatever a test is about."""
    if importlib.util.find_spec("triton") is None:
        yield
        return
    from kernel_memory import watch

    with watch():
        yield


@pytest.fixture(autouse=True)
def without_override(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests choose their backends themselves."""
    monkeypatch.delenv("IBKERNELS_BACKEND", raising=False)


@pytest.fixture(scope="session")
def assert_accurate() -> Callable[..., None]:
    """`assert_accurate(ours, torchs, exact)`: dictionaries of tensors, `torchs` computed by plain torch in our dtype.

    float64: equal to 1e-9. Otherwise, for each tensor, our largest and our RMS error against `exact` are at most twice
    those of torch, plus FLOOR times the tensor's largest exact value, or times `largest_term` where the sums behind it
    have terms so much larger than their result that torch's own error is luck.
    """

    def check(
        ours: dict[str, Tensor],
        torchs: dict[str, Tensor],
        exact: dict[str, Tensor],
        dtype: torch.dtype,
        largest_term: float = 0.0,
    ) -> None:
        assert ours.keys() == torchs.keys() == exact.keys()
        for name, truth in exact.items():
            assert ours[name].shape == truth.shape, f"{name}: {tuple(ours[name].shape)}, not {tuple(truth.shape)}"
            if truth.numel() == 0:
                continue
            scale = truth.abs().max().item()
            mine = (ours[name].double() - truth).abs()
            if dtype == torch.float64:
                assert mine.max() <= 1e-9 * max(1.0, scale), f"{name} is off by {mine.max():.2e} (scale {scale:.2e})"
                continue
            theirs = (torchs[name].double() - truth).abs()
            floor = FLOOR[dtype] * max(scale, largest_term)
            for what, error, torch_error in (("max", mine.max(), theirs.max()), ("RMS", _rms(mine), _rms(theirs))):
                message = f"{name}: {what} error {error:.2e}, torch's {torch_error:.2e}, largest value {scale:.2e}"
                assert error <= 2 * torch_error + floor, message

    return check


def _rms(error: Tensor) -> Tensor:
    return error.square().mean().sqrt()
