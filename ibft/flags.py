"""A frozen dataclass whose fields are command-line flags: declaring them, reading them, checking their values.

`--name` and, for booleans, `--no_name`; dashes do as well as underscores; nothing may be abbreviated.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NoReturn

from ibft.errors import InputError

# What a value must satisfy beyond its type, and how an error says it.
Check = tuple[Callable[[Any], bool], str]
AT_LEAST_1: Check = (lambda v: v >= 1, "at least 1")
AT_LEAST_2: Check = (lambda v: v >= 2, "at least 2")
NOT_NEGATIVE: Check = (lambda v: v >= 0, "at least 0")
POSITIVE: Check = (lambda v: v > 0, "greater than 0")
BELOW_1: Check = (lambda v: 0 <= v < 1, "at least 0 and below 1")
SHARE: Check = (lambda v: 0 <= v <= 1, "between 0 and 1")
NOT_EMPTY: Check = (lambda v: v != "", "a name or path")

REQUIRED = dataclasses.MISSING


def flag(group: str, default: Any, help: str, check: Check | None = None) -> Any:
    """A dataclass field with the group, help text and range that --help and errors show; default may be REQUIRED."""
    metadata = {"group": group, "help": help, "check": check}
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def check_fields(config: Any) -> None:
    """Check each field of a dataclass instance, from its `__post_init__`; raises InputError.

    A float with a whole value (5e2, as JSON has it) becomes an integer where one is due, an integer a float.
    """
    for field in dataclasses.fields(config):
        value = checked(type(config), field.name, getattr(config, field.name), f"--{field.name}")
        object.__setattr__(config, field.name, value)


def checked(cls: Any, name: str, value: Any, label: str) -> Any:
    """`value` as the field `name` of `cls` holds it; InputError, with `label` for its name, if it is not accepted."""
    kind, optional = _unwrap(_hints(cls)[name])
    if value is None and optional:
        return None
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        if value not in choices:
            accepted = " or ".join(choices)
            raise InputError(f"{label} takes {accepted}, not {value!r}.{did_you_mean(str(value), choices)}")
        return value
    if typing.get_origin(kind) is list:
        if not isinstance(value, (list, tuple)) or not all(isinstance(item, str) and item for item in value):
            raise InputError(f"{label} takes names, not {value!r}.")
        return list(value)
    if kind is float and type(value) is int:
        value = float(value)
    if kind is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        words = {int: "an integer", float: "a finite number", bool: "true or false", str: "text"}[kind]
        raise InputError(f"{label} takes {words}, not {value!r}.")
    check = cls.__dataclass_fields__[name].metadata["check"]
    if check is not None and not check[0](value):
        raise InputError(f"{label} must be {check[1]}, not {value!r}.")
    return value


def require(cls: type, values: Mapping[str, Any], prog: str) -> None:
    """Raise InputError if a field without a default is not among `values`."""
    required = [field.name for field in dataclasses.fields(cls) if _is_required(field)]
    if missing := [f"--{name}" for name in required if name not in values]:
        raise InputError(f"{' and '.join(missing)} must be given. `{prog} --help` lists the options.")


def read_flags(cls: type, argv: Sequence[str], prog: str, description: str) -> dict[str, Any]:
    """The flags given in `argv`, and only those, by field name and in the field's type.

    Raises InputError for an unknown flag or one without its value. Ranges are left to `check_fields`, as is text that
    is no number, so that a value is refused in the same words wherever it came from.
    """
    parser = _parser(cls, prog, description)
    namespace, rest = parser.parse_known_args([_underscored(argument) for argument in argv])
    if rest and rest[0].startswith("-"):
        name = rest[0].partition("=")[0]
        raise InputError(f"{name} is not an option of `{prog}`.{did_you_mean(name, parser._option_string_actions)}")
    if rest:
        raise InputError(f"{rest[0]!r} has no flag before it; every value follows a name, as in --seed 1.")
    return {name: _from_text(_hints(cls)[name], text) for name, text in vars(namespace).items()}


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The sentence that names the closest known name, with a space before it, or nothing when none is close."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {close[0]}?" if close else ""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message.removeprefix('argument ')}. `{self.prog} --help` lists the options.")


class _Switch(argparse.Action):
    """--name and --no_name."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, option_string == f"--{self.dest}")


def _parser(cls: type, prog: str, description: str) -> argparse.ArgumentParser:
    needed = [f"--{field.name} {field.name.upper()}" for field in dataclasses.fields(cls) if _is_required(field)]
    parser = _Parser(
        prog,
        usage=" ".join(["%(prog)s", *needed, "[options]"]),
        description=description,
        epilog="Dashes do as well as underscores.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    groups: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        title = field.metadata["group"]
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        kind, _ = _unwrap(_hints(cls)[field.name])
        options: dict[str, Any] = {"help": (field.metadata["help"] + _default_text(field)).replace("%", "%%")}
        if kind is bool:
            groups[title].add_argument(f"--{field.name}", f"--no_{field.name}", action=_Switch, nargs=0, **options)
        elif typing.get_origin(kind) is list:
            groups[title].add_argument(f"--{field.name}", nargs="+", metavar="NAME", **options)
        else:
            metavar = {int: "N", float: "X", str: "TEXT"}.get(kind) or f"{{{','.join(typing.get_args(kind))}}}"
            groups[title].add_argument(f"--{field.name}", metavar=metavar, **options)
    return parser


def _default_text(field: dataclasses.Field[Any]) -> str:
    if _is_required(field):
        return " (required)"
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if isinstance(default, bool):
        return " (default: on)" if default else ""
    if isinstance(default, list):
        default = " ".join(default)
    return "" if default in (None, "") else f" (default: {default})"


def _underscored(argument: str) -> str:
    """--learning-rate=1e-4 as --learning_rate=1e-4; values are left alone."""
    name, equals, value = argument.partition("=")
    return f"--{name[2:].replace('-', '_')}{equals}{value}" if argument.startswith("--") else argument


def _from_text(hint: Any, text: Any) -> Any:
    """The value that a flag's text stands for; text that does not fit the type stays text."""
    kind, optional = _unwrap(hint)
    if isinstance(text, list):
        items = [item for part in text for item in part.replace(",", " ").split()]
        return [] if items == ["none"] else items
    if optional and kind is not str and text == "none":
        return None
    if kind not in (int, float):
        return text
    try:
        return kind(text)
    except ValueError:
        return text


def _unwrap(hint: Any) -> tuple[Any, bool]:
    """A field's type without `| None`, and whether None is allowed."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return next(kind for kind in typing.get_args(hint) if kind is not type(None)), True
    return hint, False


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls)
