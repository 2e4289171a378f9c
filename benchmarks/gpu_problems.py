"""The problems that `tests/gpu` checks and `benchmarks.gpu` times: shapes, inputs, and the formulas in plain PyTorch.

Needs torch alone beside `ibkernels`, so that it runs from a source tree on a machine with nothing else.
"""

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import eager

DRY = os.environ.get("IBKERNELS_DRY") == "1"  # toy sizes on the CPU, in Triton's interpreter: see `make gpu DRY=1`
DEVICE = "cpu" if DRY else "cuda"
IGNORED = -100
_BLOCK_ELEMENTS = 2**27  # of float64 logits at a time: 1 GiB

Named = dict[str, Tensor]


class Shape(NamedTuple):
    """N, H, K, R and V."""

    tokens: int
    hidden: int
    width: int
    rank: int
    vocabulary: int


if DRY:
    MEASURED = Shape(32, 64, 16, 8, 96)  # K < H/2 and N >= HK / (H - 2K): the head is absorbed
    SHAPES = {"small": Shape(16, 32, 16, 8, 64), "odd": Shape(21, 37, 19, 5, 45)}
    LONG_HEAD, LONG_HIDDEN = Shape(36, 32, 16, 8, 70), Shape(150, 32, 16, 8, 0)
else:
    MEASURED = Shape(16384, 4096, 256, 32, 102400)
    # Hidden sizes and vocabularies of models of 1.3B to 70B parameters; N such that float64 fits beside them.
    SHAPES = {
        "1.3B": Shape(2048, 2048, 128, 16, 32256),
        "7B": Shape(2048, 4096, 256, 32, 102400),
        "14B": Shape(1536, 5120, 64, 32, 152064),
        "70B": Shape(1024, 8192, 512, 64, 128256),
        "odd": Shape(333, 1001, 77, 7, 32003),
    }
    LONG_HEAD = Shape(16389, 2048, 256, 32, 152064)  # N V = 2.5e9
    LONG_HIDDEN = Shape(270001, 8192, 64, 32, 0)  # N H = 2.2e9


def keep_regimes_apart() -> None:
    """Toy hidden states would fit the bottleneck's kernel: in the dry mode only widths of K still take it."""
    from ibkernels.gpu import heads

    fits, widest = heads._is_narrow, max(shape.width for shape in (MEASURED, LONG_HEAD, *SHAPES.values()))
    heads._is_narrow = lambda input, options: input.shape[1] <= widest and fits(input, options)


def normal(*size: int, seed: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """Normals on the device that `dtype` represents."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return (scale * torch.randn(size, generator=generator, device=DEVICE)).to(dtype)


def encoder_inputs(shape: Shape, encoder: str, dtype: torch.dtype) -> Named:
    """hidden, bias and the weight (or lora_a and lora_b), all in `dtype`.

    Raw logvar is near -8, 0 or 8, by the first feature: clamped below, not at all or above, and never so close to a
    bound that a rounding decides whether its gradient lives.
    """
    width, rank = shape.width, shape.rank
    hidden = normal(shape.tokens, shape.hidden, seed=1, dtype=dtype)
    hidden[:, 0] = hidden[:, 0].float().round().clamp(-1, 1).to(dtype)
    sign = (-1.0) ** torch.arange(2 * width, device=DEVICE)
    centre = (8 * sign * (torch.arange(2 * width, device=DEVICE) >= width)).to(dtype)
    inputs = {"hidden": hidden, "bias": normal(2 * width, seed=2, dtype=dtype, scale=0.2)}
    if encoder == "linear":
        weight = normal(2 * width, shape.hidden, seed=3, dtype=dtype, scale=0.5 / shape.hidden**0.5)
        weight[:, 0] = centre
        return inputs | {"weight": weight}
    lora_a = normal(rank, shape.hidden, seed=3, dtype=dtype, scale=shape.hidden**-0.5)
    lora_b = normal(2 * width, rank, seed=4, dtype=dtype, scale=0.5 / rank**0.5)
    lora_a[:, 0], lora_a[0], lora_b[:, 0] = 0, 0, centre
    lora_a[0, 0] = 1
    return inputs | {"lora_a": lora_a, "lora_b": lora_b}


def weight_of(inputs: Named) -> Any:
    """The encoder's weight as the ops take it."""
    return inputs["weight"] if "weight" in inputs else (inputs["lora_a"], inputs["lora_b"])


def eager_bottleneck(inputs: Named, eps: Tensor | None) -> Named:
    """z and kl from the formulas, in the dtype of `inputs`. None: the noise of torch.randn."""
    z, kl = eager.bottleneck(
        inputs["hidden"], weight_of(inputs), inputs["bias"], eps if eps is None else eps.to(inputs["hidden"].dtype)
    )
    return {"z": z, "kl": kl}


def head_inputs(tokens: int, width: int, vocabulary: int, dtype: torch.dtype) -> tuple[Named, Tensor]:
    """({input [N, D], weight [V, D]}, labels [N]): logits of standard deviation 2, a tenth of labels ignored."""
    inputs = {
        "input": normal(tokens, width, seed=5, dtype=dtype),
        "weight": normal(vocabulary, width, seed=6, dtype=dtype, scale=2 / width**0.5),
    }
    return inputs, _labels(tokens, vocabulary)


def bottleneck_head_inputs(shape: Shape, dtype: torch.dtype) -> tuple[Named, Tensor]:
    """({z [N, K], up_weight [H, K], up_bias [H], head_weight [V, H]}, labels [N])."""
    inputs = {
        "z": normal(shape.tokens, shape.width, seed=5, dtype=dtype),
        "up_weight": normal(shape.hidden, shape.width, seed=6, dtype=dtype, scale=shape.width**-0.5),
        "up_bias": normal(shape.hidden, seed=7, dtype=dtype, scale=0.2),
        "head_weight": normal(shape.vocabulary, shape.hidden, seed=8, dtype=dtype, scale=2 / shape.hidden**0.5),
    }
    return inputs, _labels(shape.tokens, shape.vocabulary)


def eager_head(
    input: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    token_weight: Tensor | None = None,
) -> Tensor:
    """The sum of the loss from full logits, in the dtype of `input`: plain PyTorch, one operation after the other."""
    logits = logit_scale * F.linear(input, weight)
    if bias is not None:
        logits = logits + bias
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    losses = F.cross_entropy(logits, labels, label_smoothing=label_smoothing, reduction="none")
    if z_loss:
        losses = losses + torch.where(labels == IGNORED, 0, z_loss * logits.logsumexp(dim=-1).square())
    return (losses if token_weight is None else losses * token_weight).sum()


def exact_head(input: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The mean loss and its gradient of `input` in float64, a block of rows at a time: what any N and V fit into."""
    x, weight = input.detach().double(), weight.detach().double()
    count = (labels != IGNORED).sum()
    rows = max(1, _BLOCK_ELEMENTS // weight.shape[0])
    losses: list[Tensor] = []
    gradients: list[Tensor] = []
    for start in range(0, x.shape[0], rows):
        block = x[start : start + rows].requires_grad_()
        loss = F.cross_entropy(F.linear(block, weight), labels[start : start + rows], reduction="sum") / count
        gradients += torch.autograd.grad(loss, block)
        losses.append(loss.detach())
    return torch.stack(losses).sum(), torch.cat(gradients)


def exact_bottleneck_head(inputs: Named, labels: Tensor) -> Named:
    """The mean loss and the gradients of z, up_weight and up_bias, in float64."""
    z, up = inputs["z"].detach().double(), inputs["up_weight"].detach().double()
    loss, grad = exact_head(F.linear(z, up, inputs["up_bias"].detach().double()), inputs["head_weight"], labels)
    gradients = {"z": grad @ up, "up_weight": grad.T @ z, "up_bias": grad.sum(dim=0)}
    return {"loss": loss, **{f"gradient of {name}": gradient for name, gradient in gradients.items()}}


def leaves(inputs: Named, dtype: torch.dtype | None = None, frozen: tuple[str, ...] = ()) -> Named:
    """Detached, in `dtype` (None: as they are), requiring gradients but for the frozen."""
    return {n: t.detach().to(dtype or t.dtype).requires_grad_(n not in frozen) for n, t in inputs.items()}


def upstream_of(outputs: Named) -> list[Tensor]:
    """Upstream gradients that differ in every element, and that bfloat16 represents; 1 for a scalar."""
    return [
        torch.ones_like(output)
        if output.dim() == 0
        else normal(*output.shape, seed=20 + i, dtype=torch.bfloat16).to(output.dtype)
        for i, output in enumerate(outputs.values())
    ]


def with_gradients(outputs: Named, inputs: Named, upstream: list[Tensor] | None = None) -> Named:
    """The outputs, and the gradients of those inputs that require them."""
    wanted = {name: tensor for name, tensor in inputs.items() if tensor.requires_grad}
    gradients = torch.autograd.grad(
        list(outputs.values()), list(wanted.values()), upstream_of(outputs) if upstream is None else upstream
    )
    named = {f"gradient of {name}": gradient for name, gradient in zip(wanted, gradients, strict=True)}
    return {**{name: output.detach() for name, output in outputs.items()}, **named}


def synchronise() -> None:
    """Waits for the device."""
    if not DRY:
        torch.cuda.synchronize()


def peak_bytes(step: Callable[[], Named]) -> int:
    """Bytes allocated at the highest point of a step beyond what was there before and what it returns (dry mode: 0)."""
    outputs = step()  # warm: libraries' workspaces stay
    del outputs
    if DRY:
        return 0
    synchronise()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    outputs = step()
    synchronise()
    returned = sum(tensor.untyped_storage().nbytes() for tensor in outputs.values())
    return torch.cuda.max_memory_allocated() - before - returned


def _labels(tokens: int, vocabulary: int) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(10)
    labels = torch.randint(vocabulary, (tokens,), generator=generator, device=DEVICE)
    labels[::10] = IGNORED
    return labels
