"""`variational_bottleneck` and `encode` against autograd of the formulas, written with torch alone."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import ibkernels
from ibkernels import reference

pytestmark = pytest.mark.ops("variational_bottleneck")
RNG = torch.tensor([0x0123456789ABCDEF, 0x100000005])
H, K, R = 24, 10, 3  # K is no multiple of 16, the width of the noise stream's blocks
NAMES = {"linear": ("weight",), "lora": ("lora_a", "lora_b")}

each_encoder = pytest.mark.parametrize("encoder", NAMES)

# What differs from 37 tokens with a bias, noise, row ids 0..36 and default options.
CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "no-bias": {"bias": False},
    "evaluation": {"rng": None},
    "row-ids": {"rows": "random"},
    "kl-sum": {"kl_reduction": "sum"},
    "own-range": {"logvar_range": (-5.0, 3.5)},
    "point-range": {"logvar_range": (-0.7, -0.7)},
    "wide-range": {"logvar_range": (-20.0, 20.0)},
    "batch-and-time": {"shape": (3, 5), "rows": "random"},
    "one-vector": {"shape": ()},
    "one-vector-with-row": {"shape": (), "rows": "random"},
    "one-token": {"shape": (1,)},
    "no-tokens": {"shape": (2, 0)},
    "tokens-of-three-shares": {"shape": (150,)},
    "every-other-token": {"layout": "strided"},
    "transposed": {"layout": "transposed", "shape": (3, 5), "rows": "random"},
    "columns-of-wider": {"layout": "columns"},
    "one-dimension": {"width": 1},
    "sixteen-dimensions": {"width": 16},
    "three-tiles-of-dimensions": {"width": 40},
    "whole-tiles-of-features": {"features": 32},
    "only-z": {"upstream": "z"},
    "only-kl": {"upstream": "kl"},
    "only-z-evaluation": {"upstream": "z", "rng": None},
}


def make_inputs(
    encoder: str, dtype: torch.dtype, shape=(37,), width=K, features=H, bias=True, layout="contiguous", **_
) -> dict:
    """Values that `dtype` represents; the parameters are float32 (float64 for float64).

    Raw logvar is near -8, 0 or 8, by the first feature: clamped below, not at all or above, and never so close to a
    bound that a rounding decides whether its gradient lives.
    """
    generator = torch.Generator().manual_seed(1)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    if layout == "strided":
        hidden = normal(2 * shape[0], *shape[1:], features)[::2]
    elif layout == "transposed":
        hidden = normal(*reversed(shape), features).transpose(0, 1)
    elif layout == "columns":
        hidden = normal(*shape, features + 5)[..., 2:-3]
    else:
        hidden = normal(*shape, features)
    assert hidden.is_contiguous() == (layout == "contiguous")
    hidden[..., 0] = normal(*hidden.shape[:-1]).round().clamp(-1, 1)
    spread = torch.tensor([0.5, 0.8]).repeat_interleave(width)[:, None]  # of mu, of raw logvar about its centre
    centre = 8 * torch.cat([torch.zeros(width), torch.ones(width)]) * (-1) ** torch.arange(2 * width)
    if encoder == "linear":
        weight = normal(2 * width, features) * spread / features**0.5
        weight[:, 0] = centre
        parameters = {"weight": weight}
    else:
        lora_a, lora_b = normal(R, features) / features**0.5, normal(2 * width, R) * spread / R**0.5
        lora_a[:, 0], lora_a[0], lora_b[:, 0] = 0, torch.eye(features)[0], centre
        parameters = {"lora_a": lora_a, "lora_b": lora_b}
    if bias:
        parameters["bias"] = normal(2 * width) * 0.3
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    leaves = {name: parameter.to(dtype).to(wide) for name, parameter in parameters.items()}
    return {"hidden": hidden, **leaves}


def weight_of(inputs: dict[str, Tensor]) -> Tensor | tuple[Tensor, Tensor]:
    return inputs["weight"] if "weight" in inputs else (inputs["lora_a"], inputs["lora_b"])


def row_ids(rows: str | None, shape: tuple[int, ...]) -> Tensor | None:
    if rows is None:
        return None
    return torch.randint(0, 2**40, shape, generator=torch.Generator().manual_seed(2))


def eager_encode(inputs: dict[str, Tensor], logvar_range=(-4.0, 4.0)) -> tuple[Tensor, Tensor]:
    raw = inputs["hidden"]
    for name in ("weight", "lora_a", "lora_b"):
        if name in inputs:
            raw = raw @ inputs[name].T
    if "bias" in inputs:
        raw = raw + inputs["bias"]
    mu, raw_logvar = raw.chunk(2, dim=-1)
    return mu, raw_logvar.clamp(*logvar_range)


def eager(
    inputs, rng=RNG, rows=None, logvar_range=(-4.0, 4.0), kl_reduction="mean", backend="reference", **_
) -> tuple[Tensor, Tensor]:
    """Design formulas in the dtype of `inputs`, one operation after the other.

    The noise is that of `backend`: test_noise.py holds it to the stream within 1e-6, which here would drown the rest.
    """
    mu, logvar = eager_encode(inputs, logvar_range)
    z = mu
    if rng is not None:
        ids = torch.arange(mu[..., 0].numel()) if rows is None else rows.reshape(-1)
        if backend == "reference":
            eps = reference.noise(rng, ids, mu.shape[-1], torch.float64)
        else:
            eps = ibkernels.noise(rng, ids, mu.shape[-1], backend=backend)
        eps = eps.view(mu.shape).to(mu.dtype)
        z = mu + torch.exp(logvar / 2) * eps
    kl = 0.5 * (mu**2 + torch.exp(logvar) - 1 - logvar)
    return z, getattr(kl, kl_reduction)(dim=-1)


def leaves(inputs: dict[str, Tensor], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    return {name: tensor.detach().to(dtype or tensor.dtype).requires_grad_() for name, tensor in inputs.items()}


def with_gradients(outputs: dict[str, Tensor], inputs: dict[str, Tensor], upstream=None) -> dict[str, Tensor]:
    """The outputs, and the gradients of the inputs for upstream gradients that differ in every element."""
    generator = torch.Generator().manual_seed(3)
    upstreams = {
        name: torch.randn(output.shape, generator=generator, dtype=torch.float64).to(torch.bfloat16).to(output.dtype)
        for name, output in outputs.items()
    }
    chosen = [name for name in outputs if upstream in (None, name)]
    gradients = torch.autograd.grad(
        [outputs[name] for name in chosen],
        list(inputs.values()),
        [upstreams[name] for name in chosen],
        materialize_grads=True,
    )
    named = {f"gradient of {name}": gradient for name, gradient in zip(inputs, gradients, strict=True)}
    return {**{name: output.detach() for name, output in outputs.items()}, **named}


@each_encoder
@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_equal_autograd_of_the_formulas(target, encoder, case, assert_accurate):
    options = CASES[case]
    inputs = make_inputs(encoder, target.dtype, **options)
    shape = inputs["hidden"].shape[:-1]
    rows = row_ids(options.get("rows"), shape)
    rng = options.get("rng", RNG)
    settings = {name: options[name] for name in ("logvar_range", "kl_reduction") if name in options}

    ours = leaves(inputs)
    ours["hidden"] = inputs["hidden"].detach().requires_grad_()  # keeps its strides
    z, kl = ibkernels.variational_bottleneck(
        ours["hidden"], weight_of(ours), ours.get("bias"), rng, rows=rows, backend=target.backend, **settings
    )
    assert z.dtype == target.dtype and z.shape[:-1] == shape
    assert kl.dtype == (torch.float64 if target.dtype == torch.float64 else torch.float32) and kl.shape == shape
    results = with_gradients({"z": z, "kl": kl}, ours, options.get("upstream"))
    for name, leaf in ours.items():
        assert results[f"gradient of {name}"].dtype == leaf.dtype

    expected = []
    for dtype in (target.dtype, torch.float64):
        copies = leaves(inputs, dtype)
        z, kl = eager(copies, rng, rows, **settings, backend=target.backend)
        expected.append(with_gradients({"z": z, "kl": kl}, copies, options.get("upstream")))
    # logvar's weights of the first feature are +-8 and cancel; with one row no larger error of torch's hides ours.
    largest_term = 8 * expected[1]["gradient of bias"].abs().max().item() if shape == () else 0.0
    assert_accurate(results, *expected, target.dtype, largest_term)


def test_the_clamp_acts_on_both_sides_of_every_case():
    for encoder, bounds in itertools.product(NAMES, ((-4.0, 4.0), (-5.0, 3.5))):
        _, logvar = eager_encode(make_inputs(encoder, torch.float64), bounds)
        shares = [(logvar == bound).double().mean().item() for bound in bounds]
        assert min(shares) > 0.15 and sum(shares) < 0.85


def test_the_gradient_of_logvar_lives_on_the_bound_and_dies_beyond(target):
    """As torch.clamp: raw logvar of exactly -4 and 4 passes its gradient on."""
    hidden = torch.ones(1, 1, dtype=target.dtype)
    raw = torch.tensor([-4.5, -4.0, 3.0, 4.0, 4.5])
    weight = torch.cat([torch.zeros(5), raw])[:, None].requires_grad_()
    _, kl = ibkernels.variational_bottleneck(hidden, weight, kl_reduction="sum", backend=target.backend)
    kl.backward()
    expected = torch.where(raw.abs() <= 4, (raw.exp() - 1) / 2, 0)
    # A backend may round the gradient of logvar to the compute dtype once, for its matrix products.
    rounding = max(1e-5, torch.finfo(target.dtype).eps / 2)
    torch.testing.assert_close(weight.grad[5:, 0], expected, rtol=rounding, atol=0)
    clamped = raw.clamp(-4, 4)
    torch.testing.assert_close(kl.float(), (0.5 * (clamped.exp() - 1 - clamped)).sum()[None], rtol=1e-6, atol=0)


def test_sums_are_float32_whatever_the_dtype(target):
    """z is rounded once, and KL not at all."""
    inputs = make_inputs("linear", target.dtype)
    z, kl = ibkernels.variational_bottleneck(
        inputs["hidden"], inputs["weight"], inputs["bias"], RNG, backend=target.backend
    )
    exact_z, exact_kl = eager({name: tensor.double() for name, tensor in inputs.items()})
    torch.testing.assert_close(kl.double(), exact_kl, rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(z.double(), exact_z, rtol=0.51 * torch.finfo(target.dtype).eps, atol=2e-5)


def test_float32_parameters_are_rounded_to_the_dtype_of_hidden(target):
    inputs = make_inputs("linear", target.dtype)
    generator = torch.Generator().manual_seed(5)
    for name in ("hidden", "weight"):
        shape = inputs[name].shape
        inputs[name] = torch.randn(shape, generator=generator).to(inputs[name].dtype)
    rounded = {**inputs, "weight": inputs["weight"].to(target.dtype)}
    results = [
        ibkernels.variational_bottleneck(each["hidden"], each["weight"], each["bias"], RNG, backend=target.backend)
        for each in (inputs, rounded)
    ]
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


@each_encoder
@pytest.mark.parametrize("parameters", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_gradients_come_in_each_parameters_dtype(target, encoder, parameters):
    inputs = leaves(make_inputs(encoder, target.dtype))
    inputs = {n: t if n == "hidden" else t.detach().to(parameters).requires_grad_() for n, t in inputs.items()}
    z, kl = ibkernels.variational_bottleneck(
        inputs["hidden"], weight_of(inputs), inputs["bias"], RNG, backend=target.backend
    )
    (z.float().sum() + kl.sum()).backward()
    for name, leaf in inputs.items():
        assert leaf.grad.dtype == leaf.dtype and leaf.grad.isfinite().all(), name


@each_encoder
def test_every_combination_of_frozen_tensors(target, encoder):
    inputs = make_inputs(encoder, target.dtype)

    def run(trained: tuple[str, ...]) -> tuple[dict[str, Tensor], bool]:
        own = {name: tensor.detach().requires_grad_(name in trained) for name, tensor in inputs.items()}
        z, kl = ibkernels.variational_bottleneck(
            own["hidden"], weight_of(own), own["bias"], RNG, backend=target.backend
        )
        if trained:
            (z.double().square().sum() + (kl * torch.arange(37)).sum()).backward()
        return {name: tensor.grad for name, tensor in own.items()}, z.requires_grad or kl.requires_grad

    complete, _ = run(tuple(inputs))
    for size in range(len(inputs)):
        for trained in itertools.combinations(inputs, size):
            gradients, connected = run(trained)
            assert connected == bool(trained)
            for name, gradient in gradients.items():
                assert (gradient is not None) == (name in trained), (name, trained)
                if gradient is not None:
                    torch.testing.assert_close(gradient, complete[name], rtol=1e-5, atol=1e-6)


@each_encoder
def test_gradcheck(encoder):
    inputs = leaves(make_inputs(encoder, torch.float64, shape=(5,)))

    def both(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        own = dict(zip(inputs, tensors, strict=True))
        return ibkernels.variational_bottleneck(own["hidden"], weight_of(own), own["bias"], RNG)

    def encoded(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        own = dict(zip(inputs, tensors, strict=True))
        return ibkernels.encode(own["hidden"], weight_of(own), own["bias"])

    assert torch.autograd.gradcheck(both, tuple(inputs.values()), fast_mode=True)
    assert torch.autograd.gradcheck(encoded, tuple(inputs.values()), fast_mode=True)


@each_encoder
@pytest.mark.parametrize("rng", [None, RNG], ids=["evaluation", "noise"])
def test_backward_reads_nothing_that_the_caller_may_overwrite(target, encoder, rng):
    """Twice over a retained graph, with z and kl themselves overwritten in between."""
    inputs = leaves(make_inputs(encoder, target.dtype))
    z, kl = ibkernels.variational_bottleneck(
        inputs["hidden"], weight_of(inputs), inputs["bias"], rng, backend=target.backend
    )
    upstream = [torch.ones_like(z), torch.ones_like(kl)]
    first = torch.autograd.grad([z, kl], list(inputs.values()), upstream, retain_graph=True)
    copies = [gradient.clone() for gradient in first]
    with torch.no_grad():
        z.detach().fill_(float("nan"))
        kl.detach().fill_(float("nan"))
    for gradient in first:
        gradient.zero_()
    second = torch.autograd.grad([z, kl], list(inputs.values()), upstream)
    assert all(map(torch.equal, second, copies))


@each_encoder
def test_expanded_upstream_gradients(target, encoder):
    """What z.sum() sends back has strides of zero."""
    gradients = []
    for expand in (True, False):
        inputs = leaves(make_inputs(encoder, target.dtype))
        z, kl = ibkernels.variational_bottleneck(
            inputs["hidden"], weight_of(inputs), inputs["bias"], RNG, backend=target.backend
        )
        ones = [torch.ones((), dtype=t.dtype).expand(t.shape) if expand else torch.ones_like(t) for t in (z, kl)]
        gradients.append(torch.autograd.grad([z, kl], list(inputs.values()), ones))
    assert all(map(torch.equal, *gradients))


@each_encoder
@pytest.mark.parametrize("training", [True, False])
def test_nothing_is_kept_for_a_backward_pass_that_cannot_come(target, encoder, training, monkeypatch):
    op, kept = torch.ops.ibkernels.variational_bottleneck, []

    def record(*arguments: Any) -> tuple[Tensor, ...]:
        outputs = op(*arguments)
        kept.append(sum(saved.numel() for saved in outputs[2:]))
        return outputs

    monkeypatch.setattr(torch.ops.ibkernels, "variational_bottleneck", record)
    inputs = leaves(make_inputs(encoder, target.dtype))
    frozen = {name: tensor.detach() for name, tensor in inputs.items()}
    for own, grad_enabled in ((inputs, training), (inputs if training else frozen, True)):
        with torch.set_grad_enabled(grad_enabled):
            ibkernels.variational_bottleneck(own["hidden"], weight_of(own), own["bias"], RNG, backend=target.backend)
    assert len(kept) == 2 and all((size > 0) == training for size in kept)


@each_encoder
def test_what_is_saved_for_backward(target, encoder):
    """The docstring: beside the arguments, mu and float32 raw logvar, or hidden A^T."""
    inputs = leaves(make_inputs(encoder, target.dtype))
    arguments = {tensor.data_ptr() for tensor in (*inputs.values(), RNG)}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in arguments and tensor.numel():
            saved[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ibkernels.variational_bottleneck(
            inputs["hidden"], weight_of(inputs), inputs["bias"], RNG, backend=target.backend
        )
    size, wide = target.dtype.itemsize, max(4, target.dtype.itemsize)
    assert sum(saved.values()) == (37 * K * (size + wide) if encoder == "linear" else 37 * R * size)


def test_the_noise_follows_the_rows_not_their_order(target):
    inputs = make_inputs("linear", target.dtype)
    order = torch.randperm(37, generator=torch.Generator().manual_seed(0))
    arguments = inputs["weight"], inputs["bias"], RNG

    def run(hidden: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        return ibkernels.variational_bottleneck(hidden, *arguments, rows=rows, backend=target.backend)

    z, kl = run(inputs["hidden"], None)
    permuted_z, permuted_kl = run(inputs["hidden"][order], order)
    tolerance = {"rtol": 2 * torch.finfo(target.dtype).eps, "atol": 1e-5}
    torch.testing.assert_close(permuted_z, z[order], **tolerance)
    torch.testing.assert_close(permuted_kl, kl[order], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(run(inputs["hidden"], order)[0], z, atol=0.1)


# ---- encode ----------------------------------------------------------------------------------------------------------

ENCODE_CASES = ("default", "no-bias", "own-range", "batch-and-time", "one-vector", "one-token", "no-tokens")
ENCODE_CASES += ("transposed", "columns-of-wider", "only-mu", "only-logvar")


@pytest.mark.ops("encode")
@each_encoder
@pytest.mark.parametrize("case", ENCODE_CASES)
def test_encode(target, encoder, case, assert_accurate):
    options = {"upstream": case.removeprefix("only-")} if case.startswith("only") else CASES[case]
    inputs = make_inputs(encoder, target.dtype, **options)
    bounds = options.get("logvar_range", (-4.0, 4.0))
    ours = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
    mu, logvar = ibkernels.encode(ours["hidden"], weight_of(ours), ours.get("bias"), logvar_range=bounds)
    assert mu.shape == logvar.shape == (*inputs["hidden"].shape[:-1], K)
    assert mu.dtype == logvar.dtype == (torch.float64 if target.dtype == torch.float64 else torch.float32)
    results = with_gradients({"mu": mu, "logvar": logvar}, ours, options.get("upstream"))
    expected = []
    for dtype in (target.dtype, torch.float64):
        copies = leaves(inputs, dtype)
        mu, logvar = eager_encode(copies, bounds)
        expected.append(with_gradients({"mu": mu, "logvar": logvar}, copies, options.get("upstream")))
    assert_accurate(results, *expected, target.dtype)
