"""Everything that `ibft train` can be told: one dataclass, whose fields are the command-line flags.

Values are checked here, before a model or dataset is touched; `arguments.py` knows where they come from.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

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
    did_you_mean,
    flag,
    require,
)
from ibft.legacy import NO_STREAMING, TRACKERS

STEPS_OR_ALL: Check = (lambda v: v == -1 or v >= 1, "at least 1, or -1 for no limit")
SEED: Check = (lambda v: 0 <= v < 2**63, "between 0 and 2**63 - 1")

# The schedules of transformers.get_scheduler that need nothing but the number of steps.
Scheduler = Literal[
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt"
]
_POLYNOMIAL_END = 1e-7  # of transformers' polynomial
# The scores that `ibft memorization` gives a row.
Measure = Literal["min_k", "min_k_plus_plus", "mean_log_prob"]


_model, _data, _method = partial(flag, "model"), partial(flag, "data"), partial(flag, "method")
_ib, _adapter = partial(flag, BOTTLENECK := "bottleneck, for --method ib"), partial(flag, "adapter")
_optim, _run = partial(flag, "optimisation"), partial(flag, "run")
_files = partial(flag, FILES := "settings from files")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The resolved configuration of one training run; every field is a flag of the same name.

    Construction checks every value (InputError). `preset`, `training_config` and, for the lora_* fields,
    `adapter_config` only record where values came from: `arguments.parse_args` is what applies them.
    """

    base_model: str = _model(
        REQUIRED, "Hub name or folder of the causal language model to fine-tune", NOT_EMPTY, path=True
    )
    dtype: Literal["auto", "float32", "bfloat16"] = _model("auto", "auto: bfloat16 on a GPU, float32 on a CPU")
    attn_implementation: Literal["auto", "flash_attention_3", "flash_attention_2", "varlen", "sdpa", "eager"] = _model(
        "auto", "auto: the first of the others that works here"
    )
    gradient_checkpointing: bool | None = _model(
        None, "recompute activations in backward: less memory, more time; if not given, where memory asks for it"
    )
    liger: bool = _model(False, "Liger's Triton kernels for norms, rotary embeddings and MLPs")
    load_in_4bit: bool = _model(False, "keep the base model's linear layers in 4 bits (QLoRA, by bitsandbytes)")
    compile: bool = _model(False, "torch.compile the decoder's layers")
    use_cpu: bool = _model(False, "train on the CPU even where there is a GPU")

    dataset: list[str] = _data(  # noqa: RUF009
        REQUIRED,
        "Hub name, .jsonl, .json, .csv or .parquet file, or Arrow folder; several are mixed",
        verbatim=True,
        path=True,
    )
    dataset_weights: list[float] = _data(  # noqa: RUF009
        [], "passes over each dataset in an epoch, as 1 0.5 3; 1 for each if not given", POSITIVE
    )
    dataset_split: str = _data("train", "split to train on", NOT_EMPTY)
    format: Literal["auto", "text", "chat"] = _data("auto", "auto: as the columns are; chat: by the chat template")
    separator: str | None = _data(None, "between prompt and response of text; by the columns if not given")
    prompt_column: str | None = _data(None, "column that is not learnt; recognised by name if not given", NOT_EMPTY)
    response_column: str | None = _data(None, "column that is learnt; recognised by name if not given", NOT_EMPTY)
    validation_split: str | None = _data(
        None, "split to validate on, or share (0.05) or number (200) of the rows to hold out", NOT_EMPTY
    )
    validation_column: str | None = _data(None, "column whose cells say train, validation or test", NOT_EMPTY)
    validation_dataset: str | None = _data(None, "dataset to validate on", NOT_EMPTY, path=True)
    memorization_scores: str | None = _data(
        None, "file of `ibft memorization score`, by which --drop_memorized goes", NOT_EMPTY, path=True
    )
    drop_memorized: str | None = _data(
        None, "leave out the rows best known to a model: 10%, 200, or 'above -0.5'", NOT_EMPTY
    )
    memorization_measure: Measure = _data("min_k", "the score by which --drop_memorized goes")  # noqa: RUF009
    max_length: int = _data(2048, "tokens in a row", AT_LEAST_2)
    packing: Literal["best-fit", "none"] = _data("best-fit", "none: one padded document a row")
    bos: Literal["auto", "yes", "no"] = _data("auto", "begin documents with BOS; auto: as the tokenizer does")
    overlong: Literal["shorten", "drop"] = _data("shorten", "what happens to a document longer than max_length")
    num_proc: int | None = _data(None, "processes that tokenise", AT_LEAST_1)
    streaming: bool = _data(False, "refused: the plan of a run needs the whole dataset")

    method: Literal["ib", "sft"] = _method("ib", "ib: with the information bottleneck; sft: cross-entropy alone")
    alpha: float = _ib(0.2, "in loss = CE + alpha * (kl_weight * KL + beta * CE_ib)", NOT_NEGATIVE)
    beta: float = _ib(0.01, "in loss = CE + alpha * (kl_weight * KL + beta * CE_ib)", NOT_NEGATIVE)
    alpha_warmup_steps: int = _ib(0, "optimizer steps over which alpha rises linearly from 0", NOT_NEGATIVE)
    kl_weight: float = _ib(1.0, "in the loss; 0: without KL", NOT_NEGATIVE)
    free_bits: float = _ib(0.0, "nats of KL per token that cost nothing", NOT_NEGATIVE)
    ib_rate_target: float | None = _ib(None, "nats of KL per token, held by adapting kl_weight", POSITIVE)
    target_layer: int | None = _ib(None, "compress this layer's output, from 1; if not given, 20/32 up", AT_LEAST_1)
    bottleneck_dim: int = _ib(256, "width K of the bottleneck", AT_LEAST_1)
    encoder: Literal["linear", "lora"] = _ib("linear", "full or low-rank map into the bottleneck")
    encoder_rank: int | None = _ib(None, "rank of --encoder lora; 32 if not given", AT_LEAST_1)
    kl_tokens: Literal["all", "labels"] = _ib("all", "tokens over which KL is averaged")
    kl_reduction: Literal["mean", "sum"] = _ib("mean", "over the K dimensions; sum: nats per token")
    sample: bool = _ib(True, "draw z from the posterior; --no_sample takes its mean")

    adapter_config: str | None = _adapter(
        None, "PEFT LoraConfig JSON, in place of the --lora_* flags", NOT_EMPTY, path=True
    )
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

    output_dir: str = _run(
        "ibft-output", "folder for the adapter, its record and the checkpoints", NOT_EMPTY, path=True
    )
    overwrite: bool = _run(False, "start afresh in a folder that holds a run")
    resume: bool = _run(False, "continue from the newest checkpoint in output_dir")
    save_strategy: Literal["no", "steps"] = _run("steps", "no: save only what the end of the run leaves")
    save_steps: int = _run(500, "optimizer steps between checkpoints", AT_LEAST_1)
    save_total_limit: int | None = _run(3, "newest checkpoints to keep; none: all", AT_LEAST_1)
    logging_steps: int = _run(10, "optimizer steps between logged lines", AT_LEAST_1)
    eval_steps: int | None = _run(None, "optimizer steps between evaluations; if not given, once an epoch", AT_LEAST_1)
    profile: bool = _run(False, "write a trace of steps 3 to 5 to output_dir/profile, for torch's profiler")
    peak_tflops: float | None = _run(None, "of a device, for the MFU; if not given, by the GPU's name", POSITIVE)
    report_to: list[str] = _run([], "wandb, tensorboard, trackio, or all that are installed")  # noqa: RUF009
    run_name: str | None = _run(None, "name of the run where it is reported", NOT_EMPTY)
    engine: Literal["auto", "ddp", "fsdp2", "deepspeed"] = _run("auto", "auto: ddp under torchrun, else one process")
    use_deepspeed: bool = _run(False, "the same as --engine deepspeed")
    deepspeed_config: str | None = _run(
        None, "JSON of DeepSpeed, ZeRO stage 1 to 3; if not given, stage 2", NOT_EMPTY, path=True
    )
    ddp_timeout: int = _run(1800, "seconds after which a process stops waiting for the others", AT_LEAST_1)
    dry_run: bool = _run(False, "check everything, say what the run would do, write nothing, and stop")
    debug: bool = _run(False, "show the traceback of an error")

    training_config: str | None = _files(None, "JSON of TrainingArguments, of transformers", NOT_EMPTY, path=True)
    preset: Literal["published"] | None = _files(None, "the published settings; files win over them")

    def __post_init__(self) -> None:
        if type(self.validation_split) in (int, float):  # a file may say 0.05 where a flag says "0.05"
            object.__setattr__(self, "validation_split", str(self.validation_split))
        if type(self.drop_memorized) is int:  # likewise
            object.__setattr__(self, "drop_memorized", str(self.drop_memorized))
        check_fields(self)
        self.validate()

    def validate(self) -> None:
        """Raise InputError where two values contradict each other (each alone was checked at construction)."""
        self._validate_data()
        if self.tokens_per_batch is not None and self.tokens_per_batch % self.max_length:
            raise InputError(
                f"--tokens_per_batch must be a multiple of --max_length ({self.max_length}), "
                f"not {self.tokens_per_batch}."
            )
        if self.method == "ib" and (self.ib_rate_target is not None or self.free_bits):
            from ibft.objective import check_kl_options  # imports torch

            check_kl_options(self)
        if self.encoder_rank is not None and self.encoder != "lora":
            raise InputError(f"--encoder_rank {self.encoder_rank} needs --encoder lora; the encoder is {self.encoder}.")
        if self.lr_scheduler_type == "polynomial" and self.learning_rate <= _POLYNOMIAL_END:
            raise InputError(
                f"--lr_scheduler_type polynomial ends at a learning rate of {_POLYNOMIAL_END:g}, so --learning_rate "
                f"must be greater, not {self.learning_rate:g}."
            )
        if self.attn_implementation.startswith("flash_attention") and self.use_cpu:
            raise InputError(
                f"--attn_implementation {self.attn_implementation} needs a GPU; with --use_cpu take auto, varlen, sdpa "
                "or eager."
            )
        if self.liger and self.use_cpu:
            raise InputError("--liger needs a GPU, for which its kernels are; leave it out with --use_cpu.")
        if "all-linear" in self.lora_target_modules and len(self.lora_target_modules) > 1:
            raise InputError("--lora_target_modules takes all-linear or module names, not both.")
        if not self.lora_target_modules and self.adapter_config is None:
            raise InputError("--lora_target_modules must name at least one module, or all-linear.")
        if unknown := [name for name in self.report_to if name not in (*TRACKERS, "all")]:
            raise InputError(
                f"--report_to takes {', '.join(TRACKERS)}, all, or none alone, not {unknown[0]!r}."
                f"{did_you_mean(unknown[0], TRACKERS)}"
            )
        if self.use_deepspeed and self.engine not in ("auto", "deepspeed"):
            raise InputError(f"--use_deepspeed and --engine {self.engine} name two engines; give one of them.")
        if self.deepspeed_config is not None and self.chosen_engine != "deepspeed":
            raise InputError(
                f"--deepspeed_config {self.deepspeed_config} needs --engine deepspeed; the engine is {self.engine}."
            )
        if self.load_in_4bit and self.chosen_engine in ("fsdp2", "deepspeed"):
            raise InputError(
                f"--load_in_4bit: {self.chosen_engine} cannot distribute bitsandbytes' weights; take one process, or "
                "--engine ddp."
            )
        if self.resume and self.overwrite:
            raise InputError(
                "--resume and --overwrite exclude each other; where the training config sets overwrite_output_dir, "
                "add --no_overwrite."
            )

    def _validate_data(self) -> None:
        if self.streaming:
            raise InputError(NO_STREAMING)
        if not self.dataset:
            raise InputError("--dataset must name at least one dataset.")
        if self.dataset_weights and len(self.dataset_weights) != len(self.dataset):
            raise InputError(
                f"--dataset_weights gives {len(self.dataset_weights)} weights for {len(self.dataset)} datasets; give "
                "one for each, or none."
            )
        if self.separator is not None and self.format == "chat":
            raise InputError("--separator has no place in --format chat: the chat template writes what stands between.")
        if (self.memorization_scores is None) != (self.drop_memorized is None):
            raise InputError(
                "--memorization_scores FILE and --drop_memorized 10% belong together: the first says how well each row "
                "is known, the second how many rows are left out."
            )
        if self.drop_memorized is not None:
            from ibft.data.memorized import Drop  # imports pyarrow and datasets

            Drop.read(self.drop_memorized, "--drop_memorized")
        ways = ("validation_split", "validation_column", "validation_dataset")
        if len(given := [name for name in ways if getattr(self, name) is not None]) > 1:
            raise InputError(f"--{given[0]} and --{given[1]} both say what to validate on; give one of them.")
        if self.eval_steps is not None and not given:
            raise InputError(
                "--eval_steps needs data to validate on: --validation_split, --validation_column or "
                "--validation_dataset."
            )
        if self.validation_split == self.dataset_split:
            raise InputError(
                f"--validation_split {self.validation_split} is the split that is trained on; name another, or give a "
                "share (0.05) or a number (200) of the rows to hold out."
            )
        _ = self.validation_rows  # refuses what is no split, share or number

    @property
    def validation_rows(self) -> str | float | int | None:
        """What --validation_split means: a split's name, a share of the rows (a float), or their number (an int)."""
        text = self.validation_split
        if text is None or text[0].isalpha():
            return text
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if 0 < number < 1:
            return number
        if number >= 1 and number.is_integer() and "." not in text:
            return int(number)
        raise InputError(
            "--validation_split takes the name of a split, a share of the rows between 0 and 1, or a number of rows of "
            f"at least 1, not {text!r}."
        )

    @property
    def chosen_engine(self) -> str:
        """--engine, as --use_deepspeed has it."""
        return "deepspeed" if self.use_deepspeed else self.engine

    @property
    def rows_per_process(self) -> int:
        """Rows that each process takes of an optimizer step."""
        return self.rows_per_batch * self.gradient_accumulation_steps

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


def as_in_train(name: str) -> Any:
    """The option of that name, for the configuration of another command."""
    field = FIELDS[name]
    return dataclasses.field(default=field.default, default_factory=field.default_factory, metadata=field.metadata)


@dataclass(frozen=True, kw_only=True)
class DataFlags:
    """What other commands are told of rows that `ibft train` could learn, by the same options."""

    dataset: list[str] = as_in_train("dataset")  # noqa: RUF009
    dataset_split: str = flag("data", "train", "split to read", NOT_EMPTY)
    format: Literal["auto", "text", "chat"] = as_in_train("format")
    separator: str | None = as_in_train("separator")
    prompt_column: str | None = as_in_train("prompt_column")
    response_column: str | None = as_in_train("response_column")
    max_length: int = as_in_train("max_length")
    bos: Literal["auto", "yes", "no"] = as_in_train("bos")
    overlong: Literal["shorten", "drop"] = as_in_train("overlong")
    num_proc: int | None = as_in_train("num_proc")

    def train_config(self, base_model: str) -> TrainConfig:
        """The data as `ibft train` is told of it; InputError for what that would refuse."""
        names = [field.name for field in dataclasses.fields(DataFlags)]
        return TrainConfig(base_model=base_model, **{name: getattr(self, name) for name in names})
