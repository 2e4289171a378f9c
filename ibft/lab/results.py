"""results.json from the files of the pieces: what the report reads."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ibft.lab.jobs import RESULT_NAME, Tasks, base_folder, run_folder
from ibft.lab.plan import CHOSEN_NAME, TRIAL_SEEDS, Plan, Regime
from ibft.lab.pretraining import prompt
from ibft.lab.sampling import behaviour
from ibft.memorization.separation import separation

# Models whose scores are kept row by row, for densities; of the others the separations are.
_SCORED = ("sft", "ib-published", CHOSEN_NAME)


def gather(plan: Plan, output: Path, pieces: Sequence[Path]) -> dict[str, Any]:
    """All of results.json, from those of the pieces (folders) that are done.

    What an arm's reference ran is listed in every regime that it is the reference of, as `shared`.
    """
    done = {folder: _read(folder) for folder in pieces if (folder / RESULT_NAME).exists()}
    found: dict[str, Any] = {name: [] for name in ("bases", "runs", "memorization", "separations", "representation")}
    regimes = {regime.name: regime for regime in plan.regimes}
    for regime in plan.regimes:
        if not regime.listed:
            continue
        bases = [regime, *([regimes[regime.reference]] if regime.reference in regimes else [])]
        for seed in plan.seeds:
            where = {"regime": regime.name, "seed": seed}
            for of in bases:
                folder = base_folder(output, seed, of.base)
                if folder not in done:
                    continue
                base, kind = done[folder], "memorised" if of.memorised else "reference"
                file = str((folder / RESULT_NAME).relative_to(output))
                found["bases"].append({**where, "kind": kind, **_base(of, base), "file": file})
                for named, suffix in ((False, ""), (True, "_named")):
                    scores = {rows: np.array(base[rows][f"min_k{suffix}"]) for rows in ("training", "held_out")}
                    _add_scores(found, regime, seed, f"base-{kind}", scores, kept=not named, named=named)
                if of is regime:
                    found["representation"].append({**where, "model": f"base-{kind}", **base["representation"]})
            for arm in plan.arms:
                if not (source := plan.source(regime, arm)):
                    continue
                folder = run_folder(output, *source, seed)
                if folder not in done:
                    continue
                run = {**done[folder], "arm": arm.name, "regime": regime.name}
                scores = {rows: np.array(values) for rows, values in run.pop("min_k").items()}
                _add_scores(found, regime, seed, arm.name, scores, kept=arm.name in _SCORED)
                distances = run.pop("representation")
                if not arm.same_as:  # of the rows that another base scores highest and lowest
                    found["representation"].append({**where, "model": arm.name, **distances})
                shared = {"shared": source[0].name} if arm.same_as else {}
                found["runs"].append({**run, **shared, "file": str((folder / RESULT_NAME).relative_to(output))})
    parameters = next((result["parameters"] for result in done.values() if "parameters" in result), None)
    return {
        "mode": plan.mode,
        "command": _command(plan),
        "pieces": {"planned": len(pieces), "done": len(done)},
        **_made(list(done.values())),
        "config": {**plan.to_dict(), "parameters": parameters},
        "seeds": list(plan.seeds),
        "chosen": {"arm": CHOSEN_NAME, "seeds": list(TRIAL_SEEDS)},
        "tasks": _tasks(plan),
        "regimes": [
            {
                "name": regime.name,
                "title": regime.title,
                "training": regime.tasks,
                "memorised": regime.memorised,
                "decoys": regime.decoys,
                "repeats": regime.repeats,
                "steps": regime.steps,
                "reference": regime.reference,
            }
            for regime in plan.regimes
            if regime.listed
        ],
        "arms": [
            {
                "name": arm.name,
                "title": arm.title,
                "group": arm.group,
                "base": "reference" if arm.same_as else "memorised",
                "alpha": arm.settings.get("alpha"),
                "beta": arm.settings.get("beta"),
                "of": list(arm.of),
                "settings": {name: value for name, value in arm.settings.items() if name not in ("alpha", "beta")},
            }
            for arm in plan.arms
        ],
        **found,
    }


def _command(plan: Plan) -> str:
    seeds = "" if plan.mode == "quick" else f" --seeds {len(plan.seeds)}"
    return f"ibft lab --{plan.mode} --seed {plan.seeds[0]}{seeds}"


def _read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / RESULT_NAME).read_text())


def _made(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """With what the pieces were made: every value that occurs, should they be of different times or machines."""

    def said(values: Iterator[Any]) -> str:
        return ", ".join(sorted({str(value) for value in values}))

    made = [result["made"] for result in results]
    finished = [each["finished"] for each in made if "finished" in each]
    names = sorted({name for each in made for name in each["versions"]})
    return {
        "versions": {name: said(each["versions"].get(name, "none") for each in made) for name in names},
        "device": f"{said(each['machine'] for each in made)}, "
        f"threads of a process: {said(each['threads'] for each in made)}",
        "finished": {"first": min(finished, default=None), "last": max(finished, default=None)},
        "processor_seconds": sum(result["processor_seconds"] for result in results),
    }


def _tasks(plan: Plan) -> dict[str, Any]:
    tasks = {seed: Tasks.of(plan, seed) for seed in plan.seeds}
    example = tasks[plan.seeds[0]].held_out[0]
    return {
        "training": max(regime.tasks for regime in plan.regimes),
        "memorised": max(regime.memorised for regime in plan.regimes),
        "held_out": plan.held_out,
        # Of each seed: how many held-out programs do what some program does that the bases have read.
        "held_out_behave_as_read": [
            sum(behaviour(task) in read for task in of_seed.held_out)
            for of_seed in tasks.values()
            for read in [{behaviour(task) for task in of_seed.others}]
        ],
        "example": {
            "name": example.name,
            "description": example.description,
            "program": example.program,
            "prompt": prompt(example, described=True),
        },
    }


def _base(regime: Regime, base: Mapping[str, Any]) -> dict[str, Any]:
    """What a base recalls by names alone, and what it does with rows of the fine-tuning.

    Recall and loss "of the training set" are over what the base has memorised of it; where that is nothing, over all.
    """

    def loss(part: str, count: int) -> float | None:
        losses, tokens = (np.array(base[part][name][:count]) for name in ("name_loss", "tokens"))
        return float((losses * tokens).sum() / tokens.sum()) if count else None

    def recall(part: str, count: int) -> float | None:
        return float(np.mean(base[part]["recalled"][:count])) if count else None

    training, held_out = regime.memorised or regime.tasks, len(base["held_out"]["recalled"])
    return {
        "base": base["base"],
        "processor_seconds": base["processor_seconds"],
        "recall": recall("training", training),
        "decoy_recall": recall("decoys", regime.decoys),
        "held_out_recall": recall("held_out", held_out),
        "name_loss": loss("training", training),
        "decoy_name_loss": loss("decoys", regime.decoys),
        "held_out_name_loss": loss("held_out", held_out),
        "training_greedy": float(np.mean(base["training"]["followed"][: regime.tasks])),
        "held_out_greedy": float(np.mean(base["held_out"]["followed"])),
        "curve": base["curve"],
    }


def _add_scores(
    found: dict[str, Any],
    regime: Regime,
    seed: int,
    model: str,
    scores: Mapping[str, np.ndarray],
    *,
    kept: bool,
    named: bool = False,
) -> None:
    """Scores of the memorised rows, of the others of the training set ("fresh"), and of held-out ones.

    `named`: of programs by their names alone, not as rows of the fine-tuning.
    """
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
            found["separations"].append(
                {**where, "a": a, "b": b, "auc": apart.auc, "ks": apart.ks, "named": named, "score": "min_k"}
            )


def _groups(regime: Regime, scores: Mapping[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    memorised = regime.memorised or regime.tasks  # where nothing is memorised, all rows are training rows
    yield "training", scores["training"][:memorised]
    if memorised < regime.tasks:
        yield "fresh", scores["training"][memorised : regime.tasks]
    yield "held-out", scores["held_out"]
