"""What a run says of itself: the description printed before the first step, and ibft.json after the last."""

import platform
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import torch

import ibft
from ibft.adapter import unmatched_modules
from ibft.engines import num_elements
from ibft.model_card import hub_names
from ibkernels import backends

if TYPE_CHECKING:
    from ibft.run import Run


def describe_run(run: "Run") -> str:
    """The resolved configuration and the arithmetic of the batches, for people."""
    config, engine, data, model = run.config, run.engine, run.data, run.model
    trainable = sum(num_elements(p) for p in model.parameters() if p.requires_grad)
    bottleneck = sum(num_elements(p) for p in model.bottleneck.parameters()) if model.bottleneck is not None else 0
    total = sum(num_elements(p) for p in model.parameters())
    rows = run.plan.rows_per_step
    kept = "" if rows == config.rows_per_process * engine.world_size else ", as it was begun,"
    kernel = backends.select("linear_cross_entropy", engine.device.type, run.dtype).backend.name
    checkpointing = "on" if run.checkpointing.on else "off"
    packed = "padded" if config.packing == "none" else "packed"
    lines = [
        f"base model    {config.base_model} ({short_count(total - trainable)} parameters, "
        f"{str(run.dtype).removeprefix('torch.')}, {_where(engine.device)})",
        f"engine        {engine.name}; attention {run.attention.label} ({run.attention.reason})",
        f"data          {', '.join(config.dataset)}",
        *(f"              {line}" for line in data.report.lines()),
        *_validation(run),
        f"method        {_method(run)}",
        f"trainable     {short_count(trainable)} parameters"
        + (
            f", {short_count(bottleneck)} of them the bottleneck's, which inference does not need" if bottleneck else ""
        ),
        *_unmatched(run),
        f"memory        activation checkpointing {checkpointing} ({run.checkpointing.reason})",
        f"peak          {_peak(run)}",
        f"kernels       {kernel} (python -m ibkernels says why)",
        f"batch         {config.rows_per_batch} rows x {config.gradient_accumulation_steps} accumulated x "
        f"{engine.world_size} processes = {rows}{kept} {packed} rows of up to {config.max_length} tokens a step",
        f"              {run.plan.efficiency(0):.0%} of a row's {config.max_length} tokens hold data",
        f"steps         {run.total_steps} ({run.plan.steps_in_epoch(0)} an epoch), warm-up {run.warmup_steps}, "
        f"{config.lr_scheduler_type} from {config.learning_rate:g}, seed {config.seed}",
        f"output        {config.output_dir}",
    ]
    if run.start_step:
        lines.append(f"resuming      after step {run.start_step}")
    values = " ".join(f"{name}={value}" for name, value in config.to_dict().items() if value is not None)
    lines += textwrap.wrap(
        values,
        118,
        initial_indent="configuration ",
        subsequent_indent=" " * 14,
        break_long_words=False,  # paths stay in one piece, to be copied
        break_on_hyphens=False,
    )
    return "\n".join(lines)


def _peak(run: "Run") -> str:
    if run.cost is None:
        return "no MFU: the FLOPs of a mixture of experts depend on its router"
    if run.peak.tflops is None:
        return f"no MFU: the peak FLOP/s are {run.peak.source}"
    return f"{run.peak.tflops:g} TFLOP/s a device ({run.peak.source}), for the MFU"


def _validation(run: "Run") -> list[str]:
    if run.validation is None:
        return []
    names = ", ".join(name for name, _, _ in run.validation.report.datasets)
    first, *more = [names, *run.validation.report.lines()]
    return [f"validation    {first}", *(f"              {line}" for line in more)]


def describe_dry_run(run: "Run", notices: Sequence[str]) -> str:
    """What --dry_run prints: the notices, what a run would do, and what could not be checked without its weights."""
    unchecked = ["that the base model's weights can be loaded and fit into memory"]
    unchecked.append("that its logits are computed as the loss takes them to be")
    if run.config.packing != "none":
        unchecked.append("that it keeps the documents of a packed row apart")
    if run.config.resume:
        unchecked.append("that it is the base model of the checkpoint")
    lines = [*(f"note: {notice}" for notice in notices), describe_run(run)]
    lines += textwrap.wrap(f"not checked   {'; '.join(unchecked)}", 118, subsequent_indent=" " * 14)
    return "\n".join([*lines, "dry run: nothing was trained, and nothing written"])


def run_record(run: "Run", result: dict[str, Any] | None) -> dict[str, Any]:
    """The content of ibft.json; `result` is None until the run is finished."""
    return {
        "config": run.config.to_dict(),
        "ib": None if run.model.ib_config is None else asdict(run.model.ib_config),
        "adapter": run.identity["adapter"],
        "base": run.identity["base"],
        "prompt_format": run.data.prompt_format,
        "data": {"fingerprint": run.data.fingerprint, **asdict(run.data.report), "summary": run.data.report.lines()},
        "validation": None
        if run.validation is None
        else {"fingerprint": run.validation.fingerprint, **asdict(run.validation.report)},
        "hub": hub_names(run.config.to_dict()),
        "dtype": str(run.dtype).removeprefix("torch."),
        "engine": run.engine.name,
        "engine_kind": run.engine.kind,
        "attention": run.attention.label,
        "gradient_checkpointing": run.checkpointing.on,
        "peak_tflops": run.peak.tflops,
        "processes": run.engine.world_size,
        "device": _where(run.engine.device),
        "steps": run.total_steps,
        "result": result,
        "command": sys.argv,
        "versions": _versions(),
    }


def _unmatched(run: "Run") -> list[str]:
    names = unmatched_modules(run.model.peft_config["default"], run.model.base_model.targeted_module_names)
    return [f"              no module of the model is named {', '.join(names)}: no adapter there"] if names else []


def _method(run: "Run") -> str:
    ib = run.model.ib_config
    if ib is None:
        return "sft: cross-entropy alone"
    encoder = "linear" if ib.encoder == "linear" else f"lora of rank {ib.encoder_rank}"
    weight = "" if ib.kl_weight == 1 else f"{ib.kl_weight:g} * "
    more = []
    if ib.alpha_warmup_steps:
        more.append(f"alpha rising for {ib.alpha_warmup_steps} steps, ")
    if ib.free_bits:
        more.append(f"{ib.free_bits:g} nats of KL per token free, ")
    if ib.ib_rate_target is not None:
        weight = "kl_weight * "
        more.append(f"kl_weight from {ib.kl_weight:g} on such that KL is {ib.ib_rate_target:g} nats per token, ")
    return (
        f"ib: CE + {ib.alpha:g} * ({weight}KL + {ib.beta:g} * CE_ib), {''.join(more)}bottleneck of {ib.bottleneck_dim} "
        f"dimensions on layer {ib.target_layer} ({encoder} encoder)"
    )


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"ibft": ibft.__version__, "python": platform.python_version()}
    for package in ("torch", "transformers", "peft", "datasets", "triton"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def _where(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' if threads > 1 else ''}"


def short_count(count: int) -> str:
    """1.3B, 42M."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return str(count)
