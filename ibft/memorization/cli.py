"""`ibft memorization`: score, plot, filter."""

from __future__ import annotations

import json
import signal
from collections.abc import Sequence

from ibft.errors import InputError, Interrupted
from ibft.flags import did_you_mean, parse_flags
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
    config = parse_flags(
        ScoreFlags, argv, "ibft memorization score", "Min-K% Prob and Min-K%++ of every row of a dataset by a model."
    )
    from ibft.memorization.score import score

    try:
        print(f"scores in {score(config)}")
    except KeyboardInterrupt as interrupt:
        raise Interrupted(f"interrupted; {config.again} goes on where it stopped.", signal.SIGINT) from interrupt


def _plot(argv: Sequence[str]) -> None:
    names: list[str] = []
    description = "Densities of the scores in files of `ibft memorization score`, and how far apart each two lie."
    config = parse_flags(PlotFlags, argv, "ibft memorization plot", description, words=("FILE...", names))
    if not names:
        raise InputError("`ibft memorization plot` takes files of scores: ibft memorization plot FILE... --output PNG.")
    from ibft.memorization.plot import compare, describe

    result = compare(config, names)
    print(json.dumps(result, indent=2) if config.json else describe(result))


def _filter(argv: Sequence[str]) -> None:
    config = parse_flags(
        FilterFlags,
        argv,
        "ibft memorization filter",
        "A dataset without the rows that a model knows best, all columns kept.",
    )
    from ibft.memorization.filter import describe, filter_rows

    result = filter_rows(config)
    print(json.dumps(result, indent=2) if config.json else describe(result))


_COMMANDS = {"score": _score, "plot": _plot, "filter": _filter}
