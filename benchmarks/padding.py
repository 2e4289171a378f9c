"""The same documents in rows laid out differently: padded as published, padded, packed; eager and with this project.

`python -m benchmarks.padding` checks that all give the same loss and gradients, then measures how many real tokens a
second each trains. Lengths are those of a dataset like OriGen: half of the documents are shorter than 400 tokens, one
in two hundred reaches 2048.
"""

import argparse
import gc
import json
import os
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.eager import ib_loss, sft_loss
from benchmarks.measure import (
    can_measure_memory,
    environment,
    interleave,
    peak_of,
    pinned_malloc,
    ratio,
    relative_error,
    write_record,
)
from benchmarks.models import ALPHA, BETA, SEED, ModelSize, Variant, build_variant
from benchmarks.tables import markdown
from ibft.data import BatchPlan, Document, collate
from ibft.document_attention import BY_DOCUMENT
from ibkernels import noise


class Layout(NamedTuple):
    """Which of `models.VARIANTS` trains, its rows, and transformers' name of its attention."""

    variant: str
    rows: str  # "published": padded to max_length; "padded": to the longest of a batch; "packed"
    attention: str = "sdpa"


BASELINE = "published"
LAYOUTS = {
    "eager-ib, published": Layout("eager-ib", "published"),  # all of it as published
    "eager-sft, padded": Layout("eager-sft", "padded"),
    "published": Layout("ibft-ib", "published"),
    "padded": Layout("ibft-ib", "padded"),
    "packed, mask": Layout("ibft-ib", "packed"),
    "packed, varlen": Layout("ibft-ib", "packed", BY_DOCUMENT),
    "ibft-sft, packed, varlen": Layout("ibft-sft", "packed", BY_DOCUMENT),
}
# What trains the same; of each group the first is what the others are checked against.
GROUPS = (
    ("eager-ib, published", "published", "padded", "packed, mask", "packed, varlen"),
    ("eager-sft, padded", "ibft-sft, packed, varlen"),
)
TOLERANCE = 1e-4  # of a float32 gradient, relative to its norm


@dataclass(frozen=True, kw_only=True)
class Size(ModelSize):
    """A Llama, and the documents of an optimizer step: their median and largest length in tokens."""

    bottleneck_dim: int
    documents: int
    median: int
    max_length: int
    rows: int  # of a micro-batch, as published


SIZES = {
    "toy": Size(
        hidden=32, intermediate=64, layers=2, heads=2, vocabulary=128, lora_rank=4, target_layer=1,
        bottleneck_dim=8, documents=6, median=12, max_length=48, rows=2,
    ),
    "full": Size(
        hidden=64, intermediate=172, layers=2, heads=2, vocabulary=4096, lora_rank=32, target_layer=1,
        bottleneck_dim=64, documents=32, median=400, max_length=2048, rows=2,
    ),
}  # fmt: skip


def lengths(size: Size) -> np.ndarray:
    """Evenly spaced quantiles of a log-normal distribution, whose 99.5% quantile is max_length; none is longer."""
    spread = np.log(size.max_length / size.median) / NormalDist().inv_cdf(0.995)
    quantiles = [NormalDist().inv_cdf((index + 0.5) / size.documents) for index in range(size.documents)]
    return np.minimum(np.exp(np.log(size.median) + spread * np.array(quantiles)).round(), size.max_length).astype(int)


def build_model(variant: str, size: Size) -> Variant:
    """The same weights every time, no dropout."""
    return build_variant(variant, size, size.bottleneck_dim, max_length=size.max_length)


def build_documents(size: Size) -> list[Document]:
    """Random tokens, of which the second half are labels."""
    generator = np.random.default_rng(SEED)
    return [
        Document(generator.integers(0, size.vocabulary, length), np.arange(length) >= length // 2, index)
        for index, length in enumerate(lengths(size))
    ]


def batches(layout: Layout, size: Size, documents: list[Document]) -> list[dict[str, Any]]:
    """The micro-batches of one step over all documents."""
    packing = "best-fit" if layout.rows == "packed" else "none"
    plan = BatchPlan(
        lengths(size),
        max_length=size.max_length,
        packing=packing,  # type: ignore[arg-type]
        rows_per_batch=size.rows,
        accumulation=size.documents,  # at most: the plan makes as few micro-batches as hold the step's rows
        world_size=1,
        seed=SEED,
    )
    made = [
        collate(
            [[documents[index] for index in row] for row in rows],
            pad_token_id=0,
            max_length=size.max_length,
            packing=packing,  # type: ignore[arg-type]
            lengths="host" if layout.attention == BY_DOCUMENT else None,
        )
        for rows in plan.micro_batches(0, rank=0)
    ]
    return [_padded_to(size.max_length, batch) for batch in made] if layout.rows == "published" else made


def _padded_to(length: int, batch: dict[str, Any]) -> dict[str, Any]:
    """Every row padded to `length`, as `padding="max_length"` of a tokenizer does."""
    longest = batch["input_ids"].shape[1]
    fill = {"labels": -100}
    padded = {
        name: F.pad(tensor, (0, length - longest), value=fill.get(name, 0))
        for name, tensor in batch.items()
        if name != "label_indices"
    }
    rows, columns = batch["label_indices"] // longest, batch["label_indices"] % longest
    return padded | {"label_indices": rows * length + columns}


class Step:
    """A layout's micro-batches, forward and backward, whose gradients add up to those of all documents."""

    def __init__(self, name: str, size: Size, built: Variant, documents: list[Document]) -> None:
        self.name, self.layout, self.size, self.built = name, LAYOUTS[name], size, built
        self.batches = batches(self.layout, size, documents)
        self.num_tokens = int(lengths(size).sum())
        self.num_labels = sum(batch["label_indices"].numel() for batch in self.batches)
        self.positions = sum(batch["input_ids"].numel() for batch in self.batches)

    def __call__(self, rng: Tensor | None = None) -> float:
        """The loss, with the noise of that rng state (None: any noise)."""
        self.built.model.zero_grad(set_to_none=True)
        self.built.model.get_base_model().set_attn_implementation(self.layout.attention)
        total = 0.0
        for batch in self.batches:
            loss = self._ours(batch, rng) if self.layout.variant.startswith("ibft") else self._eager(batch, rng)
            loss.backward()
            total += loss.item()
        return total

    def release(self) -> None:
        """Lets go of the gradients, which a step leaves behind."""
        self.built.model.zero_grad(set_to_none=True)
        gc.collect()

    def _ours(self, batch: dict[str, Any], rng: Tensor | None) -> Tensor:
        counts = {"num_items_in_batch": self.num_labels}
        if self.layout.variant == "ibft-ib":
            counts["num_kl_items_in_batch"] = self.num_tokens
        return self.built.model(**batch, **counts, noise_rng=rng, return_stats=False).loss

    def _eager(self, batch: dict[str, Any], rng: Tensor | None) -> Tensor:
        padded = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
        counts, model, layer = (self.num_labels, self.num_tokens), self.built.model, self.built.layer
        if layer is None:
            return sft_loss(model, padded, counts)
        eps = None
        if rng is not None:
            eps = noise(rng, batch["noise_rows"].flatten(), self.size.bottleneck_dim)
            eps = eps.view(*batch["labels"].shape, -1)
        head = model.get_output_embeddings().weight
        tapped = self.size.target_layer
        return ib_loss(model, layer, head, padded, target_layer=tapped, alpha=ALPHA, beta=BETA, eps=eps, counts=counts)


def gradients(step: Step) -> dict[str, Tensor]:
    """Of one step, with its loss."""
    loss = torch.tensor(step(torch.tensor([SEED, 0])))
    return {"loss": loss} | {n: p.grad.clone() for n, p in step.built.parameters.items() if p.grad is not None}


def check(step: Step, expected: dict[str, Tensor], of: str) -> float:
    """The largest relative error of loss and gradients. Raises RuntimeError where it exceeds TOLERANCE."""
    actual = gradients(step)
    errors = {name: relative_error(actual.get(name), tensor) for name, tensor in expected.items()}
    worst = max(errors, key=lambda name: errors[name])
    if not errors[worst] <= TOLERANCE:
        raise RuntimeError(
            f"{step.name}: {worst} differs from that of {of!r} by {errors[worst]:.2g} (accepted: "
            f"{TOLERANCE:.0e}); a layout that trains something else is not measured."
        )
    return errors[worst]


def compare(size: Size, rounds: int) -> dict[str, Any]:
    """The record's body: errors, positions, and all samples in seconds."""
    documents = build_documents(size)
    models = {variant: build_model(variant, size) for variant in {layout.variant for layout in LAYOUTS.values()}}
    steps = {name: Step(name, size, models[layout.variant], documents) for name, layout in LAYOUTS.items()}
    errors: dict[str, float] = {}
    for first, *others in GROUPS:
        expected = gradients(steps[first])
        errors |= {name: check(steps[name], expected, first) for name in others}
    for built in models.values():
        built.model.zero_grad(set_to_none=True)
    return {
        "size": asdict(size),
        "lengths": {
            name: float(value)
            for name, value in zip(
                ("least", "median", "mean", "p90", "largest"),
                [*np.quantile(lengths(size), [0, 0.5]), lengths(size).mean(), *np.quantile(lengths(size), [0.9, 1])],
                strict=True,
            )
        },
        "relative_error": errors,
        "real_tokens": steps[BASELINE].num_tokens,
        "positions": {name: step.positions for name, step in steps.items()},
        "peak_mib": _peaks(steps) if can_measure_memory() else {},
        "seconds": interleave(dict(steps), rounds),
        "load_average_after_timing": list(os.getloadavg()),
    }


def _peaks(steps: dict[str, Step]) -> dict[str, float]:
    """MiB that a step needs beyond the models' own."""
    peaks = {}
    with pinned_malloc() as trim:
        for name, step in steps.items():
            found = peak_of(step, lambda step=step: (step.release(), trim()), repeats=1)  # type: ignore[misc]
            peaks[name] = found["peak"] - found["rest"]
            step.release()
    return peaks


def table(record: dict[str, Any]) -> str:
    """A record as a Markdown table."""
    lines = [["rows", "positions", "padding", "real tokens/s: median", f"/ {BASELINE} (interval)"]]
    peaks = record.get("peak_mib", {})
    lines[0] += ["peak above rest, MiB"] if peaks else []
    for name, times in record["seconds"].items():
        positions, tokens = record["positions"][name], record["real_tokens"]
        lines.append([name, f"{positions:,}", f"{1 - tokens / positions:.1%}"])
        # Of speeds, so the other way round than of times.
        lines[-1] += [f"{tokens / statistics.median(times):,.0f}", str(ratio(record["seconds"][BASELINE], times))]
        lines[-1] += [f"{peaks[name]:,.0f}"] if peaks else []
    return "\n".join(markdown(lines))


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.padding", description="What padding costs.")
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of every layout (default: 7)")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch (default: 2)")
    parser.add_argument("--record", metavar="FILE", help="write all that was measured, as JSON")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    where = environment()  # first: the load of the machine is that without us
    measured = compare(SIZES[options.size], options.rounds)
    command = " ".join(["python -m benchmarks.padding", *arguments])
    record = {"suite": "padding", "command": command, **where, **measured}
    record["size"] = {"name": options.size, **measured["size"]}
    print(table(record))
    print(json.dumps({"lengths": record["lengths"], "relative_error": record["relative_error"]}))
    if options.record:
        write_record(options.record, record)


if __name__ == "__main__":
    main()
