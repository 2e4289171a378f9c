"""The adapter's configuration: PEFT's LoraConfig from the --lora_* flags, or from a file of PEFT's."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ibft.config_file import is_empty, read_json_object
from ibft.errors import InputError
from ibft.flags import did_you_mean

if TYPE_CHECKING:
    from peft import LoraConfig

    from ibft.config import TrainConfig


_OF_DATA = "begins from what PEFT computes of data beforehand, which a run does not do; leave it out"
# By the beginning of the name. PEFT takes all of them, and makes of the last two the default in silence.
_REFUSED_INITS = {
    "pissa_niter": "changes the base model by random numbers, so that nothing could load the adapter again as it was "
    'trained; take "pissa"',
    "eva": _OF_DATA,
    "lora_ga": _OF_DATA,
}
_WITH_A_LOSS = ("kasa_config", "monteclora_config")  # for which PEFT leaves it to the trainer to add a term


def lora_config(config: TrainConfig) -> LoraConfig:
    """The PEFT configuration of the adapter, from --adapter_config if given, else from the --lora_* flags."""
    from peft import LoraConfig  # imports torch and transformers

    path = config.adapter_config
    common: dict[str, Any] = {
        "task_type": "CAUSAL_LM",
        "inference_mode": False,
        "base_model_name_or_path": config.base_model,
    }
    if path is None:
        modules = config.lora_target_modules
        return LoraConfig(
            r=config.lora_r,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            target_modules="all-linear" if modules == ["all-linear"] else list(modules),
            **common,
        )

    values = read_json_object(path)
    for name, expected in (("peft_type", "LORA"), ("task_type", "CAUSAL_LM")):
        if (value := values.pop(name, None) or expected) != expected:
            raise InputError(f'{path}: {name} must be "{expected}", not {value!r}.')
    for name in _WITH_A_LOSS:
        if values.get(name):
            raise InputError(
                f"{path}: {name} needs a term of its own in the loss, which a run does not have; leave it out."
            )
    known = {field.name for field in dataclasses.fields(LoraConfig)}
    # A file from another version of PEFT lists options that this one lacks; they matter only when they are set.
    for name in [name for name in values if name not in known]:
        if not is_empty(value := values.pop(name)):
            raise InputError(f"{path}: {name} ({value!r}) is not an option of PEFT's LoRA.{did_you_mean(name, known)}")
    init = str(values.get("init_lora_weights"))
    for name, obstacle in _REFUSED_INITS.items():
        if init.startswith(name):
            raise InputError(f"{path}: init_lora_weights {init!r} {obstacle}.")
    try:
        return LoraConfig(**{**values, **common})
    except (AttributeError, ImportError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: PEFT does not accept this LoRA configuration: {error}") from error


def unmatched_modules(adapter: LoraConfig, adapted: Sequence[str]) -> list[str]:
    """Names in target_modules that no adapted module bears: PEFT passes over them in silence, unless all are such."""
    if not isinstance(adapter.target_modules, (set, list)):  # a regular expression, "all-linear", or PEFT's own choice
        return []
    return [
        name
        for name in sorted(adapter.target_modules)
        if not any(module == name or module.endswith(f".{name}") for module in adapted)
    ]


def with_adapter_values(config: TrainConfig, given: list[str]) -> TrainConfig:
    """The configuration whose lora_* fields say what --adapter_config says, so that its record is true.

    Raises InputError when a lora_* field that was given says something else; a record, read back, says the same.
    """
    adapter = lora_config(config)
    modules = adapter.target_modules or set()  # none: PEFT knows the modules of common architectures
    if not isinstance(modules, (str, set)) or not all(isinstance(name, str) for name in modules):
        raise InputError(
            f"{config.adapter_config}: target_modules takes names or a regular expression, not {modules!r}."
        )
    try:
        resolved = dataclasses.replace(
            config,
            lora_r=adapter.r,
            lora_alpha=adapter.lora_alpha,
            lora_dropout=adapter.lora_dropout,
            lora_target_modules=[modules] if isinstance(modules, str) else sorted(modules),
        )
    except InputError as error:
        raise InputError(f"{config.adapter_config}: {error}") from error
    for name in given:
        if getattr(config, name) != getattr(resolved, name):
            raise InputError(
                f"--{name} and --adapter_config {config.adapter_config} both set the adapter; give one of them."
            )
    return resolved
