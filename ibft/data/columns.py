"""Which columns of a dataset are the prompt and the response, or the messages of a conversation."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from ibft.errors import InputError

KNOWN_COLUMNS = {
    "OriGen": ("Instruction", "Response"),
    "Evol-CodeAlpaca": ("instruction", "output"),
    "MBPP": ("text", "code"),
}
_ALPACA_INPUT = "input"  # beside Alpaca's instruction: what it is to be done to
TRL_PAIR = ("prompt", "completion")  # text, or lists of messages
MESSAGES = "messages"
SEPARATOR = "\n"  # between prompt and response; belongs to the prompt

Format = Literal["auto", "text", "chat"]


class Layout(NamedTuple):
    """The columns to read: one of `messages`, or a pair of prompt and response whose cells are text or messages.

    `pair_of_text` tells the two kinds of pair apart. `separator` stands between prompt and response of text.
    """

    columns: tuple[str, ...]
    pair_of_text: bool
    separator: str = SEPARATOR
    split_column: str | None = None  # says of each row whether it is trained on

    def names_to_read(self, existing: list[str]) -> list[str]:
        """The columns of a source that its rows come from; tools are read to be refused."""
        names = [*self.columns, *([self.split_column] if self.split_column is not None else [])]
        return names + ["tools"] * (not self.pair_of_text and "tools" in existing)


@dataclass(frozen=True)
class ColumnChoice:
    """How the user wants columns to be chosen; called with what a source has.

    `named` is the pair of --prompt_column and --response_column, `split_column` what --validation_column names.
    """

    named: tuple[str, str] | None = None
    format: Format = "auto"
    separator: str | None = None  # None: by the columns
    split_column: str | None = None

    def __call__(self, columns: list[str], holds_lists: Callable[[str], bool], source: str) -> Layout:
        """The layout of `source`, whose `columns` hold lists where `holds_lists` says so, and text elsewhere."""
        if self.split_column is not None and self.split_column not in columns:
            raise InputError(
                f"{source} has the columns {quoted(columns)}, not the {self.split_column!r} that --validation_column "
                f"names.{_did_you_mean(self.split_column, columns)}"
            )
        chosen = self._choose(columns, source)
        if twice := [name for name in chosen if columns.count(name) > 1]:
            raise InputError(f"{source} has {columns.count(twice[0])} columns {twice[0]!r}; names must differ.")
        pair_of_text = len(chosen) == 2 and not holds_lists(chosen[0])
        if not pair_of_text:
            self._check_messages(chosen, source)
        separator = "" if chosen == TRL_PAIR else SEPARATOR
        return Layout(chosen, pair_of_text, separator if self.separator is None else self.separator, self.split_column)

    def _choose(self, columns: list[str], source: str) -> tuple[str, ...]:
        found = f"{source} has the columns {quoted(columns)}"
        if self.named is not None:
            for name in self.named:
                if name not in columns:
                    raise InputError(f"{found}, not {name!r}.{_did_you_mean(name, columns)}")
            return self.named
        known = {label: pair for label, pair in KNOWN_COLUMNS.items() if set(pair) <= set(columns)}
        others: list[tuple[str, ...]] = [names for names in (TRL_PAIR, (MESSAGES,)) if set(names) <= set(columns)]
        candidates = [*known.values(), *others]
        if candidates == [KNOWN_COLUMNS["Evol-CodeAlpaca"]] and _ALPACA_INPUT in columns:
            instruction, output = candidates[0]
            raise InputError(
                f"{found}; {quoted(candidates[0])} without {_ALPACA_INPUT!r} would lose what Alpaca's instructions are "
                f"about. Join the two into one column and name it with --prompt_column and --response_column; naming "
                f"{instruction!r} and {output!r} there trains without it."
            )
        if len(candidates) == 1:
            return candidates[0]
        if others:
            pair = next(names for names in candidates if len(names) == 2)
            raise InputError(
                f"{found}: both {_what(others[-1])} and {_what(pair)}. Name the pair to train on with "
                "--prompt_column and --response_column, or leave one of them out of the data."
            )
        verdict, pairs = ("more than one", known) if known else ("none", KNOWN_COLUMNS)
        more = "" if known else f", nor 'prompt' + 'completion', nor {MESSAGES!r}"
        raise InputError(
            f"{found}; among them is {verdict} of the known pairs {_pairs(pairs)}{more}. "
            "Name yours with --prompt_column and --response_column."
        )

    def _check_messages(self, columns: tuple[str, ...], source: str) -> None:
        what = f"{source} holds messages, in {quoted(columns)}"
        if self.format == "text":
            raise InputError(f"{what}, which are no plain text; use --format chat, or auto.")
        if self.separator is not None:
            raise InputError(f"{what}, between which the chat template stands; --separator is for text.")


def quoted(names: Iterable[str]) -> str:
    """'a', 'b': names as a list in a sentence."""
    return ", ".join(repr(str(name)) for name in names)


def _did_you_mean(name: str, columns: list[str]) -> str:
    lowered = {column.lower(): column for column in columns}
    close = difflib.get_close_matches(name.lower(), lowered, n=1)
    return f" Did you mean {lowered[close[0]]!r}?" if close else ""


def _what(names: tuple[str, ...]) -> str:
    return f"a conversation ({names[0]!r})" if len(names) == 1 else f"a pair ({' + '.join(map(repr, names))})"


def _pairs(pairs: dict[str, tuple[str, str]]) -> str:
    return ", ".join(f"{prompt!r} + {response!r} ({label})" for label, (prompt, response) in pairs.items())
