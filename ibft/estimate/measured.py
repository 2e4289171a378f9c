"""The estimate beside what was measured: a run of `ibft train`, or the record of benchmarks/step.py."""

import json
import statistics
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, LlamaConfig

from ibft.config import TrainConfig
from ibft.errors import InputError
from ibft.estimate.activations import OUTLINE, measure_activations
from ibft.estimate.cost import ModelCost
from ibft.estimate.step import GIB, MATMUL, Setting, memory, step_flops
from ibft.loading import load_base_outline
from ibft.model import IBModel
from ibft.objective import IBConfig
from ibft.speed import PHASES

MIB = 2**20


def compare(path: str) -> str:
    """The table of a run's folder or of a record. Raises InputError for anything else."""
    folder = Path(path).expanduser()
    try:
        if folder.is_dir():
            lines = (folder / "metrics.jsonl").read_text().splitlines()
            return compare_run(json.loads((folder / "ibft.json").read_text()), [json.loads(line) for line in lines])
        return compare_record(json.loads(folder.read_text()))
    except OSError as error:
        raise InputError(f"--measured: {str(error.filename)!r} cannot be read: {error.strerror}.") from error
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:  # JSON of something else
        raise InputError(
            f"--measured: {path!r} holds neither the metrics of a run nor a record of benchmarks/step.py."
        ) from error


def compare_record(record: dict[str, Any]) -> str:
    """Of benchmarks/step.py: memory above rest, and what IB-FT costs over SFT, which needs no device's peak."""
    lines = [f"{'step':<16}{'estimated, MiB':>16}{'measured, MiB':>16}{'error':>8}{'/ ibft-sft, FLOPs':>20}{'time':>8}"]
    lines[0] += f"{'GFLOP/s':>10}"
    base: tuple[float, float] | None = None
    for name, times in record["seconds"].items():
        if not name.startswith("ibft"):
            continue
        cost, setting, estimated = _of_record(record["size"], int(name.partition("K=")[2] or 0))
        flops, seconds = step_flops(cost, setting).model, statistics.median(times)
        base = base or (flops, seconds)
        line = f"{name:<16}{estimated / MIB:>16,.0f}"
        if mib := record["memory_mib"].get(name):
            measured = mib["peak"] - mib["rest"]
            line += f"{measured:>16,.0f}{estimated / MIB / measured - 1:>+8.1%}"
        else:
            line += f"{'':>24}"
        lines.append(line + f"{flops / base[0]:>20.2f}{seconds / base[1]:>8.2f}{flops / seconds / 1e9:>10,.0f}")
    return "\n".join(lines)


def _of_record(size: dict[str, Any], bottleneck_dim: int) -> tuple[ModelCost, Setting, float]:
    """The cost of a variant, its step, and the bytes that the step needs above rest, gradients included."""
    config = LlamaConfig(
        vocab_size=size["vocabulary"],
        hidden_size=size["hidden"],
        intermediate_size=size["intermediate"],
        num_hidden_layers=size["layers"],
        num_attention_heads=size["heads"],
        num_key_value_heads=size["heads"],
    )
    lora = LoraConfig(task_type="CAUSAL_LM", r=size["lora_rank"], target_modules="all-linear")
    ib = IBConfig(target_layer=size["target_layer"], bottleneck_dim=bottleneck_dim) if bottleneck_dim else None
    with torch.device("meta"):
        bases = [
            AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=OUTLINE) for _ in range(2)
        ]
    cost = ModelCost.of(IBModel.from_base(bases[0], lora, ib))
    setting = Setting(
        engine="ddp",
        gpus=1,
        tokens=size["rows"] * size["length"],
        length=size["length"],
        filled=1.0,
        labels=0.5,
        accumulation=1,
        checkpointing=False,
        load_in_4bit=False,
        dtype_bytes=4,
        logits_bytes=32 * 2**20,  # of the CPU's kernels
    )
    return cost, setting, memory(cost, measure_activations(bases[1], lora), setting).step + 4 * cost.trainable


def compare_run(run: dict[str, Any], records: list[dict[str, Any]]) -> str:
    """Of a run, from ibft.json and its metrics: the later half of its steps, when what is slow at first is over."""
    steps = records[len(records) // 2 :]
    total = {name: sum(record[name] or 0 for record in steps) for name in ("flops", "seconds", "tokens", "padding")}
    rate = total["flops"] / total["seconds"] / run["processes"] / 1e12
    phases = {phase: sum(record[f"{phase}_seconds"] for record in steps) for phase in PHASES}
    lines = [
        f"steps         {steps[0]['step']} to {steps[-1]['step']} of {run['config']['output_dir']}, on {run['device']}",
        f"speed         {total['tokens'] / total['seconds']:,.0f} tokens/s, {rate:.3g} TFLOP/s a process, "
        f"{total['padding'] / len(steps):.1%} padding",
        "phases        " + ", ".join(f"{name} {part / total['seconds']:.0%}" for name, part in phases.items()),
    ]
    if (peak := run["peak_tflops"]) is not None:
        lines.append(
            f"MFU           {rate / peak:.1%} of {peak:g} TFLOP/s; the estimate assumes {MATMUL:.0%} in products"
        )
    measured = max(record["peak_memory_gib"] for record in steps)
    if run["device"].startswith("CPU"):
        lines.append(f"memory        {measured:.2f} GiB of the whole process, which the estimate is not about")
    else:
        estimated = _of_run(run) / GIB
        lines.append(
            f"memory        {measured:.2f} GiB allocated at the peak, {estimated:.2f} estimated "
            f"({estimated / measured - 1:+.1%})"
        )
    return "\n".join(lines)


def _of_run(run: dict[str, Any]) -> float:
    """Bytes that the allocator is estimated to hand out."""
    config = TrainConfig.from_dict(run["config"])
    dtype = getattr(torch, run["dtype"])
    bases = [load_base_outline(config.base_model, dtype, OUTLINE) for _ in range(2)]
    names = ("r", "lora_alpha", "lora_dropout", "target_modules")
    adapters = [LoraConfig(task_type="CAUSAL_LM", **{name: run["adapter"][name] for name in names}) for _ in range(2)]
    cost = ModelCost.of(IBModel.from_base(bases[0], adapters[0], None if run["ib"] is None else IBConfig(**run["ib"])))
    setting = Setting(
        engine=run.get("engine_kind", "ddp"),
        gpus=run["processes"],
        tokens=config.rows_per_batch * config.max_length,
        length=config.max_length,
        filled=1.0,
        labels=run["data"]["label_tokens"] / run["data"]["tokens"],
        accumulation=config.gradient_accumulation_steps,
        checkpointing=run["gradient_checkpointing"],
        load_in_4bit=config.load_in_4bit,
        dtype_bytes=dtype.itemsize,
    )
    activations = measure_activations(bases[1], adapters[1])
    if run["attention"] == "eager":
        activations = activations.with_scores(cost, config.max_length, dtype.itemsize)
    found = memory(cost, activations, setting)
    return found.total - found.reserved
