"""The configuration that a command line of `ibft train` asks for.

Precedence: flag over --config over --training_config over --preset over default.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from typing import Any

from ibft.adapter import with_adapter_values
from ibft.config import BOTTLENECK, FIELDS, FILES, TrainConfig
from ibft.config_file import read_config_file
from ibft.errors import InputError
from ibft.flags import checked, read_flags
from ibft.legacy import read_training_config

PRECEDENCE = "Flags win over --config, that over --training_config, that over --preset, and that over defaults."
_DESCRIPTION = f"Fine-tune a causal language model with LoRA and an information bottleneck. {PRECEDENCE}"
_EXAMPLE = """

example, first to see what would happen, then to train:
  ibft train --base_model Qwen/Qwen2.5-Coder-0.5B --dataset data.jsonl \\
    --target_layer 15 --output_dir run --dry_run
  ibft train --config run.yaml --seed 1     # run.yaml has the rest"""

SOURCES = {
    "config": (
        FILES,
        "YAML or JSON of these options, `name: value`; paths in it are relative to the working folder, not to the file",
    )
}

# What --preset published sets: the published project's code as it ran.
PUBLISHED: dict[str, Any] = {
    "max_length": 2048,
    "packing": "none",
    "bos": "no",
    "bottleneck_dim": 256,
    "target_layer": 20,
    "encoder": "linear",
    "alpha": 0.2,
    "beta": 0.01,
    "lora_r": 32,
    "lora_alpha": 32,
    "lora_dropout": 0.05,
    "lora_target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "learning_rate": 1e-4,
    "weight_decay": 0.0,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.1,
    "num_train_epochs": 3.0,
    "per_device_train_batch_size": 2,
}

# The first also undoes a value that a weaker source has for the second, which would otherwise win over it.
_OUTRANKED_BY = {
    "warmup_ratio": "warmup_steps",
    "num_train_epochs": "max_steps",
    "per_device_train_batch_size": "tokens_per_batch",
}


def parse_args(argv: Sequence[str]) -> tuple[TrainConfig, list[str]]:
    """The configuration that a command line asks for, with its files read, and notices for the caller to print.

    Raises InputError for whatever is wrong with the flags or the files; --help prints and exits as argparse does.
    """
    flags = read_flags(TrainConfig, argv, "ibft train", _DESCRIPTION, files=SOURCES, example=_EXAMPLE)
    path = flags.pop("config", None)
    config_file = {} if path is None else read_config_file(path, TrainConfig)
    if "adapter_config" in flags:  # as the whole of the adapter, which the file's lora_* are parts of
        config_file = {name: value for name, value in config_file.items() if not name.startswith("lora_")}
    for name, value in config_file.items():
        if name not in flags:  # else the flag's value is the one that counts
            config_file[name] = checked(TrainConfig, name, value, f"{path}: {name}")
    given = _over(config_file, flags)

    notices: list[str] = []
    training_file: dict[str, object] = {}
    if given.get("training_config"):
        training_file, notices = read_training_config(given["training_config"])
    for name, value in training_file.items():
        if name not in given:
            checked(TrainConfig, name, value, f"{given['training_config']}: {name}")
    preset = PUBLISHED if given.get("preset") == "published" else {}  # any other name is refused with the values
    config = TrainConfig.from_dict(_over(_over(preset, training_file), given))
    check_engine(config)
    if config.adapter_config is not None:
        config = with_adapter_values(config, [name for name in given if name.startswith("lora_")])

    ib_flags = [f"--{name}" for name in flags if FIELDS[name].metadata["group"] == BOTTLENECK]
    if config.method == "sft" and ib_flags:
        notices.append(f"{', '.join(ib_flags)}: no effect, because --method sft trains without a bottleneck.")
    if {"tokens_per_batch", "per_device_train_batch_size"} <= set(flags):
        raise InputError("--tokens_per_batch and --per_device_train_batch_size set the same thing; give one of them.")
    for name, stronger in (("num_train_epochs", "max_steps"), ("warmup_ratio", "warmup_steps")):
        if name in flags and stronger in flags:
            notices.append(f"--{name}: no effect beside --{stronger}.")
    if "save_steps" in flags and config.save_strategy == "no":
        notices.append("--save_steps: no effect with save_strategy no.")
    if os.path.normpath(config.output_dir) == os.curdir:
        notices.append("output_dir is the current folder, and the run writes its files there; --output_dir changes it.")
    return config, notices


def _over(weaker: Mapping[str, Any], stronger: Mapping[str, Any]) -> dict[str, Any]:
    """Both sources together, where the stronger one has the last word."""
    undone = {_OUTRANKED_BY.get(name) for name in stronger}
    return {**{name: value for name, value in weaker.items() if name not in undone}, **stronger}


def check_engine(config: TrainConfig) -> None:
    """Raise InputError where DeepSpeed is asked for and not installed, or its file asks for what cannot be done."""
    if config.chosen_engine != "deepspeed":
        return
    if importlib.util.find_spec("deepspeed") is None:
        raise InputError('--engine deepspeed needs DeepSpeed, which is not installed: pip install "ibft[deepspeed]".')
    from ibft.engines.zero_config import zero_config

    zero_config(config.deepspeed_config, config, world_size=1)
