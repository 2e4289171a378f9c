"""The comparisons that the report's sentences, tables and figures share, computed once for each regime."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ibft.lab import report_statistics as statistics
from ibft.lab.report_data import SFT, SFT_FILTERED, SFT_HALF, SFT_REFERENCE, SFT_UNMEMORISED, Arm, Lab, Regime, Run
from ibft.lab.report_statistics import Estimate

# z tells about the labels at most what it tells about the hidden state, which is at most KL: I(z; y) <= I(z; hidden)
# <= E[KL]. Below this many nats per token the bottleneck's predictor cannot get anything worth the name from z.
COLLAPSED = 0.1
CHANGES = ("option", "layer")  # groups of arms that change one thing in another arm
_LAST = 0.1  # share of a run's records that its final values are the mean of


@dataclass(frozen=True)
class Bottleneck:
    """What the bottleneck came to at the end of an arm's runs."""

    kl: Estimate  # nats per token
    ce_ib_first: float
    ce_ib: Estimate  # nats per token
    active_share: float | None  # of the bottleneck's dimensions

    @property
    def collapsed(self) -> int:
        """In how many of the seeds KL ended below COLLAPSED."""
        return sum(kl < COLLAPSED for kl in self.kl.per_seed)

    @property
    def seeds(self) -> int:
        return len(self.kl.per_seed)


@dataclass(frozen=True)
class Terms:
    """An IB arm's gain over SFT and its two parts: gain = predicting + compressing."""

    arm: Arm
    gain: Estimate  # IB-FT - SFT
    predicting: Estimate  # an extra prediction head of the same weight, without KL - SFT
    compressing: Estimate  # IB-FT - without KL


@dataclass(frozen=True)
class Noise:
    """How an arm's held-out share varies between trainings that differ in their training seed alone."""

    arm: Arm
    deviation: float  # standard deviation, pooled over the bases
    trainings: int
    bases: int


@dataclass(frozen=True)
class Crossed:
    """Of prompts with one training task's description and another's name: the share that obeys either.

    The names are such as the base has memorised, where it has memorised some.
    """

    description: Estimate
    name: Estimate


@dataclass(frozen=True)
class Findings:
    """One regime. Every share is of tasks that greedy decoding solves, every difference of held-out shares."""

    regime: Regime
    held_out: Mapping[str, Estimate]  # by arm
    training: Mapping[str, Estimate]
    against_sft: Mapping[str, Estimate]  # arm - SFT
    against_ablation: Mapping[str, Estimate]  # arm - the same without KL
    changes: Mapping[str, Estimate]  # option or layer - the arm that it changes
    barrier: Estimate | None  # SFT from the base that has memorised - SFT from the reference base
    gains: Estimate | None  # (chosen - SFT) from the base that has memorised - the same from the reference base
    noises: Sequence[Noise]  # of the arms that were trained several times
    best: Arm | None  # of the grid, by its mean on held-out tasks
    best_corrected: Estimate | None  # best - SFT, corrected for the choice
    choices: int  # among how many
    terms: Sequence[Terms]  # of the arms that have an ablation
    bottlenecks: Mapping[str, Bottleneck]
    crossed: Mapping[str, Crossed]


def find(lab: Lab, regime: Regime) -> Findings:
    """All comparisons that the runs of a regime allow."""
    arms = lab.arms_in(regime)
    against_sft = {
        arm.name: found for arm in arms if arm.name != SFT and (found := compare(lab, regime, arm.name, SFT))
    }
    against_ablation = {
        arm.name: found
        for arm in arms
        if (ablation := lab.ablation_of(arm)) and (found := compare(lab, regime, arm.name, ablation.name))
    }
    changes = {
        arm.name: found
        for arm in lab.arms_in(regime, *CHANGES)
        if (plain := counterpart(lab, regime, arm)) and (found := compare(lab, regime, arm.name, plain.name))
    }
    held_out = {arm.name: statistics.share([run.solved for run in lab.of(regime, arm.name).values()]) for arm in arms}
    grid = lab.arms_in(regime, "grid")
    best = max(grid, key=lambda arm: held_out[arm.name].value) if grid else None
    return Findings(
        regime=regime,
        held_out=held_out,
        training={
            arm.name: statistics.over_seeds(
                [run.training for run in lab.of(regime, arm.name).values()], least=0, most=1
            )
            for arm in arms
        },
        against_sft=against_sft,
        against_ablation=against_ablation,
        changes=changes,
        barrier=compare(lab, regime, SFT, SFT_REFERENCE) if regime.memorised else None,
        gains=_gains(lab, regime) if regime.memorised else None,
        noises=[noise for arm in arms if (noise := _noise(lab, regime, arm.name))],
        best=best,
        best_corrected=compare(lab, regime, best.name, SFT, comparisons=len(grid)) if best else None,
        choices=len(grid),
        terms=_terms(lab, regime),
        bottlenecks={arm.name: end for arm in arms if (end := _bottleneck(lab.of(regime, arm.name)))},
        crossed={arm.name: obeyed for arm in arms if (obeyed := _crossed(regime, lab.of(regime, arm.name)))},
    )


def compare(lab: Lab, regime: Regime, a: str, b: str, *, comparisons: int = 1) -> Estimate | None:
    """a - b on held-out tasks, over the seeds that both have; None without any."""
    runs_a, runs_b = lab.of(regime, a), lab.of(regime, b)
    seeds = [seed for seed in runs_a if seed in runs_b]
    if not seeds:
        return None
    return statistics.difference(
        [runs_a[seed].solved for seed in seeds], [runs_b[seed].solved for seed in seeds], comparisons=comparisons
    )


def _gains(lab: Lab, regime: Regime) -> Estimate | None:
    """How much more the setting chosen beforehand gains over SFT where the base has memorised, paired by seed."""
    arms = [lab.of(regime, name) for name in (lab.chosen, SFT, f"{lab.chosen}-reference", SFT_REFERENCE)]
    seeds = [seed for seed in arms[0] if all(seed in runs for runs in arms)]
    if not seeds:
        return None
    gain, gain_of_reference = ([a[seed].solved - b[seed].solved for seed in seeds] for a, b in (arms[:2], arms[2:]))
    return statistics.difference(gain, gain_of_reference)


def _noise(lab: Lab, regime: Regime, arm: str) -> Noise | None:
    again = [lab.of(regime, other.name) for other in lab.arms_in(regime, "repeat") if arm in other.of]
    shares = [
        [float(runs[seed].solved.mean()) for runs in (lab.of(regime, arm), *again) if seed in runs]
        for seed in lab.of(regime, arm)
    ]
    shares = [of_base for of_base in shares if len(of_base) > 1]
    if not shares:
        return None
    freedom = sum(len(of_base) - 1 for of_base in shares)
    squares = sum((len(of_base) - 1) * float(np.var(of_base, ddof=1)) for of_base in shares)
    return Noise(lab.arms[arm], math.sqrt(squares / freedom), sum(map(len, shares)), len(shares))


def _crossed(regime: Regime, runs: Mapping[int, Run]) -> Crossed | None:
    obeyed = []
    for run in runs.values():
        names = [(index + 1) % len(run.crossed) for index in range(len(run.crossed))]  # of the tasks that give them
        known = [what for what, name in zip(run.crossed, names, strict=True) if name < regime.memorised]
        obeyed.append(np.array(known or run.crossed))
    if not all(map(len, obeyed)):
        return None
    return Crossed(
        *(statistics.share([(each == what).astype(float) for each in obeyed]) for what in ("description", "name"))
    )


def fewer_rows(lab: Lab, regime: Regime) -> list[tuple[Arm, Arm, Estimate]]:
    """The arms that leave rows out, what each is held against, and the difference.

    A random half of the rows against all of them; the halves that were chosen against the random one, where it was run.
    """
    control = SFT_HALF if lab.of(regime, SFT_HALF) else SFT
    pairs = ((SFT_HALF, SFT), (SFT_FILTERED, control), (SFT_UNMEMORISED, control))
    return [(lab.arms[a], lab.arms[b], found) for a, b in pairs if (found := compare(lab, regime, a, b))]


def filter_is_exact(lab: Lab, regime: Regime) -> bool:
    """Whether the rows that score as least memorised are those not memorised, so that both arms are the same run."""
    filtered, known = (lab.of(regime, name) for name in (SFT_FILTERED, SFT_UNMEMORISED))
    return (
        bool(filtered) and filtered.keys() == known.keys() and all(run.memorised_rows == 0 for run in filtered.values())
    )


def shown_arms(lab: Lab, found: Findings, *, references: bool = True) -> list[Arm]:
    """Those that tell a regime's story: references, published, narrow, the setting chosen beforehand (where there is
    none, the grid's best), and their ablations.
    """
    main = lab.arms[lab.chosen] if lab.of(found.regime, lab.chosen) else found.best
    arms = lab.arms_in(found.regime, "reference") if references else []
    for arm in [*lab.arms_in(found.regime, "published", "narrow"), *([main] if main else [])]:
        ablation = lab.ablation_of(arm)
        arms += [arm, ablation] if ablation and lab.of(found.regime, ablation.name) else [arm]
    return arms


def shown_rows(lab: Lab, part: str, found: Findings) -> list[Mapping[str, Any]]:
    """A regime's rows of a part that is measured for each model: those of the bases and of the shown arms."""
    shown = {arm.name for arm in shown_arms(lab, found)}
    return [row for row in lab.rows(part, found.regime) if row["model"] in shown or row["model"] not in lab.arms]


def counterpart(lab: Lab, regime: Regime, option: Arm) -> Arm | None:
    """The arm that an option changes, where it was run."""
    return next((lab.arms[name] for name in option.of if lab.of(regime, name)), None)


def unchanged(lab: Lab, found: Findings, group: str) -> list[Arm]:
    """The arms that those of a group change, where both were run."""
    plain = (counterpart(lab, found.regime, arm) for arm in lab.arms_in(found.regime, group))
    return list({arm.name: arm for arm in plain if arm}.values())


def _terms(lab: Lab, regime: Regime) -> list[Terms]:
    found = []
    for arm in lab.arms_in(regime, "published", "grid"):
        ablation = lab.ablation_of(arm)
        if not ablation:
            continue
        pairs = ((arm.name, SFT), (ablation.name, SFT), (arm.name, ablation.name))
        gain, predicting, compressing = (compare(lab, regime, a, b) for a, b in pairs)
        if gain and predicting and compressing:
            found.append(Terms(arm, gain, predicting, compressing))
    return found


def _bottleneck(runs: Mapping[int, Run]) -> Bottleneck | None:
    records = [[record for record in run.curve if _number(record.get("kl_nats")) is not None] for run in runs.values()]
    if not records or not all(records):
        return None
    last = [of_seed[-max(1, round(_LAST * len(of_seed))) :] for of_seed in records]
    active = [value for of_seed in last if (value := _number(of_seed[-1].get("active_share"))) is not None]
    return Bottleneck(
        kl=statistics.over_seeds([_mean(of_seed, "kl_nats") for of_seed in last]),
        ce_ib_first=float(np.mean([_mean(of_seed[:1], "ce_ib") for of_seed in records])),
        ce_ib=statistics.over_seeds([_mean(of_seed, "ce_ib") for of_seed in last]),
        active_share=float(np.mean(active)) if active else None,
    )


def _mean(records: Sequence[Mapping[str, object]], name: str) -> float:
    numbers = [number for record in records if (number := _number(record.get(name))) is not None]
    return float(np.mean(numbers)) if numbers else math.nan


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None
