"""The same documents through the same IB-FT step in rows laid out differently: padded as published, padded, packed.

`python -m benchmarks.padding` checks that all layouts give the same loss and gradients, then measures how many real
tokens a second each trains. Lengths are those of a dataset like OriGen: half of the documents are shorter than 400
tokens, one in two hundred reaches 2048.
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
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.measure import Ratio, environment, interleave, ratio, relative_error, write_record
from ibft.attention import VARLEN
from ibft.data import BatchPlan, collate
from ibft.data.encode import Document
from ibft.model import IBModel
from ibft.objective import IBConfig

BASELINE = "published"
# Each with transformers' name of its attention.
LAYOUTS = {"published": "sdpa", "padded": "sdpa", "packed, mask": "sdpa", "packed, varlen": VARLEN}
TOLERANCE = 1e-4  # of a float32 gradient, relative to its norm
SEED = 0


@dataclass(frozen=True)
class Size:
    """A Llama, and the documents of an optimizer step: their median and largest length in tokens."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocabulary: int
    lora_rank: int
    target_layer: int
    bottleneck_dim: int
    documents: int
    median: int
    max_length: int
    rows: int  # of a micro-batch, as published


SIZES = {
    "toy": Size(32, 64, 2, 2, 128, 4, 1, 8, 6, 12, 48, 2),
    "full": Size(64, 172, 2, 2, 4096, 32, 1, 64, 32, 400, 2048, 2),
}


def lengths(size: Size) -> np.ndarray:
    """Evenly spaced quantiles of a log-normal distribution, whose 99.5% quantile is max_length; none is longer."""
    spread = np.log(size.max_length / size.median) / NormalDist().inv_cdf(0.995)
    quantiles = [NormalDist().inv_cdf((index + 0.5) / size.documents) for index in range(size.documents)]
    return np.minimum(np.exp(np.log(size.median) + spread * np.array(quantiles)).round(), size.max_length).astype(int)


def build_model(size: Size) -> IBModel:
    """The same weights every time, no dropout."""
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        max_position_embeddings=size.max_length,
    )
    lora = LoraConfig(task_type="CAUSAL_LM", r=size.lora_rank, target_modules="all-linear", init_lora_weights=False)
    ib = IBConfig(target_layer=size.target_layer, bottleneck_dim=size.bottleneck_dim)
    return IBModel.from_base(LlamaForCausalLM(config), lora, ib).train()


def build_documents(size: Size) -> list[Document]:
    """Random tokens, of which the second half are labels."""
    generator = np.random.default_rng(SEED)
    return [
        Document(generator.integers(0, size.vocabulary, length), np.arange(length) >= length // 2, index)
        for index, length in enumerate(lengths(size))
    ]


def batches(layout: str, size: Size, documents: list[Document]) -> list[dict[str, Any]]:
    """The micro-batches of one step over all documents."""
    packing = "best-fit" if layout.startswith("packed") else "none"
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
            lengths=LAYOUTS[layout] == VARLEN,
        )
        for rows in plan.micro_batches(0, rank=0)
    ]
    return [_padded_to(size.max_length, batch) for batch in made] if layout == "published" else made


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

    def __init__(self, layout: str, size: Size, model: IBModel, documents: list[Document]) -> None:
        self.layout, self.model = layout, model
        self.batches = batches(layout, size, documents)
        self.num_tokens = int(lengths(size).sum())
        self.num_labels = sum(batch["label_indices"].numel() for batch in self.batches)
        self.positions = sum(batch["input_ids"].numel() for batch in self.batches)

    def __call__(self) -> float:
        """The loss."""
        self.model.zero_grad(set_to_none=True)
        self.model.get_base_model().set_attn_implementation(LAYOUTS[self.layout])
        loss = 0.0
        for batch in self.batches:
            output = self.model(
                **batch,
                num_items_in_batch=self.num_labels,
                num_kl_items_in_batch=self.num_tokens,
                noise_rng=torch.tensor([SEED, 0]),
                return_stats=False,
            )
            output.loss.backward()
            loss += output.loss.item()
        return loss


def gradients(step: Step) -> dict[str, torch.Tensor]:
    """Of one step, with its loss."""
    loss = torch.tensor(step())
    return {"loss": loss} | {n: p.grad.clone() for n, p in step.model.named_parameters() if p.grad is not None}


def check(step: Step, expected: dict[str, torch.Tensor]) -> float:
    """The largest relative error of loss and gradients. Raises RuntimeError where it exceeds TOLERANCE."""
    actual = gradients(step)
    errors = {name: relative_error(actual.get(name), tensor) for name, tensor in expected.items()}
    worst = max(errors, key=lambda name: errors[name])
    if not errors[worst] <= TOLERANCE:
        raise RuntimeError(
            f"{step.layout}: {worst} differs from that of {BASELINE} rows by {errors[worst]:.2g} (accepted: "
            f"{TOLERANCE:.0e}); a layout that trains something else is not measured."
        )
    return errors[worst]


def compare(size_name: str, rounds: int) -> dict[str, Any]:
    """The record's body: errors, positions, all samples in seconds, and real tokens a second relative to BASELINE."""
    size = SIZES[size_name]
    model, documents = build_model(size), build_documents(size)
    steps = {layout: Step(layout, size, model, documents) for layout in LAYOUTS}
    expected = gradients(steps[BASELINE])
    errors = {name: check(step, expected) for name, step in steps.items() if name != BASELINE}
    gc.collect()
    samples = interleave(dict(steps), rounds)
    return {
        "size": {"name": size_name, **asdict(size)},
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
        "seconds": samples,
        "load_average_after_timing": list(os.getloadavg()),
        # Of speeds, so the other way round than of times.
        "speed_ratio": {name: ratio(samples[BASELINE], times)._asdict() for name, times in samples.items()},
    }


def table(record: dict[str, Any]) -> str:
    """A record as a Markdown table."""
    header = ["rows", "positions", "padding", "real tokens/s: median", f"/ {BASELINE}: median (quartiles)"]
    lines = [header, ["---"] * len(header)]
    for name, times in record["seconds"].items():
        positions, tokens = record["positions"][name], record["real_tokens"]
        lines.append([name, f"{positions:,}", f"{1 - tokens / positions:.1%}"])
        lines[-1] += [f"{tokens / statistics.median(times):,.0f}", str(Ratio(**record["speed_ratio"][name]))]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


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
    measured = compare(options.size, options.rounds)
    record = {"command": " ".join(["python -m benchmarks.padding", *arguments]), **where, **measured}
    print(table(record))
    print(json.dumps({"lengths": record["lengths"], "relative_error": record["relative_error"]}))
    if options.record:
        write_record(options.record, record)


if __name__ == "__main__":
    main()
