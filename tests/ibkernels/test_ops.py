"""The ops inside PyTorch: torch.library's own checks, torch.compile, autocast, activation checkpointing, tracing."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import ibkernels

N, H, K, R, V = 9, 12, 5, 2, 17
RNG = torch.tensor([3, 4])
OPS = torch.ops.ibkernels


def normal(*size: int, dtype: torch.dtype = torch.float32, grad: bool = True, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(size))
    return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(grad)


def labels_of(n: int) -> Tensor:
    return torch.where(torch.arange(n) % 3 == 1, -100, torch.arange(n) * 5 % V)


# ---- torch.library.opcheck: schema, autograd registration, fake kernels, and all of them under AOT dispatch ----------


def bottleneck_samples(dtype: torch.dtype) -> list[tuple[Any, ...]]:
    make = partial(normal, dtype=dtype)
    tail = (-4.0, 4.0, True, True, "")
    lora = make(R, H), make(2 * K, R)
    return [
        (make(N, H), make(2 * K, H), None, make(2 * K), RNG, None, *tail),
        (make(N, H), make(2 * K, H, grad=False), None, None, None, None, -1.0, 1.0, False, True, "reference"),
        (make(N, H, grad=False), *lora, make(2 * K), RNG, torch.arange(N) * 7, *tail),
        (make(N, H, grad=False), *(t.detach() for t in lora), None, RNG, None, -4.0, 4.0, True, False, ""),
        (make(1, H), make(2 * K, H), None, make(2 * K), RNG, None, *tail),
        (make(0, H), *lora, make(2 * K), RNG, None, *tail),
        (*(make(H, n).detach().T.requires_grad_() for n in (N, 2 * K)), None, None, RNG, None, *tail),
    ]


def encode_samples(dtype: torch.dtype) -> list[tuple[Any, ...]]:
    make = partial(normal, dtype=dtype)
    return [
        (make(N, H), make(2 * K, H), None, make(2 * K), -4.0, 4.0, ""),
        (make(N, H), make(R, H), make(2 * K, R), None, -4.0, 4.0, ""),
        (make(1, H), make(2 * K, H, grad=False), None, None, -4.0, 4.0, ""),
    ]


def cross_entropy_samples(dtype: torch.dtype) -> list[tuple[Any, ...]]:
    """(tensors, labels, token weight, options, per token, needs, statistics, backend) of the linear head."""
    make, weights = partial(normal, dtype=dtype), torch.rand(N)
    plain, full = (-100, 0.0, 0.0, None, 1.0), (-100, 0.1, 1e-3, 2.0, 0.5)
    linear = make(N, H), make(V, H), make(V)
    frozen = make(N, H), make(V, H, grad=False), None
    return [
        (*linear, labels_of(N), None, *plain, False, [True] * 3, False, ""),
        (*linear, labels_of(N), weights, *full, True, [True] * 3, True, ""),
        (*frozen, labels_of(N), None, *plain, False, [True, False, False], True, ""),
        (make(0, H), make(V, H), None, labels_of(0), None, *plain, False, [True, True, False], False, ""),
    ]


def bottleneck_cross_entropy_samples(dtype: torch.dtype) -> list[tuple[Any, ...]]:
    make, weights = partial(normal, dtype=dtype), torch.rand(N)
    plain, full = (-100, 0.0, 0.0, None, 1.0), (-100, 0.1, 1e-3, 2.0, 0.5)
    trained = make(N, K), make(H, K), make(H), make(V, H), make(V)
    frozen = make(N, K), make(H, K), make(H), make(V, H, grad=False), None
    return [
        (*frozen, labels_of(N), None, *plain, True, False, [True, True, True, False, False], False, ""),
        (*frozen, labels_of(N), None, *plain, False, False, [True, True, True, False, False], True, ""),
        (*trained, labels_of(N), weights, *full, True, False, [True] * 5, True, ""),
        (*trained, labels_of(N), weights, *full, False, True, [True] * 5, False, ""),
        (*trained, labels_of(N), None, *plain, True, True, [True] * 5, False, ""),
    ]


SAMPLES: dict[str, Callable[[torch.dtype], list[tuple[Any, ...]]]] = {
    "variational_bottleneck": bottleneck_samples,
    "encode": encode_samples,
    "linear_cross_entropy": cross_entropy_samples,
    "bottleneck_cross_entropy": bottleneck_cross_entropy_samples,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("op", "index"), [(op, i) for op in SAMPLES for i in range(len(SAMPLES[op](torch.float32)))])
def test_opcheck(op, index, dtype):
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {}
    torch.library.opcheck(getattr(OPS, op).default, SAMPLES[op](dtype)[index], **tolerance)


@pytest.mark.parametrize("backend", ["", "reference"])
def test_opcheck_of_noise(backend):
    for rows, columns in ((torch.arange(5), 20), (torch.arange(10)[::2], 16), (torch.arange(0), 3)):
        torch.library.opcheck(OPS.noise.default, (RNG, rows, columns, backend))


# ---- a step that uses every op ---------------------------------------------------------------------------------------


def make_parameters(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    shapes = {"weight": (2 * K, H), "bias": (2 * K,), "lora_a": (R, H), "lora_b": (2 * K, R)}
    shapes |= {"up_weight": (H, K), "up_bias": (H,), "head": (V, H)}
    return {name: normal(*shape, dtype=dtype, grad=name != "head", seed=5) for name, shape in shapes.items()}


def step(hidden: Tensor, rng: Tensor, labels: Tensor, p: dict[str, Tensor]) -> Tensor:
    z, kl = ibkernels.variational_bottleneck(hidden, p["weight"], p["bias"], rng)
    lora = p["lora_a"], p["lora_b"]
    lora_z, lora_kl = ibkernels.variational_bottleneck(hidden, lora, None, rng, kl_reduction="sum")
    mu, logvar = ibkernels.encode(hidden, p["weight"], p["bias"])
    noisy = hidden + 0.1 * ibkernels.noise(rng, torch.arange(hidden.shape[0]), H).to(hidden.dtype)
    ce, stats = ibkernels.linear_cross_entropy(noisy, p["head"], labels, return_stats=True, softcap=3.0)
    up = p["up_weight"], p["up_bias"], p["head"], labels
    absorbed = ibkernels.bottleneck_cross_entropy(z, *up, absorb=True, num_items=7)
    unabsorbed = ibkernels.bottleneck_cross_entropy(lora_z, *up, absorb=False, reduction="none")
    per_token = kl + lora_kl + (mu * logvar).mean(dim=1) + unabsorbed
    return ce + absorbed + (per_token * torch.arange(hidden.shape[0])).mean() + 0 * stats.entropy_sum


def loss_and_gradients(function: Callable[..., Tensor], n: int) -> list[Tensor]:
    parameters, hidden = make_parameters(), normal(n, H)
    loss = function(hidden, RNG, labels_of(n), parameters)
    trained = [hidden, *(p for p in parameters.values() if p.requires_grad)]
    return [loss.detach(), *torch.autograd.grad(loss, trained)]


@pytest.mark.parametrize(
    ("compiler", "sizes"), [({"backend": "inductor"}, (9,)), ({"backend": "aot_eager", "dynamic": True}, (9, 14, 5))]
)
def test_compile_without_graph_breaks_equals_eager(compiler, sizes):
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, **compiler)
    for index, n in enumerate(sizes):
        with torch._dynamo.config.patch(error_on_recompile=index > 0):  # one dynamic graph serves every size
            results = loss_and_gradients(compiled, n)
        for ours, eager in zip(results, loss_and_gradients(step, n), strict=True):
            torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-6)


def test_compiled_noise_is_fresh_in_every_call():
    """rng is a tensor made outside: a graph that had it baked in would repeat itself."""
    torch._dynamo.reset()
    weight, hidden = normal(2 * K, H), normal(N, H)
    compiled = torch.compile(ibkernels.variational_bottleneck, fullgraph=True, backend="aot_eager")
    draws = [compiled(hidden, weight, None, torch.tensor([3, offset]))[0] for offset in (0, 1)]
    assert not torch.allclose(*draws, atol=0.1)


# ---- autocast --------------------------------------------------------------------------------------------------------


def test_autocast_equals_the_explicit_cast():
    labels = labels_of(N)

    def run(cast: Callable[[Tensor], Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """The outputs and the gradients, each op casting its own input."""
        p, hidden = make_parameters(), normal(N, H)
        z, kl = ibkernels.variational_bottleneck(cast(hidden), p["weight"], p["bias"], RNG)
        mu, _ = ibkernels.encode(cast(hidden), p["weight"], p["bias"])
        ce = ibkernels.linear_cross_entropy(cast(hidden), p["head"], labels)
        ce_ib = ibkernels.bottleneck_cross_entropy(z, p["up_weight"], p["up_bias"], p["head"], labels)
        outputs = [z, kl, mu, ce, ce_ib]
        trained = [hidden, p["weight"], p["bias"], p["up_weight"], p["up_bias"]]
        upstreams = [torch.ones_like(output) for output in outputs]
        return outputs, list(torch.autograd.grad(outputs, trained, upstreams))

    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs, gradients = run(lambda hidden: hidden)
    assert [output.dtype for output in outputs] == [torch.bfloat16, *[torch.float32] * 4]
    assert {gradient.dtype for gradient in gradients} == {torch.float32}
    explicit_outputs, explicit_gradients = run(lambda hidden: hidden.bfloat16())
    assert all(map(torch.equal, outputs, explicit_outputs))
    assert all(map(torch.equal, gradients, explicit_gradients))


def test_autocast_leaves_float64_alone():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z, kl = ibkernels.variational_bottleneck(normal(N, H, dtype=torch.float64), normal(2 * K, H))
    assert z.dtype == kl.dtype == torch.float64


def test_backward_inside_autocast_computes_as_outside():
    """Products of the backward pass must not be cast behind the op's back."""
    gradients = []
    for inside in (False, True):
        hidden, parameters = normal(N, H), make_parameters()
        loss = step(hidden, RNG, labels_of(N), parameters)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside):
            gradients.append(torch.autograd.grad(loss, [hidden, parameters["weight"], parameters["lora_a"]]))
    assert all(map(torch.equal, *gradients))


# ---- activation checkpointing ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_draws_the_same_noise_again(use_reentrant):
    def block(hidden: Tensor, p: dict[str, Tensor]) -> Tensor:
        return step(hidden, ibkernels.rng_state(), labels_of(N), p)

    def run(function: Callable[..., Tensor]) -> list[Tensor]:
        torch.manual_seed(8)
        hidden, parameters = normal(N, H), make_parameters()
        loss = function(hidden, parameters)
        torch.rand(3)  # the generator moves on before the recomputation
        loss.backward()
        return [loss.detach(), hidden.grad, *(p.grad for p in parameters.values() if p.requires_grad)]

    plain, saved = run(block), run(partial(checkpoint, block, use_reentrant=use_reentrant))
    assert all(map(torch.equal, plain, saved))


# ---- tracing without data --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["fake", "meta"])
def test_shapes_and_dtypes_without_data(mode, dtype):
    def run(device: str) -> list[Tensor]:
        def make(*size: int) -> Tensor:
            return torch.empty(size, dtype=dtype, device=device, requires_grad=True)

        hidden, weight, rng = make(2, 3, H), make(2 * K, H), torch.zeros(2, dtype=torch.int64, device=device)
        z, kl = ibkernels.variational_bottleneck(hidden, weight, None, rng)
        mu, logvar = ibkernels.encode(hidden, (make(R, H), make(2 * K, R)))
        labels = torch.zeros(6, dtype=torch.int64, device=device)
        head = make(H, K), make(H), make(V, H)
        loss, stats = ibkernels.bottleneck_cross_entropy(z.view(6, K), *head, labels, return_stats=True)
        losses = ibkernels.linear_cross_entropy(hidden.view(6, H), head[2], labels, reduction="none")
        total = loss + losses.sum() + kl.sum() + mu.sum() + logvar.sum()
        gradients = torch.autograd.grad(total, [hidden, weight, *head])
        return [z, kl, mu, logvar, loss, losses, *stats, *gradients]

    real = run("cpu")
    if mode == "fake":
        with FakeTensorMode():
            traced = run("cpu")
    else:
        traced = run("meta")
    for ours, theirs in zip(traced, real, strict=True):
        assert (ours.shape, ours.dtype, ours.stride()) == (theirs.shape, theirs.dtype, theirs.stride())
