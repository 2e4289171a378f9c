"""The tiny base model: lossless tokenizer, reproducible weights, loadable as any other model is."""

import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ibft.errors import InputError
from ibft.lab.tasks import generate_tasks
from ibft.lab.tiny import build_llama, build_tokenizer, save_base

TEXTS = [task.description + "\n" + task.program for task in generate_tasks(100, seed=0)]
AWKWARD = ["", " ", "\n\n\t ", "x ,y . it 's", "héllo ∑ 漢字 🙂", "\x00\x7f", "<eos> in a text", "  2 "]


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(TEXTS, vocab_size=400)


@pytest.mark.parametrize("text", [*AWKWARD, *TEXTS[:3]])
def test_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_and_size(tokenizer):
    assert len(tokenizer) == 400
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert not {0, 1, 2} & set(tokenizer.encode(TEXTS[0]))  # none is added
    assert len(tokenizer.encode(TEXTS[0])) < len(TEXTS[0]) / 2  # and merges were learnt


def test_tokenizer_is_the_same_in_another_process(tokenizer):
    code = (
        "from ibft.lab.tasks import generate_tasks; from ibft.lab.tiny import build_tokenizer\n"
        "texts = [task.description + '\\n' + task.program for task in generate_tasks(100, seed=0)]\n"
        "print(build_tokenizer(texts, vocab_size=400).backend_tokenizer.to_str())"
    )
    env = {**os.environ, "PYTHONHASHSEED": "7"}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == tokenizer.backend_tokenizer.to_str()


def test_vocabulary_too_small():
    with pytest.raises(InputError, match=r"at least 259 .*not 258"):
        build_tokenizer(TEXTS, vocab_size=258)
    assert len(build_tokenizer([], vocab_size=259)) == 259


def test_model_depends_on_seed_only_and_leaves_random_state_alone(tokenizer):
    torch.manual_seed(123)
    before = torch.get_rng_state()
    first = build_llama(tokenizer, hidden_size=32, num_layers=2, num_heads=2)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    again, other = (build_llama(tokenizer, hidden_size=32, num_layers=2, num_heads=2, seed=s) for s in (0, 1))
    for (name, weight), same, different in zip(
        first.named_parameters(), again.parameters(), other.parameters(), strict=True
    ):
        assert weight.dtype == torch.float32
        assert torch.equal(weight, same), name
        assert name.endswith("norm.weight") or not torch.equal(weight, different), name


def test_saved_folder_loads_through_the_auto_classes(tokenizer, tmp_path):
    model = build_llama(tokenizer, hidden_size=32, num_layers=2, num_heads=2, max_length=64).eval()
    save_base(model, tokenizer, tmp_path / "base")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    reader = AutoTokenizer.from_pretrained(tmp_path / "base")
    for text in AWKWARD + TEXTS[:3]:
        assert reader.encode(text) == tokenizer.encode(text)
        assert reader.decode(reader.encode(text)) == text
    assert (reader.pad_token, reader.bos_token, reader.eos_token) == ("<pad>", "<bos>", "<eos>")
    ids = torch.tensor([reader.encode(TEXTS[0])[:64]])
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=0)
    assert loaded.config.max_position_embeddings == 64
    assert loaded.generation_config.eos_token_id == reader.eos_token_id


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"hidden_size": 30, "num_heads": 4}, r"multiple of 2 \* num_heads \(8\), not 30"),
        ({"hidden_size": 12, "num_heads": 4}, "not 12"),
        ({"num_layers": 0}, "num_layers must be at least 1, not 0"),
    ],
)
def test_impossible_sizes(tokenizer, sizes, message):
    with pytest.raises(InputError, match=message):
        build_llama(tokenizer, **sizes)
