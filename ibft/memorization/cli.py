"""`ibft memorization`: score, plot, filter."""

from __future__ import annotations

import json
import signal
from collections.abc import Sequence
from typing import Any

from ibft.errors import InputError, Interrupted
from ibft.flags import did_you_mean, read_flags, require
from ibft.memorization.config import FilterFlags, PlotFlags, ScoreFlags

_USAGE = """usage: ibft memorization COMMAND [options]

Which rows of a dataset a model already knows by heart.

commands:
  score   Min-K% Prob and Min-K%++ of every row (ibft memorization score --help)
  plot    densities of scores of several models and datasets, AUC and KS (ibft memorization plot --help)
  filter  a dataset without the rows that are known best (ibft memorization filter --help)"""


def main(argv: Sequence[str]) -> None:
    """Runs a command of `ibft memorization`. InputError for whatever cannot be used."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_USAGE)
        return
    if argv[0] not in _COMMANDS:
        raise InputError(
            f"{argv[0]!r} is not a command of `ibft memorization`; there are {', '.join(_COMMANDS)}."
            f"{did_you_mean(argv[0], _COMMANDS)}"
        )
    _COMMANDS[argv[0]](argv[1:])


def _score(argv: Sequence[str]) -> None:
    config = _read(ScoreFlags, argv, "score", "Min-K% Prob and Min-K%++ of every row of a dataset by a model.")
    from ibft.memorization.score import score

    try:
        print(f"scores in {score(config)}")
    except KeyboardInterrupt as interrupt:
        raise Interrupted(f"interrupted; {config.again} goes on where it stopped.", signal.SIGINT) from interrupt


def _plot(argv: Sequence[str]) -> None:
    names: list[str] = []
    description = "Densities of the scores in files of `ibft memorization score`, and how far apart each two lie."
    config = _read(PlotFlags, argv, "plot", description, ("FILE...", names))
    if not names:
        raise InputError("`ibft memorization plot` takes files of scores: ibft memorization plot FILE... --output PNG.")
    from ibft.memorization.plot import compare, describe

    result = compare(config, names)
    print(json.dumps(result, indent=2) if config.json else describe(result))


def _filter(argv: Sequence[str]) -> None:
    config = _read(FilterFlags, argv, "filter", "A dataset without the rows that a model knows best, all columns kept.")
    from ibft.memorization.filter import describe, filter_rows

    result = filter_rows(config)
    print(json.dumps(result, indent=2) if config.json else describe(result))


def _read(
    cls: Any, argv: Sequence[str], command: str, description: str, words: tuple[str, list[str]] | None = None
) -> Any:
    flags = read_flags(cls, argv, f"ibft memorization {command}", description, words=words)
    require(cls, flags, f"ibft memorization {command}")
    return cls(**flags)


_COMMANDS = {"score": _score, "plot": _plot, "filter": _filter}
