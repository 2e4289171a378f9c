"""What `ibft lab` runs: regimes of memorisation, arms of fine-tuning, and the sizes of both modes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ibft.arguments import PUBLISHED

CHOSEN = (3.0, 1.0)  # (alpha, beta) that trials chose before any of the plans' seeds was run
CHOSEN_NAME = "ib-{:g}-{:g}".format(*CHOSEN)
TRIAL_SEEDS = (0, 1, 2)  # those of the trials


@dataclass(frozen=True, kw_only=True)
class Regime:
    """Which training tasks the base has memorised, and which arms are run from it.

    The base reads `memorised` programs of the training set and `decoys` other ones `repeats` times each. Bases that
    differ in which programs they repeat alone have read as much and as variously.
    """

    name: str
    title: str
    memorised: int
    decoys: int
    repeats: int
    tasks: int = 150
    steps: int = 300  # of every fine-tuning
    reference: str | None = None  # the regime whose base repeats as many programs, none of the training set
    options: bool = False  # whether the arms of the groups in _OPTIONAL are run
    only: tuple[str, ...] = ()  # names of the arms that are run; all when none is named
    listed: bool = True  # whether it is more than another regime's reference

    @property
    def base(self) -> str:
        """The name of the base that the regime starts from."""
        parts = (("memorised", self.memorised), ("decoys", self.decoys))
        return "-".join(f"{name}-{count}" for name, count in parts if count) + f"x{self.repeats}"


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way of fine-tuning: which base, which rows, and what is set in `ibft train`."""

    name: str
    title: str
    group: str
    # "filtered": the half that scores as least memorised; "unmemorised": by knowing which they are; "half": any half
    rows: str = "all"
    same_as: str | None = None  # this is that arm as the reference regime runs it
    of: tuple[str, ...] = ()  # the arms that this one is a change of
    again: int = 0  # another training seed on the same base
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def train_settings(self) -> dict[str, Any]:
        """What the arm sets in `ibft train`."""
        return {"method": "ib", **self.settings} if self.settings else {"method": "sft"}


_OPTIONAL = ("option", "layer", "repeat")


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
        """Whether the arm is run from the regime's base."""
        if arm.same_as:
            return False
        if regime.only:
            return arm.name in regime.only
        if arm.group in _OPTIONAL:
            return regime.options
        return arm.rows == "all" or 0 < regime.memorised < regime.tasks

    def source(self, regime: Regime, arm: Arm) -> tuple[Regime, Arm] | None:
        """Where the arm's runs in the regime are: its own, or what its reference ran; None where there are none."""
        if not arm.same_as:
            return (regime, arm) if self.includes(regime, arm) else None
        other = next((other for other in self.regimes if other.name == regime.reference), None)
        same = next((same for same in self.arms if same.name == arm.same_as), None)
        return (other, same) if other and same and self.includes(other, same) else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)


NONE = Regime(
    name="none", title="none of 150 tasks memorised, but 150 other programs", memorised=0, decoys=150, repeats=100
)
STRONG = Regime(
    name="strong",
    title="all of 150 tasks memorised",
    memorised=150,
    decoys=0,
    repeats=100,
    reference="none",
    options=True,
)
# Against the first, half of what is repeated is of the training set; all else is the same.
MIXED = Regime(name="mixed", title="75 of 150 tasks memorised", memorised=75, decoys=75, repeats=100, reference="none")
# Fewer repetitions leave room for other programs, and so does the reference.
MILD = Regime(
    name="mild",
    title="all of 150 tasks memorised weakly",
    memorised=150,
    decoys=0,
    repeats=65,
    reference="none-mild",
    only=("sft", "ib-published", "no-kl-0.002", CHOSEN_NAME, "no-kl-3"),
)
_NONE_MILD = Regime(
    name="none-mild",
    title="none of 150 tasks memorised, but 150 other programs weakly",
    memorised=0,
    decoys=150,
    repeats=65,
    only=("sft", CHOSEN_NAME),
    listed=False,
)

_PUBLISHED_WEIGHTS = {name: PUBLISHED[name] for name in ("alpha", "beta")}


def _weighted(name: str, group: str, alpha: float, beta: float) -> Arm:
    settings = {"alpha": alpha, "beta": beta}
    prefix = "published " if group == "published" else ""
    return Arm(name=name, title=f"IB-FT {prefix}({alpha:g}, {beta:g})", group=group, settings=settings)


def _grid(*weights: tuple[float, float]) -> tuple[Arm, ...]:
    return tuple(_weighted(f"ib-{alpha:g}-{beta:g}", "grid", alpha, beta) for alpha, beta in weights)


def _without_kl(*arms: Arm) -> tuple[Arm, ...]:
    """The ablations: without KL, alpha and beta act through their product alone, so that there is one for each."""
    products: dict[float, list[str]] = {}
    for arm in arms:
        products.setdefault(round(arm.settings["alpha"] * arm.settings["beta"], 12), []).append(arm.name)
    return tuple(
        Arm(
            name=f"no-kl-{product:g}",
            title=f"extra prediction head (no KL), weight {product:g}",
            group="ablation",
            of=tuple(names),
            settings={"alpha": product, "beta": 1.0, "kl_weight": 0.0},
        )
        for product, names in products.items()
    )


def _change(name: str, title: str, of: Arm, group: str, **settings: Any) -> Arm:
    return Arm(
        name=f"{of.name}-{name}",
        title=f"{of.title.removeprefix('IB-FT ')}, {title}",
        group=group,
        of=(of.name,),
        settings={**of.settings, **settings},
    )


def _again(of: Arm) -> tuple[Arm, ...]:
    return tuple(
        replace(of, name=f"{of.name}-again-{n}", title=f"{of.title}, training seed {n + 1}", group="repeat",
                of=(of.name,), again=n)
        for n in (1, 2)
    )  # fmt: skip


_SFT = Arm(name="sft", title="SFT", group="reference")
_PUBLISHED = _weighted("ib-published", "published", **_PUBLISHED_WEIGHTS)
# The same weights on a bottleneck of half the hidden size: KL is a mean over K, so that a nat weighs 8 times as much.
_NARROW = Arm(
    name="ib-narrow",
    title="IB-FT ({alpha:g}, {beta:g}), K = 32".format(**_PUBLISHED_WEIGHTS),
    group="narrow",
    settings={**_PUBLISHED_WEIGHTS, "bottleneck_dim": 32},
)
_CHOSEN = _grid(CHOSEN)[0]
_REFERENCES = (
    _SFT,
    Arm(name="sft-reference", title="SFT, reference base", group="reference", same_as="sft"),
    Arm(name=f"{CHOSEN_NAME}-reference", title=f"{_CHOSEN.title}, reference base", group="reference",
        same_as=CHOSEN_NAME),
    Arm(name="sft-filtered", title="SFT on the half that scores as least memorised", group="reference",
        rows="filtered"),
    Arm(name="sft-unmemorised", title="SFT on the half not memorised (known, not scored)", group="reference",
        rows="unmemorised"),
    Arm(name="sft-half", title="SFT on a random half", group="reference", rows="half"),
)  # fmt: skip


def quick_plan(seed: int) -> Plan:
    """One seed and the arms that tell the story."""
    return Plan(
        mode="quick",
        seeds=(seed,),
        regimes=(STRONG, MIXED, replace(NONE, only=("sft", CHOSEN_NAME), listed=False)),
        arms=(*_REFERENCES, _PUBLISHED, _CHOSEN, *_without_kl(_PUBLISHED, _CHOSEN)),
        samples=5,
    )


def full_plan(seeds: tuple[int, ...]) -> Plan:
    """Every regime and arm, several seeds."""
    grid = _grid((0.1, 0.01), (0.1, 1.0), (1.0, 0.1), (1.0, 1.0), CHOSEN, (10.0, 1.0))
    options = [
        option
        for arm in (_NARROW, _CHOSEN)
        for option in (
            _change("warmup", "alpha warmed up", arm, "option", alpha_warmup_steps=150),
            _change("free-bits", "8 nats free", arm, "option", free_bits=8.0),
            _change("target", "rate held at 8 nats", arm, "option", ib_rate_target=8.0),
        )
    ]
    layers = [_change(f"layer-{n}", f"layer {n}", _CHOSEN, "layer", target_layer=n) for n in (1, 3, 4)]
    # A product of 0.001 would weigh next to nothing, and the narrow bottleneck is no variant of the others.
    ablations = _without_kl(_PUBLISHED, *(arm for arm in grid if arm.name != "ib-0.1-0.01"))
    repeats = (*_again(_SFT), *_again(_CHOSEN))
    return Plan(
        mode="full",
        seeds=seeds,
        regimes=(STRONG, MIXED, MILD, NONE, _NONE_MILD),
        arms=(*_REFERENCES, _PUBLISHED, _NARROW, *grid, *ablations, *options, *layers, *repeats),
    )
