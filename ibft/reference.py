"""Writes docs/configuration.md from the configuration itself: `python -m ibft.reference > docs/configuration.md`."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any, Literal

from ibft.arguments import PRECEDENCE, SOURCES
from ibft.config import FIELDS, TrainConfig
from ibft.flags import NOT_EMPTY, REQUIRED, default_of, kind_of

EXAMPLE = """\
base_model: Qwen/Qwen2.5-Coder-0.5B
dataset: data/train.jsonl          # relative to the folder that ibft is started in
target_layer: 15
alpha: 0.1
learning_rate: 5e-5
lora_target_modules: [q_proj, k_proj, v_proj, o_proj]
gradient_checkpointing: true
save_total_limit: none             # keep every checkpoint
output_dir: runs/first
"""

_HEAD = """\
# Configuration

*Written by `python -m ibft.reference`; edit the fields in `ibft/config.py`, not this page.*

Every option of `ibft train` is a flag, `--learning_rate 1e-4`, and a key of the file that `--config` names,
`learning_rate: 1e-4`. Dashes do as well as underscores in both.
{precedence}
`ibft train --dry_run` with the same options says what they come to, without training or writing anything.

## A file

```yaml
{example}```

`ibft train --config run.yaml` needs no other flag; `ibft train --config run.yaml --seed 1` changes one of its values.

- The file is YAML (`.yaml`, `.yml`) or JSON (`.json`): one mapping from option to value. A key that is no option, or
  that comes twice, is an error.
- A switch is `true` or `false`: `gradient_checkpointing: true` is `--gradient_checkpointing`, `sample: false` is
  `--no_sample`.
- A list is a YAML list, or names with commas. `null` empties an option that takes none, as `none` does for numbers,
  choices and lists.
- In YAML, a bare word is read as its option needs it: `1e-4` is a number, `bos: no` the choice. In quotes it is text.
- Relative paths are relative to the folder that `ibft` is started in, wherever the file lies. A file cannot name
  another `config`; it can name a `training_config` and a `preset`.
- The `config` in a run's `ibft.json`, saved as a file of its own, is such a file, and asks for the same run again.

## Options
"""


def configuration_reference() -> str:
    """The page, in Markdown."""
    groups: dict[str, list[str]] = {}
    for field in FIELDS.values():
        kind, default = _kind(field), _default(field)
        groups.setdefault(field.metadata["group"], []).append(_row(field.name, kind, default, field.metadata["help"]))
    for name, (group, text) in SOURCES.items():
        groups[group].append(_row(name, "text (flag only)", "", text))
    parts = [_HEAD.format(precedence=PRECEDENCE, example=EXAMPLE)]
    for title, rows in groups.items():
        table = "\n".join(["| option | takes | default | |", "|---|---|---|---|", *rows])
        parts.append(f"### {title[0].upper()}{title[1:]}\n\n{table}\n")
    return "\n".join(parts)


def _row(name: str, kind: str, default: str, text: str) -> str:
    cells = (f"`{name}`", kind, default, text)
    return f"| {' | '.join(cell.replace('|', chr(92) + '|').replace('*', chr(92) + '*') for cell in cells)} |"


def _kind(field: dataclasses.Field[Any]) -> str:
    kind, optional = kind_of(TrainConfig, field.name)
    check = field.metadata["check"]
    if typing.get_origin(kind) is Literal:
        text = ", ".join(f"`{choice}`" for choice in typing.get_args(kind))
    elif typing.get_origin(kind) is list:
        text = "numbers" if typing.get_args(kind) == (float,) else "names"
    else:
        text = {int: "integer", float: "number", bool: "true or false", str: "text"}[kind]
    if check not in (None, NOT_EMPTY):
        text += f" {check[1]}"
    return f"{text}, or none" if optional else text


def _default(field: dataclasses.Field[Any]) -> str:
    default = default_of(field)
    if default is REQUIRED:
        return "required"
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, list):
        default = ", ".join(map(str, default))
    return "none" if default in (None, "") else f"`{default}`"


if __name__ == "__main__":
    print(configuration_reference(), end="")
