"""The objective, loss = CE + alpha * (kl_weight * KL + beta * CE_ib): its settings, its weights, and its health.

Every term is a sum divided by a count. The counts are those of the whole optimizer step, over micro-batches and ranks,
so that how a step is cut up changes nothing.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ibft.errors import InputError
from ibkernels.bottleneck import KL_REDUCTIONS, LOGVAR_RANGE
from ibkernels.modules import ENCODERS

KL_TOKENS = ("all", "labels")
CONFIG_NAME = "ib_config.json"
STATE_NAME = "ib_state.json"
# A dimension is active when its mean moves with the input: Var(mu) > 0.01, as in Burda et al., arXiv 1509.00519.
ACTIVE_VARIANCE = 0.01
# Exponents of `dual_step`, and what a nat of KL may cost in nats of CE_ib: below, it is as good as free; above, nothing
# can pay for it, for a nat in z saves at most one of CE_ib (but KL may be averaged over many more tokens).
_ASCENT, _DAMPING = 0.1, 4.0
_PRICES = (1e-3, 1e3)


@dataclass(frozen=True, kw_only=True)
class IBConfig:
    """Where the bottleneck sits, its shape, and the weights of its terms; defaults as published (arXiv 2510.16022).

    Args:
        target_layer: l of hidden_states[l], 1..num_layers; the top one is the hidden state after the final norm.
        bottleneck_dim: K.
        encoder: "linear" ([2K, H]) or "lora" (a product of rank encoder_rank).
        encoder_rank: R, used by the "lora" encoder only.
        alpha: weight of kl_weight * KL + beta * CE_ib; kl_weight and beta: weights within.
        alpha_warmup_steps: optimizer steps over which alpha rises linearly from 0.
        free_bits: nats per token, see `free_nats`. 0: none are free.
        ib_rate_target: KL in nats per token (summed over K whatever kl_reduction, over the tokens of kl_tokens) that is
            held by adapting the weight of KL from kl_weight on, see `adapted_weight`. None: that weight stays.
        kl_tokens: the KL's mean runs over "all" real tokens, or over "labels" positions.
        kl_reduction: over K, "mean" (the scale alpha and beta were published for) or "sum" (nats).
        logvar_range: the clamp of logvar.
        sample: False sets z = mu in training too.

    Raises:
        InputError: for a value out of its range, or settings that exclude each other.
    """

    target_layer: int
    bottleneck_dim: int = 256
    encoder: str = "linear"
    encoder_rank: int = 32
    alpha: float = 0.2
    beta: float = 0.01
    alpha_warmup_steps: int = 0
    kl_weight: float = 1.0
    free_bits: float = 0.0
    ib_rate_target: float | None = None
    kl_tokens: str = "all"
    kl_reduction: str = "mean"
    logvar_range: tuple[float, float] = LOGVAR_RANGE
    sample: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "logvar_range", tuple(self.logvar_range))
        for name in ("target_layer", "bottleneck_dim", "encoder_rank"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)!r}; it must be a positive integer.")
        if not isinstance(self.alpha_warmup_steps, int) or self.alpha_warmup_steps < 0:
            raise InputError(f"alpha_warmup_steps is {self.alpha_warmup_steps!r}; it must be an integer, at least 0.")
        for name in ("alpha", "beta", "kl_weight", "free_bits"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise InputError(f"{name} is {getattr(self, name)!r}; it must be a finite number, not negative.")
        for name, accepted in (("encoder", ENCODERS), ("kl_tokens", KL_TOKENS), ("kl_reduction", KL_REDUCTIONS)):
            if getattr(self, name) not in accepted:
                raise InputError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(accepted)}.")
        check_kl_options(self)
        if len(self.logvar_range) != 2 or not self.logvar_range[0] <= self.logvar_range[1]:
            raise InputError(f"logvar_range is {self.logvar_range}; it must be (low, high) with low <= high.")

    @property
    def nats_scale(self) -> int:
        """What KL is to be multiplied by for nats per token: K where kl_reduction takes the mean over them."""
        return self.bottleneck_dim if self.kl_reduction == "mean" else 1

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


def check_kl_options(settings: Any) -> None:
    """Raises InputError for free bits of a KL that has no weight, and for a rate target that cannot be held."""
    if settings.free_bits and not settings.kl_weight:
        raise InputError(f"free_bits {settings.free_bits:g} needs kl_weight above 0: without it every nat is free.")
    target = settings.ib_rate_target
    if target is None:
        return
    if not 0 < target < float("inf"):
        raise InputError(f"ib_rate_target is {target!r}; it must be a finite number of nats per token, above 0.")
    for name, what in (
        ("alpha", "alpha * kl_weight is what holds the rate"),
        ("kl_weight", "what holds the rate is that weight, multiplied anew in each step"),
        ("beta", "without CE_ib nothing raises the rate"),
    ):
        if getattr(settings, name) == 0:
            raise InputError(f"ib_rate_target {target:g} needs {name} above 0: {what}.")
    if settings.free_bits:
        raise InputError(
            f"ib_rate_target {target:g} and free_bits {settings.free_bits:g} exclude each other: both say how many "
            "nats a token may have; give one of them."
        )


def free_nats(kl: Tensor, free: float) -> Tensor:
    """max(kl - free, 0): what each token pays whose KL (kl, [N]) has `free` nats for nothing; no gradient below.

    Kingma et al. (arXiv 1606.04934) grant the free bits to the mean over a minibatch, of each group of latent
    dimensions. Here the token is the unit, over all K dimensions together. A mean is that of the whole optimizer step,
    which is known only when the step's last micro-batch has been through forward on every rank: it would take a second
    forward pass, or the mean of the step before, and that is what ib_rate_target does (as does the "soft free bits" of
    Chen et al., arXiv 1611.02731). A sum over tokens is the same however a step is cut up, and takes no extra pass.
    What is lost: a token that needs more than its share pays for it, though others leave theirs unused.
    """
    return torch.relu(kl - free)


def dual_step(multiplier: Tensor, rate: Tensor, target: float, bounds: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """Dual ascent on the constraint rate = target (nats per token): the next multiplier, and the next KL weight.

        r          =  clamp(rate / target, 1/2, 2)
        multiplier <- clamp(multiplier * r ** 0.1, *bounds)
        KL weight   = multiplier * r ** 4

    The first update is dual ascent on the multiplier's logarithm. The factor r ** 4 is proportional control, without
    which dual ascent overshoots and oscillates, because the rate follows the weight with the delay of the optimizer
    (Stooke et al., arXiv 2007.03964). The exponents are from trials: docs/method.md.
    """
    r = torch.nan_to_num(rate / target, nan=1.0).clamp(0.5, 2.0)
    multiplier = (multiplier * r**_ASCENT).clamp(*bounds)
    return multiplier, multiplier * r**_DAMPING


class Objective:
    """The weights of the terms as they stand, with what moves them from one optimizer step to the next.

    `alpha` is a number on the host, `kl_weight` one too, or with an ib_rate_target a float32 scalar on the device.
    """

    def __init__(self, config: IBConfig) -> None:
        self.config = config
        self.steps = 0  # optimizer steps done
        # In a warm-up a tensor, because a compiled graph would be compiled anew for every other number.
        self._alpha: float | Tensor = (
            torch.zeros((), dtype=torch.float64) if config.alpha_warmup_steps else config.alpha
        )
        self.kl_weight: float | Tensor = config.kl_weight
        self._multiplier: Tensor | None = None  # of the constraint; float32, on the device
        if config.ib_rate_target is not None:
            self.kl_weight = self._multiplier = torch.tensor(config.kl_weight)
        self._watch: Any = None  # a hook that notes the gradients before the first `step`
        self._has_gradient = False
        self._observed: Tensor | None = None  # KL in nats, and tokens; of this rank's micro-batches since the last step

    @property
    def alpha(self) -> float:
        """alpha * min(1, steps done / alpha_warmup_steps)."""
        warmup = self.config.alpha_warmup_steps
        return self.config.alpha if self.steps >= warmup else self.config.alpha * self.steps / warmup

    def loss(self, ce: Tensor, kl: Tensor, ce_ib: Tensor) -> Tensor:
        """loss = CE + alpha * (kl_weight * KL + beta * CE_ib)."""
        alpha = self._alpha.to(ce.dtype) if isinstance(self._alpha, Tensor) else self._alpha
        return ce + alpha * (self.kl_weight * kl + self.config.beta * ce_ib)

    @property
    def varies(self) -> bool:
        """Whether `step` does anything."""
        return self.config.alpha_warmup_steps > 0 or self.config.ib_rate_target is not None

    def varying(self) -> dict[str, float | Tensor]:
        """The weights that `step` moves, as they are now, by name."""
        found: dict[str, float | Tensor] = {}
        if self.config.alpha_warmup_steps:
            found["alpha"] = self.alpha
        if self.config.ib_rate_target is not None:
            found["kl_weight"] = self.kl_weight
        return found

    def observe(self, kl: Tensor, num_tokens: Tensor, parameter: Tensor) -> None:
        """Takes in a micro-batch: its KL, summed over the tokens (as kl_reduction has it over K), and their number.

        Raises InputError where a gradient of `parameter`, one that is trained, was used up and `step` never called.
        """
        if self.varies and not torch.compiler.is_compiling():
            self._check_step_is_called(parameter)
        # Once each: they are made on the CPU.
        if isinstance(self._alpha, Tensor):
            self._alpha = self._alpha.to(kl.device)
        if self._multiplier is None or not isinstance(self.kl_weight, Tensor):
            return
        self._multiplier, self.kl_weight = self._multiplier.to(kl.device), self.kl_weight.to(kl.device)
        seen = torch.stack([kl.detach().float() * self.config.nats_scale, num_tokens.float()])
        self._observed = seen if self._observed is None else self._observed + seen

    def step(self) -> None:
        """After an optimizer step. With an ib_rate_target this is collective where there are several processes."""
        self.steps += 1
        self._set_alpha()
        if self._watch is not None:
            self._watch.remove()
            self._watch = None
        config = self.config
        if config.ib_rate_target is None or self._multiplier is None:
            return
        observed = torch.zeros(2, device=self._multiplier.device) if self._observed is None else self._observed
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(observed)
        kl, num_tokens = observed
        price = config.beta * config.nats_scale  # the weight at which a nat of KL costs as much as a nat of CE_ib
        bounds = (_PRICES[0] * price, _PRICES[1] * price)
        self._multiplier, self.kl_weight = dual_step(self._multiplier, kl / num_tokens, config.ib_rate_target, bounds)
        self._observed = None

    def _set_alpha(self) -> None:
        if isinstance(self._alpha, Tensor):
            self._alpha = torch.full_like(self._alpha, self.alpha)

    def _check_step_is_called(self, parameter: Tensor) -> None:
        """Else alpha would stay 0, or the KL weight where it began, and nothing would tell."""
        # FSDP2, ZeRO-3, ZeRO-1 and 2: their gradients come and go within a step.
        sharded = any(hasattr(parameter, mark) for mark in ("to_local", "ds_id", "_hp_mapping"))
        if self.steps or not parameter.requires_grad or sharded:
            return
        if self._has_gradient and parameter.grad is None:
            raise InputError(
                "a gradient has been used, and alpha_warmup_steps and ib_rate_target were not told of the step: call "
                "model.step_objective() after each optimizer.step(); Trainer does with callbacks=[ObjectiveCallback()]."
            )
        if self._watch is None:  # fused optimizers do not count up the parameter's version
            self._watch = parameter.register_post_accumulate_grad_hook(self._note_gradient)

    def _note_gradient(self, _: Tensor) -> None:
        self._has_gradient = True

    def save(self, folder: str | Path) -> None:
        """Writes ib_state.json into the folder, where there is anything to go on from."""
        if self.varies:
            state: dict[str, float] = {"steps": self.steps}
            if self._multiplier is not None:  # exact: JSON has all digits
                state |= {"multiplier": float(self._multiplier), "kl_weight": float(self.kl_weight)}
            (Path(folder) / STATE_NAME).write_text(json.dumps(state, indent=2) + "\n")

    def load(self, file: str | Path) -> None:
        """Goes on from an ib_state.json."""
        state = json.loads(Path(file).read_text())
        self.steps = state["steps"]
        self._set_alpha()
        if self._multiplier is not None:
            self._multiplier = torch.full_like(self._multiplier, state["multiplier"])
            self.kl_weight = torch.full_like(self._multiplier, state["kl_weight"])


def active_share(mu: Tensor) -> Tensor:
    """Share of the bottleneck's dimensions that carry information: mu [N, K] -> scalar in [0, 1].

    A dimension is active when the variance of its mean over the tokens exceeds 0.01 (Burda et al., arXiv 1509.00519);
    with none active the posterior has collapsed onto the prior. NaN for fewer than two tokens.
    """
    if mu.shape[0] < 2:
        return mu.new_full((), float("nan"))
    return (mu.float().var(dim=0) > ACTIVE_VARIANCE).float().mean()
