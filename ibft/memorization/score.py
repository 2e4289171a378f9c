"""`ibft memorization score`: the scores of a dataset's rows by a model, in a file; a run that was stopped goes on.

Whatever can be refused without the model's weights is refused before they are loaded.
"""

from __future__ import annotations

import hashlib
import itertools
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from tqdm import tqdm

from ibft.data import EncodedDataset
from ibft.data.memorized import SCHEMA, row_digests
from ibft.data.mixture import Part, encode_parts, load_sources
from ibft.errors import InputError
from ibft.evaluate.local_model import load_model
from ibft.export import own_tokenizer, read_source
from ibft.loading import check_positions, check_vocabulary, load_base_config, load_tokenizer, quiet_libraries
from ibft.memorization.config import ScoreFlags, check_output
from ibft.memorization.score_file import ScoreFile
from ibft.memorization.scores import Scores, score_batches

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ibft.export import Source


def score(config: ScoreFlags) -> Path:
    """Scores what is not scored yet, and returns the whole file. InputError for what cannot be used."""
    quiet_libraries(progress_bars=sys.stderr.isatty())
    path = Path(config.output)
    check_output(path, config.dataset)
    adapter = read_source(Path(config.adapter)) if config.adapter is not None else None
    name = config.model or (adapter.base_model if adapter is not None else None)
    if name is None:
        raise InputError(f"--adapter {config.adapter!r} names no base model; name it with --model.")
    tokenizer = (own_tokenizer(adapter) if adapter is not None else None) or load_tokenizer(name)
    settings = config.train_config(name)
    named = load_sources(settings)
    parts = [Part(dataset, source, np.arange(source.table.num_rows)) for dataset, source in named]
    data = encode_parts(settings, tokenizer, parts)
    print("\n".join(data.report.lines()), file=sys.stderr)
    check_positions(name, load_base_config(name), int(data.lengths.max()))
    digests = [row_digests(source) for _, source in named]
    content = "".join([data.fingerprint, *itertools.chain.from_iterable(digests)])
    identity = {
        "adapter": None if adapter is None else _adapter_digest(adapter),
        "data": hashlib.sha256(content.encode()).hexdigest(),
        "k": config.k,
        "span": config.span,
        "dtype": config.dtype,
    }
    file = ScoreFile(path, identity, len(data), overwrite=config.overwrite)

    device = torch.device("cuda" if torch.cuda.is_available() and not config.use_cpu else "cpu")
    try:
        model, fingerprint = load_model(name, adapter, config.dtype, device)
    except torch.OutOfMemoryError as error:
        raise InputError(
            f"The device has too little memory for {name!r} in {config.dtype}; --dtype bfloat16 needs half of what "
            "float32 needs, and --use_cpu takes the host's memory."
        ) from error
    check_vocabulary(name, model, tokenizer, [data])
    file.check_model(_model_digest(model, fingerprint))
    if file.finished:
        print(f"{path} holds these scores already; nothing was done.", file=sys.stderr)
        return path
    if file.done.any():
        print(f"note: {file.done.sum():,} of {len(data):,} rows are scored already.", file=sys.stderr)
    record = {
        "model": name,
        "adapter": config.adapter,
        "dataset": config.dataset,
        "split": config.dataset_split,
        "k": config.k,
        "span": config.span,
        "dtype": config.dtype,
        "prompt_format": data.prompt_format,
        "summary": data.report.lines(),
        "command": sys.argv,
        "versions": {
            "python": platform.python_version(),
            **{package: version(package) for package in ("torch", "transformers")},
        },
    }
    with file.begin():
        _score_pending(config, model, data, file)
        file.finish(_table(data, digests, file.scores), record)
    return path


def _score_pending(config: ScoreFlags, model: PreTrainedModel, data: EncodedDataset, file: ScoreFile) -> None:
    batches = score_batches(
        model, data, np.flatnonzero(~file.done), k=config.k, span=config.span, batch_tokens=config.batch_tokens
    )
    with tqdm(
        total=len(data),
        initial=int(file.done.sum()),
        desc="Scoring",
        unit="row",
        disable=not sys.stderr.isatty(),
    ) as bar:
        try:
            for documents, scores in batches:
                file.add(documents, scores)
                bar.update(len(documents))
        except torch.OutOfMemoryError as error:
            raise InputError(
                f"The device has too little memory for {config.batch_tokens:,} tokens at once; {file.done.sum():,} of "
                f"{len(data):,} rows are scored, and {config.again}, with a smaller --batch_tokens, goes on."
            ) from error


def _table(data: EncodedDataset, digests: Sequence[Sequence[str]], scores: Scores) -> pa.Table:
    """SCHEMA's columns, a line for each document and each row that gave none, in the order of the rows."""
    given = [set(data.source_rows[data.sources == source].tolist()) for source in range(len(digests))]
    absent = [
        (source, row) for source, rows in enumerate(digests) for row in range(len(rows)) if row not in given[source]
    ]
    sources = np.concatenate([data.sources, np.array([source for source, _ in absent], np.int64)])
    rows = np.concatenate([data.source_rows, np.array([row for _, row in absent], np.int64)])
    nulls = [None] * len(absent)
    columns: dict[str, list[Any]] = {
        "example_id": data.example_ids.tolist() + nulls,
        "source": [data.names[source] for source in sources],
        "row": rows.tolist(),
        "digest": [digests[source][row] for source, row in zip(sources, rows, strict=True)],
        **{name: column.tolist() + nulls for name, column in scores._asdict().items()},
    }
    order = np.lexsort((np.append(data.example_ids, np.zeros(len(absent), np.int64)), rows, sources))
    return pa.table([pa.array(columns[name], kind) for name, kind in zip(SCHEMA.names, SCHEMA.types, strict=True)],
                    schema=SCHEMA).take(pa.array(order))  # fmt: skip


def _model_digest(model: PreTrainedModel, fingerprint: str) -> str:
    """Of the configuration and every weight; the fingerprint alone reads the first weights of each parameter."""
    digest = hashlib.sha256(fingerprint.encode())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _adapter_digest(adapter: Source) -> str:
    """Of weights and settings: the same weights with another lora_alpha are another adapter."""
    digest = hashlib.sha256()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        digest.update(hashlib.sha256((adapter.folder / name).read_bytes()).digest())
    return digest.hexdigest()
