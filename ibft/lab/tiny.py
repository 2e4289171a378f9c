"""A tokenizer and a Llama small enough to train on a laptop, made on the spot: no download, the same every time."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from ibft.errors import InputError

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"  # ids 0, 1, 2


def build_tokenizer(
    texts: Iterable[str], *, vocab_size: int = 512, boundaries: str | None = None
) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on `texts`: any text survives encoding and decoding, and nothing is added to it.

    No token crosses from word to word, or, with `boundaries`, a match of that regular expression: what lies between two
    matches may then become one token, a whole line of a program for instance. It has at most `vocab_size` tokens, fewer
    if the texts have too few pairs to merge. InputError if `vocab_size` does not hold the 256 bytes and the three
    special tokens.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    smallest = len(alphabet) + 3
    if vocab_size < smallest:
        raise InputError(f"vocab_size must be at least {smallest} (256 bytes and 3 special tokens), not {vocab_size}.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = (
        pre_tokenizers.ByteLevel(add_prefix_space=False)
        if boundaries is None
        else pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(boundaries), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, bos_token=BOS, eos_token=EOS)


def build_llama(
    tokenizer: PreTrainedTokenizerFast,
    *,
    hidden_size: int = 128,
    num_layers: int = 4,
    num_heads: int = 4,
    max_length: int = 256,
    rope_theta: float = 10_000.0,
    seed: int = 0,
) -> LlamaForCausalLM:
    """A Llama with random float32 weights that depend on the arguments only; global random state is left alone.

    InputError if a size is not positive, or `hidden_size` does not give each head an even number of dimensions.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": hidden_size, "num_layers": num_layers, "num_heads": num_heads, "max_length": max_length}
    for name, size in sizes.items():
        if size < 1:
            raise InputError(f"{name} must be at least 1, not {size}.")
    if hidden_size % (2 * num_heads):
        raise InputError(f"hidden_size must be a multiple of 2 * num_heads ({2 * num_heads}), not {hidden_size}.")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        max_position_embeddings=max_length,
        rope_parameters={"rope_type": "default", "rope_theta": rope_theta},
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    # The CPU generator alone: torch.manual_seed would reseed GPUs too, and fork_rng does not give that back.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        return LlamaForCausalLM(config).float()


def save_base(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, path: str | Path) -> None:
    """Write both into a folder, as a base model for `ibft train --base_model path/to/folder`."""
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
