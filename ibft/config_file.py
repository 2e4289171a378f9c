"""A file of settings, YAML or JSON, for a dataclass whose fields are flags: `--config run.yaml`.

The field decides how a bare word is read, not YAML: `1e-4` is a number where a number is due, `no` a choice where "no"
is one, and `2024` a name where a name is. A value in quotes is text, as in JSON.
"""

from __future__ import annotations

import json
import typing
from pathlib import Path
from typing import Any, Literal

import yaml

from ibft.errors import InputError
from ibft.flags import did_you_mean, from_text, kind_of

ACCEPTED = (".yaml", ".yml", ".json")
_TAG = "tag:yaml.org,2002:"


def read_config_file(path: str, cls: Any) -> dict[str, Any]:
    """The values in the file, by field name of `cls`, dashes read as underscores; ranges are left to `checked`.

    Raises InputError, with the file and the key or the line, for a file that cannot be read, is no mapping, names
    another `config`, or has an unknown or a repeated key.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in ACCEPTED:
        raise InputError(f"--config takes a {', '.join(ACCEPTED[:-1])} or {ACCEPTED[-1]} file, not {path!r}.")
    text = _read_text(path)
    pairs = _json_pairs(path, text) if suffix == ".json" else _yaml_pairs(path, text)

    values: dict[str, Any] = {}
    for key, value in pairs:
        name = key.replace("-", "_")
        if name == "config":
            raise InputError(f"{path} names {key!r}, but a file cannot include another one.")
        if name not in cls.__dataclass_fields__:
            raise InputError(f"{path}: {key!r} is not an option.{_advice(name, cls)}")
        if name in values:
            raise InputError(f"{path} gives {name} twice.")
        kind, _ = kind_of(cls, name)
        if isinstance(value, yaml.Node):
            value = _from_node(cls, name, value)
        elif kind is str and type(value) in (int, float):
            value = str(value)  # as a flag takes it, and YAML
        values[name] = _as_list(cls, name, value) if typing.get_origin(kind) is list else value
    return values


def read_json_object(path: str | Path) -> dict[str, Any]:
    """The JSON object in a file; InputError with the line and column if it holds anything else."""
    return _object(path, _parse_json(path, _read_text(path)), dict)


def is_empty(value: object) -> bool:
    """The ways in which a JSON file says "nothing"; 0 is a number, not nothing."""
    return value is None or value is False or value in ("", [], {})


def _read_text(path: str | Path) -> str:
    """The text of a file, ~ understood; InputError if it cannot be read."""
    try:
        return Path(path).expanduser().read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise InputError(f"{path} cannot be read: {reason}.") from error


def _parse_json(path: str | Path, text: str, **options: Any) -> Any:
    """What the text of the file says, `options` being json.loads's; InputError with the line and column if nothing."""
    try:
        return json.loads(text, **options)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise InputError(f"{path} is not valid JSON: {error.msg} at {where}.") from error
    except RecursionError as error:
        raise InputError(f"{path} is nested too deeply.") from error


def _json_pairs(path: str, text: str) -> list[tuple[str, Any]]:
    """The members of the object, and all of them where a dict would keep the last of a name."""
    data = _object(path, _parse_json(path, text, object_pairs_hook=_Pairs), _Pairs)
    return [(key, dict(value) if isinstance(value, _Pairs) else value) for key, value in data]


def _object(path: str | Path, data: Any, kind: type) -> Any:
    if not isinstance(data, kind):
        raise InputError(f"{path} must hold a JSON object {{...}}, not {json.dumps(data)[:40]}.")
    return data


class _Pairs(list[tuple[str, Any]]):
    """A JSON object."""


def _yaml_pairs(path: str, text: str) -> list[tuple[str, yaml.Node]]:
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise InputError(f"{path} is not valid YAML: {error.problem or error.context}{where}.") from error
    except yaml.YAMLError as error:  # a character that YAML does not allow, and where
        raise InputError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from error
    except RecursionError as error:
        raise InputError(f"{path} is nested too deeply.") from error
    if root is None:  # empty, or nothing but comments
        return []
    if not isinstance(root, yaml.MappingNode):
        raise InputError(f"{path} must hold a mapping, as in `seed: 1` line by line, not {_described(root)}.")
    for key, _ in root.value:
        if not isinstance(key, yaml.ScalarNode):
            raise InputError(f"{path}, line {key.start_mark.line + 1}: a key is a name, not {_described(key)}.")
    values = [value for _, value in root.value]
    for node in values + [item for value in values if isinstance(value, yaml.SequenceNode) for item in value.value]:
        if not node.tag.startswith(_TAG):  # an !include would otherwise be taken for a name
            raise InputError(f"{path}, line {node.start_mark.line + 1}: the tag {node.tag} is not understood.")
    return [(key.value, value) for key, value in root.value]


def _as_list(cls: Any, name: str, value: Any) -> Any:
    """One alone, several with commas, or a list, as the flag takes them; in a list, a name may hold commas."""
    numbers = typing.get_args(kind_of(cls, name)[0]) == (float,)
    if isinstance(value, list) and all(isinstance(item, str) for item in value) and (numbers or value == ["none"]):
        return from_text(cls, name, value)
    return from_text(cls, name, value) if isinstance(value, str) else value


def _from_node(cls: Any, name: str, node: yaml.Node) -> Any:
    """What a YAML value means in the field `name`; what does not fit is given as it is, for `checked` to refuse."""
    kind, _ = kind_of(cls, name)
    if not isinstance(node, yaml.ScalarNode) or typing.get_origin(kind) is list or node.style:
        return _plain(node)
    if node.tag == f"{_TAG}null":
        return None
    if node.tag == f"{_TAG}bool" and kind is bool:
        return yaml.SafeLoader.bool_values[node.value.lower()]
    if node.tag == f"{_TAG}bool" and typing.get_origin(kind) is Literal:
        return node.value.lower()  # YAML 1.1 takes the choice `no` for false
    return from_text(cls, name, node.value)


def _plain(node: yaml.Node) -> Any:
    """Text, None, or a list or mapping of these; deeper ones only hinted at, as no field takes them."""

    def text(item: yaml.Node) -> Any:
        if not isinstance(item, yaml.ScalarNode):
            return ["..."]
        return None if item.tag == f"{_TAG}null" else item.value

    if isinstance(node, yaml.SequenceNode):
        return [text(item) for item in node.value]
    if isinstance(node, yaml.MappingNode):
        return {str(text(key)): text(value) for key, value in node.value}
    return text(node)


def _described(node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode):
        return repr(node.value[:40])
    return "a list" if isinstance(node, yaml.SequenceNode) else "a mapping"


def _advice(name: str, cls: Any) -> str:
    positive = name.removeprefix("no_")
    if positive != name and positive in cls.__dataclass_fields__:
        return f" Write `{positive}: false`."
    return did_you_mean(name, cls.__dataclass_fields__)
