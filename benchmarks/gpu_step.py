"""`python -m benchmarks.gpu_step`: time and peak memory of a training step of a model of 1.3B parameters on this GPU.

A Llama from its configuration, with random weights in bfloat16, LoRA r=32 on all linear layers, no dropout, 16,384
tokens: documents of 1024, whose second half are labels. This project's steps have them packed into one row, the others
one to a row: none has padding. A step is forward, backward, clipping and fused AdamW, float32 adapters under autocast;
SFTTrainer's is timed by a callback. The record goes to $OUT/gpu-step-<device>.json after every group of variants
(OUT unset: benchmarks/results). IBKERNELS_DRY=1: the same of a toy on the CPU, with trl but without Liger.
"""

import contextlib
import gc
import os
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.eager import ib_loss, sft_loss
from benchmarks.gpu import environment, reason, record_name
from benchmarks.gpu_problems import DEVICE, DRY, synchronise
from benchmarks.measure import interleave, ratio, write_record
from benchmarks.models import ALPHA, BETA, SEED, build_base, build_variant, lora_config
from benchmarks.step import Size
from benchmarks.tables import markdown
from ibft.attention import select_attention
from ibft.data import Document, collate
from ibft.loading import autocast, compute_in_base_dtype
from ibkernels import noise

ROUNDS, WARM_UP = (2, 1) if DRY else (20, 3)
DTYPE = torch.float32 if DRY else torch.bfloat16
TOLERANCE = 1e-5 if DRY else 1e-2  # of the loss beside that of plain PyTorch with the same noise
SIZE = (
    Size(
        hidden=32, intermediate=64, layers=2, heads=2, vocabulary=256, lora_rank=4, target_layer=1,
        rows=2, length=32, bottleneck_dims=(8,),
    )
    if DRY
    else Size(
        hidden=2048, intermediate=5504, layers=24, heads=16, vocabulary=32256, lora_rank=32, target_layer=16,
        rows=16, length=1024, bottleneck_dims=(256,),
    )
)  # fmt: skip
OURS, EAGER, TRL = ("ibft-sft", "ibft-ib"), ("eager-sft", "eager-ib"), "trl-sft, Liger"
TOKENS = SIZE.rows * SIZE.length
TARGETS = (  # (text, measure, variant, its baseline, limit)
    ("time / ibft-sft", "seconds", "ibft-ib", "ibft-sft", 1.02),
    ("peak memory / ibft-sft", "peak_bytes", "ibft-ib", "ibft-sft", 1.02),
    (f"time / {TRL}", "seconds", "ibft-ib", TRL, 1.0),
)


class Step:
    """A training step of one of `models.VARIANTS`; `loss(rng)` is a forward pass with that noise, None: any."""

    def __init__(self, variant: str) -> None:
        dim, device = SIZE.bottleneck_dims[0], torch.device(DEVICE)
        with device:
            built = build_variant(variant, SIZE, dim, max_length=TOKENS, dtype=DTYPE)
        self.variant, self.model, self.layer = variant, built.model, built.layer
        for auxiliary in (self.layer, getattr(self.model, "bottleneck", None)):
            if auxiliary is not None:
                auxiliary.float()  # as in training
        ours = variant in OURS
        if ours:
            base = self.model.get_base_model()
            attention = select_attention(
                "auto", packing="best-fit", device=device, dtype=DTYPE, base_config=base.config
            )
            base.set_attn_implementation(attention.implementation)
            compute_in_base_dtype(self.model)
        made = documents()
        batch = collate(
            [made] if ours else [[document] for document in made],
            pad_token_id=0,
            max_length=TOKENS,
            packing="best-fit" if ours else "none",
            lengths=attention.lengths if ours else None,
        )
        self.batch = {n: t.to(device) if isinstance(t, Tensor) else t for n, t in batch.items()}
        self.labels = batch["label_indices"].numel()
        self.parameters = list(built.parameters.values())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, weight_decay=0.0, fused=True)

    def loss(self, rng: Tensor | None = None) -> Tensor:
        with autocast(torch.device(DEVICE), DTYPE):
            if self.variant in OURS:
                counts = {"num_items_in_batch": self.labels, "num_kl_items_in_batch": TOKENS}
                return self.model(**self.batch, **counts, noise_rng=rng, return_stats=False).loss
            padded = {name: self.batch[name] for name in ("input_ids", "attention_mask", "labels")}
            if self.layer is None:
                return sft_loss(self.model, padded)
            eps = None
            if rng is not None:
                eps = noise(rng, self.batch["noise_rows"].flatten(), SIZE.bottleneck_dims[0])
                eps = eps.view(*self.batch["labels"].shape, -1).to(DTYPE)
            head = self.model.get_output_embeddings().weight
            return ib_loss(
                self.model, self.layer, head, padded, target_layer=SIZE.target_layer, alpha=ALPHA, beta=BETA, eps=eps
            )

    def __call__(self) -> None:
        """One training step."""
        self.loss().backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def documents() -> list[Document]:
    """Random tokens, the same every time."""
    generator = np.random.default_rng(SEED)
    is_label = np.arange(SIZE.length) >= SIZE.length // 2
    return [Document(generator.integers(0, SIZE.vocabulary, SIZE.length), is_label, i) for i in range(SIZE.rows)]


def measure(save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Losses, seconds and bytes of every variant, group by group, each saved: a failure costs its group.

    Plain PyTorch's two are groups of their own, because the published one nearly fills 80 GB; trl is the last, because
    Liger changes transformers' classes.
    """
    body: dict[str, Any] = {part: {} for part in ("loss", "seconds", "rest_bytes", "peak_bytes", "left_out")}
    for names in (OURS, *((name,) for name in EAGER), (TRL,)):
        try:
            (measure_trl if TRL in names else measure_steps)(names, body)
        except Exception as error:  # out of memory, or a library that is not there
            traceback.print_exc()
            body["left_out"] |= {name: reason(error) for name in names if name not in body["seconds"]}
        gc.collect()
        if not DRY:
            with contextlib.suppress(RuntimeError):  # of a device that accepts nothing after an error
                torch.cuda.empty_cache()
        save(body)
        print(f"measured: {', '.join(names)}", file=sys.stderr, flush=True)
    for ours, eager in zip(OURS, EAGER, strict=True):
        if {ours, eager} <= body["loss"].keys() and not _agree(body["loss"][ours], body["loss"][eager]):
            body["left_out"][ours] = f"its loss is {body['loss'][ours]:.6g}, that of {eager} {body['loss'][eager]:.6g}"
    return body


def _agree(ours: float, eager: float) -> bool:
    return abs(ours - eager) <= TOLERANCE * abs(eager)


def measure_steps(names: tuple[str, ...], body: dict[str, Any]) -> None:
    """Interleaved; memory is a variant's own: at rest, and at the highest point of a step."""
    steps: dict[str, Step] = {}
    for name in names:
        before = allocated()
        step = Step(name)
        with torch.no_grad():
            body["loss"][name] = step.loss(torch.tensor([SEED, 1], device=DEVICE)).item()
        step()  # the optimizer's state; libraries' workspaces
        gc.collect()
        body["rest_bytes"][name] = allocated() - before
        steps[name] = step
    for name, step in steps.items():
        with peak_above_rest() as above:
            step()
        body["peak_bytes"][name] = body["rest_bytes"][name] + above[0]
    interleave({**steps}, WARM_UP, timed)
    body["seconds"] |= interleave({**steps}, ROUNDS, timed)


def measure_trl(names: tuple[str, ...], body: dict[str, Any]) -> None:
    """trl's SFTTrainer on the same documents, with Liger's layers (and where trl lets it, Liger's cross-entropy)."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    (name,), samples = names, []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            synchronise()
            self.start = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            synchronise()
            samples.append(time.perf_counter() - self.start)

    before = allocated()
    with torch.device(DEVICE):
        base = build_base(SIZE, TOKENS).to(DTYPE)
    rows = [
        {"input_ids": tokens.tolist(), "completion_mask": is_label.astype(int).tolist()}
        for tokens, is_label, _ in documents()
    ]
    words = Tokenizer(models.WordLevel({"<pad>": 0}, unk_token="<pad>"))  # the rows are tokens already
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<pad>")
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=base,
            processing_class=tokenizer,
            train_dataset=Dataset.from_list(rows),
            peft_config=lora_config(SIZE),
            callbacks=[Clock()],
            args=SFTConfig(
                output_dir=folder, max_length=SIZE.length, per_device_train_batch_size=SIZE.rows,
                max_steps=WARM_UP + ROUNDS, completion_only_loss=True, use_liger_kernel=not DRY, use_cpu=DRY,
                bf16=not DRY, gradient_checkpointing=False, optim="adamw_torch_fused", learning_rate=1e-4,
                lr_scheduler_type="constant", logging_strategy="no", save_strategy="no", report_to="none",
                disable_tqdm=True,
            ),
        )  # fmt: skip
        with peak_above_rest() as above:
            trainer.train()
    body["peak_bytes"][name] = above[0] + above[1] - before
    body["seconds"][name] = samples[WARM_UP:]


def timed(step: Callable[[], object]) -> float:
    """Seconds until the device is done."""
    synchronise()
    start = time.perf_counter()
    step()
    synchronise()
    return time.perf_counter() - start


def allocated() -> int:
    """Bytes of tensors on the GPU (dry mode: 0)."""
    return 0 if DRY else torch.cuda.memory_allocated()


@contextlib.contextmanager
def peak_above_rest() -> Iterator[list[int]]:
    """Gives, at its end, [bytes at the highest point above those at its beginning, these]."""
    found: list[int] = []
    rest = allocated()
    if not DRY:
        torch.cuda.reset_peak_memory_stats()
    yield found
    found += [0 if DRY else torch.cuda.max_memory_allocated() - rest, rest]


def table(record: dict[str, Any]) -> str:
    """A record in Markdown, with the targets and whether each was met."""
    tokens = record["size"]["rows"] * record["size"]["length"]
    rows = [["step", "ms: median", "least", "tokens/s", "/ ibft-sft (interval)", "peak, GiB", "/ ibft-sft", "loss"]]
    seconds, peaks = record["seconds"], record["peak_bytes"]
    for name, times in seconds.items():
        against = str(ratio(times, seconds["ibft-sft"])) if "ibft-sft" in seconds else "-"
        share = f"{peaks[name] / peaks['ibft-sft']:.3f}" if peaks.get("ibft-sft") else "-"
        median, loss = statistics.median(times), record["loss"].get(name)
        rows.append([name, f"{1e3 * median:.1f}", f"{1e3 * min(times):.1f}", f"{tokens / median:,.0f}", against])
        rows[-1] += [f"{peaks[name] / 2**30:.2f}", share, "-" if loss is None else f"{loss:.5f}"]
    lines = ["**A dry run: these numbers mean nothing.**", ""] if record["dry"] else []
    lines += [*markdown(rows), "", *(f"Not measured: {name} ({why})." for name, why in record["left_out"].items()), ""]
    targets = [["target", "measured", "met"]]
    for text, part, variant, baseline, limit in TARGETS:
        pair = [record[part].get(name) for name in (variant, baseline)]
        targets.append([f"{variant}: {text} <= {limit:g}", "-", "not measured"])
        if all(pair):
            mine, other = (statistics.median(one) if part == "seconds" else one for one in pair)
            met = "-" if record["dry"] else "yes" if mine / other <= limit else "**no**"
            targets[-1][1:] = [f"{mine / other:.3f}", met]
    return "\n".join([*lines, *markdown(targets)])


def main() -> int:
    """The command line; 1 where a step of ours was not measured or computes something else."""
    if not DRY and not torch.cuda.is_available():
        print("there is no GPU; IBKERNELS_DRY=1 runs the same code without one", file=sys.stderr)
        return 2
    where = environment()
    for package in ("transformers", "peft", "trl", "liger-kernel"):
        with contextlib.suppress(PackageNotFoundError):
            where["versions"][package] = version(package)
    record = {
        "suite": "gpu step",
        "command": "python -m benchmarks.gpu_step",
        "dry": DRY,
        **where,
        "size": asdict(SIZE),
    }
    folder = Path(os.environ.get("OUT") or ("runs" if DRY else "benchmarks/results"))
    file = folder / f"gpu-step-{record_name(where)}.json"
    record |= measure(lambda body: write_record(file, record | body))
    write_record(file, record)
    print(table(record))
    return 1 if any(name in record["left_out"] for name in OURS) else 0


if __name__ == "__main__":
    sys.exit(main())
