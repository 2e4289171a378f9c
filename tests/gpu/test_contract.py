"""What a training loop relies on: determinism, graphs, compilation, no waits, recomputation, memory."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import ibkernels
from benchmarks.gpu_problems import (
    DEVICE,
    DRY,
    MEASURED,
    SHAPES,
    Named,
    Shape,
    bottleneck_head_inputs,
    encoder_inputs,
    head_inputs,
    leaves,
    peak_bytes,
    synchronise,
    upstream_of,
    weight_of,
    with_gradients,
)

DTYPE = torch.float16 if DRY else torch.bfloat16  # which the interpreter cannot round to
SHAPE = SHAPES["small" if DRY else "7B"]


class Step:
    """Forward and backward pass of an op: called with an rng tensor, it gives outputs and gradients."""

    def __init__(self, inputs: Named, forward: Callable[[Tensor], Named]) -> None:
        self.inputs, self.forward = inputs, forward
        self.upstream: list[Tensor] | None = None  # made once: a captured graph may not draw it

    def __call__(self, rng: Tensor) -> Named:
        outputs = self.forward(rng)
        if self.upstream is None:
            self.upstream = upstream_of(outputs)
        return with_gradients(outputs, self.inputs, self.upstream)


def bottleneck(shape: Shape, encoder: str) -> Step:
    inputs = leaves(encoder_inputs(shape, encoder, DTYPE))

    def forward(rng: Tensor) -> Named:
        z, kl = ibkernels.variational_bottleneck(
            inputs["hidden"], weight_of(inputs), inputs["bias"], rng, backend="triton"
        )
        return {"z": z, "kl": kl}

    return Step(inputs, forward)


def encode(shape: Shape) -> Step:
    inputs = leaves(encoder_inputs(shape, "linear", DTYPE))

    def forward(rng: Tensor) -> Named:
        mu, logvar = ibkernels.encode(inputs["hidden"], weight_of(inputs), inputs["bias"], backend="triton")
        return {"mu": mu, "logvar": logvar}

    return Step(inputs, forward)


def head(shape: Shape, width: int, frozen: tuple[str, ...] = ()) -> Step:
    inputs, labels = head_inputs(shape.tokens, width, shape.vocabulary, DTYPE)
    inputs = leaves(inputs, None, frozen)

    def forward(rng: Tensor) -> Named:
        loss: Any = ibkernels.linear_cross_entropy(**inputs, labels=labels, backend="triton")
        return {"loss": loss}

    return Step(inputs, forward)


def bottleneck_head(shape: Shape, absorb: bool) -> Step:
    inputs, labels = bottleneck_head_inputs(shape, DTYPE)
    inputs = leaves(inputs, None, ("head_weight",))

    def forward(rng: Tensor) -> Named:
        loss: Any = ibkernels.bottleneck_cross_entropy(**inputs, labels=labels, absorb=absorb, backend="triton")
        return {"loss": loss}

    return Step(inputs, forward)


STEPS: dict[str, Callable[[Shape], Step]] = {
    "bottleneck, linear": lambda shape: bottleneck(shape, "linear"),
    "bottleneck, LoRA": lambda shape: bottleneck(shape, "lora"),
    "encode": encode,
    "narrow head": lambda shape: head(shape, shape.width),
    "wide head": lambda shape: head(shape, shape.hidden, ("weight",)),
    "bottleneck head, absorbed": lambda shape: bottleneck_head(shape, True),
    "bottleneck head, unabsorbed": lambda shape: bottleneck_head(shape, False),
}
each_op = pytest.mark.parametrize("op", STEPS)
each_encoder = pytest.mark.parametrize("encoder", ["linear", "LoRA"])


def rng_of(offset: int) -> Tensor:
    return torch.tensor([7, offset], device=DEVICE)


def assert_same(one: Named, other: Named) -> None:
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


@each_op
def test_runs_agree_bit_for_bit(op: str) -> None:
    """Warps that do not wait for each other where they must would differ in some of many runs, not in each."""
    step = STEPS[op](SHAPE)
    first = step(rng_of(1))
    for _ in range(2 if DRY else 20):
        assert_same(first, step(rng_of(1)))


@each_op
def test_nothing_waits_for_the_device(op: str) -> None:
    step, rng = STEPS[op](SHAPE), rng_of(1)
    step(rng)  # compiles, and fills caches of the device's properties
    with no_waiting():
        step(rng)


@each_op
def test_a_graph_replays_what_a_call_gives(op: str) -> None:
    """With the (seed, offset) that the tensor holds at each replay."""
    step, rng = STEPS[op](SHAPE), rng_of(0)
    replay = captured(lambda: step(rng))
    before: Named = {}
    for offset in (1, 2):
        rng.copy_(rng_of(offset))
        results = replay()
        assert_same(results, step(rng_of(offset)))
        if before and op.startswith("bottleneck, "):
            assert not torch.equal(before["z"], results["z"])
        before = results


@each_encoder
def test_a_graph_that_draws_its_own_rng_state_replays_with_fresh_noise(encoder: str) -> None:
    step = STEPS[f"bottleneck, {encoder}"](SHAPE)
    replay = captured(lambda: step(ibkernels.rng_state(DEVICE)))
    first, second = replay(), replay()
    assert not torch.equal(first["z"], second["z"])
    assert torch.equal(first["kl"], second["kl"])


@each_op
def test_compiles_without_a_graph_break(op: str) -> None:
    """The kernels are opaque to the compiler; of what is about them, a division may be fused and rounded otherwise."""
    step = STEPS[op](SHAPE)
    expected = step(rng_of(1))
    torch.compiler.reset()
    step.forward = torch.compile(step.forward, fullgraph=True, backend="aot_eager" if DRY else "inductor")
    for name, tensor in step(rng_of(1)).items():
        torch.testing.assert_close(tensor, expected[name], rtol=2 * torch.finfo(tensor.dtype).eps, atol=0)


@each_encoder
def test_a_compiled_layer_draws_its_own_noise(encoder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`rng_state()` inside the graph: noise afresh at each call, and torch's seed rules."""
    monkeypatch.setenv("IBKERNELS_BACKEND", "triton")  # in the dry mode the CPU has others
    rank = {"encoder_rank": SHAPE.rank} if encoder == "LoRA" else {}
    layer = ibkernels.VariationalBottleneck(
        SHAPE.hidden, SHAPE.width, encoder=encoder.lower(), device=DEVICE, dtype=torch.float32, **rank
    )
    hidden = encoder_inputs(SHAPE, "linear", DTYPE)["hidden"].requires_grad_()
    used = {name: tensor for name, tensor in layer.named_parameters() if not name.startswith("up_")}
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager" if DRY else "inductor")

    def draw(seed: int) -> Named:
        torch.manual_seed(seed)
        z, kl = compiled(hidden)
        return with_gradients({"z": z, "kl": kl}, {"hidden": hidden, **used})

    first = draw(3)
    assert_same(first, draw(3))
    assert not torch.equal(first["z"], draw(4)["z"])
    assert not torch.equal(compiled(hidden)[0], compiled(hidden)[0])  # without a seed between them
    mu, logvar = layer.encode(hidden)
    eps = (first["z"] - mu) / (0.5 * logvar).exp()
    assert abs(eps.mean()) < 0.2 and abs(eps.std() - 1) < 0.2
    # Backward draws what forward drew: the gradient of z's sum to logvar's bias is the sum of std * eps / 2.
    torch.manual_seed(3)
    (grad,) = torch.autograd.grad(compiled(hidden)[0].float().sum(), used["bias"])
    expected = (0.5 * (first["z"] - mu)).sum(dim=0)
    assert (grad[SHAPE.width :] - expected).norm() <= 2e-2 * expected.norm()


def test_a_count_in_host_memory_does_not_wait() -> None:
    inputs, labels = head_inputs(SHAPE.tokens, SHAPE.width, SHAPE.vocabulary, DTYPE)
    # A power of two: a GPU divides by a number in host memory by multiplying with its reciprocal.
    counts: list[Any] = [torch.tensor(64), 64, torch.tensor(64, device=DEVICE)]
    losses = []
    for _ in range(2):  # the first compiles
        with no_waiting() if losses else contextlib.nullcontext():
            losses = [
                ibkernels.linear_cross_entropy(**inputs, labels=labels, num_items=count, backend="triton")
                for count in counts
            ]
    assert losses[0] == losses[1] == losses[2]


@each_encoder
def test_recomputation_in_backward_draws_the_same_noise(encoder: str) -> None:
    inputs = leaves(encoder_inputs(SHAPE, "linear" if encoder == "linear" else "lora", DTYPE))

    def layer(hidden: Tensor) -> Tensor:
        rng = ibkernels.rng_state(DEVICE)
        z, kl = ibkernels.variational_bottleneck(hidden, weight_of(inputs), inputs["bias"], rng, backend="triton")
        return (z.float().square() * kl[:, None]).sum()

    results = []
    for recompute in (False, True):
        torch.manual_seed(3)
        loss = checkpoint(layer, inputs["hidden"], use_reentrant=False) if recompute else layer(inputs["hidden"])
        gradients = torch.autograd.grad(loss, list(inputs.values()))
        results.append({"loss": loss.detach(), **dict(zip(inputs, gradients, strict=True))})
    assert_same(*results)


@each_encoder
def test_no_rows_give_no_outputs_and_zero_gradients(encoder: str) -> None:
    step = STEPS[f"bottleneck, {encoder}"](SHAPE._replace(tokens=0))
    for name, tensor in step(rng_of(1)).items():
        assert tensor.count_nonzero() == 0 and tensor.isfinite().all(), name


@pytest.mark.parametrize("width", [SHAPE.width, SHAPE.hidden], ids=["narrow", "wide"])
def test_no_labels_give_no_loss_and_zero_gradients(width: int) -> None:
    for name, tensor in head(SHAPE._replace(tokens=0), width)(rng_of(1)).items():
        assert tensor.count_nonzero() == 0 and tensor.isfinite().all(), name


@each_op
def test_a_single_row(op: str) -> None:
    """Triton compiles a kernel anew for a size of 1."""
    for name, tensor in STEPS[op](SHAPE._replace(tokens=1))(rng_of(1)).items():
        assert tensor.isfinite().all(), name


@pytest.mark.parametrize("rank", [64, 128, 160])
def test_a_higher_rank(rank: int) -> None:
    """Beyond what fits on chip, the linear encoder's kernels behind a library GEMM: as B A in one matrix, roughly."""
    step = bottleneck(SHAPE._replace(rank=rank), "lora")
    ours, inputs = step(rng_of(1)), {name: tensor.detach().float() for name, tensor in step.inputs.items()}
    whole = inputs["lora_b"] @ inputs["lora_a"]
    z, kl = ibkernels.variational_bottleneck(inputs["hidden"], whole, inputs["bias"], rng_of(1), backend="reference")
    for name, exact in (("z", z), ("kl", kl)):
        assert (ours[name].float() - exact).norm() <= 2e-2 * exact.norm(), name


@pytest.mark.skipif(DRY or torch.cuda.device_count() < 2, reason="needs two GPUs")
@each_encoder
def test_tensors_on_another_device_than_the_current_one(encoder: str) -> None:
    step = STEPS[f"bottleneck, {encoder}"](SHAPE)
    expected, there = step(rng_of(1)), torch.device("cuda:1")
    inputs = {name: tensor.detach().to(there).requires_grad_() for name, tensor in step.inputs.items()}
    z, kl = ibkernels.variational_bottleneck(
        inputs["hidden"], weight_of(inputs), inputs["bias"], rng_of(1).to(there), backend="triton"
    )
    upstream = [tensor.to(there) for tensor in step.upstream or []]
    for name, tensor in with_gradients({"z": z, "kl": kl}, inputs, upstream).items():
        torch.testing.assert_close(tensor.cpu(), expected[name].cpu(), rtol=1e-2, atol=1e-2, msg=name)


def test_a_search_for_configurations(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of a few steps; its winners are used in a graph, and are no slower than what is shipped by more than noise."""
    from ibkernels.gpu import autotune

    every = autotune.neighbours
    monkeypatch.setattr(autotune, "neighbours", lambda config: list(every(config))[:3])
    monkeypatch.setattr(autotune, "_known", {})
    step, rng = STEPS["bottleneck, LoRA"](SHAPE), rng_of(1)
    shipped = step(rng)
    monkeypatch.setenv("IBKERNELS_AUTOTUNE", "1")
    monkeypatch.setenv("IBKERNELS_AUTOTUNE_DIR", str(tmp_path))
    tuned = step(rng)
    found = [autotune.read(path) for path in tmp_path.iterdir()]
    assert len(found) == 4 and all(winner.milliseconds <= winner.shipped_milliseconds for winner in found)
    for name, tensor in tuned.items():
        assert (tensor.float() - shipped[name].float()).norm() <= 2e-2 * shipped[name].float().norm(), name
    with no_waiting():
        again = step(rng)
    assert_same(tuned, again)
    assert_same(tuned, captured(lambda: step(rng))())


def budgets() -> dict[str, int]:
    """Bytes beyond inputs and outputs that forward and backward may hold at N=16384, H=4096, K=256, V=102400, bf16."""
    from ibkernels.gpu.wide_cross_entropy import rows_per_block

    n, h, k, r, v = MEASURED
    small = 32 * 2**20  # partial sums, vectors of N or V, float32 gradients of small parameters
    logits = rows_per_block(v) * v * 4  # a block in float32; its gradient takes its place
    return {
        "bottleneck, linear": n * k * (2 + 4) + 2 * n * k * 2 + small,  # mu, raw logvar; the gradient of both
        "bottleneck, LoRA": 2 * n * r * 2 + small,  # t and its gradient
        "encode": 3 * 2 * n * k * 4 + small,  # [mu | logvar] and its gradient in float32
        "narrow head": n * k * 4 + v * k * 4 + small,  # the pull of the softmax, the head's float32 gradient
        "wide head": logits + n * h * 2 + small,  # and the gradient that backward scales
        "bottleneck head, absorbed": 300 * 10**6,
        "bottleneck head, unabsorbed": logits + 2 * n * h * 2 + small,  # up-projected states and their gradient
    }


@each_op
def test_memory_stays_within_its_budget(op: str) -> None:
    step, rng = STEPS[op](MEASURED), rng_of(1)
    peak, budget = peak_bytes(lambda: step(rng)), budgets()[op]
    assert peak <= budget, f"{peak / 1e6:.0f} MB beyond inputs and outputs, of {budget / 1e6:.0f} MB"


class _NoReading(TorchDispatchMode):
    """What a dry run can tell of the waits: outside of the ops' implementations the host reads no tensor's value."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in _READS, f"{func} would wait for the device"
        return func(*args, **(kwargs or {}))


_READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default, torch.ops.aten.nonzero.default)


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """Makes a wait of the host for the device an error."""
    if DRY:
        with _NoReading():
            yield
        return
    synchronise()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def captured(step: Callable[[], Named]) -> Callable[[], Named]:
    """Captures a CUDA graph of the step; each call of the result replays it (dry mode: runs the step)."""
    if DRY:
        return step
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step()

    def replay() -> Named:
        graph.replay()
        return {name: tensor.clone() for name, tensor in outputs.items()}

    return replay
