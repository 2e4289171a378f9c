"""`ibft lab demo`: the whole of IB-FT in minutes on a laptop, on data and a base model made on the spot.

Makes a tiny Llama that has read many small Python programs, fine-tunes it to write programs from descriptions, plainly
(SFT) and with the bottleneck (IB-FT), reloads both adapters with plain PEFT, and compares them on unseen descriptions.
"""

import importlib.util
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, set_seed

from ibft.config import TrainConfig
from ibft.data import BatchPlan, EncodedDataset, collate, encode, load_rows
from ibft.data.packing import Packing
from ibft.errors import InputError
from ibft.flags import AT_LEAST_1, NOT_EMPTY, Check, check_fields, flag
from ibft.lab.tasks import Task, generate_tasks, write_jsonl
from ibft.lab.tiny import build_llama, build_tokenizer, save_base
from ibft.loading import quiet_libraries
from ibft.run_folder import METRICS_NAME, prepare_output, write_json
from ibft.train import train

MAX_LENGTH = 256
SEED: Check = (lambda v: 0 <= v < 2**32, "between 0 and 2**32 - 1")
PRETRAINING_TASKS, TRAINING_TASKS, HELD_OUT_TASKS = 2000, 600, 100


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """The flags of `ibft lab demo`."""

    output_dir: str = flag("demo", "ibft-demo", "folder for data, base model, both runs and the plot", NOT_EMPTY)
    seed: int = flag("demo", 0, "of data, initialisation, order and noise", SEED)
    pretraining_steps: int = flag("demo", 80, "optimizer steps of the base model", AT_LEAST_1)
    steps: int = flag("demo", 100, "optimizer steps of each fine-tuning", AT_LEAST_1)
    overwrite: bool = flag("demo", False, "start over in a folder that holds a demo")
    debug: bool = flag("demo", False, "show the traceback of an error")

    def __post_init__(self) -> None:
        check_fields(self)


def run_demo(config: DemoConfig) -> list[dict[str, Any]]:
    """Runs the demo; returns and prints the rows of its table, and writes them to output_dir/results.json."""
    folder = Path(config.output_dir)
    if (folder / "results.json").exists() and not config.overwrite:
        raise InputError(f"output_dir {folder} holds a finished demo; choose another, or pass --overwrite.")
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError('the demo draws its curves with matplotlib, which is not installed: pip install "ibft[plot]".')
    prepare_output(folder, overwrite=True, resume=False)
    quiet_libraries(progress_bars=False)
    torch.set_flush_denormal(True)  # tiny numbers would make a small model crawl on a CPU

    start = time.perf_counter()
    tasks = generate_tasks(PRETRAINING_TASKS + TRAINING_TASKS + HELD_OUT_TASKS, seed=config.seed)
    corpus, training = tasks[:PRETRAINING_TASKS], tasks[PRETRAINING_TASKS:-HELD_OUT_TASKS]
    held_out = tasks[-HELD_OUT_TASKS:]
    write_jsonl(training, folder / "train.jsonl")
    write_jsonl(held_out, folder / "held_out.jsonl")
    print(f"1. A base model: a tiny Llama reads {len(corpus)} programs, without descriptions.")
    _make_base(config, corpus, training, folder / "base")

    for step, method in ((2, "sft"), (3, "ib")):
        print(f"\n{step}. Fine-tuning on {len(training)} descriptions with programs: {method}.")
        train(_train_config(config, folder, method))

    print(f"\n4. Both adapters, reloaded with plain PEFT, on {len(held_out)} tasks that no training has seen.\n")
    rows = [_evaluate(folder, method) for method in (None, "sft", "ib")]
    print(_table(rows))
    _plot(folder)
    write_json(folder / "results.json", {"seed": config.seed, "steps": config.steps, "rows": rows})
    print(f"\nLoss curves: {folder / 'loss.png'}. The whole demo took {time.perf_counter() - start:.0f} s.")
    print(
        "Both curves are nearly one, and so they should be: this tiny base model has memorised nothing that stands in\n"
        "the way of the fine-tuning. The demo shows that every part works, and what the bottleneck's terms look like."
    )
    return rows


def _make_base(config: DemoConfig, corpus: Sequence[Task], training: Sequence[Task], folder: Path) -> None:
    """Pretrains on bare programs: next-token prediction over all of them, with AdamW on every weight."""
    tokenizer = build_tokenizer([f"{task.description}\n{task.program}" for task in (*corpus, *training)])
    model = build_llama(tokenizer, max_length=MAX_LENGTH, seed=config.seed)
    write_jsonl([replace(task, description="") for task in corpus], folder.with_suffix(".jsonl"))
    data = encode(load_rows(str(folder.with_suffix(".jsonl"))), tokenizer, max_length=MAX_LENGTH)
    plan = BatchPlan(
        data.lengths, max_length=MAX_LENGTH, rows_per_batch=16, accumulation=1, world_size=1, seed=config.seed
    )
    set_seed(config.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, config.pretraining_steps)
    for step in range(config.pretraining_steps):
        batch = _collate(data, plan.micro_batches(step, 0)[0], tokenizer, "best-fit")
        loss = _response_loss(model, batch)
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if (step + 1) % 100 == 0 or step + 1 == config.pretraining_steps:
            print(f"   step {step + 1}/{config.pretraining_steps}  loss {loss.item():.3f}", flush=True)
    save_base(model, tokenizer, folder)


def _train_config(config: DemoConfig, folder: Path, method: str) -> TrainConfig:
    return TrainConfig(
        base_model=str(folder / "base"),
        dataset=[str(folder / "train.jsonl")],
        method=method,  # type: ignore[arg-type]
        max_length=MAX_LENGTH,
        per_device_train_batch_size=8,
        max_steps=config.steps,
        learning_rate=2e-3,
        lora_r=16,
        bottleneck_dim=32,
        logging_steps=max(1, config.steps // 5),
        seed=config.seed,
        output_dir=str(folder / method),
        save_strategy="no",
        overwrite=config.overwrite,
        use_cpu=True,
    )


def _evaluate(folder: Path, method: str | None) -> dict[str, Any]:
    """A row of the table: the base model, with the adapter of a method when there is one, on the held-out tasks."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    model: Any = AutoModelForCausalLM.from_pretrained(folder / "base")
    last: dict[str, Any] = {}
    if method is not None:
        model = PeftModel.from_pretrained(model, folder / method)
        last = json.loads((folder / method / METRICS_NAME).read_text().splitlines()[-1])
    model.eval()
    data = encode(load_rows(str(folder / "held_out.jsonl")), tokenizer, max_length=MAX_LENGTH)
    everything = [np.array([index]) for index in range(len(data))]
    with torch.no_grad():
        held_out = _response_loss(model, _collate(data, everything, tokenizer, "none")).item()
    return {
        "model": {None: "base, not fine-tuned", "sft": "SFT", "ib": "IB-FT"}[method],
        "training_loss": last.get("ce"),
        "held_out_loss": held_out,
        "kl_nats": last.get("kl_nats"),
        "ce_ib": last.get("ce_ib"),
        "tokens_per_second": last.get("tokens_per_second"),
    }


def _response_loss(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The mean cross-entropy that transformers computes from the labels."""
    inputs = {name: batch[name] for name in ("input_ids", "labels", "position_ids")}
    return model(**inputs, attention_mask=batch.get("attention_mask"), use_cache=False).loss


def _collate(
    data: EncodedDataset, bins: Sequence[np.ndarray], tokenizer: PreTrainedTokenizerFast, packing: Packing
) -> dict[str, torch.Tensor]:
    documents = [[data.document(int(index)) for index in row] for row in bins]
    return collate(documents, pad_token_id=tokenizer.pad_token_id, max_length=MAX_LENGTH, packing=packing)


def _table(rows: Sequence[dict[str, Any]]) -> str:
    columns = (
        ("model", "model", "{}"),
        ("training loss", "training_loss", "{:.3f}"),
        ("held-out loss", "held_out_loss", "{:.3f}"),
        ("KL (nats/token)", "kl_nats", "{:.2f}"),
        ("bottleneck's loss", "ce_ib", "{:.3f}"),
        ("tokens/s", "tokens_per_second", "{:.0f}"),
    )
    cells = [[title for title, _, _ in columns]]
    cells += [
        ["-" if row[name] is None else template.format(row[name]) for _, name, template in columns] for row in rows
    ]
    widths = [max(len(line[column]) for line in cells) for column in range(len(columns))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    legend = (
        "training loss, held-out loss: mean cross-entropy per response token, of the last step's batch and of unseen "
        "tasks; lower is better.\n"
        "KL, bottleneck's loss: what the bottleneck keeps of a token, and how well it predicts from that alone."
    )
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:], "", legend])


def _plot(folder: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for method, label, width in (("sft", "SFT", 4.0), ("ib", "IB-FT", 1.5)):  # the two may lie on each other
        records = [json.loads(line) for line in (folder / method / METRICS_NAME).read_text().splitlines()]
        steps = [record["step"] for record in records]
        left.plot(steps, [record["ce"] for record in records], label=label, linewidth=width)
        if method == "ib":
            right.plot(steps, [record["kl_nats"] for record in records], color="C2")
    left.set(title="Cross-entropy on the training data", xlabel="optimizer step", ylabel="nats per response token")
    left.legend()
    right.set(title="IB-FT: what the bottleneck keeps (KL)", xlabel="optimizer step", ylabel="nats per token")
    figure.savefig(folder / "loss.png", dpi=120)
    pyplot.close(figure)
