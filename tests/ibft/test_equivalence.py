"""How a step is cut up changes nothing: packed or padded, one batch or many, one process or two, with noise on."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from oracle import VOCABULARY, assert_same_gradients, gradients, tiny_model, wrap
from torch import Tensor

from ibft import IBConfig, IBModel
from ibft.data import BatchPlan, Document, collate

MAX_LENGTH = 48
RNG = torch.tensor([11, 4])
TERMS = ("loss", "ce", "kl", "ce_ib")


def documents(count: int = 8) -> list[Document]:
    rng = np.random.default_rng(0)
    found = []
    for example in range(count):
        length = int(rng.integers(3, 15))
        is_label = np.arange(length) >= 1 + example % (length - 1)
        found.append(Document(rng.integers(0, VOCABULARY, length), is_label, 100 + example))
    return found


def run_step(model: IBModel, batches: Sequence[Sequence[Sequence[Document]]], packing: str) -> dict[str, float]:
    """One optimizer step's gradients, over micro-batches of rows of documents; the sums of its terms."""
    everything = [document for batch in batches for row in batch for document in row]
    num_labels = sum(int(d.is_label.sum()) for d in everything)
    num_tokens = sum(len(d.tokens) for d in everything)
    terms = dict.fromkeys(TERMS, 0.0)
    for batch in batches:
        tensors = collate([list(row) for row in batch], pad_token_id=0, max_length=MAX_LENGTH, packing=packing)  # type: ignore[arg-type]
        output = model(**tensors, num_items_in_batch=num_labels, num_kl_items_in_batch=num_tokens, noise_rng=RNG)
        output.loss.backward()
        for name in TERMS:
            terms[name] += output[name].item()
    return terms


def compare(ib: IBConfig, first: tuple[list, str], second: tuple[list, str], kind: str = "llama") -> None:
    model = wrap(tiny_model(kind), ib)
    expected = run_step(model, *first)
    expected_gradients = gradients(model)
    assert run_step(model, *second) == pytest.approx(expected, abs=1e-9)
    assert_same_gradients(gradients(model), expected_gradients, 1e-9)


@pytest.mark.parametrize("kl_tokens", ["all", "labels"])
@pytest.mark.parametrize("kind", ["llama", "qwen2-tied"])
def test_packed_equals_padded(kind: str, kl_tokens: str) -> None:
    ib = IBConfig(target_layer=2, bottleneck_dim=8, alpha=0.7, beta=0.3, kl_tokens=kl_tokens)
    docs = documents()
    packed = [[docs[:3], docs[3:5], docs[5:]]]
    compare(ib, (packed, "best-fit"), ([[[document] for document in docs]], "none"), kind)


@pytest.mark.parametrize("free_bits", [0.0, 2.0])
@pytest.mark.parametrize("kl_tokens", ["all", "labels"])
def test_one_batch_equals_accumulated_batches(kl_tokens: str, free_bits: float) -> None:
    ib = IBConfig(target_layer=3, bottleneck_dim=8, alpha=0.7, beta=0.3, kl_tokens=kl_tokens, free_bits=free_bits)
    docs = [[document] for document in documents()]
    accumulated = [docs[start : start + 2] for start in range(0, 8, 2)]
    compare(ib, ([docs], "none"), (accumulated, "none"))
    compare(ib, ([docs], "best-fit"), ([*accumulated, []], "best-fit"))  # the last is the dummy batch of an idle rank


def test_neither_order_nor_company_changes_a_documents_noise() -> None:
    """Without it, equality above could only hold with the noise off."""
    ib = IBConfig(target_layer=2, bottleneck_dim=8, alpha=0.7, beta=0.3)
    docs = documents()
    compare(ib, ([[docs[:2], docs[2:4]]], "best-fit"), ([[[docs[3]]], [docs[:1], docs[1:3]]], "best-fit"))


def test_different_noise_is_noticed() -> None:
    model = wrap(tiny_model("llama"), IBConfig(target_layer=2, bottleneck_dim=8, alpha=0.7, beta=0.3))
    docs = documents()
    batch = collate([docs[:3]], pad_token_id=0, max_length=MAX_LENGTH, packing="best-fit")
    moved = {**batch, "noise_rows": batch["noise_rows"] + 1}
    assert model(**batch, noise_rng=RNG).ce_ib != model(**moved, noise_rng=RNG).ce_ib
    assert model(**batch, noise_rng=RNG).ce_ib != model(**batch, noise_rng=RNG + 1).ce_ib


def test_documents_of_a_row_do_not_see_each_other() -> None:
    model = wrap(tiny_model("llama"), None)
    docs = documents()
    other = docs[0]._replace(tokens=(docs[0].tokens + 1) % VOCABULARY)

    def loss_of_second(first: Document) -> Tensor:
        batch = collate([[first, docs[1]]], pad_token_id=0, max_length=MAX_LENGTH, packing="best-fit")
        batch["labels"][:, : len(first.tokens)] = -100
        del batch["label_indices"]
        return model(**batch).loss

    assert loss_of_second(docs[0]) == loss_of_second(other)


def test_the_plans_counts_are_those_of_the_batches() -> None:
    docs = documents(20)
    lengths = np.array([len(d.tokens) for d in docs])
    plan = BatchPlan(lengths, max_length=MAX_LENGTH, rows_per_batch=2, accumulation=2, world_size=2, seed=0)
    for step in range(plan.total_steps(2)):
        indices = plan.documents(step)
        batches = [
            collate([[docs[i] for i in row] for row in bins], pad_token_id=0, max_length=MAX_LENGTH, packing="best-fit")
            for rank in range(2)
            for bins in plan.micro_batches(step, rank)
        ]
        assert sum(int(batch["token_mask"].sum()) for batch in batches) == lengths[indices].sum()
        labels = sum(int(docs[i].is_label.sum()) for i in indices)
        assert sum(batch["label_indices"].numel() for batch in batches) == labels


_WORKER = """
import sys, torch
from ibft import train
from ibft.arguments import parse_args
kept = {}
real = torch.nn.utils.clip_grad_norm_
def keep(parameters, norm):
    result = real(parameters, norm)
    kept.setdefault("gradients", []).append([p.grad.clone() for p in parameters])
    return result
torch.nn.utils.clip_grad_norm_ = keep
config, _ = parse_args(sys.argv[2:])
train.train(config)
import os
if os.environ.get("RANK", "0") == "0":
    torch.save(kept, sys.argv[1])
"""


@pytest.mark.parametrize("method", ["ib", "sft"])
def test_two_processes_equal_one(tmp_path: Path, base_folder: Path, tasks_file: Path, method: str) -> None:
    """The same steps through torchrun and DDP: gradients and terms, the ragged step with an idle rank included."""
    worker = tmp_path / "worker.py"
    worker.write_text(_WORKER)
    common = f"--base_model {base_folder} --dataset {tasks_file} --method {method} --max_length 128 --lora_dropout 0"
    common += " --bottleneck_dim 16 --lora_r 4 --logging_steps 1 --alpha 1 --num_train_epochs 1 --save_strategy no"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]

    for name, launcher, rows, accumulation in (("one", [sys.executable], 6, 1), ("two", two, 1, 3)):
        options = f"--output_dir {tmp_path / name} --per_device_train_batch_size {rows}"
        options += f" --gradient_accumulation_steps {accumulation}"
        command = [*launcher, str(worker), str(tmp_path / f"{name}.pt"), *common.split(), *options.split()]
        subprocess.run(command, env=environment, check=True, capture_output=True, text=True)

    one, two_ = (torch.load(tmp_path / f"{name}.pt")["gradients"] for name in ("one", "two"))
    assert len(one) == len(two_) >= 2
    for first, second in zip(one, two_, strict=True):
        for a, b in zip(first, second, strict=True):
            assert (a - b).abs().max() <= 1e-6
    records = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    for a, b in zip(*records, strict=True):
        for term in (*TERMS, "grad_norm", "tokens", "label_tokens"):
            assert a[term] == pytest.approx(b[term], abs=1e-5)
