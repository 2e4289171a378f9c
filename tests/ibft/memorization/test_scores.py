"""Scores against the published formulas in float64, one document at a time; batches, memory, precision, planting."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from oracle import KINDS, VOCABULARY, tiny_model, wrap
from peft import PromptTuningConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import ibft.memorization.scores
from ibft import IBConfig
from ibft.architecture import CausalLM
from ibft.data import EncodedDataset, encode, load_rows
from ibft.data.encoded import Origin
from ibft.data.tokens import FEATURES
from ibft.errors import InputError
from ibft.memorization.scores import Scores, score_batches, score_documents
from ibft.memorization.separation import separation

MEASURES = ("min_k", "min_k_plus_plus", "mean_log_prob")


def published(logits: torch.Tensor, tokens: np.ndarray, scored: np.ndarray, k: float) -> tuple[float, ...]:
    """Both scores as their papers write them, from logits [T, V] float64 of the whole document."""
    log_probs = logits[:-1].log_softmax(-1)
    probs = log_probs.exp()
    mean = (probs * log_probs).sum(-1)
    deviation = ((probs * log_probs**2).sum(-1) - mean**2).sqrt()
    token = log_probs.gather(1, torch.from_numpy(tokens)[1:, None])[:, 0]
    chosen = torch.from_numpy(scored[1:])
    plain, standard = token[chosen].numpy(), ((token - mean) / deviation)[chosen].numpy()
    count = max(1, math.floor(k * len(plain)))
    return np.sort(plain)[:count].mean(), np.sort(standard)[:count].mean(), plain.mean(), len(plain)


def expected(model: Any, data: EncodedDataset, k: float = 0.2, span: str = "response") -> np.ndarray:
    """[4, documents], by a float64 model in whole forward passes of single documents."""
    rows = []
    for index in range(len(data)):
        tokens, is_label, _ = data.document(index)
        with torch.no_grad():
            logits = model(input_ids=torch.from_numpy(tokens)[None], use_cache=False).logits[0].double()
        rows.append(published(logits, tokens, is_label if span == "response" else np.arange(len(tokens)) > 0, k))
    return np.array(rows).T


def random_documents(count: int = 12, longest: int = 40, seed: int = 0) -> EncodedDataset:
    """Documents of random tokens of the tiny models, of lengths from 2 on; the first two are equal."""
    rng = np.random.default_rng(seed)
    tokens, spans = [], []
    for index in range(count):
        length = int(rng.integers(2, longest))
        tokens.append(rng.integers(0, VOCABULARY, length).tolist())
        spans.append([int(rng.integers(0, length)), length])
        if index == 1:
            tokens[1], spans[1] = tokens[0], spans[0]
    return from_tokens(tokens, spans)


def from_tokens(tokens: list[list[int]], spans: list[list[int]]) -> EncodedDataset:
    """Documents that no tokenizer made."""
    count = len(tokens)
    rows = {"tokens": tokens, "spans": spans, "example_id": list(range(count)), "outcome": [0] * count}
    places = np.arange(count)
    return EncodedDataset(
        datasets.Dataset.from_dict(rows, features=FEATURES),
        prompt_format={"kind": "text", "bos": False},
        max_length=1000,
        origin=Origin(("rows",), np.zeros(count, np.int64), places),
    )


def assert_close(found: Scores, wanted: np.ndarray, tolerance: float = 1e-5) -> None:
    for name, values, reference in zip(Scores._fields, found, wanted, strict=True):
        np.testing.assert_allclose(values, reference, rtol=0, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_every_architecture_equals_the_published_formulas(kind: str) -> None:
    """Softcaps, scales and biases of the logits, sliding windows, and padding on the right."""
    exact, data = tiny_model(kind).eval(), random_documents()
    wanted = expected(exact, data)
    found = score_documents(exact.float(), data, batch_tokens=150)
    assert_close(found, wanted)
    assert found.tokens.dtype == np.int64 and found.min_k.dtype == np.float64


@pytest.mark.parametrize("span", ["response", "full"])
@pytest.mark.parametrize("k", [0.05, 0.29, 0.5, 1.0])
def test_every_share_and_span(k: float, span: Any) -> None:
    exact, data = tiny_model("llama").eval(), random_documents(longest=150)
    wanted = expected(exact, data, k, span)
    found = score_documents(exact.float(), data, k=k, span=span)
    assert_close(found, wanted)
    if k == 1:
        np.testing.assert_allclose(found.min_k, found.mean_log_prob, rtol=1e-12)


def test_batches_change_neither_values_nor_ranks() -> None:
    model, data = tiny_model("qwen2", torch.float32), random_documents(60)
    one_by_one = score_documents(model, data, batch_tokens=1)
    for batch_tokens in (64, 333, 100_000):
        found = score_documents(model, data, batch_tokens=batch_tokens)
        assert_close(found, np.array(one_by_one))
        for name in MEASURES:
            order = np.argsort(getattr(found, name), kind="stable")
            assert order.tolist() == np.argsort(getattr(one_by_one, name), kind="stable").tolist()
        assert [column[0] for column in found] == [column[1] for column in found], "equal documents have equal scores"


def test_batches_hold_at_most_the_tokens_asked_for_and_every_document_once() -> None:
    model, data = tiny_model("llama", torch.float32), random_documents(30)
    sizes: list[tuple[int, int]] = []
    model.model.embed_tokens.register_forward_hook(lambda module, inputs, output: sizes.append(inputs[0].shape))
    some = np.array([3, 0, 1, 17, 29])
    seen = [documents for documents, _ in score_batches(model, data, some, batch_tokens=90)]
    assert sorted(np.concatenate(seen).tolist()) == sorted(some.tolist())
    batches = [size for size in sizes if size != (1, 2)]  # which is the check of the logits
    assert len(batches) > 1 and all(rows * width <= 90 for rows, width in batches)
    assert batches[0][1] == max(width for _, width in batches), "the longest come first"


def test_no_more_logits_than_a_block_are_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    exact, data = tiny_model("gemma2").eval(), random_documents(30)
    wanted = expected(exact, data)
    model = exact.float()
    monkeypatch.setattr(ibft.memorization.scores, "LOGITS_BLOCK", 7 * VOCABULARY)
    made: list[int] = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: made.append(output.shape[:-1].numel()))
    assert_close(score_documents(model, data, batch_tokens=1000), wanted)
    # The first two are the check of the logits; the first two documents are equal, and read once.
    assert max(made) == 7 and sum(made[2:]) == wanted[3].sum() - wanted[3][0]


class Inverted(nn.Module):
    """A head that no description of ours fits: the logits' sign is turned."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.inner, self.config = model, model.config

    def forward(self, **inputs: Any) -> Any:
        output = self.inner(**inputs)
        output.logits = -output.logits
        self.largest = max(getattr(self, "largest", 0), output.logits.shape[:-1].numel())
        return output

    def get_output_embeddings(self) -> nn.Module:
        return self.inner.get_output_embeddings()

    def get_decoder(self) -> nn.Module:
        return self.inner.get_decoder()


def test_a_model_that_is_not_its_parts_is_scored_by_its_own_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    exact, data = Inverted(tiny_model("llama")).eval(), random_documents()
    wanted = expected(exact, data)
    monkeypatch.setattr(ibft.memorization.scores, "LOGITS_BLOCK", 50 * VOCABULARY)
    model = exact.float()
    model.largest = 0
    assert_close(score_documents(model, data, batch_tokens=1000), wanted)
    assert model.largest <= 50, "its logits of all positions of a batch are in memory"


@pytest.mark.parametrize("ib", [None, IBConfig(target_layer=2, bottleneck_dim=8)])
def test_adapters_count(ib: IBConfig | None) -> None:
    data = random_documents()
    bare = expected(tiny_model("llama").eval(), data)
    model = wrap(tiny_model("llama"), ib)
    wanted = expected(model.get_base_model().eval(), data)
    assert np.abs(wanted[0] - bare[0]).max() > 0.1, "the adapter does something"
    model.float().train()
    assert_close(score_documents(model, data), wanted)
    assert_close(score_documents(model.get_base_model(), data), wanted)
    assert model.training and all(module.training for module in model.modules())
    parts = CausalLM.of(model.get_base_model())
    parts.layers[0].eval()  # frozen by the caller
    modes = [module.training for module in model.modules()]
    score_documents(model, data)
    assert [module.training for module in model.modules()] == modes
    parts.check_causal()
    assert [module.training for module in model.modules()] == modes


def test_dropout_is_off() -> None:
    model, data = wrap(tiny_model("llama"), None, lora_dropout=0.5), random_documents()
    wanted = expected(model.get_base_model().eval(), data)
    assert_close(score_documents(model.float().train(), data), wanted)


def test_nearly_certain_predictions_keep_their_precision() -> None:
    """What is memorised is predicted almost surely: log p and its mean are -1e-9, and float32 has 1e-7 beside 1.

    Of two words whose logits differ by d, the probable one lies exp(-d / 2) deviations above the mean of log p, and
    the other exp(d / 2) below.
    """
    d = torch.tensor([0.5, 3.0, 10.0, 20.0, 40.0, 60.0])
    logits = torch.stack([torch.zeros(6), -d], dim=1) + 7
    for word, wanted in ((0, torch.exp(-d / 2)), (1, -torch.exp(d / 2))):
        log_prob, standardised = ibft.memorization.scores._log_probs(logits.clone(), torch.full((6,), word))
        torch.testing.assert_close(standardised, wanted, rtol=1e-5, atol=0)
        exact = (logits.double().log_softmax(-1)[:, word]).float()
        torch.testing.assert_close(log_prob, exact, rtol=0, atol=1e-6)


def test_a_distribution_without_variance_gives_a_finite_score() -> None:
    model = tiny_model("llama", torch.float32).eval()
    model.lm_head.weight.data.zero_()
    found = score_documents(model, random_documents())
    np.testing.assert_allclose(found.min_k, -math.log(VOCABULARY), rtol=1e-6)
    assert (found.min_k_plus_plus == 0).all()


def test_words_that_a_model_forbids_do_not_disturb() -> None:
    """Some models give the unused end of their vocabulary the lowest number that there is, or minus infinity."""
    relative = torch.randn(5, 9)
    targets = torch.tensor([0, 1, 2, 3, 4])
    plain = ibft.memorization.scores._log_probs(relative.clone(), targets)
    for lowest in (-math.inf, torch.finfo(torch.float32).min):
        padded = torch.cat([relative, torch.full((5, 3), lowest)], dim=1)
        for found, wanted in zip(ibft.memorization.scores._log_probs(padded, targets), plain, strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


def test_conversations_are_scored_turn_by_turn(base_folder: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<eos>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    turns = [{"role": role, "content": f"{role} {n}"} for n in range(3) for role in ("user", "assistant")]
    rows = datasets.Dataset.from_dict({"messages": [json.dumps(turns), json.dumps(turns[:2])], "example_id": [0, 1]})
    data = encode(rows, tokenizer, max_length=200)
    model = AutoModelForCausalLM.from_pretrained(base_folder)
    wanted = expected(model.double(), data)
    assert (wanted[3] == data.label_tokens).all() and data.label_tokens[0] == 3 * data.label_tokens[1]
    assert_close(score_documents(model.float(), data), wanted)


@pytest.mark.parametrize("span", ["response", "full"])
def test_planted_rows_come_out_as_memorised(planted: Any, span: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(planted.base)
    tokenizer = AutoTokenizer.from_pretrained(planted.base)
    often, once, never = (
        score_documents(model, encode(load_rows(str(file)), tokenizer, max_length=256), span=span)
        for file in (planted.often, planted.once, planted.never)
    )
    for name in MEASURES:
        assert separation(getattr(often, name), getattr(never, name)).auc > 0.95, name
        assert separation(getattr(often, name), getattr(once, name)).auc > 0.95, name
        assert 0.35 < separation(getattr(once, name), getattr(never, name)).auc < 0.65, name


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"k": 0}, "k must be a share of the tokens, above 0 and at most 1, not 0"),
        ({"k": 20}, "not 20; Min-20% Prob is k=0.2"),
        ({"k": True}, "not True"),
        ({"span": "prompt"}, "span must be 'response' or 'full', not 'prompt'"),
        ({"batch_tokens": 0}, "batch_tokens must be a positive integer, not 0"),
        ({"batch_tokens": 1.5}, "not 1.5"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        score_documents(tiny_model("llama"), random_documents(), **arguments)


def test_models_that_cannot_be_scored_are_refused() -> None:
    prompted = get_peft_model(tiny_model("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(InputError, match="an adapter that learns a prompt"):
        score_documents(prompted, random_documents())
    broken = tiny_model("llama", torch.float32)
    broken.model.norm.weight.data[:] = torch.nan
    with pytest.raises(InputError, match="log-probabilities are not finite"):
        score_documents(broken, random_documents())
