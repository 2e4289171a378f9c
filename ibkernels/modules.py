"""The nn.Module faces: a bottleneck layer, and its cross-entropy head alone, for people who write their own models."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from ibkernels.bottleneck import KL_REDUCTIONS, LOGVAR_RANGE, check_logvar_range, encode, variational_bottleneck
from ibkernels.cross_entropy import CrossEntropyStats, bottleneck_cross_entropy
from ibkernels.philox import rng_state

ENCODERS = ("linear", "lora")


class VariationalBottleneck(nn.Module):
    """A variational information bottleneck on hidden states, with the up-projection that reads it.

        z, kl = layer(hidden)                                 # [..., K], [...]
        loss = layer.cross_entropy(z, head_weight, labels)    # through the model's own output embedding

    Args:
        hidden_size: H; bottleneck_dim: K.
        encoder: "linear", or "lora" with `encoder_rank` R.
        sample: draw z in training; False: z = mu always. Evaluation mode is always z = mu.
        logvar_range, kl_reduction: as in `variational_bottleneck`.
        bias: whether encoder and up-projection have one.
        device, dtype: of the parameters; float32 suits any model, since the ops round what they need.

    Parameters (state-dict names): `weight` [2K, H], or `lora_a` [R, H] and `lora_b` [2K, R]; `bias` [2K];
    `up_weight` [H, K]; `up_bias` [H]. Initialised as nn.Linear does.

    Raises:
        ValueError: for a size, rank or option out of its range.
    """

    bias: nn.Parameter | None
    up_bias: nn.Parameter | None

    def __init__(
        self,
        hidden_size: int,
        bottleneck_dim: int,
        *,
        encoder: str = "linear",
        encoder_rank: int | None = None,
        sample: bool = True,
        logvar_range: tuple[float, float] = LOGVAR_RANGE,
        kl_reduction: str = "mean",
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_sizes(hidden_size=hidden_size, bottleneck_dim=bottleneck_dim)
        if encoder not in ENCODERS:
            raise ValueError(f"encoder is {encoder!r}; it must be one of {', '.join(ENCODERS)}.")
        if (encoder == "lora") != (encoder_rank is not None):
            raise ValueError(
                f"encoder_rank is {encoder_rank} with encoder {encoder!r}: 'lora' needs one, 'linear' none."
            )
        if kl_reduction not in KL_REDUCTIONS:
            raise ValueError(f"kl_reduction is {kl_reduction!r}; it must be one of {', '.join(KL_REDUCTIONS)}.")
        check_logvar_range(logvar_range)
        self.hidden_size, self.bottleneck_dim, self.encoder_rank = hidden_size, bottleneck_dim, encoder_rank
        self.sample = sample
        self.logvar_range = logvar_range
        self.kl_reduction = kl_reduction

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        outputs = 2 * bottleneck_dim
        if encoder_rank is None:
            self.weight = parameter(outputs, hidden_size)
        else:
            _check_sizes(encoder_rank=encoder_rank)
            self.lora_a = parameter(encoder_rank, hidden_size)
            self.lora_b = parameter(outputs, encoder_rank)
        self.register_parameter("bias", parameter(outputs) if bias else None)
        self.up_weight = parameter(hidden_size, bottleneck_dim)
        self.register_parameter("up_bias", parameter(hidden_size) if bias else None)
        self.reset_parameters()

    @property
    def encoder_weight(self) -> Tensor | tuple[Tensor, Tensor]:
        """What the ops take as `weight`: [2K, H], or the pair (lora_a, lora_b)."""
        return (self.lora_a, self.lora_b) if hasattr(self, "lora_a") else self.weight

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """nn.Linear's initialisation; lora_b is scaled so that lora_b lora_a has it too, variance 1/(3H)."""
        hidden_size, width = self.up_weight.shape
        if hasattr(self, "lora_a"):
            _uniform(self.lora_a, 1 / math.sqrt(hidden_size), generator)
            _uniform(self.lora_b, math.sqrt(3 / self.lora_b.shape[1]), generator)
        else:
            _uniform(self.weight, 1 / math.sqrt(hidden_size), generator)
        _uniform(self.bias, 1 / math.sqrt(hidden_size), generator)
        _uniform(self.up_weight, 1 / math.sqrt(width), generator)
        _uniform(self.up_bias, 1 / math.sqrt(width), generator)

    def forward(
        self, hidden: Tensor, *, rng: Tensor | None = None, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """z [..., K] in hidden's dtype and kl [...] float32, from hidden [..., H].

        rng: (seed, offset) of the noise, int64 [2]; None: drawn by `rng_state` in training. Evaluation never samples.
        rows: row ids of the noise stream, int64 [...].
        """
        if not (self.training and self.sample):
            rng = None
        elif rng is None:
            rng = rng_state(hidden.device)
        return variational_bottleneck(
            hidden,
            self.encoder_weight,
            self.bias,
            rng,
            rows=rows,
            logvar_range=self.logvar_range,
            kl_reduction=self.kl_reduction,
        )

    def encode(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """mu and the clamped logvar, float32 [..., K] each."""
        return encode(hidden, self.encoder_weight, self.bias, logvar_range=self.logvar_range)

    def cross_entropy(
        self, z: Tensor, head_weight: Tensor, labels: Tensor, **options: Any
    ) -> Tensor | tuple[Tensor, CrossEntropyStats]:
        """Cross-entropy of W_head (W_up z + b_up): z [..., K], head_weight [V, H], labels int64 [...].

        Options and result as in `bottleneck_cross_entropy`.
        """
        return _flat_cross_entropy(z, self.up_weight, self.up_bias, head_weight, labels, options)

    def extra_repr(self) -> str:
        """As nn.Linear prints itself."""
        encoder = "linear" if self.encoder_rank is None else f"lora, encoder_rank={self.encoder_rank}"
        sizes = f"{self.hidden_size}, {self.bottleneck_dim}"  # not the parameters': sharded ones have another shape
        return f"{sizes}, encoder={encoder}, kl_reduction={self.kl_reduction}, sample={self.sample}"


class BottleneckHead(nn.Module):
    """The up-projection and cross-entropy alone, for an encoder of your own: `loss = head(z, head_weight, labels)`.

    Args:
        hidden_size: H; bottleneck_dim: K; bias: whether the up-projection has one; device, dtype: of the parameters.

    Parameters (state-dict names): `up_weight` [H, K], `up_bias` [H], initialised as nn.Linear does.
    """

    up_bias: nn.Parameter | None

    def __init__(
        self,
        hidden_size: int,
        bottleneck_dim: int,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_sizes(hidden_size=hidden_size, bottleneck_dim=bottleneck_dim)
        self.up_weight = nn.Parameter(torch.empty(hidden_size, bottleneck_dim, device=device, dtype=dtype))
        up_bias = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype)) if bias else None
        self.register_parameter("up_bias", up_bias)
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """nn.Linear's initialisation, uniform in ±1/sqrt(K)."""
        bound = 1 / math.sqrt(self.up_weight.shape[1])
        _uniform(self.up_weight, bound, generator)
        _uniform(self.up_bias, bound, generator)

    def forward(
        self, z: Tensor, head_weight: Tensor, labels: Tensor, **options: Any
    ) -> Tensor | tuple[Tensor, CrossEntropyStats]:
        """As `VariationalBottleneck.cross_entropy`."""
        return _flat_cross_entropy(z, self.up_weight, self.up_bias, head_weight, labels, options)

    def extra_repr(self) -> str:
        """As nn.Linear prints itself."""
        hidden_size, width = self.up_weight.shape
        return f"{hidden_size}, {width}, bias={self.up_bias is not None}"


def _flat_cross_entropy(
    z: Tensor, up_weight: Tensor, up_bias: Tensor | None, head_weight: Tensor, labels: Tensor, options: dict[str, Any]
) -> Tensor | tuple[Tensor, CrossEntropyStats]:
    if labels.shape != z.shape[:-1]:  # once both are flat, a transposed one would go unnoticed
        raise ValueError(
            f"labels has shape {tuple(labels.shape)} and z {tuple(z.shape)}; labels must be {tuple(z.shape[:-1])}."
        )
    return bottleneck_cross_entropy(
        z.reshape(-1, z.shape[-1]), up_weight, up_bias, head_weight, labels.reshape(-1), **options
    )


def _uniform(parameter: Tensor | None, bound: float, generator: torch.Generator | None) -> None:
    if parameter is not None:
        nn.init.uniform_(parameter, -bound, bound, generator=generator)


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"{name} is {size!r}; it must be a positive integer.")
