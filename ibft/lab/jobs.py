"""The pieces of the experiment: a base model, or one fine-tuning measured. Each ends with its own result.json.

A piece depends on the plan, the seed and the pieces before it alone, so that it may run in any process and be repeated.
"""

from __future__ import annotations

import contextlib
import json
import platform
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from ibft.architecture import CausalLM, default_target_layer
from ibft.config import TrainConfig
from ibft.data import EncodedDataset, encode, load_rows
from ibft.errors import InputError
from ibft.estimate.devices import cpu_name
from ibft.evaluate.metrics import Count, mean, per_problem, valid_ks
from ibft.lab.plan import Arm, Plan, Regime
from ibft.lab.pretraining import ROW_LENGTH, encode_tasks, lab_tokenizer, prompt, read, write_rows
from ibft.lab.sampling import behaviour, generate, judge
from ibft.lab.tasks import Task, generate_tasks
from ibft.lab.tiny import build_llama, save_base
from ibft.memorization.scores import score_documents
from ibft.represent.distances import between
from ibft.represent.groups import choose_groups
from ibft.represent.states import hidden_means
from ibft.run_folder import METRICS_NAME, write_json
from ibft.train import train

RESULT_NAME = "result.json"
KS = (1, 5, 10)
FIRST_READING = "first-reading"
_EXTREMES = 0.25  # share of the rows in the group of the highest scores, and in that of the lowest
_AGAIN = 1000  # between the training seeds of the same seed's runs
_CURVE = ("step", "epoch", "ce", "kl_nats", "ce_ib", "active_share", "alpha", "kl_weight")


@dataclass(frozen=True)
class Tasks:
    """The tasks of a seed, no program or name in two of the four.

    A held-out task behaves unlike every training task and decoy, by the lists that judge it; a program of `others` may
    behave as it does, and has been read under another name.
    """

    training: list[Task]  # the base has memorised the first of them
    decoys: list[Task]  # likewise
    held_out: list[Task]
    others: list[Task]  # what a base reads besides

    @classmethod
    def of(cls, plan: Plan, seed: int) -> Tasks:
        """All that the plan needs. InputError where too few of the programs there are behave in ways of their own."""
        training = max(regime.tasks for regime in plan.regimes)
        repeated = training + max(regime.decoys for regime in plan.regimes)
        count = repeated + plan.held_out + plan.first_reading + plan.other_programs + plan.documented
        tasks = generate_tasks(count, seed=seed, max_steps=plan.max_steps)
        known = {behaviour(task) for task in tasks[:repeated]}
        held_out: list[Task] = []
        others: list[Task] = []
        for task in tasks[repeated:]:
            wanted = len(held_out) < plan.held_out and behaviour(task) not in known
            (held_out if wanted else others).append(task)
        if len(held_out) < plan.held_out:
            raise InputError(f"only {len(held_out)} programs behave unlike the training tasks, of {plan.held_out}.")
        return cls(tasks[:training], tasks[training:repeated], held_out, others)


def base_folder(output: Path, seed: int, name: str) -> Path:
    """Where a base lies: the model itself, and its result.json."""
    return output / "bases" / f"seed-{seed}" / name


def run_folder(output: Path, regime: Regime, arm: Arm, seed: int) -> Path:
    """Where a fine-tuning lies."""
    return output / "runs" / regime.name / arm.name / f"seed-{seed}"


def first_reading(plan: Plan, output: Path, seed: int) -> None:
    """What all bases of a seed have in common: a model that has read programs once."""
    folder, start = _fresh_folder(base_folder(output, seed, FIRST_READING)), time.process_time()
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
    _finish(folder, {"seed": seed, "curve": curve, "parameters": model.num_parameters()}, start)


def make_base(plan: Plan, output: Path, seed: int, regime: Regime) -> None:
    """Goes on from the first reading: with the programs that the regime's base repeats, and other ones."""
    folder, start = _fresh_folder(base_folder(output, seed, regime.base)), time.process_time()
    first = base_folder(output, seed, FIRST_READING)
    tokenizer, model = AutoTokenizer.from_pretrained(first), AutoModelForCausalLM.from_pretrained(first)
    tasks = Tasks.of(plan, seed)
    repeated = [*tasks.training[: regime.memorised], *tasks.decoys[: regime.decoys]]
    others = tasks.others[plan.first_reading : plan.first_reading + plan.other_programs]
    data = encode_tasks([*others, *repeated], tokenizer, folder / "programs.jsonl", described=False)
    left = plan.second_reading - len(repeated) * regime.repeats
    order = np.concatenate(
        [np.resize(np.arange(len(others)), left), np.tile(np.arange(len(others), len(data)), regime.repeats)]
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
    result = {"base": regime.base, "seed": seed, "parameters": model.num_parameters(), "curve": curve}
    # By the name alone, as the base has read them, and by the rows of the fine-tuning.
    for rows, members in (("training", tasks.training), ("decoys", tasks.decoys), ("held_out", tasks.held_out)):
        programs = generate(model, tokenizer, [prompt(task, described=False) for task in members])
        verdicts = [judge(task, program) for task, (program,) in zip(members, programs, strict=True)]
        named = score_documents(
            model, encode_tasks(members, tokenizer, folder / f"{rows}-named.jsonl", described=False)
        )
        result[rows] = {
            "recalled": [verdict == "correct" for verdict in verdicts],
            "name_loss": (-named.mean_log_prob).tolist(),
            "tokens": named.tokens.tolist(),
            "min_k_named": named.min_k.tolist(),
        }
    for rows, members in (("training", tasks.training), ("held_out", tasks.held_out)):
        described = encode_tasks(members, tokenizer, folder / f"{rows}.jsonl", described=True)
        result[rows]["followed"] = [verdict == "correct" for verdict in _greedy(model, tokenizer, members)]
        result[rows]["min_k"] = score_documents(model, described).min_k.tolist()
        if rows == "training":
            result["representation"] = _distances(model, described, np.array(result[rows]["min_k_named"]))
    _finish(folder, result, start)


def run_arm(plan: Plan, output: Path, seed: int, regime: Regime, arm: Arm) -> None:
    """Fine-tunes with `ibft train`, and measures what came of it."""
    folder, start = _fresh_folder(run_folder(output, regime, arm, seed)), time.process_time()
    base = base_folder(output, seed, regime.base)
    known = json.loads((base / RESULT_NAME).read_text())
    tasks = Tasks.of(plan, seed)
    training, held_out = tasks.training[: regime.tasks], tasks.held_out
    scores = np.array(known["training"]["min_k_named"][: regime.tasks])
    kept = _kept_rows(arm, regime, scores, seed)
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
        seed=seed + _AGAIN * arm.again,
        output_dir=str(folder / "adapter"),
        save_strategy="no",
        logging_steps=max(1, regime.steps // 40),
        use_cpu=True,
        **{"bottleneck_dim": plan.bottleneck_dim, **arm.train_settings},
    )
    before = time.process_time()
    with open(folder / "train.log", "w") as log, contextlib.redirect_stdout(log):
        train(config)
    training_seconds = time.process_time() - before

    tokenizer = AutoTokenizer.from_pretrained(base)
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    model = PeftModel.from_pretrained(model, folder / "adapter").merge_and_unload().eval()
    curve = _curve(folder / "adapter" / METRICS_NAME)
    result: dict[str, Any] = {
        "arm": arm.name,
        "seed": seed,
        "regime": regime.name,
        "trained_rows": len(kept),
        "trained_memorised_rows": sum(index < regime.memorised for index in kept),
        "epochs": curve[-1]["epoch"] + 1,
        "training_processor_seconds": training_seconds,
        "curve": curve,
    }
    solved = _greedy(model, tokenizer, training)
    result["training"] = {
        "greedy": solved.count("correct") / len(training),
        "correct_greedy": [verdict == "correct" for verdict in solved],
    }
    result["crossed"] = _crossed(model, tokenizer, training)
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
    rows = {
        name: encode_tasks(members, tokenizer, folder / f"{name}.jsonl", described=True)
        for name, members in (("training", training), ("held_out", held_out))
    }
    result["min_k"] = {name: score_documents(model, data).min_k.tolist() for name, data in rows.items()}
    result["representation"] = _distances(model, rows["training"], scores)
    shutil.rmtree(folder / "adapter" / "checkpoints", ignore_errors=True)
    _finish(folder, result, start)


def _fresh_folder(folder: Path) -> Path:
    """Empty: what is there was left by a piece that did not end."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _finish(folder: Path, result: dict[str, Any], start: float) -> None:
    """Writes the piece's result.json, with what made it; its presence says that the piece is done."""
    made = {
        "versions": {
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in ("ibft", "torch", "transformers", "peft", "numpy")},
        },
        "machine": cpu_name(),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "threads": torch.get_num_threads(),
    }
    seconds = time.process_time() - start  # of the processor, so that a busy machine does not count
    write_json(folder / RESULT_NAME, {**result, "processor_seconds": seconds, "made": made})


def _kept_rows(arm: Arm, regime: Regime, scores: np.ndarray, seed: int) -> list[int]:
    """Indices of the rows that the arm trains on; `scores` are of the programs by name, as the base has read them."""
    if arm.rows == "unmemorised":
        return list(range(regime.memorised, regime.tasks))
    if arm.rows == "filtered":
        return sorted(np.argsort(scores, kind="stable")[: regime.tasks // 2].tolist())
    if arm.rows == "half":
        return sorted(np.random.default_rng(seed).permutation(regime.tasks)[: regime.tasks // 2].tolist())
    return list(range(regime.tasks))


def _greedy(model: Any, tokenizer: Any, tasks: Sequence[Task]) -> list[str]:
    programs = generate(model, tokenizer, [prompt(task, described=True) for task in tasks])
    return [judge(task, program) for task, (program,) in zip(tasks, programs, strict=True)]


def _crossed(model: Any, tokenizer: Any, tasks: Sequence[Task]) -> list[str]:
    """Each task's description with the next task's name: which of the two the greedy program obeys.

    "neither" where it obeys none, or the two ask for the same.
    """
    others = [*tasks[1:], tasks[0]]
    prompts = [
        prompt(replace(task, name=other.name), described=True) for task, other in zip(tasks, others, strict=True)
    ]
    obeyed = []
    for task, other, (program,) in zip(tasks, others, generate(model, tokenizer, prompts), strict=True):
        by_description, by_name = (judge(each, program) == "correct" for each in (task, other))
        obeyed.append("neither" if by_description == by_name else "description" if by_description else "name")
    return obeyed


def _distances(model: Any, data: EncodedDataset, scores: np.ndarray) -> dict[str, Any]:
    """Between the rows whose programs score highest and lowest under the base, at the published relative depth."""
    groups = choose_groups(scores, _EXTREMES, "the training rows")
    layer = default_target_layer(CausalLM.of(model).num_layers)
    found = between(*(hidden_means(model, data, group, layer=layer) for group in (groups.most, groups.least)))
    return {**asdict(found), "separation": found.separation._asdict()}


def _curve(file: Path) -> list[dict[str, Any]]:
    """The logged steps, thinned to those at which the active share was taken."""
    records = [json.loads(line) for line in file.read_text().splitlines()]
    every = max(1, len(records) // 40)
    kept = [record for record in records if record["step"] % every == 0 or record is records[-1]]
    return [{name: record[name] for name in _CURVE if name in record} for record in kept]
