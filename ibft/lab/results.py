"""results.json from the files of the pieces: what the report reads."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ibft.lab.jobs import RESULT_NAME, Tasks, base_folder, run_folder
from ibft.lab.plan import FRESH, Plan, Regime
from ibft.lab.pretraining import prompt
from ibft.memorization.separation import separation

# Models whose scores are kept row by row, for densities; of the others the separations are.
_SCORED = ("sft", "sft-fresh", "ib-published", "ib-0.1-1")
_REFERENCES = ("sft", "sft-fresh")  # one from each base


def gather(plan: Plan, output: Path) -> dict[str, Any]:
    """All that results.json holds besides how and where it was made. Needs every piece of the plan."""
    example = Tasks.of(plan, plan.seeds[0]).held_out[0]
    found: dict[str, Any] = {name: [] for name in ("bases", "runs", "memorization", "separations", "representation")}
    parameters = 0
    for regime in plan.regimes:
        for seed in plan.seeds:
            for name in dict.fromkeys((regime.base, FRESH)):
                folder = base_folder(output, seed, name)
                base = _read(folder)
                parameters = base["parameters"]
                kind = "fresh" if name == FRESH else "memorised"
                found["bases"].append(_base(regime, seed, kind, base, str((folder / RESULT_NAME).relative_to(output))))
                scores = {rows: np.array(base[rows]["min_k"]) for rows in ("training", "held_out")}
                _add_scores(found, regime, seed, f"base-{kind}", scores, kept=True)
            for arm in plan.arms:
                if not plan.includes(regime, arm):
                    continue
                folder = run_folder(output, regime, arm, seed)
                run = _read(folder)
                scores = {rows: np.array(values) for rows, values in run.pop("min_k").items()}
                _add_scores(found, regime, seed, arm.name, scores, kept=arm.name in _SCORED)
                distances = run.pop("representation")
                where = {"regime": regime.name, "seed": seed}
                if arm.name in _REFERENCES:
                    model = "base-fresh" if FRESH in (arm.base, regime.base) else "base-memorised"
                    found["representation"].append({**where, "model": model, **distances["before"]})
                found["representation"].append({**where, "model": arm.name, **distances["after"]})
                found["runs"].append(
                    {**run, "seconds": run["seconds"]["all"], "file": str((folder / RESULT_NAME).relative_to(output))}
                )
    return {
        "config": {**plan.to_dict(), "parameters": parameters},
        "seeds": list(plan.seeds),
        "tasks": {
            "training": max(regime.tasks for regime in plan.regimes),
            "memorised": max(regime.memorised for regime in plan.regimes),
            "held_out": plan.held_out,
            "pretraining": plan.first_reading + plan.other_programs,
            "example": {
                "name": example.name,
                "description": example.description,
                "program": example.program,
                "prompt": prompt(example, described=True),
            },
        },
        "regimes": [
            {
                "name": regime.name,
                "title": regime.title,
                "training": regime.tasks,
                "memorised": regime.memorised,
                "repeats": regime.repeats,
                "steps": regime.steps,
            }
            for regime in plan.regimes
        ],
        "arms": [
            {
                "name": arm.name,
                "title": arm.title,
                "group": arm.group,
                "base": arm.base,
                "alpha": arm.settings.get("alpha"),
                "beta": arm.settings.get("beta"),
                "of": arm.of,
                "settings": {name: value for name, value in arm.settings.items() if name not in ("alpha", "beta")},
            }
            for arm in plan.arms
        ],
        **found,
    }


def _read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / RESULT_NAME).read_text())


def _base(regime: Regime, seed: int, kind: str, base: dict[str, Any], file: str) -> dict[str, Any]:
    """Recall and loss by name are over what the regime has memorised, or for the fresh base over all its tasks."""
    count = regime.memorised if kind == "memorised" else regime.tasks
    training = base["training"]
    recalled, loss, tokens = (np.array(training[name][:count]) for name in ("recalled", "name_loss", "tokens"))
    return {
        "regime": regime.name,
        "seed": seed,
        "kind": kind,
        "seconds": base["seconds"],
        "recall": float(recalled.mean()),
        "training_greedy": float(np.mean(training["followed"][: regime.tasks])),
        "held_out_greedy": float(np.mean(base["held_out"]["followed"])),
        "name_loss": float((loss * tokens).sum() / tokens.sum()),
        "curve": base["curve"],
        "file": file,
    }


def _add_scores(
    found: dict[str, Any], regime: Regime, seed: int, model: str, scores: dict[str, np.ndarray], *, kept: bool
) -> None:
    """Scores of the memorised rows, of the others of the training set ("fresh"), and of held-out ones."""
    groups = dict(_groups(regime, scores))
    where = {"regime": regime.name, "seed": seed, "model": model}
    if kept:
        for rows, values in groups.items():
            found["memorization"].append(
                {**where, "rows": rows, "min_k": [round(value, 4) for value in values.tolist()]}
            )
    for a, b in (("training", "held-out"), ("training", "fresh"), ("fresh", "held-out")):
        if a in groups and b in groups:
            apart = separation(groups[a], groups[b])
            found["separations"].append({**where, "a": a, "b": b, "auc": apart.auc, "ks": apart.ks, "score": "min_k"})


def _groups(regime: Regime, scores: dict[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    memorised = regime.memorised or regime.tasks  # where nothing is memorised, all rows are training rows
    yield "training", scores["training"][:memorised]
    if memorised < regime.tasks:
        yield "fresh", scores["training"][memorised : regime.tasks]
    yield "held-out", scores["held_out"]
