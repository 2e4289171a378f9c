import random
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ibft.data import BatchPlan, Document, collate, encode, load_rows
from ibft.errors import InputError

PAD = 2


def origen_like_lengths(count: int, seed: int = 0) -> np.ndarray:
    """Few short documents, a long tail, some cut at max_length: about what tokenised OriGen rows look like at 2048."""
    lengths = np.random.default_rng(seed).lognormal(mean=6.2, sigma=0.6, size=count)
    return np.clip(lengths.astype(np.int64), 16, 2048)


def plan(lengths, **changes) -> BatchPlan:
    settings = {"max_length": 64, "rows_per_batch": 2, "accumulation": 2, "world_size": 1, "seed": 5}
    return BatchPlan(np.asarray(lengths), **{**settings, **changes})


def contents(bins: list[np.ndarray]) -> list[list[int]]:
    return [documents.tolist() for documents in bins]


def random_lengths(rng: random.Random) -> list[int]:
    return [rng.randint(1, 64) for _ in range(rng.randint(1, 120))]


def naive_best_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    """The lengths in each bin, by looking at every open bin for every document."""
    bins: list[list[int]] = []
    for length in sorted(lengths, reverse=True):
        room, chosen = min(
            ((capacity - sum(held), held) for held in bins if capacity - sum(held) >= length),
            key=lambda candidate: candidate[0],
            default=(None, None),
        )
        if room is None:
            bins.append([length])
        else:
            chosen.append(length)
    return bins


@pytest.mark.parametrize("packing", ["best-fit", "none"])
@pytest.mark.parametrize("seed", range(20))
def test_bins_hold_every_document_once_and_fit(seed: int, packing) -> None:
    lengths = random_lengths(random.Random(seed))
    for epoch in range(3):
        bins = plan(lengths, packing=packing, seed=seed).bins(epoch)
        assert sorted(np.concatenate(bins).tolist()) == list(range(len(lengths)))
        assert all(1 <= sum(lengths[i] for i in documents) <= 64 for documents in bins)
        if packing == "none":
            assert all(len(documents) == 1 for documents in bins)


@pytest.mark.parametrize("seed", range(20))
def test_best_fit_equals_the_naive_search(seed: int) -> None:
    lengths = random_lengths(random.Random(seed))
    found = plan(lengths).bins(0)
    # Which of several equally full bins takes a document is free, so compare how full the bins become.
    full = sorted(sum(lengths[i] for i in documents) for documents in found)
    assert full == sorted(map(sum, naive_best_fit(lengths, 64)))


def test_best_fit_beats_next_fit_on_lengths_like_origen() -> None:
    lengths = origen_like_lengths(5000)
    next_fit_bins, room = 0, 0
    for length in lengths:
        if length > room:
            next_fit_bins, room = next_fit_bins + 1, 2048
        room -= length
    next_fit = lengths.sum() / (next_fit_bins * 2048)
    packed = plan(lengths, max_length=2048)
    bins = packed.bins(0)
    assert packed.efficiency(0) == pytest.approx(lengths.sum() / (len(bins) * 2048))
    assert packed.efficiency(0) > 0.99 > 0.9 > next_fit
    unpacked = plan(lengths, max_length=2048, packing="none")
    assert unpacked.efficiency(0) == pytest.approx(lengths.mean() / 2048)


def test_order_depends_on_seed_and_epoch_and_nothing_else() -> None:
    lengths = origen_like_lengths(400)
    for packing in ("best-fit", "none"):
        common = {"max_length": 2048, "packing": packing}
        base = contents(plan(lengths, **common).bins(1))
        for dealt in ({"world_size": 4}, {"accumulation": 5}, {"rows_per_batch": 7}):
            assert contents(plan(lengths, **common, **dealt).bins(1)) == base
        again = plan(lengths, **common)
        again.bins(0), again.bins(7)
        assert contents(again.bins(1)) == base
        others = [contents(plan(lengths, **common).bins(0)), contents(plan(lengths, **common, seed=6).bins(1))]
        for other in others:
            assert other != base
            assert sorted(map(sorted, other)) != sorted(map(sorted, base)) or packing == "none"  # new neighbours, too
        # The order is shuffled, not sorted by length: neighbours rise about as often as they fall.
        longest = [max(lengths[i] for i in documents) for documents in base]
        rises = sum(a < b for a, b in pairwise(longest))
        falls = sum(a > b for a, b in pairwise(longest))
        assert 0.7 < rises / falls < 1.4


def test_order_is_the_same_on_every_machine_and_version() -> None:
    lengths = [5, 60, 30, 30, 4, 64, 12, 12, 12, 33]
    assert contents(plan(lengths, seed=2**40 + 1).bins(3)) == [[9, 3], [5], [6], [2, 8, 7, 0], [1, 4]]
    assert contents(plan(lengths, seed=2**40 + 1, packing="none").bins(3)) == [
        [0],
        [8],
        [3],
        [7],
        [9],
        [6],
        [5],
        [1],
        [2],
        [4],
    ]


def test_shuffle_is_uniform() -> None:
    firsts = Counter(int(plan([1] * 8, packing="none", seed=seed).bins(0)[0][0]) for seed in range(4000))
    assert len(firsts) == 8 and all(400 < count < 600 for count in firsts.values())  # 500 expected, sd 21
    pairs = Counter(tuple(sorted(plan([32] * 4, seed=s).bins(0)[0].tolist())) for s in range(3000))
    assert len(pairs) == 6 and all(400 < count < 600 for count in pairs.values())  # equal lengths meet at random


@pytest.mark.parametrize("seed", range(30))
def test_ranks_and_micro_batches_share_out_every_bin_once(seed: int) -> None:
    rng = random.Random(seed)
    lengths = random_lengths(rng)
    packing = rng.choice(["best-fit", "none"])
    dealt = {name: rng.randint(1, 4) for name in ("world_size", "accumulation", "rows_per_batch")}
    batches = plan(lengths, packing=packing, seed=seed, **dealt)
    per_step = dealt["world_size"] * dealt["accumulation"] * dealt["rows_per_batch"]
    seen: dict[int, list[list[int]]] = {0: [], 1: []}
    for step in range(2 * batches.steps_in_epoch(0)):
        epoch, _ = batches.locate(step)
        ranks = [batches.micro_batches(step, rank) for rank in range(dealt["world_size"])]
        bins = [contents([b for micro_batch in rank for b in micro_batch]) for rank in ranks]
        in_order = [documents for rank in bins for documents in rank]
        seen[epoch] += in_order
        # As few micro-batches as the fullest rank needs, the same number on every rank, none too large.
        needed = -(-max(map(len, bins)) // dealt["rows_per_batch"])
        assert {len(rank) for rank in ranks} == {needed}
        assert 1 <= needed <= dealt["accumulation"]
        assert all(len(micro_batch) <= dealt["rows_per_batch"] for rank in ranks for micro_batch in rank)
        assert max(map(len, bins)) - min(map(len, bins)) <= 1  # the remainder is spread over the ranks first
        if len(in_order) == per_step:
            assert all(len(micro_batch) == dealt["rows_per_batch"] for rank in ranks for micro_batch in rank)
    for epoch in (0, 1):
        assert seen[epoch] == contents(batches.bins(epoch))  # all ranks together: the one-process order


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 12])
def test_a_step_holds_the_same_bins_however_it_is_dealt_out(world_size: int) -> None:
    lengths = np.arange(1, 51)
    single = plan(lengths, packing="none", rows_per_batch=12, accumulation=1)
    many = plan(lengths, packing="none", rows_per_batch=1, accumulation=12 // world_size, world_size=world_size)
    assert single.steps_in_epoch(0) == many.steps_in_epoch(0) == 5
    for step in range(10):
        ranks = [many.micro_batches(step, rank) for rank in range(world_size)]
        assert contents([b for rank in ranks for micro in rank for b in micro]) == contents(
            single.micro_batches(step, 0)[0]
        )


def test_ragged_last_step_gives_empty_micro_batches_where_there_is_nothing_left() -> None:
    batches = plan([1] * 11, packing="none", rows_per_batch=1, accumulation=2, world_size=4)
    assert batches.steps_in_epoch(0) == 2
    sizes = [[len(micro) for micro in batches.micro_batches(1, rank)] for rank in range(4)]
    assert sizes == [[1], [1], [1], [0]]
    batches = plan([1] * 13, packing="none", rows_per_batch=1, accumulation=2, world_size=4)
    assert [[len(micro) for micro in batches.micro_batches(1, rank)] for rank in range(4)] == [
        [1, 1],
        [1, 0],
        [1, 0],
        [1, 0],
    ]


def test_steps_of_a_run() -> None:
    batches = plan([40] * 37, rows_per_batch=2, accumulation=2, world_size=1)  # 37 bins, 10 steps an epoch
    assert [batches.steps_in_epoch(epoch) for epoch in range(3)] == [10, 10, 10]
    assert [batches.total_steps(n) for n in (1, 3, 0.5, 0.31, 2.05, 1e-9)] == [10, 30, 5, 4, 21, 1]
    # 0.07 * 100 is a little more than 7 in floating point, which must not cost a step.
    assert plan([64] * 400).total_steps(0.07) == 7
    assert [batches.locate(step) for step in (0, 9, 10, 29)] == [(0, 0), (0, 9), (1, 0), (2, 9)]
    assert len(batches.micro_batches(9, 0)) == 1 and len(batches.micro_batches(10, 0)) == 2


@pytest.mark.parametrize("seed", range(5))
def test_every_epoch_has_as_many_bins(seed: int) -> None:
    batches = plan(origen_like_lengths(500, seed), max_length=2048, seed=seed)
    assert len({len(batches.bins(epoch)) for epoch in range(6)}) == 1


def test_resuming_needs_only_the_step() -> None:
    lengths = origen_like_lengths(60)
    whole, resumed = plan(lengths, max_length=2048), plan(lengths, max_length=2048)
    steps = whole.total_steps(2)
    expected = [[contents(micro) for micro in whole.micro_batches(step, 0)] for step in range(steps)]
    for step in reversed(range(steps)):
        assert [contents(micro) for micro in resumed.micro_batches(step, 0)] == expected[step]


def test_plan_refuses_lengths_that_it_cannot_pack() -> None:
    with pytest.raises(InputError, match="Document 1 has 65 tokens; accepted are 1 to max_length 64"):
        plan([64, 65])
    with pytest.raises(InputError, match="Document 2 has 0 tokens"):
        plan([64, 1, 0])
    with pytest.raises(InputError, match="at least one document"):
        plan(np.zeros(0, np.int64))


def test_plan_is_unmoved_by_what_its_caller_does_to_lengths() -> None:
    lengths = np.array([10, 20, 30])
    batches = plan(lengths)
    before = contents(batches.bins(0))
    lengths[:] = 64
    batches.bins(1)
    assert contents(batches.bins(0)) == before


def random_documents(rng: random.Random, rows: int, most: int) -> list[list[Document]]:
    bins = []
    for _ in range(rows):
        documents = []
        for _ in range(rng.randint(1, most)):
            length = rng.randint(2, 9)
            tokens = np.array([rng.randint(3, 99) for _ in range(length)])
            is_label = np.array([rng.random() < 0.5 for _ in range(length - 1)] + [True])
            documents.append(Document(tokens, is_label, rng.randint(0, 2**33)))
        bins.append(documents)
    return bins


@pytest.mark.parametrize("seed", range(25))
def test_collate_equals_the_token_by_token_construction(seed: int) -> None:
    rng = random.Random(seed)
    packing = rng.choice(["best-fit", "none"])
    bins = random_documents(rng, rng.randint(1, 4), 1 if packing == "none" else 4)
    batch = collate(bins, pad_token_id=PAD, max_length=64, packing=packing)
    longest = max(sum(len(document.tokens) for document in row) for row in bins)
    expected: dict[str, list] = {name: [] for name in ("input_ids", "labels", "position_ids", "mask", "noise", "next")}
    for row in bins:
        cells = []
        for document in row:
            for position, token in enumerate(document.tokens.tolist()):
                label = token if document.is_label[position] and position > 0 else -100
                noise = (document.example_id * 64 + position) % 4294967296
                cells.append((token, label, position, True, noise))
        cells += [(PAD, -100, position, False, 0) for position in range(longest - len(cells))]
        for name, column in zip(expected, zip(*cells, strict=True), strict=False):
            expected[name].append(list(column))
    for b, row in enumerate(expected["labels"]):
        expected["next"] += [b * longest + t for t in range(longest - 1) if row[t + 1] != -100]
    found = [batch[name] for name in ("input_ids", "labels", "position_ids", "token_mask", "noise_rows")]
    assert [tensor.tolist() for tensor in [*found, batch["label_indices"]]] == list(expected.values())
    assert len(batch["label_indices"]) == sum(int(d.is_label[1:].sum()) for row in bins for d in row)
    if packing == "none":
        assert batch["attention_mask"].tolist() == [[int(real) for real in row] for row in expected["mask"]]
    assert ("attention_mask" in batch) == (packing == "none")
    assert {name: tensor.dtype for name, tensor in batch.items()} == {
        name: torch.bool if name == "token_mask" else torch.int64 for name in batch
    }


@pytest.mark.parametrize("packing", ["best-fit", "none"])
def test_dummy_batch_has_no_real_token(packing) -> None:
    batch = collate([], pad_token_id=PAD, max_length=64, packing=packing)
    assert batch["input_ids"].tolist() == [[PAD]] and batch["labels"].tolist() == [[-100]]
    assert batch["token_mask"].tolist() == [[False]] and batch["position_ids"].tolist() == [[0]]
    assert batch["noise_rows"].tolist() == [[0]]
    assert batch["label_indices"].shape == (0,) and batch["label_indices"].dtype == torch.int64
    assert ("attention_mask" in batch) == (packing == "none")
    if packing == "none":
        assert batch["attention_mask"].tolist() == [[1]]


def test_noise_rows_name_the_token_whatever_row_it_lies_in() -> None:
    documents = [document for row in random_documents(random.Random(1), 5, 3) for document in row]
    alone = collate([[d] for d in documents], pad_token_id=PAD, max_length=200, packing="none")
    together = collate([documents], pad_token_id=PAD, max_length=200, packing="best-fit")
    assert torch.equal(alone["noise_rows"][alone["token_mask"]], together["noise_rows"][together["token_mask"]])
    assert torch.equal(alone["input_ids"][alone["token_mask"]], together["input_ids"][together["token_mask"]])


def test_collate_refuses_what_no_plan_gives() -> None:
    document = Document(np.arange(5), np.arange(5) >= 2, 0)
    with pytest.raises(ValueError, match="row of 10 tokens is longer than max_length 9"):
        collate([[document, document]], pad_token_id=PAD, max_length=9, packing="best-fit")
    with pytest.raises(ValueError, match="one document a row"):
        collate([[document, document]], pad_token_id=PAD, max_length=64, packing="none")


@pytest.mark.parametrize("relative", ["mbpp/mbpp.jsonl", "rtllm/rtllm_train.jsonl"])
def test_real_rows_from_file_to_batches(test_data, tokenizer, relative) -> None:
    encoded = encode(load_rows(str(test_data(relative))), tokenizer, max_length=1024)
    batches = BatchPlan(
        encoded.lengths, max_length=1024, rows_per_batch=4, accumulation=2, world_size=2, packing="best-fit", seed=0
    )
    labels = tokens = 0
    seen: list[int] = []
    for step in range(batches.steps_in_epoch(0)):
        for rank in range(2):
            for bins in batches.micro_batches(step, rank):
                documents = [[encoded.document(i) for i in indices] for indices in bins]
                batch = collate(documents, pad_token_id=PAD, max_length=1024, packing="best-fit")
                labels += len(batch["label_indices"])
                tokens += int(batch["token_mask"].sum())
                seen += batch["noise_rows"][batch["token_mask"]].tolist()
    assert (tokens, labels) == (encoded.report.tokens, encoded.report.label_tokens)
    assert len(set(seen)) == tokens  # no two tokens of an epoch share their noise


def test_transformers_isolates_the_documents_of_a_packed_batch() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config).eval()
    bins = random_documents(random.Random(0), 3, 4)
    batch = collate(bins, pad_token_id=PAD, max_length=64, packing="best-fit")
    with torch.no_grad():
        packed = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        for row, documents in enumerate(bins):
            start = 0
            for document in documents:
                alone = model(torch.from_numpy(document.tokens)[None], use_cache=False).logits[0]
                torch.testing.assert_close(packed[row, start : start + len(alone)], alone, rtol=0, atol=1e-5)
                start += len(alone)
