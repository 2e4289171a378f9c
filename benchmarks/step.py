"""One training step, four ways: SFT and IB-FT, each as eager PyTorch (PEFT) and as this project.

`python -m benchmarks.step` checks that both give the same gradients, then measures time and peak memory on one shared
setup. A step is forward, backward and AdamW; LoRA on all linear layers, no dropout, the same data and initial weights.
"""

import argparse
import gc
import json
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import ibkernels
from benchmarks.eager import ib_loss, sft_loss
from benchmarks.measure import (
    can_measure_memory,
    environment,
    in_fresh_process,
    interleave,
    peak_of,
    ratio,
    relative_error,
    write_record,
)
from benchmarks.models import ALPHA, BETA, SEED, ModelSize, build_variant
from benchmarks.tables import markdown
from ibft.data.encoded import Document
from ibft.data.packing import collate
from ibft.estimate.cost import ModelCost
from ibkernels import noise

BASELINE = "eager-sft"
TOLERANCE = 1e-4  # of a float32 gradient, relative to its norm


@dataclass(frozen=True, kw_only=True)
class Size(ModelSize):
    """A Llama and its batch: `rows` documents of `length` tokens, the last `label_share` of each being labels."""

    rows: int
    length: int
    bottleneck_dims: tuple[int, ...]
    label_share: float = 0.5


SIZES = {
    "toy": Size(
        hidden=32, intermediate=64, layers=2, heads=2, vocabulary=256, lora_rank=4, target_layer=1,
        rows=2, length=32, bottleneck_dims=(4, 8),
    ),
    "small": Size(
        hidden=256, intermediate=688, layers=4, heads=4, vocabulary=32000, lora_rank=16, target_layer=3,
        rows=2, length=512, bottleneck_dims=(64,),
    ),
    "full": Size(
        hidden=512, intermediate=1376, layers=8, heads=8, vocabulary=32000, lora_rank=32, target_layer=5,
        rows=2, length=1024, bottleneck_dims=(64, 256),
    ),
}  # fmt: skip


@dataclass
class Step:
    """A model ready to train. `loss(rng)` is one forward pass, with the noise of `rng` or, with None, any noise."""

    model: Any  # a PEFT model, or an IBModel
    parameters: dict[str, nn.Parameter]  # the trainable ones, of the same names in the eager variant and in ours
    batch: dict[str, Tensor]
    loss: Callable[[Tensor | None], Tensor]
    optimizer: torch.optim.Optimizer

    def __call__(self) -> None:
        """One training step."""
        self.optimizer.zero_grad(set_to_none=True)
        self.loss(None).backward()
        self.optimizer.step()

    def release(self) -> None:
        """Lets go of the gradients, which the last step leaves behind."""
        self.optimizer.zero_grad(set_to_none=True)
        gc.collect()


def build(
    variant: str, size: Size, bottleneck_dim: int, *, dtype: torch.dtype = torch.float32, sample: bool = True
) -> Step:
    """A step of one of VARIANTS, with weights and data that depend on the size alone. sample=False: no noise."""
    built = build_variant(variant, size, bottleneck_dim, max_length=size.length, dtype=dtype, sample=sample)
    model, batch = built.model, _batch(size)
    padded = {name: batch[name] for name in ("input_ids", "labels")}
    padded["attention_mask"] = torch.ones_like(batch["input_ids"])

    def loss(rng: Tensor | None) -> Tensor:
        if variant.startswith("ibft"):
            return model(**batch, noise_rng=rng, return_stats=False).loss  # as the training loop calls it
        if built.layer is None:
            return sft_loss(model, padded)
        eps = None
        if not sample:
            eps = torch.zeros(1, dtype=dtype)
        elif rng is not None:
            eps = noise(rng, batch["noise_rows"].flatten(), bottleneck_dim)
            eps = eps.view(*batch["labels"].shape, bottleneck_dim)
        head = model.get_output_embeddings().weight
        return ib_loss(
            model, built.layer, head, padded, target_layer=size.target_layer, alpha=ALPHA, beta=BETA, eps=eps
        )

    optimizer = torch.optim.AdamW(built.parameters.values(), lr=1e-4, weight_decay=0.0, fused=True)
    return Step(model, built.parameters, batch, loss, optimizer)


def check(ours: Step, eager: Step) -> float:
    """The largest relative error, of the loss and of every gradient, between two variants with the same noise.

    Raises RuntimeError where it exceeds TOLERANCE: a wrong step's time is not worth reporting.
    """
    rng = torch.tensor([SEED, 1])
    losses = [step.loss(rng) for step in (ours, eager)]
    for loss in losses:
        loss.backward()
    errors = {"loss": relative_error(losses[0], losses[1])}
    for name in ours.parameters.keys() | eager.parameters.keys():
        pair = [step.parameters.get(name) for step in (ours, eager)]
        errors[name] = relative_error(*(None if parameter is None else parameter.grad for parameter in pair))
    for step in (ours, eager):
        step.release()
    worst = max(errors, key=lambda name: errors[name])
    if not errors[worst] <= TOLERANCE:
        raise RuntimeError(
            f"{worst} differs from the eager one by {errors[worst]:.2g} (accepted: {TOLERANCE:.0e}); "
            "a step that computes something else is not measured."
        )
    return errors[worst]


def extra_gemms(size: Size, bottleneck_dim: int) -> Callable[[], None]:
    """The library GEMMs that IB-FT adds to a step, alone: the least that a step can cost beyond SFT.

    The encoder over all tokens and the bottleneck's cross-entropy over the labels, forward and backward, absorbed or
    not as `ibkernels.absorbs` says.
    """
    torch.manual_seed(SEED)
    tokens, labels = size.rows * size.length, size.rows * round(size.length * size.label_share)
    hidden, encoder = torch.randn(tokens, size.hidden), torch.randn(2 * bottleneck_dim, size.hidden)
    z, up = torch.randn(labels, bottleneck_dim), torch.randn(size.hidden, bottleneck_dim)
    head = torch.randn(size.vocabulary, size.hidden)

    def run() -> None:
        raw = hidden @ encoder.T
        _ = raw @ encoder, raw.T @ hidden
        if ibkernels.absorbs(labels, size.hidden, bottleneck_dim):
            matrix = head @ up
            grad = z @ matrix.T
            _ = grad @ matrix, head.T @ (grad.T @ z)
        else:
            grad_wide = (z @ up.T @ head.T) @ head
            _ = grad_wide @ up, grad_wide.T @ z

    return run


def label(variant: str, bottleneck_dim: int) -> str:
    """The name of a variant in tables and records."""
    return f"{variant} K={bottleneck_dim}" if variant.endswith("-ib") else variant


def cells(size: Size) -> list[tuple[str, int]]:
    """Every variant with its K, the baseline first; SFT has no K, and stands there once."""
    narrow = size.bottleneck_dims[0]
    ib = [(variant, dim) for dim in size.bottleneck_dims for variant in ("eager-ib", "ibft-ib")]
    return [("eager-sft", narrow), ("ibft-sft", narrow), *ib]


def peak_memory(variant: str, size: Size, bottleneck_dim: int, default_malloc: bool) -> dict[str, float]:
    """MiB resident at rest and at the peak of a step, and perhaps that peak under the default malloc; see README.md."""
    cell = json.dumps([variant, asdict(size), bottleneck_dim])
    arguments = ["--peak", cell, "--threads", str(torch.get_num_threads())]
    found = in_fresh_process("benchmarks.step", arguments, pinned_malloc=True)
    if default_malloc:
        found["peak_default_malloc"] = in_fresh_process("benchmarks.step", arguments, pinned_malloc=False)["peak"]
    return found


def compare(size: Size, rounds: int, memory: bool, default_malloc: bool) -> dict[str, Any]:
    """A record's body: errors, all samples in seconds, FLOPs of our steps by `ibft estimate`, peak memory."""
    steps = {label(*cell): build(cell[0], size, cell[1]) for cell in cells(size)}
    errors = {
        label(variant, dim): check(steps[label(variant, dim)], steps[label(variant.replace("ibft", "eager"), dim)])
        for variant, dim in cells(size)
        if variant.startswith("ibft")
    }
    floors = {f"extra GEMMs K={dim}": extra_gemms(size, dim) for dim in size.bottleneck_dims}
    timed = interleave({**steps, **floors}, rounds)
    samples = {name: timed[name] for name in steps}
    load = os.getloadavg()  # above the number of threads: others were at work
    flops = {name: step_flops(step, size) for name, step in steps.items() if name.startswith("ibft")}
    del steps
    return {
        "size": asdict(size),
        "relative_error": errors,
        "seconds": samples,
        "floor_seconds": {name: timed[name] for name in floors},
        "load_average_after_timing": list(load),
        "flops": flops,
        "memory_mib": {
            label(variant, dim): peak_memory(variant, size, dim, default_malloc)
            for variant, dim in cells(size)
            if memory
        },
    }


def step_flops(step: Step, size: Size) -> float:
    """What the mathematics of a step of IBModel needs."""
    lengths = np.full(size.rows, size.length)
    cost = ModelCost.of(step.model)
    labels = size.rows * round(size.length * size.label_share)
    return cost.flops(int(lengths.sum()), labels, cost.pairs(lengths)).model


def table(record: dict[str, Any]) -> str:
    """A record as a Markdown table; what the extra GEMMs take is added to the SFT step, the floor of an IB-FT step."""
    header = ["step", "seconds: median", "least", "real tokens/s", f"/ {BASELINE} (interval)", "/ ibft-sft (interval)"]
    memory = record["memory_mib"]
    if memory:
        header += ["peak above rest, MiB", f"/ {BASELINE}", "peak, MiB"]
    if any("peak_default_malloc" in mib for mib in memory.values()):
        header.append("peak under default malloc, MiB")
    lines = [header]
    above = {name: mib["peak"] - mib["rest"] for name, mib in memory.items()}
    tokens = record["size"]["rows"] * record["size"]["length"]
    sft = record["seconds"]["ibft-sft"]
    floors = {
        f"ibft-sft + {name}": [one + other for one, other in zip(sft, times, strict=True)]
        for name, times in record["floor_seconds"].items()
    }
    for name, times in (record["seconds"] | floors).items():
        lines.append([name, f"{statistics.median(times):.2f}", f"{min(times):.2f}"])
        lines[-1] += ["" if name in floors else f"{tokens / statistics.median(times):,.0f}"]
        lines[-1] += [str(ratio(times, record["seconds"][BASELINE])), str(ratio(times, sft))]
        if name in above:
            lines[-1] += [f"{above[name]:.0f}", f"{above[name] / max(above[BASELINE], 1):.2f}"]
            peaks = (memory[name].get(which) for which in ("peak", "peak_default_malloc"))
            lines[-1] += [f"{peak:.0f}" for peak in peaks if peak is not None]
        lines[-1] += [""] * (len(header) - len(lines[-1]))
    return "\n".join(markdown(lines))


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description="Time and memory of a step.")
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--rounds", type=int, default=10, help="timed steps of every variant (default: 10)")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch (default: 2)")
    parser.add_argument("--no-memory", action="store_true", help="time only")
    parser.add_argument("--record", metavar="FILE", help="write all that was measured, as JSON")
    parser.add_argument("--peak", metavar="CELL", help=argparse.SUPPRESS)  # only the peak memory of this process
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.peak:
        variant, size, bottleneck_dim = json.loads(options.peak)
        step = build(variant, Size(**size), bottleneck_dim)
        print(json.dumps(peak_of(step, step.release, repeats=3)))
        return
    memory = can_measure_memory() and not options.no_memory
    record = make_record(" ".join(["python -m benchmarks.step", *arguments]), options.size, options.rounds, memory)
    print(table(record))
    if options.record:
        write_record(options.record, record)


def make_record(command: str, size_name: str, rounds: int, memory: bool) -> dict[str, Any]:
    """Everything measured at that size, and where."""
    where = environment()  # first: the load of the machine is that without us
    measured = compare(SIZES[size_name], rounds, memory, default_malloc=size_name == "full")
    return {"suite": "step", "command": command, **where, **measured, "size": {"name": size_name, **measured["size"]}}


def _batch(size: Size) -> dict[str, Tensor]:
    """A batch as `ibft train` makes it: every row one document, whose prompt comes first."""
    tokens = np.random.default_rng(SEED).integers(0, size.vocabulary, (size.rows, size.length))
    is_label = np.arange(size.length) >= size.length - round(size.length * size.label_share)
    bins = [[Document(row, is_label, example_id)] for example_id, row in enumerate(tokens)]
    return collate(bins, pad_token_id=0, max_length=size.length, packing="best-fit")


if __name__ == "__main__":
    main()
