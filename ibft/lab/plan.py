"""What `ibft lab` runs: regimes of memorisation, arms of fine-tuning, and the sizes of both modes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ibft.config import preset_values

FRESH = "fresh"  # the base that has not read the training set


@dataclass(frozen=True, kw_only=True)
class Regime:
    """How many training tasks there are, and how many of them the base has read how often."""

    name: str
    title: str
    tasks: int
    memorised: int
    repeats: int
    steps: int  # of every fine-tuning
    remedies: bool = False  # whether the arms of that group are run

    @property
    def base(self) -> str:
        """The name of the base that the regime starts from."""
        return f"memorised-{self.memorised}x{self.repeats}" if self.memorised else FRESH


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way of fine-tuning: which base, which rows, and what is set in `ibft train`."""

    name: str
    title: str
    group: str
    base: str = "memorised"
    rows: str = "all"  # "filtered": without those that score as memorised; "unmemorised": by knowing which they are
    of: str | None = None  # the arm that this one is a change of: an ablation's, a remedy's
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def train_settings(self) -> dict[str, Any]:
        """What the arm sets in `ibft train`."""
        return {"method": "sft"} if self.group == "reference" else {"method": "ib", **self.settings}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """An experiment, all of whose numbers follow from this and the seeds."""

    mode: str
    seeds: tuple[int, ...]
    regimes: tuple[Regime, ...]
    arms: tuple[Arm, ...]
    held_out: int = 200
    samples: int = 10
    temperature: float = 0.8
    max_steps: int = 2  # list operations of a task
    hidden_size: int = 64
    num_layers: int = 4
    num_heads: int = 2
    rope_theta: float = 100.0  # the documents are short
    first_reading: int = 500  # programs that every base reads once
    documented: int = 9500  # further programs that every base reads once, with their descriptions
    other_programs: int = 4000  # that may be read after those
    second_reading: int = 16_500  # documents read after those, of which the memorised programs are a part
    rows_per_step: int = 4
    pretraining_learning_rate: float = 6e-3
    rows_per_micro_batch: int = 4
    learning_rate: float = 4e-3
    lora_r: int = 16
    lora_alpha: int = 32
    bottleneck_dim: int = 256  # as published, so that a nat of KL weighs what it weighs there

    def includes(self, regime: Regime, arm: Arm) -> bool:
        """Whether the arm is run in the regime."""
        if arm.group == "remedy":
            return regime.remedies
        if not regime.memorised:
            return arm.base != FRESH and arm.rows == "all"  # nothing to filter, and its base is the fresh one anyway
        return arm.rows != "unmemorised" or regime.memorised < regime.tasks

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)


# One axis each from the first: how strongly, what share, and whether at all.
STRONG = Regime(
    name="strong", title="all of 150 tasks memorised", tasks=150, memorised=150, repeats=100, steps=300, remedies=True
)
MILD = Regime(name="mild", title="all of 150 tasks memorised weakly", tasks=150, memorised=150, repeats=65, steps=300)
MIXED = Regime(
    name="mixed", title="75 of 150 tasks memorised", tasks=150, memorised=75, repeats=200, steps=300, remedies=True
)
NONE = Regime(name="none", title="none of 150 tasks memorised", tasks=150, memorised=0, repeats=0, steps=300)

_REFERENCES = (
    Arm(name="sft", title="SFT", group="reference"),
    Arm(name="sft-fresh", title="SFT, base that has not memorised", group="reference", base=FRESH),
    Arm(name="sft-filtered", title="SFT without the most memorised half", group="reference", rows="filtered"),
    Arm(name="sft-unmemorised", title="SFT on the other half alone", group="reference", rows="unmemorised"),
)


def _pair(name: str, title: str, group: str, **settings: Any) -> tuple[Arm, Arm]:
    """An IB arm, and beside it the ablation without KL: the same weight on the prediction from the bottleneck."""
    without = {**settings, "kl_weight": 0.0}
    return (
        Arm(name=name, title=f"IB-FT {title}", group=group, settings=settings),
        Arm(name=f"{name}-no-kl", title=f"{title} without KL", group="ablation", of=name, settings=without),
    )


def _remedy(name: str, title: str, of: Arm, **settings: Any) -> Arm:
    return Arm(
        name=f"{of.name}-{name}",
        title=f"{of.title.removeprefix('IB-FT ')}, {title}",
        group="remedy",
        of=of.name,
        settings={**of.settings, **settings},
    )


_PUBLISHED_WEIGHTS = {name: preset_values("published")[name] for name in ("alpha", "beta")}
_WEIGHTS = "({alpha:g}, {beta:g})".format(**_PUBLISHED_WEIGHTS)
_PUBLISHED = _pair("ib-published", f"published {_WEIGHTS}", "published", **_PUBLISHED_WEIGHTS)
# The same weights on a bottleneck of half the hidden size: KL is a mean over K, so that a nat weighs 8 times as much.
_NARROW = _pair("ib-narrow", f"{_WEIGHTS}, K = 32", "grid", **_PUBLISHED_WEIGHTS, bottleneck_dim=32)


def _grid(*weights: tuple[float, float]) -> tuple[Arm, ...]:
    return tuple(
        arm for a, b in weights for arm in _pair(f"ib-{a:g}-{b:g}", f"({a:g}, {b:g})", "grid", alpha=a, beta=b)
    )


def quick_plan(seed: int) -> Plan:
    """One seed and the arms that tell the story."""
    return Plan(
        mode="quick",
        seeds=(seed,),
        regimes=(STRONG, MIXED),
        arms=(*_REFERENCES, *_PUBLISHED, *_grid((3.0, 1.0))),
        samples=5,
    )


def full_plan(seeds: tuple[int, ...]) -> Plan:
    """Every regime and arm, several seeds."""
    grid = _grid((0.1, 0.01), (0.1, 1.0), (1.0, 0.1), (1.0, 1.0), (3.0, 1.0), (10.0, 1.0))
    narrow, strong = _NARROW[0], next(arm for arm in grid if arm.name == "ib-3-1")
    remedies = [
        remedy
        for arm in (narrow, strong)
        for remedy in (
            _remedy("warmup", "alpha warmed up", arm, alpha_warmup_steps=150),
            _remedy("free-bits", "8 nats free", arm, free_bits=8.0),
            _remedy("target", "rate held at 8 nats", arm, ib_rate_target=8.0),
        )
    ]
    remedies += [_remedy(f"layer-{layer}", f"layer {layer}", strong, target_layer=layer) for layer in (1, 3, 4)]
    return Plan(
        mode="full",
        seeds=seeds,
        regimes=(STRONG, MIXED, MILD, NONE),
        arms=(*_REFERENCES, *_PUBLISHED, *_NARROW, *grid, *remedies),
    )
