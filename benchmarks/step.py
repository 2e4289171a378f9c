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
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import ibkernels
from benchmarks.eager import EagerBottleneck, ib_loss, sft_loss
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
from ibft.data.encode import Document
from ibft.data.packing import collate
from ibft.model import IBModel
from ibft.objective import IBConfig
from ibkernels import noise

BASELINE = "eager-sft"
VARIANTS = ("eager-sft", "eager-ib", "ibft-sft", "ibft-ib")
ALPHA, BETA = 0.2, 0.01
TOLERANCE = 1e-4  # of a float32 gradient, relative to its norm
SEED = 0


@dataclass(frozen=True)
class Size:
    """A Llama and its batch: `rows` documents of `length` tokens, the second half of each being labels."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocabulary: int
    rows: int
    length: int
    lora_rank: int
    target_layer: int
    bottleneck_dims: tuple[int, ...]


SIZES = {
    "toy": Size(32, 64, 2, 2, 256, 2, 32, 4, 1, (4, 8)),
    "full": Size(512, 1376, 8, 8, 32000, 2, 1024, 32, 5, (64, 256)),
}


@dataclass
class Step:
    """A model ready to train. `loss(rng)` is one forward pass, with the noise of `rng` or, with None, any noise."""

    model: nn.Module
    parameters: dict[str, nn.Parameter]  # the trainable ones, of the same names in the eager variant and in ours
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
    if variant not in VARIANTS:
        raise ValueError(f"the variant is {variant!r}; it must be one of {', '.join(VARIANTS)}.")
    base = _base_model(size, dtype)
    # Both LoRA factors random: with the usual zero in B, the gradient of A would be zero and its check empty.
    lora = LoraConfig(task_type="CAUSAL_LM", r=size.lora_rank, lora_alpha=size.lora_rank, lora_dropout=0.0)
    lora.target_modules, lora.init_lora_weights = "all-linear", False
    batch = _batch(size)
    layer = EagerBottleneck(size.hidden, bottleneck_dim).to(dtype)  # the last to draw, so that all models agree
    torch.manual_seed(SEED)
    if variant.startswith("ibft"):
        config = IBConfig(
            target_layer=size.target_layer, bottleneck_dim=bottleneck_dim, alpha=ALPHA, beta=BETA, sample=sample
        )
        model: Any = IBModel.from_base(base, lora, config if variant == "ibft-ib" else None)
        if variant == "ibft-ib":
            model.bottleneck.to(dtype).load_state_dict(layer.state_dict())
        named = dict(model.named_parameters())

        def loss(rng: Tensor | None) -> Tensor:
            return model(**batch, noise_rng=rng, return_stats=False).loss  # as the training loop calls it
    else:
        model = get_peft_model(base, lora)
        named = dict(model.named_parameters())
        head = base.get_output_embeddings().weight
        padded = {name: batch[name] for name in ("input_ids", "labels")}
        padded["attention_mask"] = torch.ones_like(batch["input_ids"])
        if variant == "eager-ib":
            named |= {f"bottleneck.{name}": parameter for name, parameter in layer.named_parameters()}
        rows = batch["noise_rows"].flatten()

        def loss(rng: Tensor | None) -> Tensor:
            if variant == "eager-sft":
                return sft_loss(model, padded)
            eps = None
            if not sample:
                eps = torch.zeros(1, dtype=dtype)
            elif rng is not None:
                eps = noise(rng, rows, bottleneck_dim).view(*batch["labels"].shape, bottleneck_dim)
            return ib_loss(model, layer, head, padded, target_layer=size.target_layer, alpha=ALPHA, beta=BETA, eps=eps)

    parameters = {name: parameter for name, parameter in named.items() if parameter.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-4, weight_decay=0.0, fused=True)
    return Step(model.train(), parameters, loss, optimizer)


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
    tokens, labels = size.rows * size.length, size.rows * size.length // 2
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


def peak_memory(variant: str, size_name: str, bottleneck_dim: int) -> dict[str, float]:
    """MiB resident at rest and at the peak of a step, and that peak under the default malloc; see README.md."""
    arguments = ["--peak", variant, "--size", size_name, "--bottleneck-dim", str(bottleneck_dim)]
    arguments += ["--threads", str(torch.get_num_threads())]
    pinned, default = (in_fresh_process("benchmarks.step", arguments, pinned_malloc=pin) for pin in (True, False))
    return {**pinned, "peak_default_malloc": default["peak"]}


def compare(size_name: str, rounds: int, memory: bool) -> dict[str, Any]:
    """The record's body: errors, all samples in seconds, ratios to the eager SFT step, peak memory."""
    size = SIZES[size_name]
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
    del steps
    return {
        "size": {"name": size_name, **asdict(size)},
        "relative_error": errors,
        "seconds": samples,
        "floor_seconds": {name: timed[name] for name in floors},
        "load_average_after_timing": list(load),
        "ratio": {name: ratio(times, samples[BASELINE])._asdict() for name, times in samples.items()},
        "memory_mib": {label(*cell): peak_memory(cell[0], size_name, cell[1]) for cell in cells(size) if memory},
    }


def table(record: dict[str, Any]) -> str:
    """A record as a Markdown table; what the extra GEMMs take is added to the SFT step, the floor of an IB-FT step."""
    header = ["step", "seconds: median", f"/ {BASELINE}: median (quartiles)", "/ ibft-sft: median (quartiles)"]
    header += ["seconds: least", f"/ {BASELINE}"]
    if record["memory_mib"]:
        header += ["peak above rest, MiB", f"/ {BASELINE}", "peak, MiB", "peak under default malloc, MiB"]
    lines = [header, ["---"] * len(header)]
    above = {name: mib["peak"] - mib["rest"] for name, mib in record["memory_mib"].items()}
    sft = record["seconds"]["ibft-sft"]
    floors = {
        f"ibft-sft + {name}": [one + other for one, other in zip(sft, times, strict=True)]
        for name, times in record["floor_seconds"].items()
    }
    for name, times in (record["seconds"] | floors).items():
        least = min(times) / min(record["seconds"][BASELINE])
        lines.append([name, f"{statistics.median(times):.2f}", str(ratio(times, record["seconds"][BASELINE]))])
        lines[-1].append(str(ratio(times, sft)))
        lines[-1] += [f"{min(times):.2f}", f"{least:.2f}"]
        if above and name not in above:
            lines[-1] += ["", "", "", ""]
        elif above:
            mib = record["memory_mib"][name]
            lines[-1] += [f"{above[name]:.0f}", f"{above[name] / max(above[BASELINE], 1):.2f}"]
            lines[-1] += [f"{mib['peak']:.0f}", f"{mib['peak_default_malloc']:.0f}"]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description="Time and memory of a step.")
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--rounds", type=int, default=10, help="timed steps of every variant (default: 10)")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch (default: 2)")
    parser.add_argument("--no-memory", action="store_true", help="time only")
    parser.add_argument("--record", metavar="FILE", help="write all that was measured, as JSON")
    parser.add_argument("--peak", choices=VARIANTS, help="only the peak memory of this variant, in this process")
    parser.add_argument("--bottleneck-dim", type=int, metavar="K", help="of --peak")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.peak:
        step = build(
            options.peak, SIZES[options.size], options.bottleneck_dim or SIZES[options.size].bottleneck_dims[0]
        )
        print(json.dumps(peak_of(step, step.release, repeats=3)))
        return
    where = environment()  # first: the load of the machine is that without us
    memory = can_measure_memory() and not options.no_memory
    measured = compare(options.size, options.rounds, memory)
    record = {"command": " ".join(["python -m benchmarks.step", *arguments]), **where, **measured}
    print(table(record))
    if options.record:
        write_record(options.record, record)


def _base_model(size: Size, dtype: torch.dtype) -> LlamaForCausalLM:
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        max_position_embeddings=size.length,
        use_cache=False,
    )
    return LlamaForCausalLM(config).to(dtype)


def _batch(size: Size) -> dict[str, Tensor]:
    """A batch as `ibft train` makes it: every row one document, the first half of it prompt."""
    tokens = np.random.default_rng(SEED).integers(0, size.vocabulary, (size.rows, size.length))
    is_label = np.arange(size.length) >= size.length // 2
    bins = [[Document(row, is_label, example_id)] for example_id, row in enumerate(tokens)]
    return collate(bins, pad_token_id=0, max_length=size.length, packing="best-fit")


if __name__ == "__main__":
    main()
