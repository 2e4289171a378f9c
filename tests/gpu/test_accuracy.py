"""Every op and all its gradients against float64, at the shapes of real models; errors at most twice plain torch's."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import ibkernels
from benchmarks import eager
from benchmarks.gpu_problems import (
    DEVICE,
    DRY,
    IGNORED,
    LONG_HEAD,
    LONG_HIDDEN,
    SHAPES,
    bottleneck_head_inputs,
    eager_bottleneck,
    eager_head,
    encoder_inputs,
    head_inputs,
    leaves,
    normal,
    weight_of,
    with_gradients,
)
from ibkernels import reference

RNG = (0x0123456789ABCDEF, 0x100000005)
# bf16 at every shape; the others, whose kernels differ in type alone, at one real shape and the odd one.
_SECOND = [name for name in SHAPES if name in ("7B", "small", "odd")]
PROBLEMS = [] if DRY else [("bf16", name) for name in SHAPES]
PROBLEMS += [(precision, name) for precision in ("fp16", "fp32") for name in _SECOND]
PROBLEMS += [] if DRY else [("tf32", name) for name in _SECOND]  # the interpreter rounds neither to bf16 nor to tf32

each_problem = pytest.mark.parametrize(("precision", "shape"), PROBLEMS)
each_encoder = pytest.mark.parametrize("encoder", ["linear", "lora"])
pytestmark = pytest.mark.usefixtures("poisoned_memory")


def rng_tensor() -> Tensor:
    return torch.tensor(RNG, device=DEVICE)


def row_ids(tokens: int) -> Tensor:
    return torch.randint(0, 2**40, (tokens,), generator=torch.Generator().manual_seed(2)).to(DEVICE)


@pytest.mark.parametrize("columns", [16, 77] if DRY else [16, 77, 512])
def test_noise_is_that_of_the_reference_bit_for_bit(columns: int) -> None:
    from ibkernels import gpu

    tokens = 17 if DRY else 1025
    rows = torch.cat([torch.arange(tokens, device=DEVICE), row_ids(tokens)])
    assert torch.equal(gpu.noise_bits(rng_tensor(), rows, columns), reference.noise_bits(rng_tensor(), rows, columns))
    ours = ibkernels.noise(rng_tensor(), rows, columns, backend="triton").double()
    exact = reference.noise(rng_tensor(), rows, columns, torch.float64)
    # The GPU's logarithm has an absolute error near 1, which a small radius magnifies in a few: gpu/philox.py.
    assert (ours - exact).abs().max() < 1e-3 and (ours - exact).square().mean().sqrt() < 2e-6


def test_noise_of_published_test_vectors() -> None:
    from ibkernels import gpu

    words = gpu.noise_bits(rng_tensor(), torch.tensor([0, 3], device=DEVICE), 18).cpu()
    assert [hex(words[0, column]) for column in (0, 1, 8, 9, 2)] == [
        "0xb1b649f8", "0x87d61e30", "0xa14ccfaf", "0x7b1065e7", "0x887a8368",
    ]  # fmt: skip
    assert hex(words[1, 17]) == "0x31a7005a"


@each_encoder
@each_problem
def test_variational_bottleneck(
    precision: str, shape: str, encoder: str, dtype: torch.dtype, assert_accurate: Callable[..., None]
) -> None:
    inputs, rows = encoder_inputs(SHAPES[shape], encoder, dtype), row_ids(SHAPES[shape].tokens)
    ours = leaves(inputs)
    z, kl = ibkernels.variational_bottleneck(
        ours["hidden"], weight_of(ours), ours["bias"], rng_tensor(), rows=rows, backend="triton"
    )
    results = with_gradients({"z": z, "kl": kl}, ours)
    # Its own noise, which the tests above hold to the reference: a float32 ulp of it would drown the rest.
    eps = ibkernels.noise(rng_tensor(), rows, SHAPES[shape].width, backend="triton")
    torchs, exact = (
        with_gradients(eager_bottleneck(copies, eps), copies)
        for copies in (leaves(inputs), leaves(inputs, torch.float64))
    )
    assert_accurate(results, torchs, exact, precision)


@each_encoder
def test_evaluation_equals_the_float64_reference(encoder: str, assert_accurate: Callable[..., None]) -> None:
    """No noise: z = mu. The same call of the reference backend in float64 is the oracle."""
    inputs = encoder_inputs(SHAPES["odd"], encoder, torch.float32)
    results = []
    for dtype, backend in ((torch.float32, "triton"), (torch.float32, "reference"), (torch.float64, "reference")):
        own = leaves(inputs, dtype)
        z, kl = ibkernels.variational_bottleneck(
            own["hidden"], weight_of(own), own["bias"], kl_reduction="sum", backend=backend
        )
        results.append(with_gradients({"z": z, "kl": kl}, own))
    assert_accurate(*results, "fp32")


@each_encoder
@each_problem
def test_encode(
    precision: str, shape: str, encoder: str, dtype: torch.dtype, assert_accurate: Callable[..., None]
) -> None:
    inputs = encoder_inputs(SHAPES[shape], encoder, dtype)
    own = leaves(inputs)
    mu, logvar = ibkernels.encode(own["hidden"], weight_of(own), own["bias"], backend="triton")
    results = [with_gradients({"mu": mu, "logvar": logvar}, own)]
    for copies in (leaves(inputs), leaves(inputs, torch.float64)):
        mu, logvar = eager.encode(copies["hidden"], weight_of(copies), copies["bias"])
        results.append(with_gradients({"mu": mu, "logvar": logvar}, copies))
    assert_accurate(*results, precision)


@pytest.mark.parametrize("regime", ["narrow", "wide", "wide-frozen"])
@each_problem
def test_linear_cross_entropy(
    precision: str, shape: str, regime: str, dtype: torch.dtype, assert_accurate: Callable[..., None]
) -> None:
    size = SHAPES[shape]
    if regime == "wide" and size.hidden * size.vocabulary > 2**29:
        pytest.skip("float64 gradients of so large a head fill the device; the smaller shapes train it")
    width = size.width if regime == "narrow" else size.hidden
    inputs, labels = head_inputs(size.tokens, width, size.vocabulary, dtype)
    _compare_heads(inputs, labels, {}, precision, assert_accurate, ("weight",) if regime == "wide-frozen" else ())


# A soft cap, and float32, are for the wide path at any width.
OPTIONS: dict[str, dict[str, Any]] = {
    "scale, z": {"logit_scale": 0.5, "z_loss": 1e-3},
    "smoothing, scale, z, bias": {"label_smoothing": 0.1, "logit_scale": 0.5, "z_loss": 1e-3, "bias": True},
    "softcap, scale, z": {"softcap": 15.0, "logit_scale": 0.5, "z_loss": 1e-3},
    "all": {"softcap": 15.0, "label_smoothing": 0.1, "logit_scale": 0.5, "z_loss": 1e-3, "bias": True},
}


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("case", OPTIONS)
@pytest.mark.parametrize("regime", ["narrow", "wide"])
def test_options_and_statistics_of_linear_cross_entropy(
    precision: str,
    regime: str,
    case: str,
    dtype: torch.dtype,
    assert_accurate: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from ibkernels.gpu import heads

    taken = []
    for name in ("narrow", "wide"):
        path = getattr(heads, f"{name}_cross_entropy")
        monkeypatch.setattr(
            heads, f"{name}_cross_entropy", lambda *a, name=name, path=path: (taken.append(name), path(*a))[1]
        )
    size, options = SHAPES["odd"], dict(OPTIONS[case])
    width = size.width if regime == "narrow" else size.hidden
    inputs, labels = head_inputs(size.tokens, width, size.vocabulary, dtype)
    if options.pop("bias", False):
        inputs["bias"] = normal(size.vocabulary, seed=11, dtype=dtype)
    weights = normal(size.tokens, seed=12, dtype=dtype).abs()
    # Half of the labels are what the head predicts, so that there is something to count.
    logits = options["logit_scale"] * F.linear(inputs["input"].double(), inputs["weight"].double())
    best = (logits + inputs.get("bias", torch.zeros(1, device=DEVICE)).double()).argmax(dim=-1)
    labels = torch.where((labels != IGNORED) & (torch.arange(size.tokens, device=DEVICE) % 2 == 0), best, labels)
    _compare_heads(inputs, labels, options, precision, assert_accurate, token_weight=weights, stats=True)
    assert set(taken) == {"wide" if precision == "fp32" or "softcap" in options else regime}


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32", "tf32"])
@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("regime", ["narrow", "wide"])
def test_gradients_of_confident_tokens(precision: str, regime: str, softcap: float | None, dtype: torch.dtype) -> None:
    """Where the label has almost all the probability, a gradient is what little the others have of it."""
    size = SHAPES["small" if DRY else "1.3B"]
    width = size.width if regime == "narrow" else size.hidden
    inputs, labels = head_inputs(size.tokens, width, size.vocabulary, dtype)
    labels = labels.clamp(min=0)
    rows = inputs["weight"].double()[labels]
    confident = math.log(size.vocabulary) + 7  # the label's logit: the others' are about 0, and have e^-7 together
    inputs["input"] = (rows * (confident / rows.square().sum(dim=-1, keepdim=True))).to(dtype)
    results = []
    for copy, backend in ((leaves(inputs), "triton"), (leaves(inputs, torch.float64), "reference")):
        losses: Any = ibkernels.linear_cross_entropy(
            **copy, labels=labels, softcap=softcap, reduction="none", backend=backend
        )
        gradients = torch.autograd.grad(losses.sum(), list(copy.values()))
        results.append([tensor.double() for tensor in (losses.detach(), *gradients)])
    (loss, grad, grad_weight), (exact_loss, exact, exact_weight) = results
    assert exact_loss.median() < 0.1
    error = {"bf16": 2**-7, "fp16": 2**-8, "fp32": 2**-8, "tf32": 2**-4}[precision]
    assert ((grad - exact).norm(dim=-1) <= error * exact.norm(dim=-1)).all()
    assert (grad_weight - exact_weight).norm() <= error * exact_weight.norm()
    assert (loss - exact_loss).abs().max() <= (1e-2 if precision == "tf32" else 1e-4) and loss.min() >= -1e-4


@pytest.mark.parametrize("absorb", [True, False], ids=["absorbed", "unabsorbed"])
@each_problem
def test_bottleneck_cross_entropy(
    precision: str, shape: str, absorb: bool, dtype: torch.dtype, assert_accurate: Callable[..., None]
) -> None:
    """The head frozen, as in training."""
    inputs, labels = bottleneck_head_inputs(SHAPES[shape], dtype)
    results = []
    for copies, backend in ((leaves(inputs, None, ("head_weight",)), "triton"), (_doubles(inputs), "reference")):
        loss: Any = ibkernels.bottleneck_cross_entropy(
            **copies, labels=labels, absorb=absorb and backend == "triton", reduction="sum", backend=backend
        )
        results.append(with_gradients({"loss": loss}, copies))
    copies = leaves(inputs, None, ("head_weight",))
    up = F.linear(copies["z"], copies["up_weight"], copies["up_bias"])
    torchs = with_gradients({"loss": eager_head(up, copies["head_weight"], labels)}, copies)
    assert_accurate(results[0], torchs, results[1], precision)


@pytest.mark.parametrize("regime", ["narrow", "wide"])
def test_more_logits_than_32_bits_count(regime: str, assert_accurate: Callable[..., None]) -> None:
    """N V beyond 2^31: losses and gradients of a sample of rows, and of a sample of the head's, at both ends."""
    size, dtype = LONG_HEAD, torch.float32 if DRY else torch.bfloat16
    precision = "fp32" if DRY else "bf16"
    inputs, labels = head_inputs(size.tokens, size.width if regime == "narrow" else size.hidden, size.vocabulary, dtype)
    own = leaves(inputs, None, ("weight",) if regime == "wide" else ())
    losses: Any = ibkernels.linear_cross_entropy(**own, labels=labels, reduction="none", backend="triton")
    wanted = [tensor for tensor in own.values() if tensor.requires_grad]
    grad, *grad_weight = torch.autograd.grad(losses.sum(), wanted)
    picked = torch.cat([torch.arange(16), torch.arange(-16, 0) + size.tokens]).to(DEVICE)
    results = [{"loss": losses.detach()[picked], "gradient": grad[picked]}]
    for wide in (dtype, torch.float64):
        x = inputs["input"][picked].to(wide).requires_grad_()
        loss = F.cross_entropy(F.linear(x, inputs["weight"].to(wide)), labels[picked], reduction="none")
        results.append({"loss": loss.detach(), "gradient": torch.autograd.grad(loss.sum(), x)[0]})
    assert_accurate(*results, precision)
    if grad_weight:
        words = torch.cat([torch.arange(16), torch.arange(-16, 0) + size.vocabulary]).to(DEVICE)
        exact = _head_gradient(inputs, labels, words)
        error = (grad_weight[0][words].double() - exact).norm() / exact.norm()
        assert error < (1e-5 if DRY else 1e-2)


@each_encoder
def test_more_hidden_elements_than_32_bits_count(encoder: str, assert_accurate: Callable[..., None]) -> None:
    """N H beyond 2^31: a sample of rows at both ends; their row ids make the noise of the sample that of the whole."""
    precision = "fp32" if DRY else "bf16"
    inputs = encoder_inputs(LONG_HIDDEN, encoder, torch.float32 if DRY else torch.bfloat16)
    picked = torch.cat([torch.arange(64), torch.arange(-64, 0) + LONG_HIDDEN.tokens]).unique().to(DEVICE)
    own = leaves(inputs)
    z, kl = ibkernels.variational_bottleneck(own["hidden"], weight_of(own), own["bias"], rng_tensor(), backend="triton")
    (grad,) = torch.autograd.grad([z.float().sum() + kl.sum()], [own["hidden"]])
    results = [{"z": z.detach()[picked], "kl": kl.detach()[picked], "gradient": grad[picked]}]
    eps = ibkernels.noise(rng_tensor(), picked, LONG_HIDDEN.width, backend="triton")
    sample = inputs | {"hidden": inputs["hidden"][picked]}
    for copies in (leaves(sample), leaves(sample, torch.float64)):
        outputs = eager_bottleneck(copies, eps)
        wide = torch.promote_types(outputs["z"].dtype, torch.float32)
        total = outputs["z"].to(wide).sum() + outputs["kl"].to(wide).sum()
        (grad,) = torch.autograd.grad([total], [copies["hidden"]])
        results.append({name: tensor.detach() for name, tensor in outputs.items()} | {"gradient": grad})
    assert_accurate(*results, precision)


def _compare_heads(
    inputs: dict[str, Tensor],
    labels: Tensor,
    options: dict[str, float],
    precision: str,
    assert_accurate: Callable[..., None],
    frozen: tuple[str, ...] = (),
    token_weight: Tensor | None = None,
    stats: bool = False,
) -> None:
    """`stats`: plain torch's are the reference's, which computes in float32 from the same inputs."""
    results, correct = [], []
    for dtype, backend in ((None, "triton"), (None, None), (torch.float64, "reference")):
        own = leaves(inputs, dtype, frozen)
        settings: dict[str, Any] = {**options, "token_weight": None if token_weight is None else token_weight.to(
            own["input"].dtype
        )}  # fmt: skip
        if backend is None:
            loss: Any = eager_head(**own, labels=labels, **settings)
        else:
            loss = ibkernels.linear_cross_entropy(
                **own, labels=labels, reduction="sum", backend=backend, return_stats=stats, **settings
            )
        found = {}
        if stats:
            if backend is None:
                _, found = ibkernels.linear_cross_entropy(
                    **own, labels=labels, reduction="sum", backend="reference", return_stats=True, **settings
                )
            else:
                loss, found = loss
            correct.append(found.num_correct)
            found = {"entropy": found.entropy_sum, "lse": found.lse}
        results.append(with_gradients({"loss": loss}, own) | found)
    assert len({count.item() for count in correct}) <= 1
    assert_accurate(*results, precision)


def _doubles(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return leaves(inputs, torch.float64, ("head_weight",))


def _head_gradient(inputs: dict[str, Tensor], labels: Tensor, words: Tensor) -> Tensor:
    """Of some words' rows of the head, in float64, over all tokens, a block at a time."""
    weight, total = inputs["weight"].double(), 0.0
    for start in range(0, labels.shape[0], 512):
        x, own = inputs["input"][start : start + 512].double(), labels[start : start + 512]
        share = torch.softmax(x @ weight.T, dim=-1)[:, words] - (own[:, None] == words).double()
        total = total + (share * (own != IGNORED)[:, None]).T @ x
    assert isinstance(total, Tensor)
    return total
