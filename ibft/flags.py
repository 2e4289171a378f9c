"""A frozen dataclass whose fields are command-line flags: declaring them, reading them, checking their values.

`--name` and, for booleans, `--no_name`; dashes do as well as underscores; nothing may be abbreviated.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import math
import os
import re
import shutil
import textwrap
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NoReturn, TypeVar

from ibft.errors import InputError

Config = TypeVar("Config")
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
_LONG_DASHES = ("\N{EM DASH}", "\N{EN DASH}", "\N{MINUS SIGN}")


def flag(
    group: str, default: Any, help: str, check: Check | None = None, *, verbatim: bool = False, path: bool = False
) -> Any:
    """A dataclass field with the group, help text and range that --help and errors show; default may be REQUIRED.

    The values of a list are split at commas and white space, unless they are `verbatim`, as paths must be. In a `path`,
    or a name that may be one, a leading ~ is the home folder, which the shell puts there in --output ~/run alone, and
    not in --output=~/run.
    """
    metadata = {"group": group, "help": help, "check": check, "verbatim": verbatim, "path": path}
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def check_fields(config: Any) -> None:
    """Check each field of a dataclass instance, from its `__post_init__`; raises InputError.

    A float with a whole value (5e2, as JSON has it) becomes an integer where one is due, an integer a float.
    """
    for field in dataclasses.fields(config):
        value = checked(type(config), field.name, getattr(config, field.name), f"--{field.name}")
        if field.metadata["path"] and value is not None:
            value = list(map(os.path.expanduser, value)) if isinstance(value, list) else os.path.expanduser(value)
        object.__setattr__(config, field.name, value)


def checked(cls: Any, name: str, value: Any, label: str) -> Any:
    """`value` as the field `name` of `cls` holds it; InputError, with `label` for its name, if it is not accepted."""
    kind, optional = kind_of(cls, name)
    if value is None and optional:
        return None
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        if value not in choices:
            accepted = " or ".join(choices)
            raise InputError(f"{label} takes {accepted}, not {value!r}.{did_you_mean(str(value), choices)}")
        return value
    metadata = cls.__dataclass_fields__[name].metadata
    check = metadata["check"]
    if typing.get_origin(kind) is list:
        # Paths and numbers may come alone, as in a file that says `dataset: rows.jsonl`.
        alone = isinstance(value, (int, float)) or (isinstance(value, str) and metadata["verbatim"])
        return _checked_list(kind, [value] if alone else value, label, check)
    if kind is float and type(value) is int:
        value = float(value)
    if kind is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        words = {int: "an integer", float: "a finite number", bool: "true or false", str: "text"}[kind]
        raise InputError(f"{label} takes {words}, not {value!r}.")
    if check is not None and not check[0](value):
        raise InputError(f"{label} must be {check[1]}, not {value!r}.")
    return value


def _checked_list(kind: Any, value: Any, label: str, check: Check | None) -> list[Any]:
    numbers = typing.get_args(kind) == (float,)
    items: Any = value if isinstance(value, (list, tuple)) else [None]
    if numbers and not all(type(item) in (int, float) and math.isfinite(item) for item in items):
        raise InputError(f"{label} takes finite numbers, not {value!r}.")
    if not numbers and not all(isinstance(item, str) and item for item in items):
        raise InputError(f"{label} takes names, not {value!r}.")
    items = [float(item) for item in items] if numbers else list(items)
    if check is not None and (bad := [item for item in items if not check[0](item)]):
        raise InputError(f"{label} must be {check[1]}, not {bad[0]!r}.")
    return items


def require(cls: type, values: Mapping[str, Any], prog: str) -> None:
    """Raise InputError if a field without a default is not among `values`."""
    required = [field.name for field in dataclasses.fields(cls) if _is_required(field)]
    if missing := [f"--{name}" for name in required if name not in values]:
        raise InputError(f"{' and '.join(missing)} must be given. `{prog} --help` lists the options.")


def parse_flags(
    cls: type[Config],
    argv: Sequence[str],
    prog: str,
    description: str,
    *,
    example: str = "",
    words: tuple[str, list[str]] | None = None,
) -> Config:
    """What a command line makes of a dataclass whose fields are nothing but flags; arguments as for `read_flags`.

    Raises InputError for whatever that or the dataclass refuses, and for a required flag that is not given.
    """
    flags = read_flags(cls, argv, prog, description, example=example, words=words)
    require(cls, flags, prog)
    return cls(**flags)


def read_flags(
    cls: type,
    argv: Sequence[str],
    prog: str,
    description: str,
    *,
    files: Mapping[str, tuple[str, str]] | None = None,
    example: str = "",
    words: tuple[str, list[str]] | None = None,
) -> dict[str, Any]:
    """The flags given in `argv`, and only those, by field name and in the field's type.

    `files` are flags that are no fields, because they name where values come from: name -> (group, help). `example`
    ends the help text. `words`, where values without a flag are accepted, are their name in the usage and the list that
    receives them. Raises InputError for an unknown flag or one without its value. Ranges are left to
    `check_fields`, as is text that is no number, so that a value is refused in the same words wherever it came from.
    """
    usage = f"{prog} {words[0]}" if words else prog
    parser = _parser(cls, usage, description, files or {}, example)
    namespace, rest = parser.parse_known_args([_underscored(argument) for argument in argv])
    if words:
        words[1].extend(word for word in rest if not word.startswith(("-", *_LONG_DASHES)))
        rest = [word for word in rest if word not in words[1]]
    if rest and rest[0].startswith("-"):
        name = rest[0].partition("=")[0]
        raise InputError(f"{name} is not an option of `{prog}`.{did_you_mean(name, parser._option_string_actions)}")
    if rest and rest[0].startswith(_LONG_DASHES):
        raise InputError(f"{rest[0]!r} begins with a long dash, which text editors make of two hyphens; write --name.")
    if rest and rest[0].lower() in ("true", "false", "yes", "no"):
        raise InputError(f"{rest[0]!r} has no flag before it: a switch takes no value, --name is on and --no_name off.")
    if rest:
        raise InputError(f"{rest[0]!r} has no flag before it; every value follows a name, as in --seed 1.")
    given = vars(namespace)
    return {name: from_text(cls, name, text) if name in _hints(cls) else text for name, text in given.items()}


def from_text(cls: Any, name: str, text: Any) -> Any:
    """The value that a text, or a list of them, stands for in the field `name`; what does not fit the type stays text.

    `none` empties a list and an optional number or choice.
    """
    kind, optional = kind_of(cls, name)
    if typing.get_origin(kind) is list:
        parts = text if isinstance(text, list) else [text]
        if cls.__dataclass_fields__[name].metadata["verbatim"]:
            return parts
        items = [item for part in parts for item in part.replace(",", " ").split()]
        if items == ["none"]:
            return []
        return [_number(float, item) for item in items] if typing.get_args(kind) == (float,) else items
    if optional and kind is not str and text == "none":
        return None
    return _number(kind, text) if kind in (int, float) else text


def _number(kind: Any, text: str) -> Any:
    """The number that `text` writes, or the text itself, which `checked` then refuses by its words."""
    try:
        return kind(text)
    except ValueError:
        return text


def kind_of(cls: Any, name: str) -> tuple[Any, bool]:
    """The type of a field without `| None`, and whether None is allowed."""
    hint = _hints(cls)[name]
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return next(kind for kind in typing.get_args(hint) if kind is not type(None)), True
    return hint, False


def default_of(field: dataclasses.Field[Any]) -> Any:
    """A field's default; REQUIRED where it has none."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The sentence that names the closest known name, with a space before it, or nothing when none is close."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {close[0]}?" if close else ""


class _Parser(argparse.ArgumentParser):
    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        # argparse takes -1 for a value, but -1e-4 for an option that lacks one.
        self._negative_number_matcher = re.compile(r"-(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$|-inf(inity)?$", re.IGNORECASE)

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message.removeprefix('argument ')}. `{self.prog} --help` lists the options.")


class _Switch(argparse.Action):
    """--name and --no_name."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, option_string == f"--{self.dest}")


class _Help(argparse.RawDescriptionHelpFormatter):
    """A switch once, as --[no_]name, and never wider than a line of prose should be."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=min(shutil.get_terminal_size().columns - 2, 100))

    def _format_action_invocation(self, action: argparse.Action) -> str:
        return f"--[no_]{action.dest}" if isinstance(action, _Switch) else super()._format_action_invocation(action)


def _parser(
    cls: type, prog: str, description: str, files: Mapping[str, tuple[str, str]], example: str
) -> argparse.ArgumentParser:
    needed = [f"--{field.name} {field.name.upper()}" for field in dataclasses.fields(cls) if _is_required(field)]
    parser = _Parser(
        prog,
        usage="\n       ".join(
            [
                " ".join(["%(prog)s", *needed, "[options]"]),
                *(f"%(prog)s --{name} FILE [options]" for name in files),
            ]
        ),
        description="\n".join(textwrap.wrap(description, 78)),
        epilog=f"Dashes do as well as underscores.{example}",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=_Help,
    )
    groups: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        title = field.metadata["group"]
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        kind, _ = kind_of(cls, field.name)
        options: dict[str, Any] = {"help": (field.metadata["help"] + _default_text(field)).replace("%", "%%")}
        if kind is bool:
            groups[title].add_argument(f"--{field.name}", f"--no_{field.name}", action=_Switch, nargs=0, **options)
        elif typing.get_origin(kind) is list:
            metavar = "X" if typing.get_args(kind) == (float,) else "NAME"
            groups[title].add_argument(f"--{field.name}", nargs="+", metavar=metavar, **options)
        elif typing.get_origin(kind) is Literal:
            choices = typing.get_args(kind)
            metavar = f"{{{','.join(choices)}}}"
            if len(metavar) > 50:  # would break the column of the help texts, and the terminal's width
                metavar, options["help"] = "NAME", f"{', '.join(choices)}: {options['help']}"
            groups[title].add_argument(f"--{field.name}", metavar=metavar, **options)
        else:
            metavar = {int: "N", float: "X", str: "TEXT"}[kind]
            groups[title].add_argument(f"--{field.name}", metavar=metavar, **options)
    for name, (title, text) in files.items():
        groups[title].add_argument(f"--{name}", metavar="FILE", help=text)
    return parser


def _default_text(field: dataclasses.Field[Any]) -> str:
    if _is_required(field):
        return " (required)"
    default = default_of(field)
    if isinstance(default, bool):
        default = "on" if default else "off"
    if isinstance(default, list):
        default = " ".join(map(str, default)) or "none"
    return "" if default in (None, "") else f" (default: {default})"


def _underscored(argument: str) -> str:
    """--learning-rate=1e-4 as --learning_rate=1e-4; values are left alone."""
    name, equals, value = argument.partition("=")
    return f"--{name[2:].replace('-', '_')}{equals}{value}" if argument.startswith("--") else argument


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return default_of(field) is REQUIRED


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls)
