"""Fixtures of the engines' tests: base models, data, and trainings that are run once."""

import itertools
import json
from pathlib import Path
from typing import Any

import planted
import pytest
import torch
from engine_runs import ROWS, SIZES, STEPS, Train, flags
from processes import Training
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ibft.lab.tasks import generate_tasks, write_jsonl


@pytest.fixture(scope="session")
def bases(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The base model with a head of its own, and with one that is the embedding."""
    tied = tmp_path_factory.mktemp("tied")
    config = AutoModelForCausalLM.from_pretrained(base_folder).config
    config.tie_word_embeddings = True
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config).save_pretrained(tied)
    AutoTokenizer.from_pretrained(base_folder).save_pretrained(tied)
    return {"untied": base_folder, "tied": tied}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where every run goes, with the data and DeepSpeed's files."""
    folder = tmp_path_factory.mktemp("engines")
    write_jsonl(generate_tasks(ROWS, seed=2), folder / "rows.jsonl")
    for stage in (1, 2, 3):
        # Else stage 3 would leave parameters as small as these whole in every process.
        settings = {"stage": stage, **({"stage3_param_persistence_threshold": 0} if stage == 3 else {})}
        (folder / f"zero{stage}.json").write_text(json.dumps({"zero_optimization": settings}))
    return folder


@pytest.fixture(scope="session")
def train(bases: dict[str, Path], folder: Path) -> Train:
    """`train("untied", "fsdp2", 2, "--flag value ...")`: every step's gradients and record, and the weights saved.

    The same arguments give what they gave before.
    """
    done: dict[tuple[str, str, int, str], Any] = {}
    numbers = itertools.count()  # so that after a run that failed the next has a folder of its own

    def train(base: str, engine: str, world_size: int, more: str) -> Any:
        key = (base, engine, world_size, more)
        if key not in done:
            out = folder / f"run-{next(numbers)}"
            Training(
                f"--base_model {bases[base]} --dataset {folder}/rows.jsonl --output_dir {out} {STEPS} {SIZES} "
                f"{flags(engine, folder)} {more}",
                folder / f"{out.name}.log",
                world_size=world_size,
                before=planted.record_gradients,
                before_arguments=(f"{out}.pt",),
            ).succeed()
            records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
            weights = load_file(out / "adapter_model.safetensors")
            if (out / "ib_head.safetensors").exists():
                weights |= load_file(out / "ib_head.safetensors")
            done[key] = torch.load(f"{out}.pt"), records, weights
        return done[key]

    return train
