"""The published project's JSON of `transformers.TrainingArguments`, mapped onto the names of `TrainConfig`.

What we support goes across, what is at its default is ignored, what cannot change the trained adapter is named in a
notice, and anything else is refused by name: a file never asks for something that quietly does not happen.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ibft.config_file import is_empty, read_json_object
from ibft.errors import InputError
from ibft.flags import REQUIRED, default_of, did_you_mean

# What --report_to can name; ibft.tracking has them.
TRACKERS = ("wandb", "tensorboard", "trackio")

# Field of the file -> (field of TrainConfig, JSON type).
SUPPORTED: dict[str, tuple[str, type]] = {
    "output_dir": ("output_dir", str),
    "overwrite_output_dir": ("overwrite", bool),
    "per_device_train_batch_size": ("per_device_train_batch_size", int),
    "gradient_accumulation_steps": ("gradient_accumulation_steps", int),
    "learning_rate": ("learning_rate", float),
    "weight_decay": ("weight_decay", float),
    "adam_beta1": ("adam_beta1", float),
    "adam_beta2": ("adam_beta2", float),
    "adam_epsilon": ("adam_epsilon", float),
    "max_grad_norm": ("max_grad_norm", float),
    "num_train_epochs": ("num_train_epochs", float),
    "max_steps": ("max_steps", int),
    "lr_scheduler_type": ("lr_scheduler_type", str),
    "warmup_ratio": ("warmup_ratio", float),
    "logging_steps": ("logging_steps", int),
    "save_strategy": ("save_strategy", str),
    "save_steps": ("save_steps", int),
    "save_total_limit": ("save_total_limit", int),
    "seed": ("seed", int),
    "gradient_checkpointing": ("gradient_checkpointing", bool),
    "ddp_timeout": ("ddp_timeout", int),
    "run_name": ("run_name", str),
}

# Read field by field in `_settle`, because the value and not only the name differs from ours.
SETTLED = ("warmup_steps", "no_cuda", "use_cpu", "do_train", "logging_strategy", "fp16", "bf16", "report_to",
           "resume_from_checkpoint", "deepspeed")  # fmt: skip

# What is evaluated, and when, our own flags say; one notice names those of these that the file changes.
EVALUATION = ("do_eval", "do_predict", "eval_strategy", "evaluation_strategy", "eval_steps", "eval_delay",
              "eval_on_start", "eval_accumulation_steps", "eval_do_concat_batches", "eval_use_gather_object",
              "per_device_eval_batch_size", "prediction_loss_only", "fp16_full_eval", "bf16_full_eval",
              "include_inputs_for_metrics", "include_for_metrics", "batch_eval_metrics", "jit_mode_eval")  # fmt: skip

# How the Trainer loads, logs or saves: the trained adapter is the same without them. One notice, likewise.
INERT = ("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers",
         "dataloader_prefetch_factor", "ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers",
         "disable_tqdm", "gradient_checkpointing_kwargs", "log_level", "log_level_replica", "log_on_each_node",
         "logging_dir", "logging_first_step", "logging_nan_inf_filter", "project", "remove_unused_columns",
         "save_only_model", "save_safetensors", "skip_memory_metrics", "trackio_space_id")  # fmt: skip

# Without meaning unless another field is on: that one is refused or settled, so these pass in silence.
DEPENDENT = ("fp16_opt_level", "fp16_backend", "half_precision_backend", "fsdp_config", "greater_is_better",
             "hub_always_push", "hub_model_id", "hub_private_repo", "hub_revision", "hub_strategy", "hub_token",
             "length_column_name", "local_rank", "metric_for_best_model", "push_to_hub_model_id",
             "push_to_hub_organization", "push_to_hub_token")  # fmt: skip

# Fields that transformers 5 dropped, with the default that transformers 4 gave them. The first 14 are in the published
# file; the rest are what a transformers 4 run writes when it dumps its arguments.
REMOVED: dict[str, object] = {
    "fp16_backend": "auto",
    "fp16_opt_level": "O1",
    "group_by_length": False,
    "half_precision_backend": "auto",
    "include_inputs_for_metrics": False,
    "logging_dir": None,
    "no_cuda": False,
    "overwrite_output_dir": False,
    "past_index": -1,
    "save_safetensors": True,
    "tpu_metrics_debug": False,
    "tpu_num_cores": None,
    "use_mps_device": False,
    "warmup_ratio": 0.0,
    "dispatch_batches": None,
    "evaluation_strategy": "no",
    "fsdp_min_num_params": 0,
    "fsdp_transformer_layer_cls_to_wrap": None,
    "include_tokens_per_second": False,
    "jit_mode_eval": False,
    "mp_parameters": "",
    "push_to_hub_model_id": None,
    "push_to_hub_organization": None,
    "push_to_hub_token": None,
    "ray_scope": "last",
    "split_batches": None,
    "torchdynamo": None,
    "use_ipex": False,
    "use_legacy_prediction_loop": False,
}

# Values that ask for what we do anyway, although they are not the default of the transformers that is installed.
AS_GOOD_AS_DEFAULT: dict[str, tuple[object, ...]] = {
    "optim": ("adamw_torch", "adamw_torch_fused"),
    # Our means are always over every device's tokens; transformers 4 wrote its default, false, into every dump.
    "average_tokens_across_devices": (True, False),
    "accelerator_config": (
        {"split_batches": False, "dispatch_batches": None, "even_batches": True, "use_seedable_sampler": True,
         "non_blocking": False, "gradient_accumulation_kwargs": None},
    ),
}  # fmt: skip


# For the flag and for the field that some of the published project's files have.
NO_STREAMING = (
    "streaming is not supported: the plan of a run packs the whole dataset and resumes at an exact position, for which "
    "it needs the length of every document. The tokens are memory-mapped, so they take no memory; without streaming, "
    "the same data works."
)


def read_training_config(path: str | Path) -> tuple[dict[str, object], list[str]]:
    """Read a TrainingArguments JSON; returns the values it gives, by TrainConfig name, and notices to print.

    Only fields present in the file are returned, with their JSON types checked; ranges are TrainConfig's concern.
    Raises InputError for a file that is no JSON object, an unknown field, a wrong type, or an unsupported field whose
    value is not its default.
    """
    data = read_json_object(path)
    if data.pop("streaming", False):
        raise InputError(f"{path}: {NO_STREAMING}")
    defaults = _known_defaults()
    for name in data:
        if name not in defaults:
            raise InputError(
                f"{path}: {name!r} is not a field of TrainingArguments.{did_you_mean(name, defaults)} "
                "Options that only ibft has are given as flags of `ibft train`."
            )

    settings: dict[str, object] = {}
    for name, (target, kind) in SUPPORTED.items():
        value = data.get(name)
        if value is None or value == "":
            continue
        settings[target] = _typed(path, name, value, kind)
    notices = _settle(path, data, settings)

    changed = [name for name, value in data.items() if not _is_default(name, value, defaults[name])]
    allowed = {*SUPPORTED, *SETTLED, *EVALUATION, *INERT, *DEPENDENT}
    for name in changed:
        if name not in allowed:
            raise InputError(
                f"{path}: {name} is {json.dumps(data[name])}, which `ibft train` does not support; "
                f"remove the field or set it to its default, {json.dumps(defaults[name])}."
            )
    if evaluation := [name for name in changed if name in EVALUATION]:
        notices.append(
            f"{', '.join(evaluation)} in {path}: no effect; --validation_split (or _column, _dataset) and --eval_steps "
            "say what is evaluated, and when."
        )
    if inert := [name for name in changed if name in INERT]:
        notices.append(f"{', '.join(inert)} in {path}: without effect in `ibft train`; the adapter is the same.")
    return settings, notices


def _settle(path: str | Path, data: Mapping[str, Any], settings: dict[str, object]) -> list[str]:
    """Add to `settings` the fields whose value needs translating; returns a notice for each that is not followed."""
    notices = []
    flags = {name: bool(data.get(name)) and _typed(path, name, data[name], bool)
             for name in ("no_cuda", "use_cpu", "do_train", "fp16", "bf16")}  # fmt: skip
    if flags["no_cuda"] or flags["use_cpu"]:
        settings["use_cpu"] = True
    if data.get("do_train") is False:
        raise InputError(f"{path}: do_train is false, but `ibft train` only trains; remove it or set it to true.")
    if flags["fp16"]:
        notices.append(
            f"fp16 in {path}: float16 training is not supported. --dtype decides instead: by default bfloat16 on a "
            "GPU, float32 on a CPU."
        )
    if flags["bf16"]:
        notices.append(f"bf16 in {path}: --dtype decides instead: by default bfloat16 on a GPU, float32 on a CPU.")

    # transformers 5 has no warmup_ratio: it reads warmup_steps below 1 as a share of the run, and 0 as no warm-up.
    if (warmup := data.get("warmup_steps")) is not None:
        warmup = _typed(path, "warmup_steps", warmup, float)
        if warmup >= 1 or warmup < 0:
            settings["warmup_steps"] = _typed(path, "warmup_steps", warmup, int)
        elif warmup > 0 or "warmup_ratio" not in settings:
            settings["warmup_ratio"] = warmup
    # The Trainer reads "no limit" from null, zero or less.
    if "save_total_limit" in data and (data["save_total_limit"] or 0) <= 0:
        settings["save_total_limit"] = None
    if isinstance(steps := settings.get("max_steps"), int) and steps <= 0:
        settings["max_steps"] = -1
    if (strategy := data.get("logging_strategy") or "steps") != "steps":
        raise InputError(f'{path}: logging_strategy is {json.dumps(strategy)}; only "steps" is supported.')

    if resume := data.get("resume_from_checkpoint"):
        if resume is not True:
            raise InputError(
                f"{path}: resume_from_checkpoint is {json.dumps(resume)}; a run resumes from the newest checkpoint in "
                "its own output_dir: set the field to true or give --resume."
            )
        settings["resume"] = True
    if data.get("deepspeed"):
        settings["engine"] = "deepspeed"
        settings["deepspeed_config"] = _typed(path, "deepspeed", data["deepspeed"], str)
    if "report_to" in data:
        settings["report_to"], unsupported = _trackers(path, data["report_to"])
        if unsupported:
            notices.append(
                f"report_to in {path}: {', '.join(unsupported)} not supported, only {', '.join(TRACKERS)}; "
                "metrics.jsonl in the output folder holds every number."
            )
    return notices


def _trackers(path: str | Path, value: object) -> tuple[list[str], list[str]]:
    """The trackers that we can report to, and those that we cannot, from a name, a list of names or null."""
    names = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(f"{path}: report_to takes a name or a list of names, not {json.dumps(value)}.")
    return (
        [name for name in (*TRACKERS, "all") if name in names],
        [name for name in names if name not in (*TRACKERS, "all", "none", "")],
    )


def _typed(path: str | Path, name: str, value: object, kind: type) -> Any:
    """`value` as `kind`: a whole float such as 5e2 passes for an integer, an integer for a float, nothing else does."""
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not kind:
        words = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}[kind]
        raise InputError(f"{path}: {name} takes {words}, not {json.dumps(value)}.")
    return value


def _is_default(name: str, value: object, default: object) -> bool:
    return value == default or (is_empty(value) and is_empty(default)) or value in AS_GOOD_AS_DEFAULT.get(name, ())


def _known_defaults() -> dict[str, Any]:
    """Every field that TrainingArguments has, or had in transformers 4, with its default."""
    from transformers import TrainingArguments  # seconds to import, and only needed when there is a file

    defaults: dict[str, Any] = dict(REMOVED)
    for field in dataclasses.fields(TrainingArguments):
        default = default_of(field)
        defaults[field.name] = None if default is REQUIRED else default
    return defaults
