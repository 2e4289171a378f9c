"""Tensors of more than 2^31 elements: the last program of each kernel finds the last of them.

The memory is reserved and hardly used: of a grid one program runs, on a few pages. An offset that 32 bits do not hold
lies outside of the tensors, which the watch over every kernel (conftest.py) reports before anything is touched.
"""

import math
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ibkernels import reference
from ibkernels.options import LogitOptions

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("there is a GPU: tests/gpu runs the kernels there", allow_module_level=True)
if os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") < 12 * 2**30:
    pytest.skip("the system may not reserve 10 GiB at once", allow_module_level=True)

from triton.runtime.interpreter import InterpreterBuilder

from ibkernels.gpu import bottleneck_linear, bottleneck_lora, bottleneck_lora_bwd, configs, cross_entropy

WIDTH = 128  # of every matrix
MANY = 2**31 // WIDTH + 37
RNG = torch.tensor([3, 4])
EVEN = torch.full((1, 1), 1 / WIDTH)  # a product with it is a mean
ENCODERS = {
    "linear": (EVEN.expand(2 * WIDTH, WIDTH),),
    "lora": (EVEN.expand(WIDTH, WIDTH), EVEN.expand(2 * WIDTH, WIDTH)),
}
RANGE = (-8.0, 8.0)


class LastProgram:
    """In the place of a kernel: launches the last program of a grid alone."""

    def __init__(self, kernel: Any, first: list[int], launched: dict[str, tuple[Any, ...]]) -> None:
        self.kernel, self.first, self.launched = kernel, first, launched

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **settings: Any) -> None:
            self.first[:] = [size - 1 for size in grid]
            self.launched[self.kernel.fn.__name__] = arguments
            self.kernel[(1,) * len(grid)](*arguments, **settings)

        return launch


@pytest.fixture(autouse=True)
def launched(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[Any, ...]]:
    """Of every kernel only the last program runs; its arguments in its latest launch, by its name."""
    first: list[int] = []
    arguments: dict[str, tuple[Any, ...]] = {}
    program_id = InterpreterBuilder.create_get_program_id

    def counted_on(self: InterpreterBuilder, axis: int) -> Any:
        handle = program_id(self, axis)
        handle.data = handle.data + handle.data.dtype.type(first[axis])
        return handle

    monkeypatch.setattr(InterpreterBuilder, "create_get_program_id", counted_on)
    for module in (bottleneck_linear, bottleneck_lora, bottleneck_lora_bwd, cross_entropy):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, LastProgram(getattr(module, name), first, arguments))
    torch.use_deterministic_algorithms(False)  # they would write NaN to all that torch.empty gives
    for block, size in {"BM": 64, "BK": WIDTH}.items():
        monkeypatch.setitem(configs._INTERPRETED, block, size)
    return arguments


def many(last: float, dtype: torch.dtype = torch.float16) -> Tensor:
    """[MANY, WIDTH]: `last` in the last row, zeros (as fresh memory is) in the others."""
    tensor = torch.empty(MANY, WIDTH, dtype=dtype)
    tensor[-1] = last
    return tensor


def noise(row: int) -> Tensor:
    return reference.noise(RNG, torch.tensor([row]), WIDTH, torch.float64)[0]


def assert_close(ours: Tensor, exact: Tensor | float) -> None:
    torch.testing.assert_close(ours.double(), torch.as_tensor(exact).double().expand(ours.shape), rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("layout", ["many rows", "rows far apart"])
@pytest.mark.parametrize("encoder", ENCODERS)
def test_forward(encoder: str, layout: str) -> None:
    """Of a last row whose mu and logvar are 0.5."""
    hidden = many(0.5)
    if layout == "rows far apart":
        hidden = hidden[MANY % 2**18 - 1 :: 2**18]
        assert hidden.stride(0) * (len(hidden) - 1) >= 2**31
    module = {"linear": bottleneck_linear, "lora": bottleneck_lora}[encoder]
    z, kl, *saved = module.forward(hidden, *ENCODERS[encoder], None, RNG, None, RANGE, 1 / WIDTH, True)
    assert_close(z[-1], 0.5 + math.exp(0.25) * noise(len(hidden) - 1))
    assert_close(kl[-1], 0.5 * (0.25 + math.exp(0.5) - 1.5))
    for tensor in saved:  # mu and raw logvar, or t
        assert_close(tensor[-1], 0.5)


def test_backward_of_the_linear_encoder(launched: dict[str, tuple[Any, ...]]) -> None:
    """Of dz = 1 in a last row whose mu and logvar are 0; beyond the kernel there are GEMMs of the library."""
    saved = many(0.0), many(0.0, torch.float32)
    bottleneck_linear.backward(
        many(1.0), None, many(0.0), *ENCODERS["linear"], None, RNG, None, saved, RANGE, 1.0, (False, False, False)
    )
    grad = launched["bottleneck_linear_bwd_kernel"][6]
    assert_close(grad[-1, :WIDTH], 1.0)
    assert_close(grad[-1, WIDTH:], 0.5 * noise(MANY - 1))


def test_backward_of_the_lora_encoder(monkeypatch: pytest.MonkeyPatch, launched: dict[str, tuple[Any, ...]]) -> None:
    """Of dz = dkl = 1 in a last row of t = 1/2, so that mu and logvar are too; the last of the shares has few rows."""
    grad_kl = torch.empty(MANY)
    grad_kl[-1] = 1
    monkeypatch.setattr(bottleneck_lora_bwd, "_shares", lambda *_: (-(-MANY // 2**16), 2**16))
    bottleneck_lora_bwd.backward(
        many(1.0), grad_kl, many(1.0), *ENCODERS["lora"], None, RNG, None, many(0.5), RANGE, 1.0, (True,) * 4
    )
    grad_b, grad_bias = launched["bottleneck_lora_bwd_b_kernel"][7:9]
    grad_t, _, _, grad_hidden, grad_a = launched["bottleneck_lora_bwd_hidden_kernel"][:5]
    of_mu, of_logvar = torch.ones(WIDTH) + 0.5, 0.5 * (math.exp(0.25) * noise(MANY - 1) + math.exp(0.5) - 1)
    slope = torch.cat([of_mu.double(), of_logvar])
    assert_close(grad_bias[-1], slope)
    assert_close(grad_t[-1], slope.sum() / WIDTH)
    assert_close(grad_hidden[-1, -16:], slope.sum() / WIDTH)  # the last tile of columns
    assert_close(grad_a[-1, :, -16:], slope.sum() / WIDTH)
    assert_close(grad_b[-1], 0.5 * slope[:, None])


@pytest.mark.parametrize(("rows", "first"), [(MANY, 0), (MANY // 7 + 19, 7 * 32)], ids=["one split", "last of eight"])
def test_cross_entropy_of_many_rows(rows: int, first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a last row of ones, over the words from `first` on: the last split's."""
    monkeypatch.setattr(configs, "splits", lambda *_: 8)
    words = torch.randn(first + 13, WIDTH, generator=torch.Generator().manual_seed(0)).half() / 8
    labels, upstream = torch.empty(rows, dtype=torch.int64), torch.empty(rows)
    labels[-1], upstream[-1] = first + 7, 1
    result = cross_entropy.narrow_cross_entropy(
        many(1.0)[-rows:], words, None, labels, upstream, LogitOptions(), (True, False, False), True
    )
    logits = words.double().sum(dim=1)
    assert_close(result.losses[-1], logits[first:].logsumexp(dim=0) - logits[first + 7])
    pull = logits[first:].softmax(dim=0) @ words[first:].double()
    assert_close(result.grad_input[-1], pull - words[first + 7].double())


class InPlaceOf:
    """A kernel of which no program runs: it gives some of its arguments, by number, a value."""

    def __init__(self, values: dict[int, float]) -> None:
        self.values = values

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def fill(*arguments: Any, **settings: Any) -> None:
            for number, value in self.values.items():
                arguments[number].fill_(value)

        return fill


def of_many_words(
    splits: Callable[..., int], label: int, needs: tuple[bool, bool, bool], patch: pytest.MonkeyPatch
) -> Any:
    """Logits 0 but for the last, which is 1."""
    patch.setattr(configs, "splits", splits)
    x, labels = torch.ones(1, WIDTH, dtype=torch.float16), torch.tensor([label])
    return cross_entropy.narrow_cross_entropy(
        x, many(1 / WIDTH), None, labels, torch.ones(1), LogitOptions(), needs, False
    )


def test_cross_entropy_of_many_words(monkeypatch: pytest.MonkeyPatch, launched: dict[str, tuple[Any, ...]]) -> None:
    """Each block of words is a split, of which the last has five; to put them all together would take hours."""
    monkeypatch.setattr(cross_entropy, "cross_entropy_finish_kernel", InPlaceOf({14: 1.0, 15: 0.25, 16: -0.75}))
    result = of_many_words(
        lambda device, row_blocks, column_blocks: column_blocks, MANY - 2, (True, True, False), monkeypatch
    )
    peak, total, *_, pull = launched["cross_entropy_fwd_kernel"][3:9]
    assert_close(peak[-1], 1.0)
    assert_close(total[-1], 1 + 3 * math.exp(-1))  # without the label's
    assert_close(pull[-1], 1 / WIDTH)
    assert_close(result.grad_weight[-1], 0.25)
    assert_close(result.grad_weight[-2], -0.75)


def test_cross_entropy_of_the_last_of_many_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "cross_entropy_fwd_kernel", InPlaceOf({3: 1.0, 4: 1.0, 8: 0.0}))
    result = of_many_words(lambda *_: 1, MANY - 1, (True, False, False), monkeypatch)
    assert_close(result.losses, math.log(2))  # of a sum of exp(logit - 1) that is 1, and the label's
    assert_close(result.grad_input, -0.5 / WIDTH)
