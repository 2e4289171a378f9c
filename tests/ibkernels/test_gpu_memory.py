"""What the ops hold on a GPU at the sizes of a model, and that their host code waits for nothing: without a GPU."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._pytree import tree_leaves

import ibkernels

pytest.importorskip("triton")

from fake_gpu import Inside, Memory, pretend

from ibkernels.gpu.wide_cross_entropy import rows_per_block

N, H, K, R, V = 16384, 4096, 256, 32, 102400  # those of the targets for an H100, in bfloat16
SMALL = 2**20  # vectors of N or V, and what is summed up in parts


@pytest.fixture
def on_an_h100(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)


def held(shapes: dict[str, tuple[int, ...]], call: Callable[..., Any]) -> int:
    """The most bytes that forward and backward hold beside inputs, outputs, gradients, and those of the outputs.

    By the names of inputs: "frozen" has no gradient, labels and rng are whole numbers.
    """
    with FakeTensorMode(), Memory() as memory:
        inputs = {
            name: torch.empty(shape, dtype=torch.int64)
            if name in ("labels", "rng")
            else torch.empty(shape, dtype=torch.bfloat16, requires_grad=name != "frozen")
            for name, shape in shapes.items()
        }
        outputs = tree_leaves(call(*inputs.values()))
        upstream = [torch.empty_like(output) for output in outputs]
        trained = [tensor for tensor in inputs.values() if tensor.requires_grad]
        gradients = torch.autograd.grad(outputs, trained, upstream)
        given = sum(tensor.untyped_storage().nbytes() for tensor in (*inputs.values(), *upstream))
        returned = sum(tensor.untyped_storage().nbytes() for tensor in (*outputs, *gradients))
    return memory.peak - given - returned


LINEAR = {"hidden": (N, H), "weight": (2 * K, H), "bias": (2 * K,), "rng": (2,)}
LORA = {"hidden": (N, H), "a": (R, H), "b": (2 * K, R), "bias": (2 * K,), "rng": (2,)}
HEAD = {"input": (N, H), "weight": (V, H), "labels": (N,)}
BRANCH = {"z": (N, K), "up": (H, K), "up_bias": (H,), "frozen": (V, H), "labels": (N,)}
ROWS = rows_per_block(V)
LOGITS = ROWS * V * 4  # a block in float32; its gradient takes its place


def lora(hidden: Tensor, a: Tensor, b: Tensor, bias: Tensor, rng: Tensor) -> tuple[Tensor, Tensor]:
    return ibkernels.variational_bottleneck(hidden, (a, b), bias, rng)


def branch(absorb: bool) -> Callable[..., Any]:
    def call(z: Tensor, up: Tensor, up_bias: Tensor, frozen: Tensor, labels: Tensor) -> Any:
        return ibkernels.bottleneck_cross_entropy(z, up, up_bias, frozen, labels, absorb=absorb)

    return call


CASES: dict[str, tuple[dict[str, tuple[int, ...]], Callable[..., Any], float]] = {
    # mu and raw logvar for backward, the gradient of both, and the weight's before it is rounded
    "linear": (LINEAR, ibkernels.variational_bottleneck, N * K * (2 + 4 + 2 * 2) + 2 * K * H * 2),
    # t and its gradient; eight parts of A's gradient
    "lora": (LORA, lora, 2 * N * R * 2 + 8 * R * H * 4),
    # [mu | logvar] again and its gradient in float32, that in bfloat16, where logvar was not clamped, the weight's
    "encode": (
        {name: LINEAR[name] for name in ("hidden", "weight", "bias")},
        ibkernels.encode,
        2 * N * K * (4 + 4 + 2) + N * K + 2 * K * H * 4,
    ),
    # the gradients of the sum, which backward scales
    "narrow head": (
        {"input": (N, K), "weight": (V, K), "labels": (N,)}, ibkernels.linear_cross_entropy, V * K * 4 + N * K * 2,
    ),
    "wide head": (HEAD, ibkernels.linear_cross_entropy, V * H * 4 + N * H * 2),
    # and no gradient of the weight, but that of a block's input before it is rounded
    "frozen head": (
        {"input": (N, H), "frozen": (V, H), "labels": (N,)}, ibkernels.linear_cross_entropy, LOGITS + ROWS * H * 4,
    ),
    # the gradient of M, and what takes its factors apart; the target for this op is 300 MB
    "branch, absorbed": (BRANCH, branch(True), 160e6),
    # the hidden states after the up-projection and their gradient
    "branch": (BRANCH, branch(False), LOGITS + 2 * N * H * 2),
}  # fmt: skip


@pytest.mark.usefixtures("on_an_h100")
@pytest.mark.parametrize("case", CASES)
def test_memory_beside_inputs_and_outputs(case: str) -> None:
    shapes, call, expected = CASES[case]
    assert 0.95 * expected <= held(shapes, call) <= expected + SMALL


@pytest.mark.usefixtures("on_an_h100")
def test_the_table_of_the_documentation() -> None:
    page = (Path(__file__).parents[2] / "docs" / "ibkernels.md").read_text()
    plain = {
        "branch": held(BRANCH, published),
        "frozen head": held(CASES["frozen head"][0], eager_head),
        "wide head": held(HEAD, eager_head),
    }
    ours = {name: f"{held(*CASES[name][:2]) / 1e6:,.0f} MB" for name in CASES}
    eager = {name: f"{count / 1e6:,.0f} MB" for name, count in plain.items()}
    for row in (
        f"| bottleneck, linear encoder | {ours['linear']} | |",
        f"| bottleneck, LoRA encoder of rank {R} | {ours['lora']} | |",
        f"| bottleneck's cross-entropy, absorbed, frozen head | {ours['branch, absorbed']} | {eager['branch']} |",
        f"| the same, not absorbed | {ours['branch']} | {eager['branch']} |",
        f"| the model's cross-entropy, frozen head | {ours['frozen head']} | {eager['frozen head']} |",
        f"| the same, trained head | {ours['wide head']} | {eager['wide head']} |",
    ):
        assert row in page, row


def test_what_is_counted() -> None:
    def call(x: Tensor, frozen: Tensor) -> Tensor:
        return (x @ frozen).exp().exp()

    # In backward the first exponential and both gradients are there at a time, and x's, which is returned, is not yet.
    assert held({"x": (1000, 10), "frozen": (10, 500)}, call) == (3 * 1000 * 500 - 1000 * 10) * 2


def eager_head(input: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """As transformers computes it."""
    return F.cross_entropy(F.linear(input, weight).float(), labels)


def published(z: Tensor, up: Tensor, up_bias: Tensor, frozen: Tensor, labels: Tensor) -> Tensor:
    return eager_head(F.linear(z, up, up_bias), frozen, labels)


class Scalings(Inside):
    """Products of a half-precision tensor, by the dtype in which they are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[torch.dtype] = []

    def saw(self, func: Any, args: Any, result: Any) -> None:
        name, tensors = func._schema.name, [argument for argument in args if isinstance(argument, Tensor)]
        if name in ("aten::mul", "aten::div") and any(tensor.dtype == torch.float16 for tensor in tensors):
            self.found.append(torch.result_type(*args[:2]))


@pytest.mark.usefixtures("on_an_h100")
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradients_are_scaled_in_float32(reduction: str) -> None:
    """By a vector of one: a scalar on a GPU is rounded to float16 before it is multiplied, 2^16 to infinity."""
    with FakeTensorMode(), Scalings() as scalings:
        input, weight = (torch.empty(size, 256, dtype=torch.float16, requires_grad=True) for size in (64, 512))
        labels, token_weight = torch.empty(64, dtype=torch.int64), torch.empty(64)
        loss: Any = ibkernels.linear_cross_entropy(
            input, weight, labels, token_weight=token_weight, reduction=reduction
        )
        torch.autograd.grad(loss.sum(), (input, weight))
    assert scalings.found and set(scalings.found) == {torch.float32}


def test_waiting_for_a_value_would_show() -> None:
    with pytest.raises(DataDependentOutputException):
        held({"x": (3,)}, lambda x: x * x.sum().item())
