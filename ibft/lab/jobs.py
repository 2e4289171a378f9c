"""The pieces of the experiment: a base model, or one fine-tuning measured. Each ends with its own result.json.

A piece depends on the plan, the seed and the pieces before it alone, so that it may run in any process and be repeated.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from ibft.architecture import CausalLM, default_target_layer
from ibft.config import TrainConfig
from ibft.data import encode, load_rows
from ibft.evaluate.metrics import Count, mean, per_problem, valid_ks
from ibft.lab.plan import FRESH, Arm, Plan, Regime
from ibft.lab.pretraining import ROW_LENGTH, encode_tasks, lab_tokenizer, prompt, read, write_rows
from ibft.lab.sampling import generate, judge
from ibft.lab.tasks import Task, generate_tasks
from ibft.lab.tiny import build_llama, save_base
from ibft.memorization.scores import Scores, score_documents
from ibft.represent.distances import between
from ibft.represent.groups import choose_groups
from ibft.represent.states import hidden_means
from ibft.run_folder import METRICS_NAME, write_json
from ibft.train import train

RESULT_NAME = "result.json"
KS = (1, 5, 10)
FIRST_READING = "first-reading"
_EXTREMES = 0.25  # share of the rows in the group of the most memorised, and in that of the least
_CURVE = ("step", "ce", "kl_nats", "ce_ib", "active_share", "alpha", "kl_weight")


@dataclass(frozen=True)
class Tasks:
    """The tasks of a seed, no program or name in two of the three."""

    training: list[Task]  # a regime takes the first of them, and the base has memorised the first of those
    held_out: list[Task]
    others: list[Task]  # what a base reads besides

    @classmethod
    def of(cls, plan: Plan, seed: int) -> Tasks:
        """All that the plan needs."""
        training = max(regime.tasks for regime in plan.regimes)
        count = training + plan.held_out + plan.first_reading + plan.other_programs + plan.documented
        tasks = generate_tasks(count, seed=seed, max_steps=plan.max_steps)
        held_out = tasks[training : training + plan.held_out]
        return cls(tasks[:training], held_out, tasks[training + plan.held_out :])


def base_folder(output: Path, seed: int, name: str) -> Path:
    """Where a base lies: the model itself, and its result.json."""
    return output / "bases" / f"seed-{seed}" / name


def run_folder(output: Path, regime: Regime, arm: Arm, seed: int) -> Path:
    """Where a fine-tuning lies."""
    return output / "runs" / regime.name / arm.name / f"seed-{seed}"


def first_reading(plan: Plan, output: Path, seed: int) -> None:
    """What all bases of a seed have in common: a model that has read programs once."""
    folder, start = _fresh_folder(base_folder(output, seed, FIRST_READING)), time.perf_counter()
    set_seed(seed)
    tokenizer = lab_tokenizer()
    model = build_llama(
        tokenizer,
        hidden_size=plan.hidden_size,
        num_layers=plan.num_layers,
        num_heads=plan.num_heads,
        max_length=ROW_LENGTH,
        rope_theta=plan.rope_theta,
        seed=seed,
    )
    others = Tasks.of(plan, seed).others
    file = folder / "documents.jsonl"
    write_rows(others[: plan.first_reading], file, described=False)
    write_rows(others[-plan.documented :], file, described=True)
    data = encode(load_rows(str(file)), tokenizer, max_length=ROW_LENGTH)
    curve = read(
        model,
        data,
        np.arange(len(data)),
        rows_per_step=plan.rows_per_step,
        learning_rate=plan.pretraining_learning_rate,
        seed=seed,
    )
    save_base(model, tokenizer, folder)
    write_json(
        folder / RESULT_NAME,
        {"seconds": time.perf_counter() - start, "curve": curve, "parameters": model.num_parameters()},
    )


def make_base(plan: Plan, output: Path, seed: int, regime: Regime | None) -> None:
    """Goes on from the first reading: with other programs and the regime's memorised ones, or (None) without those.

    Both read as many documents.
    """
    name = FRESH if regime is None else regime.base
    folder, start = _fresh_folder(base_folder(output, seed, name)), time.perf_counter()
    first = base_folder(output, seed, FIRST_READING)
    tokenizer, model = AutoTokenizer.from_pretrained(first), AutoModelForCausalLM.from_pretrained(first)
    tasks = Tasks.of(plan, seed)
    repeated, repeats = ([], 0) if regime is None else (tasks.training[: regime.memorised], regime.repeats)
    others = tasks.others[plan.first_reading : plan.first_reading + plan.other_programs]
    data = encode_tasks([*others, *repeated], tokenizer, folder / "programs.jsonl", described=False)
    left = plan.second_reading - len(repeated) * repeats
    order = np.concatenate(
        [np.resize(np.arange(len(others)), left), np.tile(np.arange(len(others), len(data)), repeats)]
    )
    set_seed(seed)
    curve = read(
        model,
        data,
        order,
        rows_per_step=plan.rows_per_step,
        learning_rate=plan.pretraining_learning_rate,
        seed=seed + 1,
    )
    save_base(model, tokenizer, folder)
    result = {"base": name, "seed": seed, "parameters": model.num_parameters(), "curve": curve}
    # By the name alone, as the base has read them, and by the rows of the fine-tuning.
    for rows, members in (("training", tasks.training), ("held_out", tasks.held_out)):
        programs = generate(model, tokenizer, [prompt(task, described=False) for task in members])
        verdicts = [judge(task, program) for task, (program,) in zip(members, programs, strict=True)]
        named = _scores(model, tokenizer, members, folder / f"{rows}-named.jsonl", described=False)
        described = _scores(model, tokenizer, members, folder / f"{rows}.jsonl", described=True)
        result[rows] = {
            "followed": [verdict == "correct" for verdict in _greedy(model, tokenizer, members)],
            "recalled": [verdict == "correct" for verdict in verdicts],
            "name_loss": (-named.mean_log_prob).tolist(),
            "tokens": named.tokens.tolist(),
            "min_k": described.min_k.tolist(),
            "min_k_plus_plus": described.min_k_plus_plus.tolist(),
        }
    write_json(folder / RESULT_NAME, {**result, "seconds": time.perf_counter() - start})


def run_arm(plan: Plan, output: Path, seed: int, regime: Regime, arm: Arm) -> None:
    """Fine-tunes with `ibft train`, and measures what came of it."""
    folder, start = _fresh_folder(run_folder(output, regime, arm, seed)), time.perf_counter()
    base = base_folder(output, seed, FRESH if arm.base == FRESH else regime.base)
    known = json.loads((base_folder(output, seed, regime.base) / RESULT_NAME).read_text())
    tasks = Tasks.of(plan, seed)
    training, held_out = tasks.training[: regime.tasks], tasks.held_out
    scores = np.array(known["training"]["min_k"][: regime.tasks])
    kept = _kept_rows(arm, regime, scores)
    write_rows([training[index] for index in kept], folder / "rows.jsonl", described=True)
    config = TrainConfig(
        base_model=str(base),
        dataset=[str(folder / "rows.jsonl")],
        max_length=ROW_LENGTH,
        per_device_train_batch_size=plan.rows_per_micro_batch,
        max_steps=regime.steps,
        learning_rate=plan.learning_rate,
        lora_r=plan.lora_r,
        lora_alpha=plan.lora_alpha,
        lora_dropout=0.0,
        seed=seed,
        output_dir=str(folder / "adapter"),
        save_strategy="no",
        logging_steps=max(1, regime.steps // 40),
        use_cpu=True,
        **{"bottleneck_dim": plan.bottleneck_dim, **arm.train_settings},
    )
    with open(folder / "train.log", "w") as log, contextlib.redirect_stdout(log):
        train(config)
    trained = time.perf_counter()

    tokenizer = AutoTokenizer.from_pretrained(base)
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    result: dict[str, Any] = {"arm": arm.name, "seed": seed, "regime": regime.name, "trained_rows": len(kept)}
    before = _distances(model, tokenizer, training, scores, folder / "before.jsonl")
    model = PeftModel.from_pretrained(model, folder / "adapter").merge_and_unload().eval()
    result["curve"] = _curve(folder / "adapter" / METRICS_NAME)
    recalled = _greedy(model, tokenizer, training)
    result["training"] = {"greedy": recalled.count("correct") / len(training), "n": len(training)}
    verdicts = _greedy(model, tokenizer, held_out)
    samples = generate(
        model, tokenizer, [prompt(task, described=True) for task in held_out], samples=plan.samples,
        temperature=plan.temperature, seed=seed,
    )  # fmt: skip
    correct = [
        sum(judge(task, program) == "correct" for program in programs)
        for task, programs in zip(held_out, samples, strict=True)
    ]
    counts = [Count(plan.samples, passed) for passed in correct]
    metrics = per_problem(counts, valid_ks(counts, KS))
    result["held_out"] = {
        "greedy": verdicts.count("correct") / len(held_out),
        "correct_greedy": [verdict == "correct" for verdict in verdicts],
        "samples": plan.samples,
        "correct": correct,
        "metrics": {name: mean(values) for name, values in metrics.items()},
    }
    result["kinds"] = {kind: verdicts.count(kind) / len(held_out) for kind in ("correct", "wrong", "invalid")}
    result["min_k"] = {
        rows: _scores(model, tokenizer, members, folder / f"{rows}.jsonl", described=True).min_k.tolist()
        for rows, members in (("training", training), ("held_out", held_out))
    }
    after = _distances(model, tokenizer, training, scores, folder / "after.jsonl")
    result["representation"] = {"before": before, "after": after}
    result["seconds"] = {"training": trained - start, "all": time.perf_counter() - start}
    shutil.rmtree(folder / "adapter" / "checkpoints", ignore_errors=True)
    write_json(folder / RESULT_NAME, result)


def _fresh_folder(folder: Path) -> Path:
    """Empty: what is there was left by a piece that did not end."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _kept_rows(arm: Arm, regime: Regime, scores: np.ndarray) -> list[int]:
    """Indices of the rows that the arm trains on; "filtered" drops the half that the base knows best."""
    if arm.rows == "unmemorised":
        return list(range(regime.memorised, regime.tasks))
    if arm.rows == "filtered":
        return sorted(np.argsort(scores, kind="stable")[: regime.tasks // 2].tolist())
    return list(range(regime.tasks))


def _greedy(model: Any, tokenizer: Any, tasks: Sequence[Task]) -> list[str]:
    programs = generate(model, tokenizer, [prompt(task, described=True) for task in tasks])
    return [judge(task, program) for task, (program,) in zip(tasks, programs, strict=True)]


def _scores(model: Any, tokenizer: Any, tasks: Sequence[Task], file: Path, *, described: bool) -> Scores:
    return score_documents(model, encode_tasks(tasks, tokenizer, file, described=described))


def _distances(model: Any, tokenizer: Any, tasks: Sequence[Task], scores: np.ndarray, file: Path) -> dict[str, float]:
    """Between the rows that the base knows best and least, at the published relative depth."""
    data = encode_tasks(tasks, tokenizer, file, described=True)
    groups = choose_groups(scores, _EXTREMES, "the training rows")
    layer = default_target_layer(CausalLM.of(model).num_layers)
    most, least = (hidden_means(model, data, group, layer=layer) for group in (groups.most, groups.least))
    found = between(most, least, permutations=100)
    return {"l2": found.l2, "angle_degrees": found.angle_degrees, "separation": found.separation.value}


def _curve(file: Path) -> list[dict[str, Any]]:
    """The logged steps, thinned to those at which the active share was taken."""
    records = [json.loads(line) for line in file.read_text().splitlines()]
    every = max(1, len(records) // 40)
    kept = [record for record in records if record["step"] % every == 0 or record is records[-1]]
    return [{name: record[name] for name in _CURVE if name in record} for record in kept]
