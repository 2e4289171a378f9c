"""Rows → token documents: `[BOS] prompt separator response EOS`, or a conversation as the chat template writes it.

The response and EOS are learnt, or the assistant's turns. The result lies in a memory-mapped Arrow file of its own,
never in a cache that could serve another run's tokens.
"""

from __future__ import annotations

import os
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import datasets
import numpy as np

from ibft.data.chat import ChatEncoder, ChatTemplate
from ibft.data.columns import SEPARATOR
from ibft.data.encoded import EncodedDataset, Origin
from ibft.data.tokens import FEATURES, TextEncoder
from ibft.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROGRESS_BAR_ROWS = 10_000  # fewer rows are tokenised before a bar would be read


def encode(
    rows: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    bos: Literal["auto", "yes", "no"] = "auto",
    overlong: Literal["shorten", "drop"] = "shorten",
    num_proc: int | None = None,
    separator: str = SEPARATOR,
    order: np.ndarray | None = None,
    origin: Origin | None = None,
) -> EncodedDataset:
    """Tokenise what `load_rows` gave; at most `max_length` tokens (>= 2) a document.

    Text: prompt and separator are tokenised apart from the response, without special tokens. EOS always closes a
    document, BOS opens it if `bos` says so ("auto": if the tokenizer does that by itself). An overlong document loses
    the start of its prompt (never BOS, never a token of the response) until it fits, with at least one token left
    before the response; where that is impossible, or with overlong="drop", the row is dropped. A row whose response is
    empty or white space is dropped too.

    Conversations (rows of `messages`) follow the tokenizer's chat template, which alone writes their special tokens:
    see `chat.py`. Every assistant's turn is learnt, through its end-of-turn token; EOS is appended where the template
    has none. An overlong one loses whole exchanges, the oldest first, but not a leading system message.

    `num_proc` > 1 tokenises in that many processes (a fast tokenizer uses every core without them), to the same
    documents. Tokens are written to the folder for temporary files (TMPDIR). With `order` [examples] int64, example i
    is row order[i], of which one may occur several times; it then replaces the rows' own `example_id`. InputError: a
    bad argument, a tokenizer without EOS, without a chat template for conversations, or without BOS for bos="yes"; a
    conversation that the template refuses; no row left.
    """
    if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 2:
        raise InputError(f"max_length must be an integer of at least 2, not {max_length!r}.")
    if bos not in ("auto", "yes", "no"):
        raise InputError(f"bos must be 'auto', 'yes' or 'no', not {bos!r}.")
    if overlong not in ("shorten", "drop"):
        raise InputError(f"overlong must be 'shorten' or 'drop', not {overlong!r}.")
    if num_proc is not None and (isinstance(num_proc, bool) or not isinstance(num_proc, int) or num_proc < 1):
        raise InputError(f"num_proc must be a positive integer or None, not {num_proc!r}.")
    if len(rows) == 0:
        raise InputError("There are no rows to encode; at least one is needed.")
    name = tokenizer.name_or_path or type(tokenizer).__name__
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"The tokenizer {name!r} has no EOS token, so the model could never learn to stop. Use a tokenizer that "
            "has one, or set tokenizer.eos_token to a token of its vocabulary and save it with the base model."
        )
    if origin is None:
        origin = Origin(("the dataset",), np.zeros(len(rows), np.int64), np.asarray(rows["example_id"]))
    encoder: TextEncoder | ChatEncoder
    prompt_format: dict[str, Any]
    if "messages" in rows.column_names:
        template = ChatTemplate(tokenizer)
        _check_template_bos(template, bos)
        encoder = ChatEncoder(template, max_length, overlong, origin.names)
        rows = rows.add_column("source", origin.sources).add_column("source_row", origin.source_rows)
        prompt_format = {"kind": "chat", "separator": None}
    else:
        with_bos = _puts_bos(tokenizer, bos, name)
        encoder = TextEncoder(tokenizer, with_bos, max_length, overlong, separator)
        prompt_format = {"kind": "text", "separator": separator, "bos": with_bos, "eos": True}
    # The file is gone once it is mapped, so that no end of the process, kill -9 included, leaves it behind. (NFS keeps
    # it until it is closed, and refuses to remove the folder.)
    try:
        with tempfile.TemporaryDirectory(prefix="ibft-tokens-", ignore_cleanup_errors=True) as folder:
            dataset = _map(rows, encoder, num_proc, Path(folder) / "tokens.arrow")
    except OSError as error:
        raise InputError(
            f"The tokens cannot be written to {tempfile.gettempdir()}, the folder for temporary files: "
            f"{error.strerror or error}. TMPDIR names another one, with more room."
        ) from error
    if isinstance(encoder, ChatEncoder):  # after the rows, whose refusals name the row
        prompt_format |= encoder.template.description
    return EncodedDataset(dataset, prompt_format=prompt_format, max_length=max_length, order=order, origin=origin)


def _check_template_bos(template: ChatTemplate, bos: str) -> None:
    if bos != "auto" and (bos == "yes") != (writes := template.description["bos"]):
        does = "begins conversations with BOS" if writes else "begins no conversation with BOS"
        raise InputError(f"--bos {bos}: the chat template decides, and this one {does}; use --bos auto.")


def _puts_bos(tokenizer: PreTrainedTokenizerBase, bos: str, name: str) -> bool:
    if bos == "yes" and tokenizer.bos_token_id is None:
        raise InputError(f"bos='yes' needs a tokenizer with a BOS token, and {name!r} has none; use 'auto' or 'no'.")
    if bos != "auto":
        return bos == "yes"
    return tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


def _map(
    rows: datasets.Dataset, encoder: TextEncoder | ChatEncoder, num_proc: int | None, file: Path
) -> datasets.Dataset:
    processes = min(num_proc or 1, len(rows))
    with _progress_bar(len(rows) >= PROGRESS_BAR_ROWS), _tokenizer_threads(processes == 1):
        return rows.map(
            encoder,
            batched=True,
            remove_columns=rows.column_names,
            features=FEATURES,
            num_proc=processes if processes > 1 else None,
            cache_file_name=str(file),  # in a fresh folder, so that nothing is ever taken from a cache
            new_fingerprint=uuid.uuid4().hex,  # otherwise the tokenizer is pickled to compute one
            desc="Tokenising",
        )


@contextmanager
def _progress_bar(wanted: bool) -> Iterator[None]:
    if wanted or datasets.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()


@contextmanager
def _tokenizer_threads(wanted: bool) -> Iterator[None]:
    """Threads of the tokenizers library do not survive a fork: off while there are worker processes, or it warns."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    if not wanted:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is not None:
            os.environ["TOKENIZERS_PARALLELISM"] = before
        elif not wanted:
            del os.environ["TOKENIZERS_PARALLELISM"]
