"""The objective, loss = CE + alpha * (KL + beta * CE_ib): its settings, its token counts, and its health.

Every term is a sum divided by a count. The counts are those of the whole optimizer step, over micro-batches and ranks,
so that how a step is cut up changes nothing.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from ibft.errors import InputError
from ibkernels.bottleneck import KL_REDUCTIONS, LOGVAR_RANGE
from ibkernels.modules import ENCODERS

KL_TOKENS = ("all", "labels")
CONFIG_NAME = "ib_config.json"
# A dimension is active when its mean moves with the input: Var(mu) > 0.01, as in Burda et al., arXiv 1509.00519.
ACTIVE_VARIANCE = 0.01


@dataclass(frozen=True, kw_only=True)
class IBConfig:
    """Where the bottleneck sits, its shape, and the weights of its terms; defaults as published (arXiv 2510.16022).

    Args:
        target_layer: l of hidden_states[l], 1..num_layers; the top one is the hidden state after the final norm.
        bottleneck_dim: K.
        encoder: "linear" ([2K, H]) or "lora" (a product of rank encoder_rank).
        encoder_rank: R, used by the "lora" encoder only.
        alpha: weight of KL + beta * CE_ib; beta: weight of CE_ib within.
        kl_tokens: the KL's mean runs over "all" real tokens, or over "labels" positions.
        kl_reduction: over K, "mean" (the scale alpha and beta were published for) or "sum" (nats).
        logvar_range: the clamp of logvar.
        sample: False sets z = mu in training too.

    Raises:
        InputError: for a value out of its range.
    """

    target_layer: int
    bottleneck_dim: int = 256
    encoder: str = "linear"
    encoder_rank: int = 32
    alpha: float = 0.2
    beta: float = 0.01
    kl_tokens: str = "all"
    kl_reduction: str = "mean"
    logvar_range: tuple[float, float] = LOGVAR_RANGE
    sample: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "logvar_range", tuple(self.logvar_range))
        for name in ("target_layer", "bottleneck_dim", "encoder_rank"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)!r}; it must be a positive integer.")
        for name in ("alpha", "beta"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise InputError(f"{name} is {getattr(self, name)!r}; it must be a finite number, not negative.")
        for name, accepted in (("encoder", ENCODERS), ("kl_tokens", KL_TOKENS), ("kl_reduction", KL_REDUCTIONS)):
            if getattr(self, name) not in accepted:
                raise InputError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(accepted)}.")
        if len(self.logvar_range) != 2 or not self.logvar_range[0] <= self.logvar_range[1]:
            raise InputError(f"logvar_range is {self.logvar_range}; it must be (low, high) with low <= high.")

    def save(self, folder: str | Path) -> None:
        """Writes ib_config.json into the folder."""
        (Path(folder) / CONFIG_NAME).write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, file: str | Path) -> "IBConfig":
        """Reads an ib_config.json. Raises InputError for one that this version does not understand."""
        values = json.loads(Path(file).read_text())
        unknown = set(values) - set(cls.__dataclass_fields__)
        if unknown:
            raise InputError(
                f"{file} has the unknown settings {', '.join(sorted(unknown))}; was it written by a later ibft?"
            )
        return cls(**values)


def weigh_terms(ce: Tensor, kl: Tensor, ce_ib: Tensor, config: IBConfig) -> Tensor:
    """loss = CE + alpha * (KL + beta * CE_ib)."""
    return ce + config.alpha * (kl + config.beta * ce_ib)


def active_share(mu: Tensor) -> Tensor:
    """Share of the bottleneck's dimensions that carry information: mu [N, K] -> scalar in [0, 1].

    A dimension is active when the variance of its mean over the tokens exceeds 0.01 (Burda et al., arXiv 1509.00519);
    with none active the posterior has collapsed onto the prior. NaN for fewer than two tokens.
    """
    if mu.shape[0] < 2:
        return mu.new_full((), float("nan"))
    return (mu.float().var(dim=0) > ACTIVE_VARIANCE).float().mean()
