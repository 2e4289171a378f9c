"""What `ibft lab` found, read back from its results.json alone: the report knows of nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ibft.errors import InputError

RESULTS_NAME = "results.json"
SFT, SFT_REFERENCE, SFT_FILTERED, SFT_UNMEMORISED, SFT_HALF = (
    "sft", "sft-reference", "sft-filtered", "sft-unmemorised", "sft-half",
)  # fmt: skip


@dataclass(frozen=True)
class Regime:
    """How much of the training set the base has memorised, and how strongly."""

    name: str
    title: str
    memorised: int  # training tasks that the base was made to memorise


@dataclass(frozen=True)
class Arm:
    """A way of fine-tuning. `alpha` and `beta` are None for plain fine-tuning."""

    name: str
    title: str
    group: str  # "reference", "published", "narrow", "grid", "ablation", "option", "layer" or "repeat"
    base: str  # "memorised", or "reference": one that has memorised other programs
    alpha: float | None
    beta: float | None
    of: tuple[str, ...]  # the arms that an ablation or an option is a change of

    @property
    def setting(self) -> str:
        """ "(alpha, beta)"."""
        return f"({self.alpha:g}, {self.beta:g})"


@dataclass(frozen=True)
class Run:
    """One arm, fine-tuned and measured with one seed in one regime."""

    seed: int
    training: float  # share of the training tasks solved, greedily
    solved: np.ndarray  # [held-out tasks] 0 or 1: solved greedily
    samples: int  # drawn for each held-out task
    correct: Sequence[int]  # [held-out tasks] how many of the samples pass
    curve: Sequence[Mapping[str, Any]]
    crossed: Sequence[str]  # [training tasks] what a prompt with the next task's name obeys: "description", "name" ...
    rows: int | None  # that it was trained on
    memorised_rows: int | None  # of these, what the base has memorised
    epochs: int | None
    shared: str  # the regime that it was run in, where that is another one
    seconds: float  # of the processor
    file: str
    kinds: Mapping[str, float]


@dataclass(frozen=True)
class Lab:
    """The whole of a results.json. `raw` holds what is only shown, as it was written."""

    raw: Mapping[str, Any]
    regimes: Sequence[Regime]
    arms: Mapping[str, Arm]
    runs: Mapping[tuple[str, str], Mapping[int, Run]]  # by (regime, arm), then by seed

    @property
    def chosen(self) -> str:
        """The arm whose setting was chosen before these seeds were run."""
        return str((self.raw.get("chosen") or {}).get("arm", ""))

    def of(self, regime: Regime, arm: str) -> Mapping[int, Run]:
        """An arm's runs in a regime by seed; none where it was not run."""
        return self.runs.get((regime.name, arm), {})

    def arms_in(self, regime: Regime, *groups: str) -> list[Arm]:
        """The arms that were run in a regime, of these groups (all groups when none is named), in the file's order."""
        return [arm for arm in self.arms.values() if self.of(regime, arm.name) and (not groups or arm.group in groups)]

    def ablation_of(self, arm: Arm) -> Arm | None:
        """The arm that differs from this one by having no KL term; several may share it."""
        ablations = (other for other in self.arms.values() if other.group == "ablation")
        return next((other for other in ablations if arm.name in other.of), None)

    def rows(self, part: str, regime: Regime) -> list[Mapping[str, Any]]:
        """Those entries of a list of the file ("bases", "separations" and so on) that belong to a regime."""
        return [row for row in self.raw.get(part) or () if row.get("regime") == regime.name]


def load(folder: Path) -> Lab:
    """Reads folder/results.json. InputError where there is none, or it is not what `ibft lab` writes."""
    file = folder / RESULTS_NAME
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(f"{str(folder)!r} holds no {RESULTS_NAME}; name the --output_dir of `ibft lab`.") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read ({type(error).__name__}: {error}).") from error
    try:
        lab = _parse(raw)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{file} is not what `ibft lab` writes ({type(error).__name__}: {error}).") from error
    if not lab.runs:
        raise InputError(f"{file} holds no run, so there is nothing to report.")
    return lab


def _parse(raw: Mapping[str, Any]) -> Lab:
    regimes = [Regime(row["name"], row["title"], int(row.get("memorised", 0))) for row in raw["regimes"]]
    arms = {
        row["name"]: Arm(
            row["name"],
            row["title"],
            row["group"],
            row["base"],
            row.get("alpha"),
            row.get("beta"),
            tuple(row.get("of") or ()),
        )
        for row in raw["arms"]
    }
    names = {regime.name for regime in regimes}
    runs: dict[tuple[str, str], dict[int, Run]] = {}
    for row in raw["runs"]:
        if row["regime"] not in names or row["arm"] not in arms:
            raise ValueError(f"a run of regime {row['regime']!r} and arm {row['arm']!r}, which the file does not name")
        held_out = row["held_out"]
        of_arm = runs.setdefault((row["regime"], row["arm"]), {})
        if row["seed"] in of_arm:
            raise ValueError(f"two runs of regime {row['regime']!r}, arm {row['arm']!r} and seed {row['seed']}")
        of_arm[row["seed"]] = Run(
            seed=row["seed"],
            training=row["training"]["greedy"],
            solved=np.array(held_out["correct_greedy"], dtype=float),
            samples=held_out.get("samples") or 0,
            correct=held_out.get("correct") or (),
            curve=row.get("curve") or (),
            crossed=row.get("crossed") or (),
            rows=row.get("trained_rows"),
            memorised_rows=row.get("trained_memorised_rows"),
            epochs=row.get("epochs"),
            shared=row.get("shared") or "",
            seconds=row.get("processor_seconds") or 0.0,
            file=row.get("file") or "",
            kinds=row.get("kinds") or {},
        )
    order = {key: dict(sorted(of_arm.items())) for key, of_arm in runs.items()}
    return Lab(raw, [regime for regime in regimes if any(key[0] == regime.name for key in order)], arms, order)
