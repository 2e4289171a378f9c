"""The command `ibft`: sub-commands, and errors without a traceback."""

import importlib
import os
import sys
import traceback
from collections.abc import Callable, Sequence

from ibft.errors import FailedElsewhere, HarnessError, InputError, Interrupted, SavingFailed, TrainingDiverged

_USAGE = """usage: ibft COMMAND [options]

commands:
  train         fine-tune a causal language model with an information bottleneck, or plainly (ibft train --help)
  eval          Pass@k and Pass@k^(m) of a model on HumanEval, MBPP, VerilogEval or your own task (ibft eval --help)
  estimate      what a training takes in memory and time on named GPUs, whether it fits (ibft estimate --help)
  memorization  which rows of a dataset a model knows already, and a filter (ibft memorization --help)
  represent     how far apart a model keeps memorised rows, and what a bottleneck keeps (ibft represent --help)
  export        make a run's adapter ready for others, merge it, push it to the Hub (ibft export --help)
  lab           the memorisation barrier as an experiment, on data and models made on the spot (ibft lab --help)

ibft --version prints the version."""
_COMMANDS = {
    "train": "ibft.train",
    "eval": "ibft.evaluate.cli",
    "estimate": "ibft.estimate.cli",
    "memorization": "ibft.memorization.cli",
    "represent": "ibft.represent.cli",
    "export": "ibft.export",
    "lab": "ibft.lab.cli",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a sub-command; returns the exit code: 0, 1 for a run that failed on the way, 2 for wrong input."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if command in ("-h", "--help", "help"):
        print(_USAGE)
        return 0
    if command == "--version":
        import ibft

        print(f"ibft {ibft.__version__}")
        return 0
    if command not in _COMMANDS:
        known = ", ".join(_COMMANDS)
        print(f"ibft: error: {command!r} is not a command of ibft; there are: {known}.", file=sys.stderr)
        return 2
    module = importlib.import_module(_COMMANDS[command])  # only now: they import torch, most of them
    return run_command(module.main, rest, interrupted=getattr(module, "INTERRUPTED", ""))


def run_command(command: Callable[[Sequence[str]], None], argv: Sequence[str], *, interrupted: str = "") -> int:
    """Runs a command; every error that is no bug becomes a sentence, and with `--debug` its traceback too.

    `interrupted`: what Ctrl-C leaves to be done, in words.

    Exit code 2: a wrong input, which another command line or file would mend. Exit code 1: the run failed on the way,
    because it diverged or because the system refused (disk full, no permission, file gone): an OSError with an errno.
    Exit code 128 + N: signal N ended it, with everything saved. Anything else is a bug, and its traceback is shown.
    """
    _adopt_published_token()
    rank = os.environ.get("RANK", "0")  # under torchrun, an error may be one process's alone
    where = "" if rank == "0" else f" (process {rank})"
    try:
        command(argv)
    except Interrupted as error:
        if rank == "0":
            print(f"ibft: {error}", file=sys.stderr)
        return 128 + error.number
    except (InputError, SavingFailed, TrainingDiverged, FailedElsewhere, HarnessError, OSError) as error:
        message = str(error)
        if isinstance(error, OSError):
            if error.errno is None:  # a library's own kind, raised for anything
                raise
            message = _system_error(error)
        if "--debug" in argv:
            traceback.print_exc()
        print(f"ibft: error{where}: {' '.join(message.splitlines())}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    except KeyboardInterrupt:
        print(f"ibft: interrupted{where}{interrupted}.", file=sys.stderr)
        return 130
    return 0


def _system_error(error: OSError) -> str:
    """What the system refused and for which file; a refusal that should not be is looked into with --debug."""
    file = f" {os.fspath(error.filename)!r}:" if isinstance(error.filename, (str, bytes, os.PathLike)) else ""
    return f"the system refused:{file} {error.strerror or error}. --debug shows where."


def _adopt_published_token() -> None:
    """HF_TOKEN is what the libraries read for tokenizer, model and datasets; the published project has another name."""
    token = os.environ.get("HUGGINGFACE_TOKEN")
    if token and not os.environ.get("HF_TOKEN"):
        os.environ["HF_TOKEN"] = token
