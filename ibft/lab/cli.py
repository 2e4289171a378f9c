"""`ibft lab`: the memorisation barrier as a controlled experiment, on data and models made on the spot."""

import signal
from collections.abc import Sequence
from pathlib import Path

from ibft.errors import InputError, Interrupted
from ibft.flags import read_flags

_DESCRIPTION = (
    "The paper's argument as a controlled experiment: tiny models that have memorised programs by their names are "
    "fine-tuned to follow descriptions, plainly and with the bottleneck, and judged on unseen tasks."
)
_EXAMPLE = """

  ibft lab --quick                    minutes on two free cores: one seed, the arms that tell the story
  ibft lab --full                     every regime and arm, several seeds; the same command goes on where it stopped
  ibft lab report FOLDER              the report alone, written anew of what there is of an experiment"""

_INTERRUPTED = "interrupted; the same command goes on where it stopped."


def main(argv: Sequence[str]) -> None:
    """Runs the experiment, or writes the report of one. Raises InputError for what it cannot do."""
    if argv and argv[0] == "report":
        if len(argv) != 2 or argv[1].startswith("-"):
            raise InputError("`ibft lab report` takes one folder, the --output_dir of an experiment.")
        from ibft.lab.experiment import report

        print(report(Path(argv[1])))
        return
    from ibft.lab.experiment import LabConfig, run_lab

    flags = read_flags(LabConfig, argv, "ibft lab", _DESCRIPTION, example=_EXAMPLE)
    config = LabConfig(**flags)
    try:
        run_lab(config)
    except KeyboardInterrupt as interrupt:
        raise Interrupted(_INTERRUPTED, signal.SIGINT) from interrupt
    except Interrupted as interrupt:  # in a process of a piece, whose message is of its own run
        raise Interrupted(_INTERRUPTED, interrupt.number) from interrupt
