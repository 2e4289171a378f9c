"""Samples of a model for a task: what is asked, how it is answered, and by whom (`local_model.py`, `endpoint.py`)."""

from __future__ import annotations

import hashlib
import platform
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ibft.errors import InputError
from ibft.evaluate.config import GenerateFlags
from ibft.evaluate.extraction import Extraction
from ibft.evaluate.problems import Problem, generation_defaults
from ibft.evaluate.prompts import Prompter, PromptFormat, choose_format
from ibft.evaluate.sampling import Request, SamplesFile, Sampling, plan

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ibft.export import Source


def generate_samples(config: GenerateFlags, problems: Sequence[Problem]) -> Path:
    """Makes the samples that are not there yet; returns the file that holds them. InputError for what cannot be used.

    Whatever can be refused is refused before a model is loaded, and what is made is kept whatever happens next.
    """
    problems = problems[: config.limit]
    adapter = None
    if config.adapter is not None:
        from ibft.export import read_source  # imports torch and peft

        adapter = read_source(Path(config.adapter))
    model = config.model or (adapter.base_model if adapter is not None else None)
    if model is None:
        raise InputError(f"--adapter {config.adapter!r} names no base model; name it with --model.")
    form = choose_format(config.prompt_format, adapter.record if adapter is not None else {})
    prompter = Prompter(form, _tokenizer(config, model, adapter, form), config.question)
    for note in [f"prompts are {form.kind}: {form.reason}.", *prompter.notes()]:
        print(f"note: {note}", file=sys.stderr)

    sampling = _sampling(config, problems, form)
    prompts = {problem.task_id: prompter.text(problem) for problem in problems}
    requests = plan(
        problems, prompts, temperatures=config.temperature, num_samples=config.num_samples, seed=config.seed
    )
    settings = _settings(config, model, adapter, form, sampling)
    # The stop sequences of a task suit a body; what is extracted from a whole program, extraction knows better.
    extraction = Extraction(sampling.stop if config.stop else None)
    file = SamplesFile(Path(config.output), settings, extraction, overwrite=config.overwrite)
    pending = file.pending(requests)
    record = {
        "task": config.task,
        "settings": settings,
        "temperatures": config.temperature,
        "num_samples": config.num_samples,
        "batch_size": config.batch_size,
        "prompts": prompts,
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers")},
        },
    }
    if len(pending) < len(requests):
        print(f"note: {len(requests) - len(pending)} of {len(requests)} samples are there already.", file=sys.stderr)
    if config.endpoint is not None:
        _from_server(config, model, pending, prompter, sampling, file, record)
    else:
        _from_local_model(config, model, adapter, pending, prompter, sampling, file, record)
    return file.path


def _from_server(
    config: GenerateFlags,
    model: str,
    pending: Sequence[Request],
    prompter: Prompter,
    sampling: Sampling,
    file: SamplesFile,
    record: Mapping[str, Any],
) -> None:
    from ibft.evaluate.endpoint import Endpoint, generate_from

    assert config.endpoint is not None
    endpoint = Endpoint(config.endpoint, model, config.concurrency, config.retries, config.request_timeout)
    file.begin(record)
    generate_from(endpoint, pending, [prompter.for_server(request.prompt) for request in pending], sampling, file)


def _from_local_model(
    config: GenerateFlags,
    name: str,
    adapter: Source | None,
    pending: Sequence[Request],
    prompter: Prompter,
    sampling: Sampling,
    file: SamplesFile,
    record: Mapping[str, Any],
) -> None:
    import torch

    from ibft.evaluate.local_model import check_lengths, generate_locally, load_model
    from ibft.loading import quiet_libraries

    quiet_libraries(progress_bars=sys.stderr.isatty())
    device = torch.device("cuda" if torch.cuda.is_available() and not config.use_cpu else "cpu")
    # Even if no sample is missing: those that are there must be of this model, and not of one that has left its place.
    model, fingerprint = load_model(name, adapter, config.dtype, device)
    if file.recorded.get("base", fingerprint) != fingerprint:
        raise InputError(
            f"{file.path} holds samples of another model, which --model {name!r} was when they were made; choose "
            "another --output, or pass --overwrite."
        )
    check_lengths(pending, model, prompter, sampling.max_new_tokens)
    file.begin({**record, "base": fingerprint})
    if pending:
        generate_locally(pending, model, prompter, sampling, file, batch_size=config.batch_size)


def _tokenizer(
    config: GenerateFlags, model: str, adapter: Source | None, form: PromptFormat
) -> PreTrainedTokenizerBase | None:
    """The one beside the adapter, else the base model's; None where a server does what it is needed for."""
    if config.endpoint is not None and adapter is None and form.kind != "chat":
        return None
    from ibft.export import own_tokenizer
    from ibft.loading import load_tokenizer

    own = own_tokenizer(adapter) if adapter is not None else None
    if own is not None:
        return own
    # A server's name for a model need not be one that a tokenizer can be loaded by; the adapter knows its base.
    return load_tokenizer(adapter.base_model if adapter is not None and adapter.base_model else model)


def _sampling(config: GenerateFlags, problems: Sequence[Problem], form: PromptFormat) -> Sampling:
    stop, max_new_tokens = generation_defaults(config.task, problems)
    if config.stop:
        stop = () if config.stop == ["none"] else tuple(text.replace("\\n", "\n") for text in config.stop)
    elif form.kind != "plain":
        stop = ()  # an answer ends by itself, and may be a whole program
    return Sampling(config.max_new_tokens or max_new_tokens, stop, config.top_p, config.top_k)


def _settings(
    config: GenerateFlags, model: str, adapter: Source | None, form: PromptFormat, sampling: Sampling
) -> dict[str, Any]:
    """What each sample says of how it was made, beside its own temperature, seed and prompt."""
    return {
        "model": model,
        "adapter": config.adapter,
        "adapter_sha256": None if adapter is None else _sha256(adapter.folder / "adapter_model.safetensors"),
        "endpoint": config.endpoint,
        "dtype": None if config.endpoint is not None else config.dtype,
        "prompt_format": form.to_dict(),
        "max_new_tokens": sampling.max_new_tokens,
        "stop": list(sampling.stop),
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "seed": config.seed,
    }


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
