"""The README.md of a result: what it is, what it came from, how to use it, from the record in ibft.json.

Everything in it comes from the record, and of local paths it shows no more than a name: cards are made to be published.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ibft.config import BOTTLENECK, FIELDS
from ibft.flags import default_of

CARD_NAME = "README.md"
# run: what training leaves; adapter: what `ibft export` makes of that; merged: likewise with --merge.
Kind = Literal["run", "adapter", "merged"]

_PAPER = "https://arxiv.org/abs/2510.16022"
_MARK = re.compile(r"<!-- ibft wrote this card \(sha256 (\w{64})\) and replaces it as long as it is unchanged\. -->\n")
# What a second run may be told differently, or what the card's command has already resolved.
_NOT_IN_COMMAND = {
    "overwrite",
    "resume",
    "debug",
    "training_config",
    "preset",
    "num_proc",
    "report_to",
    "run_name",
    "dry_run",
}
_NAMES = ("base_model", "dataset", "validation_dataset")  # on the Hub, or paths
_PATHS = (*_NAMES, "output_dir", "adapter_config")
_RESULTS = {
    "step": "optimizer steps",
    "loss": "loss",
    "ce": "CE, nats per label token",
    "kl_nats": "KL, nats per token",
    "ce_ib": "CE_ib, nats per label token",
    "eval_loss": "CE on the validation data, nats per label token",
    "active_share": "share of the bottleneck's dimensions that vary with the input",
}
_BOTTLENECK = {
    "target_layer": "layer whose output is compressed, from 1",
    "bottleneck_dim": "K, width of the bottleneck",
    "encoder": "map into the bottleneck",
    "encoder_rank": "rank of that map",
    "alpha": "weight of KL + beta * CE_ib",
    "beta": "weight of CE_ib",
    "alpha_warmup_steps": "optimizer steps over which alpha rose from 0",
    "kl_weight": "weight of KL within",
    "free_bits": "nats of KL per token that cost nothing",
    "ib_rate_target": "nats of KL per token, held by adapting kl_weight",
    "kl_tokens": "tokens over which KL is averaged",
    "kl_reduction": "KL over the K dimensions (sum: nats)",
    "logvar_range": "clamp of the log-variance",
    "sample": "z is drawn from the posterior (else: its mean)",
}
_GENERATE = "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=200)[0], skip_special_tokens=True))"
# An answer ends with its turn, which the base model's own configuration need not know.
_GENERATE_ANSWER = [
    "end = tokenizer.encode({end}, add_special_tokens=False)[-1]",
    "output = model.generate(**inputs, max_new_tokens=200, eos_token_id=end)[0]",
    "print(tokenizer.decode(output, skip_special_tokens=True))",
]
_LORA = {"r": "rank", "lora_alpha": "with the rank, the scale of the update", "lora_dropout": "in training"}


def render_card(
    record: Mapping[str, Any], kind: Kind, *, base_model: str | None = None, dtype: str | None = None
) -> str:
    """The card of a run whose record is given, or of what was exported from it.

    `base_model` is a Hub name or a path that replaces the record's; `dtype` that of merged weights. A record without
    `config` gives the little that is known of an adapter which ibft did not train.
    """
    config = record.get("config", {})
    name = base_model or config.get("base_model")
    hub = _is_hub_name(base_model) if base_model else name in record.get("hub", [])
    body = [
        *_opening(record, kind, name, hub, dtype),
        *_usage(record, kind, name, hub),
        *(_training(record) if config else []),
    ]
    return _sealed(f"---\n{_metadata(record, kind, name, hub).to_yaml()}\n---\n", "\n".join(body))


def is_ours(file: Path) -> bool:
    """Whether this is a card that ibft wrote, changed since or not."""
    return file.is_file() and _MARK.search(_read(file)) is not None


def may_replace(file: Path) -> bool:
    """Whether nobody's words are lost: no such file, or ibft's card, unchanged, or PEFT's template, not filled in."""
    if not file.is_file():
        return not file.exists()
    text = _read(file)
    mark = _MARK.search(text)
    if mark is not None:
        return mark[1] == _digest(text.replace(mark[0], ""))
    words = re.sub(r"\A---\n.*?\n---\n", "", text, count=1, flags=re.DOTALL)
    words = re.sub(r"^(### Framework versions|- PEFT .*)$", "", words, flags=re.MULTILINE)
    return words.split() == ModelCard.from_template(ModelCardData()).text.split()


def hub_names(config: Mapping[str, Any]) -> list[str]:
    """The models and datasets of a run's configuration that are on the Hub, which only the run's own machine knows."""
    return [name for field in _NAMES for name in _listed(config.get(field)) if _is_hub_name(name)]


def _metadata(record: Mapping[str, Any], kind: Kind, base_model: str | None, hub: bool) -> ModelCardData:
    config = record.get("config", {})
    tags = ["ibft", "lora"] if config else []
    if record.get("ib"):
        tags = ["ib-ft", "information-bottleneck", *tags]
    names: dict[str, Any] = {}
    if hub:  # a path there would make the Hub refuse the card
        names = {"base_model": base_model, "base_model_relation": "finetune" if kind == "merged" else "adapter"}
    if datasets := [name for name in _listed(config.get("dataset")) if name in record.get("hub", [])]:
        names["datasets"] = datasets
    library = "transformers" if kind == "merged" else "peft"
    return ModelCardData(library_name=library, pipeline_tag="text-generation", tags=tags or None, **names)


def _opening(record: Mapping[str, Any], kind: Kind, base_model: str | None, hub: bool, dtype: str | None) -> list[str]:
    thing = "Merged model" if kind == "merged" else "Adapter"
    shown = _public(base_model, hub) if base_model else "an unnamed base model"
    how = ""
    if record.get("config"):
        paper = f"an information bottleneck (IB-FT, [arXiv 2510.16022]({_PAPER}))"
        how = f", trained with {paper}" if record.get("ib") else ", trained by supervised fine-tuning (SFT)"
    lines = [f"# {thing} for {shown.rpartition('/')[2]}", ""]
    lines += [f"{'A LoRA adapter merged into its base model' if kind == 'merged' else 'A PEFT adapter'}{how}.", ""]
    where = f"[{shown}](https://huggingface.co/{shown})" if hub else f"`{shown}`, a local folder"
    lines.append(f"- base model: {where}" if base_model else "- base model: not recorded")
    if record.get("base"):
        lines.append(f"- its fingerprint as trained on (by ibft; configuration and some weights): `{record['base']}`")
    if record.get("trained_on"):
        lines.append(f"- the adapter was trained on another base model: `{record['trained_on']}`")
    if dtype is not None:
        lines.append(f"- weights in {dtype}")
    if (step := record.get("checkpoint")) is not None:
        lines.append(f"- a checkpoint: after step {step} of {record['steps']}")
    if kind == "run" and record.get("ib"):
        lines.append(
            "- `ib_head.safetensors` holds the bottleneck, for analysis and more training; inference does not need it"
        )
    return [*lines, ""]


def _usage(record: Mapping[str, Any], kind: Kind, base_model: str | None, hub: bool) -> list[str]:
    folder = "path/to/this/folder"
    base = (base_model if hub else "path/to/base/model") or "path/to/base/model"
    classes = "AutoModelForCausalLM, AutoTokenizer"
    load = [f"from transformers import {classes}", "", f'tokenizer = AutoTokenizer.from_pretrained("{folder}")']
    if kind == "merged":
        load.append(f'model = AutoModelForCausalLM.from_pretrained("{folder}", dtype="auto")')
    else:
        load.insert(0, "from peft import PeftModel")
        load.append(f'base = AutoModelForCausalLM.from_pretrained("{base}", dtype="auto")')
        load.append(f'model = PeftModel.from_pretrained(base, "{folder}")')
    lines = ["## Use", "", "```python", *load]
    form = record.get("prompt_format") or {}
    if form.get("kind") == "chat":
        lines += [
            "",
            'messages = [{"role": "user", "content": "Write a function that adds two numbers."}]',
            "inputs = tokenizer.apply_chat_template(",
            '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"',
            ")",
            *(
                [line.format(end=json.dumps(end, ensure_ascii=False)) for line in _GENERATE_ANSWER]
                if (end := form.get("end_of_turn"))
                else [_GENERATE]
            ),
        ]
    elif isinstance(form.get("separator"), str):
        bos = "tokenizer.bos_token + " if form.get("bos") else ""
        lines += [
            "",
            f'prompt = {bos}"Write a function that adds two numbers." + {json.dumps(form["separator"])}',
            'inputs = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")',
            _GENERATE,
        ]
    lines += ["```", ""]
    if form:
        described = ", ".join(f"{name} {json.dumps(value)}" for name, value in form.items())
        lines += [f"The form of the prompts in training, which generation should keep: {described}.", ""]
    return lines


def _training(record: Mapping[str, Any]) -> list[str]:
    lines = ["## Training", "", "### Data", "", *_data(record), "", "### Method", "", *_method(record)]
    if result := {name: value for name, value in (record.get("result") or {}).items() if value is not None}:
        held_out = "; eval_loss on the validation data" if "eval_loss" in result else ""
        lines += ["### Result", "", f"Of the last optimizer step, on its own batch of training data{held_out}:", ""]
        lines += [*_table(result, _RESULTS), ""]
    lines += [
        "### Reproduce",
        "",
        "A command of the same meaning:",
        "",
        "```console",
        f"$ {_command(record)}",
        "```",
        "",
    ]
    versions = ", ".join(f"{name} {value}" for name, value in record.get("versions", {}).items() if value)
    dtype = f", base model in {record['dtype']}" if record.get("dtype") else ""
    lines.append(f"Ran on {versions}; engine {record.get('engine')}, attention {record.get('attention')}{dtype}.")
    if record.get("ib"):
        lines += ["", f"The method: [arXiv 2510.16022]({_PAPER})."]
    return [*lines, ""]


def _data(record: Mapping[str, Any]) -> list[str]:
    config, data = record["config"], record.get("data", {})
    named = _listed(config["dataset"]) + _listed(config.get("validation_dataset"))
    public = {name: _public(name, name in record.get("hub", [])) for name in named}
    lines = [f"- `{public[name]}`" for name in _listed(config["dataset"])]
    for line in data.get("summary", []):
        for name in sorted(public, key=len, reverse=True):  # a path may be the beginning of another one
            line = line.replace(name, public[name])
        lines.append(f"- {line}")
    if (held_out := record.get("validation")) is not None:
        lines.append(f"- validated on {held_out['kept']:,} rows")
    if data.get("fingerprint"):
        lines.append(f"- fingerprint of the tokens: `{data['fingerprint']}`")
    return lines


def _method(record: Mapping[str, Any]) -> list[str]:
    lines = []
    if ib := record.get("ib"):
        unused = {name for name in ("alpha_warmup_steps", "free_bits", "ib_rate_target") if not ib.get(name)}
        unused |= {"encoder_rank"} if ib.get("encoder") != "lora" else set()
        unused |= {"kl_weight"} if ib.get("kl_weight") == 1 and "ib_rate_target" in unused else set()
        kl = "KL" if "kl_weight" in unused or "kl_weight" not in ib else "kl_weight * KL"
        lines += [
            f"`loss = CE + alpha * ({kl} + beta * CE_ib)`: CE is the model's cross-entropy; the bottleneck maps one "
            "layer's hidden states to a Gaussian z, KL is that Gaussian's divergence from N(0, 1), and CE_ib the "
            "cross-entropy of what z alone predicts. It shapes training only: inference runs the model without it.",
            "",
        ]
        shown = {name: value for name, value in ib.items() if name not in unused}
        lines += [*_table(shown, _BOTTLENECK), ""]
    else:
        lines += ["`loss = CE`, the cross-entropy of the responses.", ""]
    adapter = record.get("adapter", {})
    lines += ["LoRA:", "", *_table({name: adapter[name] for name in _LORA if name in adapter}, _LORA), ""]
    if modules := adapter.get("target_modules"):
        # PEFT resolves "all-linear" to every module's full name: a page of them, of which the last part says enough.
        last = sorted({name.rpartition(".")[2] for name in modules}) if isinstance(modules, list) else [modules]
        lines += [f"on the modules {', '.join(last)}.", ""]
    if flags := [name for name in ("use_rslora", "use_dora") if adapter.get(name)]:
        lines += [f"with {', '.join(flags)}.", ""]
    return lines


def _table(values: Mapping[str, Any], meanings: Mapping[str, str]) -> list[str]:
    lines = ["| name | value | meaning |", "|---|---|---|"]
    for name, value in values.items():
        if isinstance(value, float):
            value = f"{value:.6g}"
        elif isinstance(value, (list, tuple)):  # a tuple until it has been through JSON
            value = ", ".join(map(str, value))
        lines.append(f"| {name} | {value} | {meanings.get(name, '')} |")
    return lines


def _command(record: Mapping[str, Any]) -> str:
    """The configuration as flags, defaults left out. `sys.argv` would not do: it names paths, or is a notebook's."""
    config = record["config"]
    words = ["ibft", "train"]
    for name, value in config.items():
        field = FIELDS.get(name)
        if field is None or value is None or name in _NOT_IN_COMMAND:
            continue
        if config.get("adapter_config") and name.startswith("lora_"):
            continue
        if record.get("ib") is None and field.metadata["group"] == BOTTLENECK:
            continue
        if value == default_of(field):
            continue
        if isinstance(value, bool):
            words.append(f"--{'' if value else 'no_'}{name}")
        elif isinstance(value, list):
            words += [f"--{name}", *(_shown(name, item, record) for item in value or ["none"])]
        else:
            words += [f"--{name}", _shown(name, value, record)]
    return shlex.join(words)


def _shown(field: str, value: Any, record: Mapping[str, Any]) -> str:
    return _public(value, value in record.get("hub", [])) if field in _PATHS else str(value)


def _public(name: str, hub: bool) -> str:
    """A Hub name or a relative path as it is; any other path without the folders above its last name."""
    path = Path(name)
    if hub or not (path.is_absolute() or ".." in path.parts or name.startswith("~")):
        return name
    return f"path/to/{path.name}"


def _listed(value: Any) -> list[str]:
    return [] if value is None else [value] if isinstance(value, str) else list(value)


def _is_hub_name(name: str) -> bool:
    """Whether this can only be a name on the Hub: nothing here is called so, and it has the form of one."""
    if Path(name).expanduser().exists():
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _sealed(head: str, body: str) -> str:
    """The card with the mark that `is_ours` and `may_replace` look for, after the metadata."""
    digest = _digest(f"{head}{body}")
    return f"{head}<!-- ibft wrote this card (sha256 {digest}) and replaces it as long as it is unchanged. -->\n{body}"


def _read(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace")  # it may be the user's, in any encoding


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
