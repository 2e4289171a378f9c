"""A tokenizer whose tokens can be told by heart: one token a byte, its id the byte's value plus an offset."""

import re
from collections.abc import Callable
from typing import Any

import datasets
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

BOS, EOS, PAD, FIRST_BYTE = 0, 1, 2, 3
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_tokenizer(
    *, first_byte: int = FIRST_BYTE, bos: bool = True, eos: bool = True, puts_bos: bool = False
) -> PreTrainedTokenizerFast:
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    character = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    specials = {"<s>": BOS, "</s>": EOS, "<pad>": PAD}
    vocab = specials | {character[byte]: first_byte + byte for byte in range(256)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if puts_bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    named = {"bos_token": "<s>" if bos else None, "eos_token": "</s>" if eos else None, "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **named)


@pytest.fixture
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    return byte_tokenizer


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture
def make_rows() -> Callable[..., datasets.Dataset]:
    """Rows as `load_rows` gives them, from (prompt, response) pairs; ids far from 0..n-1 so that mix-ups show."""

    def make(*pairs: tuple[str, str]) -> datasets.Dataset:
        prompts, responses = zip(*pairs, strict=True)
        ids = [7 * index + 100 for index in range(len(pairs))]
        return datasets.Dataset.from_dict({"prompt": prompts, "response": responses, "example_id": ids})

    return make


@pytest.fixture
def chat_tokenizer(make_tokenizer) -> Callable[..., PreTrainedTokenizerFast]:
    """`chat_tokenizer(template)`: the byte tokenizer with a chat template, whose special tokens it knows."""

    def make(template: str = CHATML, **options: Any) -> PreTrainedTokenizerFast:
        tokenizer = make_tokenizer(**options)
        found = re.findall(r"<\|?[^\s<>'\"{}]+?\|?>|<｜[^<>]+?｜>", template)
        special = sorted({text for text in found if re.search(r"\||｜|turn", text)})
        tokenizer.add_special_tokens({"additional_special_tokens": special})
        tokenizer.chat_template = template
        return tokenizer

    return make
