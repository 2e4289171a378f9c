"""Every op of `ibkernels` for the CPU's suite: inputs, this project's backends and their peers, floors and cost."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import ibkernels
from benchmarks import cost, eager
from benchmarks.cost import BACKWARD, FORWARD, CostOf, Size
from benchmarks.peers import torch_heads
from ibkernels import backends
from ibkernels.reference import noise as reference_noise

Inputs = tuple[Tensor, ...]
Call = Callable[[Inputs, Tensor | None], Inputs]  # with the noise of this rng state; None: any noise
OURS, EAGER, COMPILED = "ibkernels", "eager", "torch.compile"
GPU_PEERS = {"Liger": "liger_kernel", "cut-cross-entropy": "cut_cross_entropy"}
CHUNKS = (256, 1024)
_AUTO = "F.linear_cross_entropy chunk=auto"


@dataclass(frozen=True)
class Op:
    """`floor` is no implementation: the library products that a pass cannot do without."""

    name: str
    kernel: str  # its name in ibkernels.backends
    sizes: dict[str, Size]
    inputs: Callable[[Size], Inputs]  # float32; those that require gradients get them
    eager: Call
    ours: Callable[[str | None], Call]  # by backend
    cost: CostOf
    floor: Callable[[Inputs, str], None] | None = None
    compiled: dict[str, Call] = field(default_factory=dict)  # what is given to torch.compile, beside `eager`
    peers: dict[str, Call] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)  # peers that are not here, and why
    # The float64 result, where it is not eager's on float64 inputs: peers then compute something else, unchecked.
    exact: Call | None = None

    @property
    def trains(self) -> bool:
        """Whether it has a backward pass."""
        return self.exact is None

    def variants(self, dtype: torch.dtype, generate_code: bool) -> tuple[dict[str, Call], dict[str, str]]:
        """What can run, the baseline first, and what cannot, with the reason."""
        chosen = backends.select(self.kernel, "cpu", dtype).backend.name
        found = {EAGER: self.eager, OURS: self.ours(None)}
        missing = dict(self.missing)
        for name in ("triton", "cpp", "reference"):
            try:
                backends.select(self.kernel, "cpu", dtype, name)
            except ValueError as error:
                missing[f"{OURS} {name}"] = str(error).partition(f"{self.kernel}: ")[2].rstrip(".")
            else:
                if name == "triton":
                    missing[f"{OURS} {name}"] = "runs in Triton's interpreter here, whose time tells nothing"
                elif name != chosen:
                    found[f"{OURS} {name}"] = self.ours(name)
        backend = "inductor" if generate_code else "eager"
        for name, call in {COMPILED: self.eager, **self.compiled}.items():
            found[name] = torch.compile(call, fullgraph=True, dynamic=False, backend=backend)
        peers = dict(self.peers)
        if dtype != torch.float32 and _AUTO in peers:
            del peers[_AUTO]
            missing[_AUTO] = "timed in float32 alone: it takes several times as long as a given chunk"
        return found | peers, missing


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


def _noise_inputs(size: Size) -> Inputs:
    """Row ids; the number of columns as a shape."""
    return torch.arange(size.tokens), torch.empty(size.bottleneck)


def _eager_encode(inputs: Inputs, rng: Tensor | None) -> Inputs:
    hidden, bias, *weight = inputs
    return eager.encode(hidden, _encoder_weight(weight), bias)


def _encode(backend: str | None) -> Call:
    def call(inputs: Inputs, rng: Tensor | None) -> Inputs:
        hidden, bias, *weight = inputs
        return ibkernels.encode(hidden, _encoder_weight(weight), bias, backend=backend)

    return call


def _eager_bottleneck(inputs: Inputs, rng: Tensor | None) -> Inputs:
    hidden, bias, *weight = inputs
    eps = None
    if rng is not None:
        eps = ibkernels.noise(rng, torch.arange(hidden.shape[0]), bias.shape[0] // 2).to(hidden.dtype)
    return eager.bottleneck(hidden, _encoder_weight(weight), bias, eps)


def _bottleneck(backend: str | None) -> Call:
    def call(inputs: Inputs, rng: Tensor | None) -> Inputs:
        hidden, bias, *weight = inputs
        rng = ibkernels.rng_state() if rng is None else rng
        return ibkernels.variational_bottleneck(hidden, _encoder_weight(weight), bias, rng, backend=backend)

    return call


def _eager_head(inputs: Inputs, rng: Tensor | None) -> Inputs:
    input, weight, labels = inputs
    return (_cross_entropy(F.linear(input, weight), labels),)


def _head(backend: str | None) -> Call:
    return lambda inputs, rng: (_loss(ibkernels.linear_cross_entropy(*inputs, backend=backend)),)


def _eager_bottleneck_head(inputs: Inputs, rng: Tensor | None) -> Inputs:
    z, up_weight, up_bias, head_weight, labels = inputs
    return (_cross_entropy(F.linear(F.linear(z, up_weight, up_bias), head_weight), labels),)


def _eager_absorbed_head(inputs: Inputs, rng: Tensor | None) -> Inputs:
    z, up_weight, up_bias, head_weight, labels = inputs
    return (_cross_entropy(F.linear(z, head_weight @ up_weight, head_weight @ up_bias), labels),)


def bottleneck_head(backend: str | None, absorb: bool | str = "auto") -> Call:
    """Ours, of (z, up_weight, up_bias, head_weight, labels)."""
    return lambda inputs, rng: (_loss(ibkernels.bottleneck_cross_entropy(*inputs, absorb=absorb, backend=backend)),)


def _eager_noise(inputs: Inputs, rng: Tensor | None) -> Inputs:
    return (torch.randn(inputs[0].shape[0], inputs[1].shape[0]),)


def _exact_noise(inputs: Inputs, rng: Tensor | None) -> Inputs:
    return (reference_noise(_rng(rng), inputs[0], inputs[1].shape[0], torch.float64),)


def _noise(backend: str | None) -> Call:
    def call(inputs: Inputs, rng: Tensor | None) -> Inputs:
        return (ibkernels.noise(_rng(rng), inputs[0], inputs[1].shape[0], backend=backend),)

    return call


def _rng(rng: Tensor | None) -> Tensor:
    return torch.tensor([0, 1]) if rng is None else rng


def _linear_products(inputs: Inputs, passes: str) -> None:
    """hidden W^T; G W and G^T hidden."""
    hidden, _, weight = (tensor.detach() for tensor in inputs)
    grad = _any_gradient(hidden.shape[0], weight) if passes == BACKWARD else hidden @ weight.T
    if passes != FORWARD:
        _ = grad @ weight, grad.T @ hidden


def _any_gradient(tokens: int, weight: Tensor) -> Tensor:
    """[N, outputs], for the products of a backward pass alone."""
    return weight.new_full((tokens, weight.shape[0]), 0.5)


def _lora_products(inputs: Inputs, passes: str) -> None:
    """t = hidden A^T, t B^T; then, G being that gradient, G B, (G B) A, (G B)^T hidden, G^T t."""
    hidden, _, lora_a, lora_b = (tensor.detach() for tensor in inputs)
    # Backward has t from forward, and mu and logvar from t again.
    t = hidden @ lora_a.T if passes != BACKWARD else _any_gradient(hidden.shape[0], lora_a)
    grad = t @ lora_b.T
    if passes != FORWARD:
        low = grad @ lora_b
        _ = low @ lora_a, low.T @ hidden, grad.T @ t


def _head_products(inputs: Inputs, passes: str) -> None:
    """x W^T; G W and, for a weight that is trained, G^T x."""
    input, weight = inputs[0].detach(), inputs[1].detach()
    grad = _any_gradient(input.shape[0], weight) if passes == BACKWARD else input @ weight.T
    if passes != FORWARD:
        _ = grad @ weight, grad.T @ input if inputs[1].requires_grad else None


def _bottleneck_head_products(inputs: Inputs, passes: str) -> None:
    """Absorbed: M = W_head W_up, z M^T; G M, dM = G^T z, W_head^T dM. At full width otherwise.

    A backward pass alone is given an M, too: its forward kept it no more than ours does.
    """
    z, up, _, head, _ = (tensor.detach() for tensor in inputs)
    if not ibkernels.absorbs(z.shape[0], *up.shape):
        grad = z @ up.T @ head.T if passes != BACKWARD else _any_gradient(z.shape[0], head)
        if passes != FORWARD:
            grad_wide = grad @ head
            _ = grad_wide @ up, grad_wide.T @ z
        return
    matrix = head @ up
    grad = z @ matrix.T if passes != BACKWARD else _any_gradient(z.shape[0], head)
    if passes != FORWARD:
        _ = grad @ matrix, head.T @ (grad.T @ z)


def _through(head: Any, absorbed: bool) -> Call:
    """Another library's cross-entropy behind the up-projection, or of the head absorbed in PyTorch."""

    def call(inputs: Inputs, rng: Tensor | None) -> Inputs:
        z, up_weight, up_bias, head_weight, labels = inputs
        if absorbed:
            return (head(z, head_weight @ up_weight, labels, linear_bias=head_weight @ up_bias),)
        return (head(F.linear(z, up_weight, up_bias), head_weight, labels),)

    return call


def _gpu_peers() -> dict[str, str]:
    """Why those whose kernels are Triton's do not run here."""
    reasons = {}
    for name, module in GPU_PEERS.items():
        installed = importlib.util.find_spec(module) is not None
        reasons[name] = "needs a GPU: see `make gpu`" + ("" if installed else "; not installed either")
    return reasons


_FOUND, _MISSING = torch_heads(CHUNKS)
_MISSING |= _gpu_peers()
_TUNED = f"F.linear_cross_entropy chunk={CHUNKS[0]}"  # behind an up-projection: one of them
_HEADS: dict[str, Call] = {
    name: lambda inputs, rng, head=head: (head(*inputs),)  # type: ignore[misc]
    for name, head in _FOUND.items()
}
_BEHIND: dict[str, Call] = {"eager, absorbed": _eager_absorbed_head}
if _TUNED in _FOUND:
    _BEHIND |= {_TUNED: _through(_FOUND[_TUNED], False), f"{_TUNED}, absorbed": _through(_FOUND[_TUNED], True)}

_ENCODER_SIZES = {"toy": Size(32, 32, 8, 4), "full": Size(4096, 1024, 256)}
_HEAD_SIZES = {"toy": Size(40, 32, 8, vocabulary=64), "full": Size(256, 1024, 128)}
_ABSORBED_SIZES = {"toy": Size(40, 32, 8, vocabulary=64), "full": Size(512, 1024, 128)}
_BOTTLENECK_HEAD_SIZES = {"toy": Size(40, 32, 8, vocabulary=64), "full": Size(512, 1024, 128)}
_ALL = (
    Op("encode, linear", "encode", _ENCODER_SIZES, _linear_inputs, _eager_encode, _encode,
       cost.encode_linear, _linear_products),
    Op("bottleneck, linear", "variational_bottleneck", _ENCODER_SIZES, _linear_inputs, _eager_bottleneck, _bottleneck,
       cost.bottleneck_linear, _linear_products),
    Op("bottleneck, LoRA", "variational_bottleneck", _ENCODER_SIZES, _lora_inputs, _eager_bottleneck, _bottleneck,
       cost.bottleneck_lora, _lora_products),
    Op("linear CE", "linear_cross_entropy", _HEAD_SIZES, _head_inputs, _eager_head, _head,
       cost.linear_cross_entropy, _head_products, peers=_HEADS, missing=_MISSING),
    Op("absorbed CE", "linear_cross_entropy", _ABSORBED_SIZES, _absorbed_inputs, _eager_head, _head,
       cost.absorbed_cross_entropy, _head_products, peers=_HEADS, missing=_MISSING),
    Op("bottleneck CE", "bottleneck_cross_entropy", _BOTTLENECK_HEAD_SIZES, _bottleneck_head_inputs,
       _eager_bottleneck_head, bottleneck_head, cost.bottleneck_cross_entropy, _bottleneck_head_products,
       {"torch.compile, absorbed": _eager_absorbed_head}, _BEHIND, _MISSING),
    Op("noise", "noise", _ENCODER_SIZES, _noise_inputs, _eager_noise, _noise, cost.noise, exact=_exact_noise),
)  # fmt: skip
OPS = {op.name: op for op in _ALL}


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


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """As transformers computes it: of the logits in float32."""
    return F.cross_entropy(logits.float() if logits.dtype != torch.float64 else logits, labels)


def _loss(result: Any) -> Tensor:
    assert isinstance(result, Tensor)  # a pair only with return_stats
    return result
