"""`ibft estimate`: what a training would take on named GPUs, whether it fits, and what to set where it does not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from peft import LoraConfig

from ibft.architecture import default_target_layer
from ibft.errors import InputError
from ibft.estimate.activations import OUTLINE, Activations, measure_activations
from ibft.estimate.advice import fits, flags, largest_batch, mildest_change, with_checkpointing
from ibft.estimate.cost import ModelCost
from ibft.estimate.devices import DEVICES, Device
from ibft.estimate.measured import compare
from ibft.estimate.step import GIB, LINK, MATMUL, STREAM, Memory, Setting, logits_avoided, memory, step_flops, step_time
from ibft.flags import (
    AT_LEAST_1,
    AT_LEAST_2,
    BELOW_1,
    NOT_EMPTY,
    SHARE,
    Check,
    check_fields,
    did_you_mean,
    flag,
    parse_flags,
)
from ibft.loading import load_base_outline, quiet_libraries
from ibft.model import IBModel
from ibft.objective import IBConfig
from ibft.record import short_count

GPUS: Check = (lambda v: 1 <= v <= 1024, "between 1 and 1,024")
_MODEL, _STEP, _WHERE = "model, as in ibft train", "step, as in ibft train", "machine"


@dataclass(frozen=True, kw_only=True)
class EstimateConfig:
    """The flags of `ibft estimate`. Those of a training have its names and defaults."""

    base_model: str | None = flag(
        _MODEL, None, "Hub name, or folder with a config.json: no weights needed", NOT_EMPTY, path=True
    )
    dtype: Literal["bfloat16", "float32"] = flag(_MODEL, "bfloat16", "of the base model")
    method: Literal["ib", "sft"] = flag(_MODEL, "ib", "ib: with the bottleneck; sft: without")
    bottleneck_dim: int = flag(_MODEL, 256, "width K of the bottleneck", AT_LEAST_1)
    encoder: Literal["linear", "lora"] = flag(_MODEL, "linear", "map into the bottleneck; lora: of rank 32")
    lora_r: int = flag(_MODEL, 32, "rank", AT_LEAST_1)
    lora_dropout: float = flag(_MODEL, 0.05, "needs memory for its masks", BELOW_1)
    lora_target_modules: list[str] = flag(_MODEL, ["all-linear"], "module names, or all-linear")  # noqa: RUF009
    load_in_4bit: bool = flag(_MODEL, False, "linear layers in 4 bits")
    attn_implementation: Literal["auto", "eager"] = flag(
        _MODEL, "auto", "auto: one that keeps no scores; eager keeps those of all pairs of tokens in a row"
    )

    max_length: int = flag(_STEP, 2048, "tokens in a row", AT_LEAST_2)
    tokens_per_batch: int | None = flag(_STEP, None, "of one GPU's micro-batch; 2 rows if not given", AT_LEAST_1)
    gradient_accumulation_steps: int = flag(_STEP, 1, "micro-batches in an optimizer step", AT_LEAST_1)
    gradient_checkpointing: bool | None = flag(_STEP, None, "if not given, where memory asks for it")
    document_length: int | None = flag(
        _STEP, None, "tokens of a typical document; a whole row if not given", AT_LEAST_1
    )
    label_share: float = flag(_STEP, 0.5, "of the tokens that are learnt", SHARE)

    gpus: int = flag(_WHERE, 1, "how many", GPUS)
    gpu: list[str] = flag(_WHERE, list(DEVICES), "which: names from this list")  # noqa: RUF009
    engine: Literal["ddp", "fsdp2", "zero2", "zero3"] = flag(_WHERE, "ddp", "how they share the work")
    measured: str | None = flag(
        _WHERE, None, "output folder of a run, or a record of benchmarks/: compare with the estimate", NOT_EMPTY
    )
    debug: bool = flag(_WHERE, False, "show the traceback of an error")

    def __post_init__(self) -> None:
        check_fields(self)
        if (self.base_model is None) == (self.measured is None):
            raise InputError("give --base_model, to estimate a training, or --measured, to compare with one.")
        if unknown := [name for name in self.gpu if name not in DEVICES]:
            raise InputError(
                f"--gpu takes {', '.join(DEVICES)}, not {unknown[0]!r}.{did_you_mean(unknown[0], DEVICES)}"
            )
        if self.tokens % self.max_length:
            raise InputError(
                f"--tokens_per_batch must be a multiple of --max_length ({self.max_length}), not {self.tokens}."
            )
        if self.document_length is not None and self.document_length > self.max_length:
            raise InputError(
                f"--document_length must be at most --max_length ({self.max_length}), not {self.document_length}."
            )
        if self.load_in_4bit and self.engine in ("fsdp2", "zero3") and self.gpus > 1:
            raise InputError(f"--load_in_4bit: {self.engine} cannot shard bitsandbytes' weights; take ddp.")

    @property
    def tokens(self) -> int:
        """Positions of a micro-batch of one GPU."""
        return self.tokens_per_batch if self.tokens_per_batch is not None else 2 * self.max_length

    @property
    def setting(self) -> Setting:
        """The step, checkpointing off unless asked for."""
        return Setting(
            engine=self.engine,
            gpus=self.gpus,
            tokens=self.tokens,
            length=self.document_length or self.max_length,
            filled=1.0,
            labels=self.label_share,
            accumulation=self.gradient_accumulation_steps,
            checkpointing=bool(self.gradient_checkpointing),
            load_in_4bit=self.load_in_4bit,
            dtype_bytes=getattr(torch, self.dtype).itemsize,
        )


def main(argv: Sequence[str]) -> None:
    """Parses the command line and prints the estimate."""
    config = parse_flags(
        EstimateConfig,
        argv,
        "ibft estimate",
        "What a training would take: memory, FLOPs and time, from the model's configuration alone.",
        example="\n\nexample:\n  ibft estimate --base_model path/to/model --max_length 2048 "
        "--tokens_per_batch 16384 \\\n    --gpus 8 --engine fsdp2 --gpu h100-80gb a100-40gb",
    )
    quiet_libraries(progress_bars=False)
    if config.measured is not None:
        print(compare(config.measured))
        return
    cost, activations = cost_of(config)
    print(report(config, cost, activations))


def cost_of(config: EstimateConfig) -> tuple[ModelCost, Activations]:
    """Builds the model on the meta device. Raises InputError as `ibft train` would for its base model and adapter."""
    assert config.base_model is not None
    base, other = (load_base_outline(config.base_model, getattr(torch, config.dtype), OUTLINE) for _ in range(2))
    targets = config.lora_target_modules
    adapter = LoraConfig(
        task_type="CAUSAL_LM",
        r=config.lora_r,
        lora_dropout=config.lora_dropout,
        target_modules=targets[0] if targets == ["all-linear"] else targets,
    )
    ib = None
    if config.method == "ib":
        layer = default_target_layer(base.config.get_text_config().num_hidden_layers)
        ib = IBConfig(target_layer=layer, bottleneck_dim=config.bottleneck_dim, encoder=config.encoder)
    try:
        model = IBModel.from_base(base, adapter, ib)
    except InputError:
        raise
    except ValueError as error:  # PEFT's
        raise InputError(f"the adapter does not fit the base model: {error}") from error
    cost, activations = ModelCost.of(model), measure_activations(other, adapter)
    if config.attn_implementation == "eager":
        activations = activations.with_scores(cost, config.max_length, config.setting.dtype_bytes)
    return cost, activations


def report(config: EstimateConfig, cost: ModelCost, activations: Activations) -> str:
    """The estimate, for people."""
    setting = config.setting
    devices = {name: DEVICES[name] for name in config.gpu}
    flops = step_flops(cost, setting)
    lines = [
        f"base model    {config.base_model}: {short_count(cost.num_parameters)} parameters, {cost.num_layers} layers "
        f"of {cost.hidden_size}, {cost.vocabulary:,} words, {'4-bit' if config.load_in_4bit else config.dtype}",
        f"trained       {short_count(cost.adapter_parameters)} parameters of adapter, "
        f"{short_count(cost.bottleneck_parameters)} of bottleneck; float32, AdamW",
        f"step          {setting.tokens:,} tokens a GPU x {setting.accumulation} accumulated x {setting.gpus} GPUs = "
        f"{setting.tokens * setting.accumulation * setting.gpus:,} tokens"
        + (f"; {config.engine}" if setting.gpus > 1 else ""),
        f"FLOPs         {flops.model / 1e12:,.0f} T a GPU and step: decoder "
        f"{(flops.decoder_forward + flops.decoder_backward) / flops.model:.0%}, head {flops.head / flops.model:.1%}, "
        f"bottleneck {flops.bottleneck / flops.model:.1%}; {flops.decoder_forward / flops.model:.0%} more with "
        "activation checkpointing",
        f"logits        {logits_avoided(cost, setting) / GIB:.1f} GiB a GPU are never made",
        "",
        *_memory_table(cost, activations, setting),
        "",
        *_device_table(config, cost, activations, devices),
        "",
        *_advice(config, cost, activations, devices),
        f"Times assume {MATMUL:.0%} of the data sheet's FLOP/s, {STREAM:.0%} of its memory bandwidth and {LINK:.0%} of "
        "its links; no GPU has confirmed them.",
    ]
    return "\n".join(lines)


def _memory_table(cost: ModelCost, activations: Activations, setting: Setting) -> list[str]:
    names = {field: field for field in Memory._fields} | {"adapter": "adapter, AdamW"}
    rows = [["GiB a GPU", *names.values(), "peak"]]
    for label, checkpointing in (("without checkpointing", False), ("with it", True)):
        found = memory(cost, activations, setting.changed(checkpointing=checkpointing))
        rows.append([label, *(f"{value / GIB:.1f}" for value in [*found, found.total])])
    return _aligned(rows)


def _device_table(
    config: EstimateConfig, cost: ModelCost, activations: Activations, devices: dict[str, Device]
) -> list[str]:
    rows = [["GPU", "fits", "peak of GiB", "checkpointing", "s / step", "tokens/s", "MFU", "bound by"]]
    for name, device in devices.items():
        setting = settled(config, cost, activations, device)
        time = step_time(cost, activations, setting, device)
        tokens = setting.tokens * setting.accumulation * setting.gpus
        used = step_flops(cost, setting).model / time.step / (device.tflops * 1e12)
        rows.append(
            [
                name,
                "yes" if fits(cost, activations, setting, device.memory_gib) else "no",
                f"{memory(cost, activations, setting).total / GIB:.1f} of {device.memory_gib:.0f}",
                "on" if setting.checkpointing else "off",
                f"{time.step:.3g}",
                f"{tokens / time.step:,.0f}",
                f"{used:.0%}",
                "network" if time.communication > time.matmul + time.stream else "GPU",
            ]
        )
    return _aligned(rows)


def settled(config: EstimateConfig, cost: ModelCost, activations: Activations, device: Device) -> Setting:
    """The setting on a GPU, with checkpointing as asked for, or as memory asks for it."""
    if config.gradient_checkpointing is not None:
        return config.setting
    return with_checkpointing(cost, activations, config.setting, device.memory_gib)


def _advice(config: EstimateConfig, cost: ModelCost, activations: Activations, devices: dict[str, Device]) -> list[str]:
    lines = []
    for name, device in devices.items():
        setting = settled(config, cost, activations, device)
        if fits(cost, activations, setting, device.memory_gib):
            most = largest_batch(cost, activations, setting, device.memory_gib, config.max_length)
            line = f"{name}: fits, up to --tokens_per_batch {most}"
            if not setting.checkpointing:
                recomputing = setting.changed(checkpointing=True)
                most = largest_batch(cost, activations, recomputing, device.memory_gib, config.max_length)
                line += f", or {most} with --gradient_checkpointing"
            lines.append(f"{line}.")
        elif (change := mildest_change(cost, activations, setting, device.memory_gib, config.max_length)) is None:
            least = memory(cost, activations, setting.changed(tokens=config.max_length, checkpointing=True)).total
            lines.append(f"{name}: does not fit; even one row a GPU needs {least / GIB:.0f} GiB. {_more(config)}")
        else:
            lines.append(f"{name}: does not fit as it is; it does with {flags(change, setting)}.")
    return lines


def _more(config: EstimateConfig) -> str:
    if config.engine in ("fsdp2", "zero3"):
        return "More GPUs, shorter rows, or larger GPUs."
    return "More GPUs with --engine fsdp2, or larger GPUs."


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
