"""The cross-entropy ops against autograd of F.cross_entropy over the full logits, for each head and option."""

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import ibkernels
from ibkernels import reference

pytestmark = pytest.mark.ops("linear_cross_entropy", "bottleneck_cross_entropy")
N, V, H, K = 37, 53, 24, 7  # of the vocabulary and the sizes none is a multiple of anything

# The linear head reads [N, H] itself; the other two read z [N, K] behind the up-projection.
each_head = pytest.mark.parametrize("head", ["linear", "absorbed", "unabsorbed"])
LOSS_OPTIONS = {"label_smoothing": 0.1, "z_loss": 1e-2, "softcap": 2.5, "logit_scale": 0.7}
CASES: dict[str, dict[str, Any]] = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "num-items": {"num_items": 91},
    "num-items-tensor": {"num_items": torch.tensor(91)},
    "num-items-0": {"num_items": 0, "ignored": 1.0},
    "ignore-index": {"ignore_index": 5},
    "nothing-ignored": {"ignored": 0.0},
    "label-smoothing": {"label_smoothing": 0.2},
    "z-loss": {"z_loss": 3e-2},
    "softcap": {"softcap": 1.5},
    "logit-scale": {"logit_scale": -1.7},
    "weighted": {"token_weight": torch.float32},
    "weighted-sum": {"token_weight": torch.float32, "reduction": "sum"},
    "weighted-none": {"token_weight": torch.float32, "reduction": "none"},
    "weighted-num-items": {"token_weight": torch.float32, "num_items": 10},
    "weighted-bfloat16": {"token_weight": torch.bfloat16},
    "masked": {"token_weight": torch.bool},
    "without-biases": {"biases": False},
    "all-mean": {**LOSS_OPTIONS, "token_weight": torch.float32},
    "all-none": {**LOSS_OPTIONS, "token_weight": torch.float32, "reduction": "none"},
    "all-without-biases": {**LOSS_OPTIONS, "biases": False},
    "one-token": {"n": 1, "ignored": 0.0},
    "no-tokens": {"n": 0},
    "no-tokens-none": {"n": 0, "reduction": "none"},
    "all-ignored": {"ignored": 1.0, **LOSS_OPTIONS},
    "all-ignored-none": {"ignored": 1.0, "reduction": "none"},
    "all-ignored-weighted": {"ignored": 1.0, "token_weight": torch.float32},
    "many-blocks-of-words": {"vocabulary": 120},
    "one-word": {"vocabulary": 1},
    "one-feature": {"sizes": (1, 7)},
    "widths-within-a-block": {"sizes": (40, 35), "label_smoothing": 0.2},
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference then takes three blocks of rows, and four of a low-precision head."""
    monkeypatch.setattr(reference.cross_entropy, "_LOGITS_BYTES", 1)
    monkeypatch.setattr(reference.cross_entropy, "_HEAD_BYTES", 17 * H * 4)


def make_inputs(
    head: str,
    dtype: torch.dtype,
    n: int = N,
    vocabulary: int = V,
    biases: bool = True,
    sizes: tuple[int, int] = (H, K),
) -> dict:
    """Values that `dtype` represents: activations and the head in it, the rest in float32 (float64 for float64)."""
    hidden_size, width = sizes
    generator = torch.Generator().manual_seed(1)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*size: int, kept: torch.dtype = wide) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype).to(kept)

    if head == "linear":
        inputs = {"input": normal(n, hidden_size, kept=dtype)}
    else:
        inputs = {
            "z": normal(n, width, kept=dtype),
            "up_weight": normal(hidden_size, width) / 2,
            "up_bias": normal(hidden_size),
        }
    inputs |= {"head_weight": normal(vocabulary, hidden_size, kept=dtype) / 4, "head_bias": normal(vocabulary)}
    return {name: tensor for name, tensor in inputs.items() if biases or not name.endswith("bias")}


def make_targets(n: int, vocabulary: int, ignored: float, ignore_index: int, token_weight: torch.dtype | None):
    generator = torch.Generator().manual_seed(2)
    labels = torch.randint(0, vocabulary, (n,), generator=generator)
    labels[torch.rand(n, generator=generator) < ignored] = ignore_index
    if ignored < 1:
        labels[:1] = vocabulary - 1  # beyond its row there is no memory of the head's
    weights = torch.rand(n, generator=generator) * 2
    if token_weight == torch.bool:
        return labels, weights > 1
    # Multiples of 1/64 are exact in bfloat16, their sum is not.
    return labels, None if token_weight is None else (weights * 64).round().div(64).to(token_weight)


def ours(head: str, inputs: dict[str, Tensor], labels: Tensor, **options: Any) -> Any:
    own = dict(inputs)
    if head == "linear":
        return ibkernels.linear_cross_entropy(
            own["input"], own["head_weight"], labels, bias=own.get("head_bias"), **options
        )
    return ibkernels.bottleneck_cross_entropy(
        own["z"],
        own["up_weight"],
        own.get("up_bias"),
        own["head_weight"],
        labels,
        bias=own.get("head_bias"),
        absorb=head == "absorbed",
        **options,
    )


def eager_logits(inputs: dict[str, Tensor], softcap: float | None = None, logit_scale: float = 1.0, **_) -> Tensor:
    hidden = inputs["input"] if "input" in inputs else F.linear(inputs["z"], inputs["up_weight"], inputs.get("up_bias"))
    logits = logit_scale * (hidden @ inputs["head_weight"].T)
    if "head_bias" in inputs:
        logits = logits + inputs["head_bias"]
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def eager(inputs, labels, ignore_index=-100, reduction="mean", num_items=None, token_weight=None, **options) -> Tensor:
    logits = eager_logits(inputs, **options)
    smoothing, z_loss = options.get("label_smoothing", 0.0), options.get("z_loss", 0.0)
    valid = labels != ignore_index
    losses = F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="none", label_smoothing=smoothing)
    losses = losses + z_loss * logits.logsumexp(dim=1).square() * valid
    weights = valid if token_weight is None else valid * token_weight.to(losses.dtype)
    losses = losses * weights
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    count = weights.sum() if num_items is None else num_items
    return losses.sum() / (count if count != 0 else 1)


def gradients_of(loss: Tensor, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The loss, and the gradients for an upstream gradient that is different for each token."""
    generator = torch.Generator().manual_seed(3)
    upstream = torch.randn(loss.shape, generator=generator, dtype=torch.float64).to(torch.bfloat16).to(loss.dtype)
    gradients = torch.autograd.grad(loss, list(inputs.values()), upstream, retain_graph=True)
    named = {f"gradient of {name}": gradient for name, gradient in zip(inputs, gradients, strict=True)}
    return {"loss": loss.detach(), **named}


def leaves(inputs: dict[str, Tensor], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    return {name: tensor.detach().to(dtype or tensor.dtype).requires_grad_() for name, tensor in inputs.items()}


def prepare(head: str, dtype: torch.dtype, case: dict[str, Any]) -> tuple[dict[str, Tensor], Tensor, dict[str, Any]]:
    """The inputs, the labels, and the op's options of a case."""
    options = dict(case)
    n, vocabulary, ignored = options.pop("n", N), options.pop("vocabulary", V), options.pop("ignored", 0.3)
    inputs = make_inputs(head, dtype, n, vocabulary, options.pop("biases", True), options.pop("sizes", (H, K)))
    labels, weights = make_targets(
        n, vocabulary, ignored, options.get("ignore_index", -100), options.pop("token_weight", None)
    )
    return inputs, labels, {**options, "token_weight": weights} if weights is not None else options


@each_head
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_equal_autograd_over_the_logits(target, head, case, assert_accurate):
    inputs, labels, options = prepare(head, target.dtype, CASES[case])
    own = leaves(inputs)
    loss = ours(head, own, labels, backend=target.backend, **options)
    assert loss.dtype == (torch.float64 if target.dtype == torch.float64 else torch.float32)
    results = gradients_of(loss, own)
    for name, leaf in own.items():
        assert results[f"gradient of {name}"].dtype == leaf.dtype

    expected = []
    for dtype in (target.dtype, torch.float64):
        copies = leaves(inputs, dtype)
        expected.append(gradients_of(eager(copies, labels, **options), copies))
    # With one word all results are zero, and a backend may sum the target's logit apart from the others.
    largest_term = eager_logits(leaves(inputs, torch.float64)).abs().max().item() if case == "one-word" else 0.0
    assert_accurate(results, *expected, target.dtype, largest_term)
    if case.startswith(("all-ignored", "no-tokens", "num-items-0")):
        assert all((tensor == 0).all() for tensor in results.values())
    again = gradients_of(loss, own)  # the graph was retained
    assert all(torch.equal(again[name], tensor) for name, tensor in results.items())


@each_head
def test_float32_mean_and_sum_are_accurate_in_low_precision_too(target, head):
    """Only the activations and M are low precision: the loss comes near the exact one, whatever the dtype."""
    inputs, labels, _ = prepare(head, target.dtype, {})
    loss = ours(head, inputs, labels, backend=target.backend)
    exact = eager({name: tensor.double() for name, tensor in inputs.items()}, labels)
    rounds_inside = target.dtype.itemsize == 2 and head != "linear"
    torch.testing.assert_close(loss.double(), exact, rtol=2e-3 if rounds_inside else 1e-6, atol=0)


@each_head
@pytest.mark.parametrize("case", ["mean", "all-none", "all-ignored", "no-tokens", "ignore-index"])
def test_statistics(target, head, case):
    inputs, labels, options = prepare(head, target.dtype, CASES[case])
    own = leaves(inputs)
    loss, stats = ours(head, own, labels, backend=target.backend, return_stats=True, **options)
    assert torch.equal(loss, ours(head, own, labels, backend=target.backend, **options))
    assert not any(statistic.requires_grad for statistic in stats)
    assert loss.requires_grad

    logits = eager_logits({name: tensor.double() for name, tensor in inputs.items()}, **options)
    valid = labels != options.get("ignore_index", -100)
    probabilities = logits.softmax(dim=1)
    entropy = -(probabilities * probabilities.log()).sum(dim=1)
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-5}.get(target.dtype, 2e-2)
    torch.testing.assert_close(stats.entropy_sum.double(), entropy[valid].sum(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(stats.lse.double(), logits.logsumexp(dim=1), rtol=tolerance, atol=tolerance)
    assert stats.num_correct.dtype == torch.int64
    assert stats.num_correct.item() == ((logits.argmax(dim=1) == labels) & valid).sum().item()


@each_head
def test_correct_tokens_are_counted_where_they_are_labels(target, head):
    """With word 0 predicted everywhere: neither an ignored token nor another label is correct."""
    inputs, labels, _ = prepare(head, target.dtype, {})
    inputs["head_bias"][0] = 1e3
    labels[::4] = 0
    _, stats = ours(head, inputs, labels, backend=target.backend, return_stats=True)
    assert stats.num_correct.item() == (labels == 0).sum().item() >= 10
    assert (labels == -100).any() and (labels > 0).any()


@each_head
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_every_combination_of_frozen_tensors(target, head, reduction):
    inputs, labels, _ = prepare(head, target.dtype, {})

    def run(trained: tuple[str, ...]) -> dict[str, Tensor]:
        own = {name: tensor.detach().requires_grad_(name in trained) for name, tensor in inputs.items()}
        loss = ours(head, own, labels, reduction=reduction, backend=target.backend, **LOSS_OPTIONS)
        assert loss.requires_grad == bool(trained)
        if trained:
            (loss * torch.arange(1, loss.numel() + 1)).sum().backward()
        assert {name for name, tensor in own.items() if tensor.grad is not None} == set(trained)
        return {name: own[name].grad for name in trained}

    complete = run(tuple(inputs))
    for size in range(len(inputs)):
        for trained in itertools.combinations(inputs, size):
            for name, gradient in run(trained).items():
                torch.testing.assert_close(gradient, complete[name], rtol=1e-5, atol=1e-6)


@each_head
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(head, reduction):
    inputs, labels, options = prepare(head, torch.float64, {**LOSS_OPTIONS, "n": 6, "vocabulary": 9})
    own = leaves(inputs)

    def loss_of(*tensors: Tensor) -> Tensor:
        return ours(head, dict(zip(own, tensors, strict=True)), labels, reduction=reduction, **options)

    assert torch.autograd.gradcheck(loss_of, tuple(own.values()), fast_mode=True)


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("width", [H, 600], ids=["narrow", "wide"])
def test_gradients_of_confident_tokens(target, width, softcap):
    """Where the label has almost all the probability, a gradient is what little the others have of it."""
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(V, width, generator=generator).to(target.dtype)
    labels = torch.arange(N) * 7 % V
    rows = weight.double()[labels]
    x = (rows * (11 / rows.square().sum(dim=1, keepdim=True))).to(target.dtype)  # the label's logit is 11
    results = []
    for dtype, backend in ((target.dtype, target.backend), (torch.float64, "reference")):
        own = [tensor.to(dtype).requires_grad_() for tensor in (x, weight)]
        losses = ibkernels.linear_cross_entropy(*own, labels, softcap=softcap, reduction="none", backend=backend)
        results.append([tensor.double() for tensor in (losses.detach(), *torch.autograd.grad(losses.sum(), own))])
    (loss, grad, grad_weight), (exact_loss, exact, exact_weight) = results
    assert exact_loss.median() < 0.02
    # Beside a rounding to the dtype: of float32 logits, which is large beside 1 - p.
    error = {torch.float64: 1e-9, torch.float32: 2**-8, torch.float16: 2**-8, torch.bfloat16: 2**-6}[target.dtype]
    assert ((grad - exact).norm(dim=1) <= error * exact.norm(dim=1)).all()
    assert (grad_weight - exact_weight).norm() <= error * exact_weight.norm()
    assert (loss - exact_loss).abs().max() <= 1e-5


@pytest.mark.parametrize("width", [H, 600], ids=["narrow", "wide"])
@pytest.mark.parametrize("upstream", [1e-9, 1e3])
def test_upstream_gradients_beyond_a_half_types_range(target, width, upstream):
    """Of one of many tokens' mean, say: float16 holds neither them nor their products with probabilities."""
    generator = torch.Generator().manual_seed(5)
    x, weight = (torch.randn(n, width, generator=generator) / width**0.5 for n in (N, V))
    x, weight, labels = x.to(target.dtype), (4 * weight).to(target.dtype), torch.arange(N) * 7 % V
    results = []
    for dtype, backend in ((target.dtype, target.backend), (torch.float64, "reference")):
        wide = torch.promote_types(dtype, torch.float32)
        own = x.to(dtype), weight.to(wide).requires_grad_(), torch.zeros(V, dtype=wide).requires_grad_()
        losses = ibkernels.linear_cross_entropy(*own[:2], labels, bias=own[2], reduction="none", backend=backend)
        upstreams = upstream * torch.linspace(0.5, 1.5, N, dtype=losses.dtype)
        results.append([tensor.double() for tensor in torch.autograd.grad(losses, own[1:], upstreams)])
    for ours, exact in zip(*results, strict=True):
        error = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 2**-9, torch.bfloat16: 2**-7}[target.dtype]
        assert (ours - exact).norm() <= error * exact.norm()


@each_head
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("unit", [1e-6, 1e6])
def test_token_weights_beyond_a_half_types_range(target, head, reduction, unit):
    """As 1 / a number of tokens is, under a scaled loss: what waits for backward in input's dtype is neither."""
    inputs, labels, options = prepare(head, target.dtype, {"token_weight": torch.float32, "reduction": reduction})
    options["token_weight"] = unit * options["token_weight"]
    options["token_weight"][labels == -100] = float("nan")
    results = []
    for dtype, backend in ((target.dtype, target.backend), (torch.float64, "reference")):
        own = leaves(inputs, dtype)
        loss = ours(head, own, labels, backend=backend, **options)
        scale = 2**16 if unit < 1 or reduction == "mean" else 2**-16
        results.append([t.double() for t in torch.autograd.grad(loss, list(own.values()), loss.new_tensor(scale))])
    for mine, exact in zip(*results, strict=True):
        error = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 2**-8, torch.bfloat16: 2**-5}[target.dtype]
        assert (mine - exact).norm() <= error * exact.norm()


@pytest.mark.parametrize("width", [16, 600], ids=["narrow", "wide"])
def test_a_vocabularys_tail_of_tiny_probabilities(target, width):
    """4000 words of 1.2e-8 each, less than float16 holds: together input's gradient, as the label's row is 0."""
    generator = torch.Generator().manual_seed(6)
    x, weight = (torch.randn(n, width, generator=generator) / width**0.5 for n in (3, 4000))
    x, weight, labels = x.to(target.dtype), (weight + 1).to(target.dtype), torch.full((3,), 70)
    weight[70], bias = 0, 18.2 * (torch.arange(4000) == 70)
    results = []
    for dtype, backend in ((target.dtype, target.backend), (torch.float64, "reference")):
        own = x.to(dtype).requires_grad_(), weight.to(torch.promote_types(dtype, torch.float32)).requires_grad_()
        # As a gradient scaler does, so that the result itself is one that float16 holds.
        loss = ibkernels.linear_cross_entropy(
            *own, labels, bias=bias.to(own[1].dtype), reduction="sum", backend=backend
        )
        grad, grad_weight = torch.autograd.grad(2.0**12 * loss, own)
        results.append([grad.double(), grad_weight[71:].double()])
    for ours, exact in zip(*results, strict=True):
        error = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 2**-8, torch.bfloat16: 2**-7}[target.dtype]
        assert (ours - exact).norm() <= error * exact.norm()


@each_head
@pytest.mark.parametrize("scale", [1e2, 1e4])
def test_large_logits(target, head, scale, assert_accurate):
    """A softmax without its maximum subtracted would overflow."""
    inputs, labels, _ = prepare(head, target.dtype, {"biases": False})
    options = {"logit_scale": scale, "reduction": "none"}
    own = leaves(inputs)
    loss = ours(head, own, labels, backend=target.backend, **options)
    assert loss.isfinite().all()
    if target.dtype.itemsize == 2:
        return  # rounded to 16 bits the softmax is arbitrary at this scale, and float16 gradients overflow
    expected = []
    for dtype in (target.dtype, torch.float64):
        copies = leaves(inputs, dtype)
        expected.append(gradients_of(eager(copies, labels, **options), copies))
    assert_accurate(gradients_of(loss, own), *expected, target.dtype)


def test_an_offset_common_to_all_logits_costs_no_accuracy(target, assert_accurate):
    """Softmax does not see it. The log-sum-exp does, so that lse - target would lose what the offset has digits."""
    input = torch.stack([torch.ones(40), torch.arange(40) / 64], dim=1).to(target.dtype)
    weight = torch.stack([torch.full((50,), 8192.0), (torch.arange(50) * 7 % 50) / 16], dim=1).to(target.dtype)
    labels = torch.arange(40)
    loss = ibkernels.linear_cross_entropy(input, weight, labels, reduction="none", backend=target.backend)
    # The products are exact in float32, the differences of the exact logits do not contain the offset.
    wide = torch.promote_types(target.dtype, torch.float32)
    torchs = F.cross_entropy(input.to(wide) @ weight.to(wide).T, labels, reduction="none")
    exact = F.cross_entropy(input[:, 1:].double() @ weight[:, 1:].double().T, labels, reduction="none")
    assert_accurate({"loss": loss}, {"loss": torchs}, {"loss": exact}, wide)


def test_words_that_the_bias_excludes(target):
    """A bias of -inf: probability 0, and 0 log 0 = 0 in the entropy."""
    inputs, labels, _ = prepare("linear", target.dtype, {})
    labels = labels.clamp(max=V - 10)
    inputs["head_bias"][V - 9 :] = -torch.inf
    own = leaves(inputs)
    loss, stats = ours("linear", own, labels, backend=target.backend, return_stats=True)
    kept = {name: tensor[: V - 9] if name.startswith("head") else tensor for name, tensor in leaves(inputs).items()}
    expected, expected_stats = ours("linear", kept, labels, backend=target.backend, return_stats=True)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(stats, expected_stats)
    assert all(tensor.isfinite().all() for tensor in gradients_of(loss, own).values())


@each_head
def test_blocks_do_not_change_the_result(target, head, monkeypatch):
    inputs, labels, _ = prepare(head, target.dtype, {})
    own = leaves(inputs)
    blocked = gradients_of(ours(head, own, labels, backend=target.backend, **LOSS_OPTIONS), own)
    monkeypatch.undo()
    whole = gradients_of(ours(head, own, labels, backend=target.backend, **LOSS_OPTIONS), own)
    for name, tensor in blocked.items():
        torch.testing.assert_close(tensor, whole[name], rtol=2 * torch.finfo(tensor.dtype).eps, atol=2e-6)


@each_head
def test_strided_arguments(target, head):
    inputs, labels, options = prepare(head, target.dtype, CASES["all-none"])
    expected = gradients_of(ours(head, own := leaves(inputs), labels, backend=target.backend, **options), own)

    def strided(tensor: Tensor) -> Tensor:
        spread = tensor.new_empty(*(2 * size for size in reversed(tensor.shape)))
        spread = spread.T if tensor.dim() == 2 else spread
        view = spread[tuple(slice(None, None, 2) for _ in tensor.shape)]
        return view.copy_(tensor).detach()

    own = {name: strided(tensor).requires_grad_() for name, tensor in inputs.items()}
    options["token_weight"] = strided(options["token_weight"])
    results = gradients_of(ours(head, own, strided(labels), backend=target.backend, **options), own)
    # In half precision a product summed in another order may round an element of M the other way.
    atol = 2e-6 if target.dtype.itemsize > 2 else 1e-5
    for name, tensor in results.items():
        torch.testing.assert_close(tensor, expected[name], rtol=2 * torch.finfo(tensor.dtype).eps, atol=atol)


@each_head
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_derivatives_are_refused(target, head, reduction):
    inputs, labels, _ = prepare(head, target.dtype, {})
    own = leaves(inputs)
    loss = ours(head, own, labels, reduction=reduction, backend=target.backend).sum()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, list(own.values()), create_graph=True)
