"""`ibft export`: a run's adapter as others use it, alone or merged into its base model, and on the Hub if asked.

Whatever can be refused is refused before a model is loaded; the output folder appears whole or not at all.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ibft.config_file import read_json_object
from ibft.errors import InputError
from ibft.flags import NOT_EMPTY, REQUIRED, check_fields, flag, parse_flags
from ibft.loading import fingerprint, load_base_model, load_tokenizer, quiet_libraries
from ibft.model_card import CARD_NAME, is_ours, may_replace, render_card
from ibft.run_folder import CHECKPOINT, RECORD_NAME, refusal, write_json

_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"
# What a base model can have been trained in: `ibft train --dtype`.
TRAINING_DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """The flags of `ibft export`."""

    adapter: str = flag(
        "export", REQUIRED, "folder that `ibft train` wrote, or a checkpoint in it", NOT_EMPTY, path=True
    )
    output_dir: str = flag("export", REQUIRED, "folder to write", NOT_EMPTY, path=True)
    merge: bool = flag("export", False, "write a whole model, the adapter merged in; else the adapter alone")
    base_model: str | None = flag(
        "export", None, "Hub name or folder; if not given, the one trained on", NOT_EMPTY, path=True
    )
    allow_other_base: bool = flag("export", False, "merge into a base model that is not the one trained on")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = flag(
        "export", "auto", "of the merged weights; auto: that of the base model's file"
    )
    overwrite: bool = flag("export", False, "replace what an earlier export left in output_dir")
    push_to_hub: str | None = flag("Hub", None, "NAMESPACE/NAME to upload to, with the token in HF_TOKEN", NOT_EMPTY)
    private: bool = flag("Hub", False, "make that repository a private one")
    revision: str | None = flag("Hub", None, "branch to upload to, made if there is none; main if not given", NOT_EMPTY)
    debug: bool = flag("export", False, "show the traceback of an error")

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.merge and (self.dtype != "auto" or self.allow_other_base):
            name = "allow_other_base" if self.allow_other_base else f"dtype {self.dtype}"
            raise InputError(f"--{name} needs --merge; without it no weights are merged.")
        if self.push_to_hub is None and (self.private or self.revision is not None):
            name = "private" if self.private else f"revision {self.revision}"
            raise InputError(f"--{name} needs --push_to_hub NAMESPACE/NAME; without it nothing is uploaded.")
        if self.push_to_hub is not None:
            _check_repository(self.push_to_hub)


@dataclass(frozen=True)
class Source:
    """An adapter's folder, read: PEFT's configuration, and the record of the run, {} where ibft did not train it."""

    folder: Path
    settings: dict[str, Any]
    record: dict[str, Any]

    @property
    def base_model(self) -> str | None:
        return self.settings.get("base_model_name_or_path") or self.record.get("config", {}).get("base_model")


def main(argv: Sequence[str]) -> None:
    """Parses the command line and exports."""
    description = "Make a run's adapter ready for others: clean or merged, locally or on the Hub."
    export(parse_flags(ExportConfig, argv, "ibft export", description))


def export(config: ExportConfig) -> Path:
    """Writes the folder that the configuration asks for, uploads it if asked, and returns its path.

    Raises InputError for what is not there or does not fit, and when the Hub cannot be reached or refuses: by then the
    folder is written, and stays.
    """
    quiet_libraries(progress_bars=sys.stderr.isatty())
    source = read_source(Path(config.adapter))
    base_model = config.base_model or source.base_model
    output = Path(config.output_dir)
    try:
        _check_output(output, [source.folder, *([Path(base_model)] if base_model else [])], config.overwrite)
    except OSError as error:
        raise InputError(f"output_dir {output} cannot be written: {error.strerror}.") from error
    token = _token() if config.push_to_hub is not None else None
    if config.push_to_hub is not None and not config.merge and Path(base_model or "").is_absolute():
        print(f"note: {_CONFIG} will tell others {base_model!r}; --base_model gives a name on the Hub in its place.")

    target = output.resolve()  # a link stays, and what it points to is written
    partial = target.with_name(f".{target.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        if config.merge:
            _write_merged(source, base_model, config, partial)
        else:
            _write_adapter(source, config.base_model, partial)
        _put_in_place(partial, target)
    except Exception as error:
        if isinstance(error, InputError) or (reason := refusal(error, target.parent)) is None:
            raise
        raise InputError(f"output_dir {output} cannot be written: {reason}.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"{'merged model' if config.merge else 'adapter'} written to {output}")
    if config.push_to_hub is not None:
        _push(output, config, token)
    return output


def read_source(folder: Path) -> Source:
    """What an adapter's folder holds, without its weights. InputError if it is none, or none of LoRA."""
    if not folder.is_dir():
        raise InputError(
            f"--adapter {str(folder)!r} is not a folder; name the output_dir of a run, or a checkpoint in it."
        )
    for name in (_CONFIG, _WEIGHTS):
        if (folder / name).is_file():
            continue
        newest = sorted(path.name for path in folder.glob("checkpoint-*") if (path / _CONFIG).is_file())
        hint = f" The run has not finished; its checkpoints are {', '.join(newest)}." if newest else ""
        raise InputError(f"--adapter {str(folder)!r} holds no {name}, so it is no adapter.{hint}")
    try:
        with safe_open(folder / _WEIGHTS, "pt") as file:
            names = list(file.keys())
    except (OSError, SafetensorError) as error:
        raise InputError(f"{folder / _WEIGHTS} cannot be read: {error}.") from error
    if not names:
        raise InputError(f"{folder / _WEIGHTS} holds no weights.")
    settings = read_json_object(folder / _CONFIG)
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise InputError(f"{folder / _CONFIG}: peft_type is {kind!r}; only LORA adapters can be exported.")
    checkpoint = CHECKPOINT.fullmatch(folder.name)
    record_file = folder / RECORD_NAME
    if checkpoint and not record_file.is_file():
        record_file = folder.parent / RECORD_NAME
    record = read_json_object(record_file) if record_file.is_file() else {}
    trained = record.get("config")
    if record and not (isinstance(trained, dict) and {"base_model", "dataset"} <= trained.keys()):
        raise InputError(f"{record_file} is no record of `ibft train`: its config names no base_model and dataset.")
    if record and checkpoint:  # the run's result is of a later step than this adapter
        record = {**record, "result": None, "checkpoint": int(checkpoint[1])}
    return Source(folder, settings, record)


def _check_output(output: Path, sources: Sequence[Path], overwrite: bool) -> None:
    for source in sources:
        if source.is_dir() and source.resolve().is_relative_to(output.resolve()):
            raise InputError(f"output_dir {output} is or holds {source}, which is needed; choose another folder.")
    if output.resolve() == Path.cwd():
        raise InputError(f"output_dir {str(output)!r} is the current folder; name one to be made in it.")
    if output.exists() and not output.is_dir():
        raise InputError(f"output_dir {output} is a file; name a folder.")
    if not output.exists() or not any(output.iterdir()):
        return
    if not overwrite:
        raise InputError(f"output_dir {output} is not empty; choose another folder, or pass --overwrite.")
    if (output / RECORD_NAME).exists() or not is_ours(output / CARD_NAME):
        raise InputError(
            f"output_dir {output} holds what `ibft export` did not write; --overwrite replaces an earlier export only."
        )


def _check_repository(name: str) -> None:
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise InputError(f"--push_to_hub {name!r} is no name for a repository: {error}") from error
    if "/" not in name:
        raise InputError(f"--push_to_hub takes NAMESPACE/NAME, with your name or organisation first, not {name!r}.")


def _token() -> str:
    token = get_token()  # that of HF_TOKEN or of a login; `ibft` puts HUGGINGFACE_TOKEN into HF_TOKEN
    if token is None:
        raise InputError(
            "--push_to_hub needs a token that may write: set HF_TOKEN (or HUGGINGFACE_TOKEN), or run `hf auth login`."
        )
    return token


def _write_adapter(source: Source, base_model: str | None, folder: Path) -> None:
    """The adapter as PEFT itself would leave it, with tokenizer and card: no bottleneck, no record, no checkpoints."""
    shutil.copyfile(source.folder / _WEIGHTS, folder / _WEIGHTS)
    write_json(folder / _CONFIG, {**source.settings, **({"base_model_name_or_path": base_model} if base_model else {})})
    tokenizer = own_tokenizer(source)
    if tokenizer is None:
        print(f"note: {source.folder} has no tokenizer, so the export has none; the base model's is the one to use.")
    else:
        tokenizer.save_pretrained(folder)
    card = render_card(source.record, "adapter", base_model=base_model or _unrecorded_base(source))
    (folder / CARD_NAME).write_text(card, encoding="utf-8")


def _stop_after_a_turn(merged: Any, tokenizer: Any, record: dict[str, Any]) -> None:
    """A model trained on conversations ends its turn with the template's token, which generation must know of."""
    form = record.get("prompt_format") or {}
    if form.get("kind") != "chat" or merged.generation_config is None:
        return
    turn_end = tokenizer(form["end_of_turn"], add_special_tokens=False)["input_ids"][-1]
    known = merged.generation_config.eos_token_id
    stops = [] if known is None else [known] if isinstance(known, int) else list(known)
    if turn_end not in stops:
        merged.generation_config.eos_token_id = [*stops, turn_end]


def _write_merged(source: Source, base_model: str | None, config: ExportConfig, folder: Path) -> None:
    """A plain transformers model, in the dtype of the base model's file unless told otherwise."""
    if base_model is None:
        raise InputError(f"{source.folder / _CONFIG} names no base model; name it with --base_model.")
    try:
        base = load_base_model(base_model, "auto", None, torch.device("cpu"))
        tokenizer = own_tokenizer(source) or load_tokenizer(base_model)
    except InputError as error:
        if config.base_model is not None:
            raise
        raise InputError(
            f"{error} The adapter names it as its base model; --base_model names another place."
        ) from error
    record = _checked_record(base, base_model, source, config.allow_other_base)
    wanted = base.dtype if config.dtype == "auto" else getattr(torch, config.dtype)
    base = base.to(torch.promote_types(base.dtype, wanted))  # the wider of both, so that rounding comes last
    try:
        settings = PeftConfig.from_pretrained(str(source.folder))
        settings.inference_mode = True
        model = PeftModel.from_pretrained(base, str(source.folder), config=settings)
        _untie_adapted_embeddings(model.get_base_model())
        merged = model.merge_and_unload(safe_merge=True).to(wanted)  # safe: refuses weights that are not finite
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise InputError(f"{source.folder} cannot be merged into base_model {base_model!r}: {reason}") from error
    _stop_after_a_turn(merged, tokenizer, record)
    merged.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # Where the weights are those of the record, its name for them is as true as the place they were loaded from.
    known = record.get("base") and record["config"]["base_model"] in record.get("hub", [])
    card = render_card(
        record, "merged", base_model=None if known else base_model, dtype=str(wanted).removeprefix("torch.")
    )
    (folder / CARD_NAME).write_text(card, encoding="utf-8")


def _untie_adapted_embeddings(base: Any) -> None:
    """A head of its own for a model whose input embeddings alone carry an adapter: merged, it would come with them."""
    embeddings, head = base.get_input_embeddings(), base.get_output_embeddings()
    if type(embeddings) is nn.Embedding or not base.config.get_text_config().tie_word_embeddings:
        return
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    base.config.tie_word_embeddings = base.config.get_text_config().tie_word_embeddings = False


def _unrecorded_base(source: Source) -> str | None:
    """The base model that only the adapter's configuration names; the record knows its own better."""
    return None if source.record else source.base_model


def own_tokenizer(source: Source) -> PreTrainedTokenizerBase | None:
    """The tokenizer beside the adapter, or beside the run that a checkpoint belongs to."""
    for folder in (source.folder, source.folder.parent) if "checkpoint" in source.record else (source.folder,):
        if (folder / "tokenizer_config.json").is_file():
            try:
                return AutoTokenizer.from_pretrained(folder)
            except (OSError, ValueError, KeyError) as error:
                raise InputError(f"the tokenizer in {folder} cannot be loaded: {error}") from error
    return None


def _checked_record(base: PreTrainedModel, base_model: str, source: Source, allow_other: bool) -> dict[str, Any]:
    """The adapter's record, true of this base model too; InputError where that is another one, unless allowed."""
    expected = source.record.get("base")
    if expected is None:
        print(f"note: there is no {RECORD_NAME} to say whether the adapter was trained on {base_model}.")
        return source.record
    # A merge starts from the file's dtype, which need not be what training loaded it in.
    if expected in (fingerprint(base, dtype) for dtype in TRAINING_DTYPES):
        return source.record
    if not allow_other:
        raise InputError(
            f"base_model {base_model!r} is not the model that the adapter was trained on: its fingerprint differs from "
            f"the one in {RECORD_NAME}. Name the right one with --base_model, or pass --allow_other_base."
        )
    return {**source.record, "base": None, "trained_on": expected}


def _put_in_place(partial: Path, output: Path) -> None:
    if output.is_dir():
        if (output / CARD_NAME).exists() and not may_replace(output / CARD_NAME):
            shutil.copyfile(output / CARD_NAME, partial / CARD_NAME)  # someone's words
        old = partial.with_suffix(".old.partial")
        shutil.rmtree(old, ignore_errors=True)
        output.rename(old)
        partial.rename(output)
        shutil.rmtree(old)
    else:
        partial.rename(output)


def _push(folder: Path, config: ExportConfig, token: str | None) -> None:
    repository = str(config.push_to_hub)
    stays = f"The folder {folder} is complete and stays; `hf upload {repository} {folder}` uploads it later."
    api = HfApi(token=token)
    try:
        # private=None leaves the choice to the organisation's own default.
        api.create_repo(repository, private=config.private or None, exist_ok=True)
        public = config.private and not api.repo_info(repository).private
        if not public:
            if config.revision is not None:
                api.create_branch(repository, branch=config.revision, exist_ok=True)
            url = api.upload_folder(
                folder_path=folder,
                repo_id=repository,
                revision=config.revision,
                commit_message="Upload with ibft export",
            )
    except Exception as error:  # network, access, quota: the library has no common base class over its versions
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise InputError(f"--push_to_hub {repository}: {reason}. {stays}") from error
    if public:  # that the repository exists already is no reason to publish what was meant to be private
        raise InputError(f"--private: the repository {repository} exists and is public; nothing was uploaded. {stays}")
    print(f"uploaded to {url}")
