"""Everything that `ibft train` can be told: one dataclass, whose fields are the command-line flags.

Precedence: flag over file over preset over default. Values are checked here, before a model or dataset is touched.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from ibft.errors import InputError
from ibft.flags import (
    AT_LEAST_1,
    AT_LEAST_2,
    BELOW_1,
    NOT_EMPTY,
    NOT_NEGATIVE,
    POSITIVE,
    REQUIRED,
    SHARE,
    Check,
    check_fields,
    checked,
    did_you_mean,
    flag,
    read_flags,
    require,
)
from ibft.legacy import is_empty, read_json_object, read_training_config

if TYPE_CHECKING:
    from peft import LoraConfig

STEPS_OR_ALL: Check = (lambda v: v == -1 or v >= 1, "at least 1, or -1 for no limit")
SEED: Check = (lambda v: 0 <= v < 2**63, "between 0 and 2**63 - 1")

# The schedules of transformers.get_scheduler that need nothing but the number of steps.
Scheduler = Literal[
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt"
]


_model, _data, _method = partial(flag, "model"), partial(flag, "data"), partial(flag, "method")
_ib, _adapter = partial(flag, BOTTLENECK := "bottleneck, for --method ib"), partial(flag, "adapter")
_optim, _run = partial(flag, "optimisation"), partial(flag, "run")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The resolved configuration of one training run; every field is a flag of the same name.

    Construction checks every value (InputError). `preset`, `training_config` and, for the lora_* fields,
    `adapter_config` only record where values came from: `parse_args` is what applies them.
    """

    base_model: str = _model(REQUIRED, "Hub name or folder of the causal language model to fine-tune", NOT_EMPTY)
    dtype: Literal["auto", "float32", "bfloat16"] = _model("auto", "auto: bfloat16 on a GPU, float32 on a CPU")
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = _model("sdpa", "attention of transformers")
    gradient_checkpointing: bool = _model(False, "recompute activations in backward: less memory, more time")
    use_cpu: bool = _model(False, "train on the CPU even where there is a GPU")

    dataset: str = _data(REQUIRED, "Hub name, .jsonl, .json, .csv or .parquet file, or Arrow folder", NOT_EMPTY)
    dataset_split: str = _data("train", "split to train on", NOT_EMPTY)
    prompt_column: str | None = _data(None, "column that is not learnt; recognised by name if not given", NOT_EMPTY)
    response_column: str | None = _data(None, "column that is learnt; recognised by name if not given", NOT_EMPTY)
    max_length: int = _data(2048, "tokens in a row", AT_LEAST_2)
    packing: Literal["best-fit", "none"] = _data("best-fit", "none: one padded document a row")
    bos: Literal["auto", "yes", "no"] = _data("auto", "begin documents with BOS; auto: as the tokenizer does")
    overlong: Literal["shorten", "drop"] = _data("shorten", "what happens to a document longer than max_length")
    num_proc: int | None = _data(None, "processes that tokenise", AT_LEAST_1)

    method: Literal["ib", "sft"] = _method("ib", "ib: with the information bottleneck; sft: cross-entropy alone")
    alpha: float = _ib(0.2, "in loss = CE + alpha * (KL + beta * CE_ib)", NOT_NEGATIVE)
    beta: float = _ib(0.01, "in loss = CE + alpha * (KL + beta * CE_ib)", NOT_NEGATIVE)
    target_layer: int | None = _ib(None, "compress this layer's output, from 1; if not given, 20/32 up", AT_LEAST_1)
    bottleneck_dim: int = _ib(256, "width K of the bottleneck", AT_LEAST_1)
    encoder: Literal["linear", "lora"] = _ib("linear", "full or low-rank map into the bottleneck")
    encoder_rank: int | None = _ib(None, "rank of --encoder lora; 32 if not given", AT_LEAST_1)
    kl_tokens: Literal["all", "labels"] = _ib("all", "tokens over which KL is averaged")
    kl_reduction: Literal["mean", "sum"] = _ib("mean", "over the K dimensions; sum: nats per token")
    sample: bool = _ib(True, "draw z from the posterior; --no_sample takes its mean")

    adapter_config: str | None = _adapter(None, "PEFT LoraConfig JSON, in place of the --lora_* flags", NOT_EMPTY)
    lora_r: int = _adapter(32, "rank", AT_LEAST_1)
    lora_alpha: int = _adapter(32, "the update is multiplied by lora_alpha / lora_r", AT_LEAST_1)
    lora_dropout: float = _adapter(0.05, "share of the adapter's input that is dropped", BELOW_1)
    lora_target_modules: list[str] = _adapter(["all-linear"], "module names, or all-linear")  # noqa: RUF009

    per_device_train_batch_size: int = _optim(2, "rows in a micro-batch of one device", AT_LEAST_1)
    tokens_per_batch: int | None = _optim(None, "tokens instead of rows: a multiple of max_length", AT_LEAST_1)
    gradient_accumulation_steps: int = _optim(1, "micro-batches in an optimizer step", AT_LEAST_1)
    learning_rate: float = _optim(1e-4, "AdamW's, at the top of the schedule", POSITIVE)
    weight_decay: float = _optim(0.0, "AdamW's", NOT_NEGATIVE)
    adam_beta1: float = _optim(0.9, "AdamW's", BELOW_1)
    adam_beta2: float = _optim(0.999, "AdamW's", BELOW_1)
    adam_epsilon: float = _optim(1e-8, "AdamW's", POSITIVE)
    max_grad_norm: float = _optim(1.0, "clip gradients to this norm; 0: never", NOT_NEGATIVE)
    num_train_epochs: float = _optim(3.0, "passes over the data", POSITIVE)
    max_steps: int = _optim(-1, "optimizer steps, instead of epochs; -1: by epochs", STEPS_OR_ALL)
    lr_scheduler_type: Scheduler = _optim("cosine", "course of the learning rate")  # noqa: RUF009
    warmup_ratio: float = _optim(0.1, "share of the steps in which the learning rate rises", SHARE)
    warmup_steps: int = _optim(0, "number of those steps, instead of the ratio; 0: by the ratio", NOT_NEGATIVE)
    seed: int = _optim(42, "of initialisation, order, dropout and noise", SEED)

    output_dir: str = _run("ibft-output", "folder for the adapter, its record and the checkpoints", NOT_EMPTY)
    overwrite: bool = _run(False, "start afresh in a folder that holds a run")
    resume: bool = _run(False, "continue from the newest checkpoint in output_dir")
    save_strategy: Literal["no", "steps"] = _run("steps", "no: save only what the end of the run leaves")
    save_steps: int = _run(500, "optimizer steps between checkpoints", AT_LEAST_1)
    save_total_limit: int | None = _run(3, "newest checkpoints to keep; none: all", AT_LEAST_1)
    logging_steps: int = _run(10, "optimizer steps between logged lines", AT_LEAST_1)
    report_to: list[str] = _run([], "wandb or none; metrics.jsonl is always written")  # noqa: RUF009
    run_name: str | None = _run(None, "name of the run where it is reported", NOT_EMPTY)
    use_deepspeed: bool = _run(False, "train with DeepSpeed; not available yet")
    ddp_timeout: int = _run(1800, "seconds after which a process stops waiting for the others", AT_LEAST_1)
    training_config: str | None = _run(None, "JSON of transformers.TrainingArguments; flags win over it", NOT_EMPTY)
    preset: Literal["published"] | None = _run(None, "the published settings; flags and files win over them")
    debug: bool = _run(False, "show the traceback of an error")

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("base_model", "dataset", "output_dir", "training_config", "adapter_config"):
            if (getattr(self, name) or "").startswith("~"):  # the shell leaves it alone in --output_dir=~/run
                object.__setattr__(self, name, os.path.expanduser(getattr(self, name)))
        self.validate()

    def validate(self) -> None:
        """Raise InputError where two values contradict each other (each alone was checked at construction)."""
        if self.tokens_per_batch is not None and self.tokens_per_batch % self.max_length:
            raise InputError(
                f"--tokens_per_batch must be a multiple of --max_length ({self.max_length}), "
                f"not {self.tokens_per_batch}."
            )
        if self.encoder_rank is not None and self.encoder != "lora":
            raise InputError(f"--encoder_rank {self.encoder_rank} needs --encoder lora; the encoder is {self.encoder}.")
        if self.attn_implementation == "flash_attention_2" and self.packing != "none":
            raise InputError(
                f"--attn_implementation flash_attention_2 is not ready for --packing {self.packing} yet: it works "
                "with --packing none; packed rows need sdpa or eager."
            )
        if self.attn_implementation == "flash_attention_2" and self.use_cpu:
            raise InputError("--attn_implementation flash_attention_2 needs a GPU; with --use_cpu take sdpa or eager.")
        if "all-linear" in self.lora_target_modules and len(self.lora_target_modules) > 1:
            raise InputError("--lora_target_modules takes all-linear or module names, not both.")
        if not self.lora_target_modules and self.adapter_config is None:
            raise InputError("--lora_target_modules must name at least one module, or all-linear.")
        if unknown := [name for name in self.report_to if name != "wandb"]:
            raise InputError(f"--report_to takes wandb or none, not {unknown[0]!r}.")
        if self.resume and self.overwrite:
            raise InputError(
                "--resume and --overwrite exclude each other; where the training config sets overwrite_output_dir, "
                "add --no_overwrite."
            )

    @property
    def rows_per_batch(self) -> int:
        """Rows of max_length tokens in a micro-batch of one device."""
        if self.tokens_per_batch is None:
            return self.per_device_train_batch_size
        return self.tokens_per_batch // self.max_length

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON; `from_dict` takes them back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """The configuration with these values over the defaults; InputError for an unknown or missing name."""
        for name in values:
            if name not in FIELDS:
                raise InputError(f"{name!r} is not an option of `ibft train`.{did_you_mean(name, FIELDS)}")
        require(cls, values, "ibft train")
        return cls(**values)


FIELDS = {field.name: field for field in dataclasses.fields(TrainConfig)}

_DESCRIPTION = (
    "Fine-tune a causal language model with LoRA and an information bottleneck. "
    "Flags win over files, files over the preset, the preset over defaults."
)

# A flag for the first also undoes the training config's value for the second, which would otherwise win over the flag.
_OUTRANKED_BY = {"warmup_ratio": "warmup_steps", "num_train_epochs": "max_steps"}


def parse_args(argv: Sequence[str], prog: str = "ibft train") -> tuple[TrainConfig, list[str]]:
    """The configuration that a command line asks for, with its files read, and notices for the caller to print.

    Raises InputError for whatever is wrong with the flags or the files; --help prints and exits as argparse does.
    """
    flags = read_flags(TrainConfig, argv, prog, _DESCRIPTION)
    require(TrainConfig, flags, prog)
    file: dict[str, object] = {}
    notices: list[str] = []
    if flags.get("training_config"):
        file, notices = read_training_config(flags["training_config"])
    for name, stronger in _OUTRANKED_BY.items():
        if name in flags:
            file.pop(stronger, None)
    for name, value in file.items():
        if name not in flags:  # else the flag's value is the one that counts
            checked(TrainConfig, name, value, f"{flags['training_config']}: {name}")
    preset = preset_values(flags["preset"]) if flags.get("preset") else {}
    config = TrainConfig.from_dict({**preset, **file, **flags})
    check_deepspeed(config)
    if config.adapter_config is not None:
        if given := [name for name in flags if name.startswith("lora_")]:
            raise InputError(
                f"--{given[0]} and --adapter_config {config.adapter_config} both set the adapter; give one of them."
            )
        config = _with_adapter_values(config)

    ib_flags = [f"--{name}" for name in flags if FIELDS[name].metadata["group"] == BOTTLENECK]
    if config.method == "sft" and ib_flags:
        notices.append(f"{', '.join(ib_flags)}: no effect, because --method sft trains without a bottleneck.")
    if "tokens_per_batch" in flags and "per_device_train_batch_size" in flags:
        raise InputError("--tokens_per_batch and --per_device_train_batch_size set the same thing; give one of them.")
    for name, stronger in (("num_train_epochs", "max_steps"), ("warmup_ratio", "warmup_steps")):
        if name in flags and stronger in flags:
            notices.append(f"--{name}: no effect beside --{stronger}.")
    if "save_steps" in flags and config.save_strategy == "no":
        notices.append("--save_steps: no effect with save_strategy no.")
    if os.path.normpath(config.output_dir) == os.curdir:
        notices.append("output_dir is the current folder, and the run writes its files there; --output_dir changes it.")
    return config, notices


def preset_values(name: str) -> dict[str, Any]:
    """What --preset NAME sets, by field; "published" is the published project's code as it ran."""
    if name != "published":
        raise InputError(f"--preset takes published, not {name!r}.")
    return {
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


def check_deepspeed(config: TrainConfig) -> None:
    """Refuse --use_deepspeed, which this version cannot follow, saying what is missing."""
    if not config.use_deepspeed:
        return
    if importlib.util.find_spec("deepspeed") is None:
        raise InputError(
            '--use_deepspeed needs DeepSpeed, which is not installed (`pip install "ibft[deepspeed]"`); and this '
            "version cannot train with it yet, only on one process or, under torchrun, with DDP."
        )
    raise InputError(
        "--use_deepspeed: this version trains on one process or, under torchrun, with DDP; training with DeepSpeed is "
        "not available yet."
    )


def lora_config(config: TrainConfig) -> LoraConfig:
    """The PEFT configuration of the adapter, from --adapter_config if given, else from the --lora_* flags."""
    from peft import LoraConfig  # imports torch and transformers

    path = config.adapter_config
    common: dict[str, Any] = {"task_type": "CAUSAL_LM", "inference_mode": False}
    common["base_model_name_or_path"] = config.base_model
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
    known = {field.name for field in dataclasses.fields(LoraConfig)}
    # A file from another version of PEFT lists options that this one lacks; they matter only when they are set.
    for name in [name for name in values if name not in known]:
        if not is_empty(value := values.pop(name)):
            raise InputError(f"{path}: {name} ({value!r}) is not an option of PEFT's LoRA.{did_you_mean(name, known)}")
    try:
        return LoraConfig(**{**values, **common})
    except (AttributeError, ImportError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: PEFT does not accept this LoRA configuration: {error}") from error


def _with_adapter_values(config: TrainConfig) -> TrainConfig:
    """The configuration whose lora_* fields say what --adapter_config says, so that its record is true."""
    adapter = lora_config(config)
    modules = adapter.target_modules or []  # none: PEFT knows the modules of common architectures
    try:
        return dataclasses.replace(
            config,
            lora_r=adapter.r,
            lora_alpha=adapter.lora_alpha,
            lora_dropout=adapter.lora_dropout,
            lora_target_modules=[modules] if isinstance(modules, str) else sorted(modules),
        )
    except InputError as error:
        raise InputError(f"{config.adapter_config}: {error}") from error
