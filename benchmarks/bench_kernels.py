"""Every op of `ibkernels`, forward (no gradients) and forward with backward, against eager PyTorch of its formula.

Each implementation is first compared with the formula in float64; one that errs is not timed.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import ibkernels
from benchmarks import eager
from benchmarks.measure import relative_error
from ibkernels.reference import noise as reference_noise

pytestmark = pytest.mark.timeout(0)

TOLERANCE = 1e-4  # of a float32 result, relative to its norm
Inputs = tuple[Tensor, ...]
Op = Callable[[Inputs, Tensor | None], Inputs]  # with the noise of this rng state; None: any noise


class Size(NamedTuple):
    """N, H, K, R and V."""

    tokens: int
    hidden: int
    bottleneck: int
    rank: int = 32
    vocabulary: int = 32000


class Case(NamedTuple):
    """Implementations of one op, "eager" being the formula; those inputs that require gradients get them.

    `floor`, where there is one, is no implementation: the library GEMMs that the op cannot do without, forward alone or
    with the backward pass.
    """

    sizes: dict[str, Size]
    inputs: Callable[[Size], Inputs]
    implementations: dict[str, Op]
    floor: Callable[[Inputs, str], None] | None = None


ENCODER_SIZES = {"toy": Size(32, 32, 8, 4), "full": Size(4096, 1024, 256)}
HEAD_SIZES = {"toy": Size(40, 32, 8, vocabulary=64), "full": Size(1024, 1024, 128)}
BOTTLENECK_HEAD_SIZES = {"toy": Size(40, 32, 8, vocabulary=64), "full": Size(2048, 2048, 128)}
ABSORBED_SIZES = {"toy": Size(40, 32, 8, vocabulary=64), "full": Size(1024, 1024, 256)}


def _linear_inputs(size: Size) -> Inputs:
    outputs = 2 * size.bottleneck
    return _hidden(size), _trainable(outputs), _trainable(outputs, size.hidden)


def _lora_inputs(size: Size) -> Inputs:
    outputs = 2 * size.bottleneck
    return _hidden(size), _trainable(outputs), _trainable(size.rank, size.hidden), _trainable(outputs, size.rank)


def _head_inputs(size: Size) -> Inputs:
    """The model's own head, frozen."""
    return _hidden(size), _trainable(size.vocabulary, size.hidden).detach(), _labels(size)


def _absorbed_inputs(size: Size) -> Inputs:
    """The bottleneck's z and the absorbed weight M [V, K], whose gradient is wanted."""
    z = torch.randn(size.tokens, size.bottleneck, requires_grad=True)
    return z, _trainable(size.vocabulary, size.bottleneck), _labels(size)


def _bottleneck_head_inputs(size: Size) -> Inputs:
    z = torch.randn(size.tokens, size.bottleneck, requires_grad=True)
    up_weight, up_bias = _trainable(size.hidden, size.bottleneck), _trainable(size.hidden)
    return z, up_weight, up_bias, _trainable(size.vocabulary, size.hidden).detach(), _labels(size)


def _eager_encode(inputs: Inputs, rng: Tensor | None) -> Inputs:
    hidden, bias, *weight = inputs
    return eager.encode(hidden, _encoder_weight(weight), bias)


def _encode(inputs: Inputs, rng: Tensor | None) -> Inputs:
    hidden, bias, *weight = inputs
    return ibkernels.encode(hidden, _encoder_weight(weight), bias)


def _eager_bottleneck(inputs: Inputs, rng: Tensor | None) -> Inputs:
    hidden, bias, *weight = inputs
    eps = None if rng is None else _noise(rng, hidden.shape[0], bias.shape[0] // 2).to(hidden.dtype)
    return eager.bottleneck(hidden, _encoder_weight(weight), bias, eps)


def _bottleneck(inputs: Inputs, rng: Tensor | None) -> Inputs:
    hidden, bias, *weight = inputs
    rng = ibkernels.rng_state() if rng is None else rng
    return ibkernels.variational_bottleneck(hidden, _encoder_weight(weight), bias, rng)


def _eager_head(inputs: Inputs, rng: Tensor | None) -> Inputs:
    hidden, weight, labels = inputs
    return (F.cross_entropy(F.linear(hidden, weight), labels),)


def _head(inputs: Inputs, rng: Tensor | None) -> Inputs:
    return (_loss(ibkernels.linear_cross_entropy(*inputs)),)


def _torch_head(inputs: Inputs, rng: Tensor | None, chunk: int | None = None) -> Inputs:
    method = "auto" if chunk is None else None
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=chunk, chunking_method=method)
    return (F.linear_cross_entropy(*inputs, options=options),)


def _eager_bottleneck_head(inputs: Inputs, rng: Tensor | None) -> Inputs:
    z, up_weight, up_bias, head_weight, labels = inputs
    return (F.cross_entropy(F.linear(F.linear(z, up_weight, up_bias), head_weight), labels),)


def _eager_absorbed_head(inputs: Inputs, rng: Tensor | None) -> Inputs:
    z, up_weight, up_bias, head_weight, labels = inputs
    return (F.cross_entropy(F.linear(z, head_weight @ up_weight, head_weight @ up_bias), labels),)


def _bottleneck_head(inputs: Inputs, rng: Tensor | None) -> Inputs:
    return (_loss(ibkernels.bottleneck_cross_entropy(*inputs)),)


def _linear_gemms(inputs: Inputs, passes: str) -> None:
    """hidden W^T; G W and G^T hidden."""
    hidden, _, weight = (tensor.detach() for tensor in inputs)
    grad = hidden @ weight.T
    if passes != "forward":
        _ = grad @ weight, grad.T @ hidden


def _head_gemms(inputs: Inputs, passes: str) -> None:
    """x W^T; G W and, for a weight that is trained, G^T x."""
    input, weight = inputs[0].detach(), inputs[1].detach()
    grad = input @ weight.T
    if passes != "forward":
        _ = grad @ weight, grad.T @ input if inputs[1].requires_grad else None


TORCH_HEAD: dict[str, Op] = {}
if hasattr(F, "linear_cross_entropy"):
    TORCH_HEAD["torch chunk=auto"] = _torch_head
    TORCH_HEAD |= {f"torch chunk={chunk}": partial(_torch_head, chunk=chunk) for chunk in (64, 256, 512, 1024)}
HEADS: dict[str, Op] = {"eager": _eager_head, "ibkernels": _head, **TORCH_HEAD}
CASES = {
    "encode, linear": Case(ENCODER_SIZES, _linear_inputs, {"eager": _eager_encode, "ibkernels": _encode}),
    "encode, LoRA": Case(ENCODER_SIZES, _lora_inputs, {"eager": _eager_encode, "ibkernels": _encode}),
    "bottleneck, linear": Case(
        ENCODER_SIZES, _linear_inputs, {"eager": _eager_bottleneck, "ibkernels": _bottleneck}, _linear_gemms
    ),
    "bottleneck, LoRA": Case(ENCODER_SIZES, _lora_inputs, {"eager": _eager_bottleneck, "ibkernels": _bottleneck}),
    "linear CE": Case(HEAD_SIZES, _head_inputs, HEADS, _head_gemms),
    "absorbed CE": Case(ABSORBED_SIZES, _absorbed_inputs, HEADS, _head_gemms),
    "bottleneck CE": Case(
        BOTTLENECK_HEAD_SIZES,
        _bottleneck_head_inputs,
        {"eager": _eager_bottleneck_head, "eager absorbed": _eager_absorbed_head, "ibkernels": _bottleneck_head},
    ),
}


@pytest.mark.parametrize(
    "implementation", [(case, name) for case in CASES for name in CASES[case].implementations], ids=": ".join
)
@pytest.mark.parametrize("passes", ["forward", "forward+backward"])
def test_op(
    implementation: tuple[str, str], passes: str, size_name: str, benchmark: Any, paired: Callable[..., None]
) -> None:
    case, name = CASES[implementation[0]], implementation[1]
    torch.manual_seed(0)
    inputs = case.inputs(case.sizes[size_name])
    benchmark.group = f"{implementation[0]}, {passes}"
    step, baseline = (partial(_run, case.implementations[one], inputs, passes) for one in (name, "eager"))
    rng = torch.tensor([0, 1])
    exact = _run(case.implementations["eager"], tuple(_double(tensor) for tensor in inputs), passes, rng)
    error = max(relative_error(actual, expected) for actual, expected in zip(step(rng), exact, strict=True))
    assert error <= TOLERANCE
    del exact
    paired(step, baseline, relative_error=error)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.floor is not None])
@pytest.mark.parametrize("passes", ["forward", "forward+backward"])
def test_floor(name: str, passes: str, size_name: str, benchmark: Any, paired: Callable[..., None]) -> None:
    """The library GEMMs alone, beside eager."""
    case = CASES[name]
    assert case.floor is not None
    torch.manual_seed(0)
    inputs = case.inputs(case.sizes[size_name])
    benchmark.group = f"{name}, {passes}"
    paired(partial(case.floor, inputs, passes), partial(_run, case.implementations["eager"], inputs, passes))


@pytest.mark.benchmark(group="noise, forward")
@pytest.mark.parametrize("name", ["torch.randn", "ibkernels"])
def test_noise(name: str, size_name: str, paired: Callable[..., None]) -> None:
    """Against torch.randn, which draws other numbers, one after the other."""
    size = ENCODER_SIZES[size_name]
    rng, rows = torch.tensor([0, 1]), torch.arange(size.tokens)
    exact = reference_noise(rng, rows, size.bottleneck, torch.float64)
    error = relative_error(_noise(rng, size.tokens, size.bottleneck), exact)
    assert error <= TOLERANCE
    randn = partial(torch.randn, size.tokens, size.bottleneck)
    ours = partial(ibkernels.noise, rng, rows, size.bottleneck)
    if name == "ibkernels":
        paired(ours, randn, relative_error=error)
    else:
        paired(randn, randn)


def _run(op: Op, inputs: Inputs, passes: str, rng: Tensor | None = None) -> Inputs:
    """The op's outputs, and with a backward pass the gradients of its inputs."""
    if passes == "forward":
        with torch.no_grad():
            return op(inputs, rng)
    outputs = op(inputs, rng)
    # No number of the upstream gradient is like another, as in training; made of what costs nothing.
    upstream = [torch.ones_like(output) if output.dim() == 0 else output.detach() for output in outputs]
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    return (*(output.detach() for output in outputs), *torch.autograd.grad(outputs, wanted, upstream))


def _hidden(size: Size) -> Tensor:
    return torch.randn(size.tokens, size.hidden, requires_grad=True)


def _trainable(*shape: int) -> Tensor:
    return (torch.randn(shape) / shape[-1] ** 0.5).requires_grad_()


def _labels(size: Size) -> Tensor:
    labels = torch.randint(size.vocabulary, (size.tokens,))
    labels[::10] = -100
    return labels


def _encoder_weight(weight: list[Tensor]) -> Any:
    return weight[0] if len(weight) == 1 else tuple(weight)


def _noise(rng: Tensor, tokens: int, columns: int) -> Tensor:
    return ibkernels.noise(rng, torch.arange(tokens), columns)


def _loss(result: Any) -> Tensor:
    assert isinstance(result, Tensor)  # a pair only with return_stats
    return result


def _double(tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    return tensor.detach().double().requires_grad_(tensor.requires_grad)
