"""What `benchmarks.gpu` times: each op of `ibkernels`, plain PyTorch, other libraries, and the floor of the machine.

Floors compute less than the op: its matrix products alone, or a copy of the bytes it cannot avoid.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import ibkernels
from benchmarks.gpu_problems import (
    DEVICE,
    DRY,
    MEASURED,
    Named,
    bottleneck_head_inputs,
    eager_bottleneck,
    encoder_inputs,
    exact_bottleneck_head,
    exact_head,
    head_inputs,
    leaves,
    upstream_of,
    weight_of,
    with_gradients,
)
from benchmarks.peers import Head, gpu_heads, torch_heads

DTYPE = torch.float32 if DRY else torch.bfloat16  # which Triton's interpreter does not round to
TOLERANCE = 1e-4 if DRY else 2e-2  # ||x - x64|| / ||x64|| of every output and gradient: a few roundings to DTYPE
OURS, EAGER, COMPILED = "ibkernels", "eager", "torch.compile"
COPY, GEMMS = "floor: copy", "floor: GEMMs"

Floors = dict[str, Callable[[], object]]
Call = Callable[[bool], Named]  # outputs; True: with the noise that the float64 result has


class Case(NamedTuple):
    """One table. A variant runs its whole pass for the gate and the memory, and `steps` makes what is timed."""

    calls: dict[str, Call]
    inputs: Named
    exact: Callable[[], Named]
    backward: str  # "none": forward alone; "alone": timed without its forward; "with": both are timed
    floors: Floors
    moved: dict[str, int]  # bytes that the memory-bound must move, by variant and floor
    left_out: dict[str, str]  # variants that are not there, and why

    def run(self, name: str, checked: bool) -> Named:
        """Outputs of a variant, and its gradients where the case has a backward pass."""
        outputs = self.calls[name](checked)
        return outputs if self.backward == "none" else with_gradients(outputs, self.inputs)

    def step(self, name: str) -> Callable[[], object]:
        """What is timed."""
        if self.backward != "alone":
            return partial(self.run, name, False)
        outputs = self.calls[name](False)
        wanted = [tensor for tensor in self.inputs.values() if tensor.requires_grad]
        return partial(
            torch.autograd.grad, list(outputs.values()), wanted, upstream_of(outputs), retain_graph=True
        )  # fmt: skip


def cases() -> Iterator[tuple[str, Callable[[], Case]]]:
    """Names, and what makes each, so that the memory of one is free for the next."""
    for encoder in ("linear", "lora"):
        for direction in ("forward", "backward"):
            yield f"bottleneck, {encoder}: {direction}", partial(encoder_case, encoder, direction == "backward")
    yield "bottleneck cross-entropy: forward + backward", bottleneck_head_case
    yield "wide cross-entropy, frozen head: forward + backward", wide_head_case


def encoder_case(encoder: str, backward: bool) -> Case:
    """Forward as in training (what backward needs is saved), or backward alone."""
    n, h, k, r, _ = MEASURED
    inputs = leaves(encoder_inputs(MEASURED, encoder, DTYPE))
    rng, rows = torch.tensor([0, 1], device=DEVICE), torch.arange(n, device=DEVICE)
    eps = ibkernels.noise(rng, rows, k, backend="triton")
    compiled = compile_(eager_bottleneck)

    def ours(checked: bool) -> Named:
        z, kl = ibkernels.variational_bottleneck(
            inputs["hidden"], weight_of(inputs), inputs["bias"], rng, backend="triton"
        )
        return {"z": z, "kl": kl}

    calls: dict[str, Call] = {
        OURS: ours,
        EAGER: lambda checked: eager_bottleneck(inputs, eps if checked else None),
        COMPILED: lambda checked: compiled(inputs, eps if checked else None),
    }

    def exact() -> Named:
        copies = leaves(inputs, torch.float64)
        outputs = eager_bottleneck(copies, eps)
        return with_gradients(outputs, copies) if backward else outputs

    hidden = inputs["hidden"].detach()
    floors: Floors
    moved: dict[str, int] = {}
    if encoder == "linear":
        weight, grad = inputs["weight"].detach(), torch.randn(n, 2 * k, device=DEVICE).to(DTYPE)
        floors = {GEMMS: (lambda: (grad @ weight, grad.T @ hidden)) if backward else (lambda: hidden @ weight.T)}
    else:
        target = torch.empty_like(hidden)
        floors = {COPY: lambda: target.copy_(hidden)}
        if not backward:
            size = hidden.element_size()
            moved = {COPY: 2 * n * h * size, OURS: n * (h + k + r) * size + n * 4 + r * (h + 2 * k) * size}
    return Case(calls, inputs, exact, "alone" if backward else "none", floors, moved, {})


def bottleneck_head_case() -> Case:
    """Forward and backward of the bottleneck's cross-entropy, the model's head frozen."""
    data, labels = bottleneck_head_inputs(MEASURED, DTYPE)
    inputs = leaves(data, None, ("head_weight",))
    z, up, up_bias, head = inputs.values()

    def ours(checked: bool) -> Named:
        loss: Any = ibkernels.bottleneck_cross_entropy(z, up, up_bias, head, labels, backend="triton")
        return {"loss": loss}

    def published(z: Tensor, up: Tensor, up_bias: Tensor, head: Tensor) -> Tensor:
        return cross_entropy(F.linear(F.linear(z, up, up_bias), head), labels)

    def absorbed(z: Tensor, up: Tensor, up_bias: Tensor, head: Tensor) -> Tensor:
        return cross_entropy(F.linear(z, head @ up, head @ up_bias), labels)

    compiled, compiled_absorbed = compile_(published), compile_(absorbed)
    calls: dict[str, Call] = {
        OURS: ours,
        EAGER: lambda checked: {"loss": published(z, up, up_bias, head)},
        COMPILED: lambda checked: {"loss": compiled(z, up, up_bias, head)},
        "eager, absorbed": lambda checked: {"loss": absorbed(z, up, up_bias, head)},
        "torch.compile, absorbed": lambda checked: {"loss": compiled_absorbed(z, up, up_bias, head)},
    }
    grad = torch.randn(z.shape[0], head.shape[0], device=DEVICE, dtype=DTYPE)

    @torch.no_grad()
    def products() -> None:
        matrix = head @ up
        del_matrix = grad.T @ z
        _ = z @ matrix.T, grad @ matrix, head.T @ del_matrix

    return Case(calls, inputs, partial(exact_bottleneck_head, inputs, labels), "with", {GEMMS: products}, {}, {})


def wide_head_case() -> Case:
    """Forward and backward of the model's own cross-entropy, its head frozen."""
    data, labels = head_inputs(MEASURED.tokens, MEASURED.hidden, MEASURED.vocabulary, DTYPE)
    inputs = leaves(data, None, ("weight",))
    x, weight = inputs["input"], inputs["weight"]

    def ours(checked: bool) -> Named:
        loss: Any = ibkernels.linear_cross_entropy(x, weight, labels, backend="triton")
        return {"loss": loss}

    def published(x: Tensor, weight: Tensor) -> Tensor:
        return cross_entropy(F.linear(x, weight), labels)

    compiled = compile_(published)
    calls: dict[str, Call] = {
        OURS: ours,
        EAGER: lambda checked: {"loss": published(x, weight)},
        COMPILED: lambda checked: {"loss": compiled(x, weight)},
    }
    others, left_out = _other_heads()
    for name, other in others.items():
        calls[name] = lambda checked, other=other: {"loss": other(x, weight, labels)}  # type: ignore[misc]

    def exact() -> Named:
        loss, gradient = exact_head(x, weight, labels)
        return {"loss": loss, "gradient of input": gradient}

    grad = torch.randn(x.shape[0], weight.shape[0], device=DEVICE, dtype=DTYPE)

    @torch.no_grad()
    def products() -> None:
        _ = x @ weight.T, grad @ weight

    return Case(calls, inputs, exact, "with", {GEMMS: products}, {}, left_out)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """As transformers computes it: of the logits in float32."""
    return F.cross_entropy(logits.float(), labels)


def compile_(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile with its defaults; the dry mode leaves code generation out."""
    return torch.compile(function, fullgraph=True, dynamic=False, backend="aot_eager" if DRY else "inductor")


def _other_heads() -> tuple[dict[str, Head], dict[str, str]]:
    """Other libraries' cross-entropies of (input, weight, labels), and why those that are left out are."""
    found, left_out = torch_heads((1024, 4096))
    if DRY:
        return found, left_out | dict.fromkeys(("Liger", "cut-cross-entropy"), "the dry mode leaves it out")
    others, reasons = gpu_heads()
    return found | others, left_out | reasons
