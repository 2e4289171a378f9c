"""Where a run's numbers go: metrics.jsonl always, the terminal, and the trackers that were asked for and are there."""

import importlib
import json
import netrc
import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from tqdm import tqdm

from ibft.legacy import TRACKERS

TENSORBOARD_FOLDER = "runs"  # in the output folder, as transformers has it

_SHOWN = ("loss", "ce", "kl_nats", "ce_ib", "active_share", "eval_loss", "tokens_per_second")


class Metrics:
    """One record per optimizer step, on the main process only.

    `progress` is a bar on a terminal, and a line at a time elsewhere, where a bar would leave a mess of a log.
    """

    def __init__(self, path: Path, *, total_steps: int, start_step: int, trackers: "Sequence[Tracker]" = ()) -> None:
        self._file = path.open("a")
        self._trackers = list(trackers)
        self._total = total_steps
        no_terminal = not sys.stderr.isatty()
        self._bar = tqdm(total=total_steps, initial=start_step, unit="step", dynamic_ncols=True, disable=no_terminal)

    def write(self, records: list[dict[str, Any]]) -> None:
        """Appends the records of a logging window and shows the newest."""
        for record in records:
            self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        for tracker in list(self._trackers):
            try:
                for record in records:
                    numbers = {name: value for name, value in record.items() if isinstance(value, (int, float))}
                    del numbers["step"]  # given beside them, and a name of trackio's own
                    tracker.log(numbers, record["step"])
            except Exception as error:  # a full disk, a lost server, a bug of the library's: none is worth the run
                self._trackers.remove(tracker)
                self.say(f"warning: {tracker.name} stopped taking metrics ({_reason(error)}); {_ADVICE} from here on.")
        newest = {name: f"{records[-1][name]:.4g}" for name in _SHOWN if records[-1].get(name) is not None}
        self._bar.update(len(records))
        self._bar.set_postfix(newest)
        if self._bar.disable:
            shown = "  ".join(f"{name} {value}" for name, value in newest.items())
            print(f"step {records[-1]['step']}/{self._total}  {shown}", flush=True)

    def say(self, text: str) -> None:
        """A line to the terminal, clear of the bar."""
        tqdm.write(text)

    def close(self) -> None:
        """Closes file, bar and trackers."""
        self._bar.close()
        self._file.close()
        for tracker in self._trackers:
            try:
                tracker.finish()
            except Exception as error:
                self.say(f"warning: {tracker.name} did not finish cleanly ({_reason(error)}).")


class Tracker(Protocol):
    """Where numbers go besides metrics.jsonl. Whatever it raises, the run goes on without it."""

    name: str

    def log(self, values: dict[str, Any], step: int) -> None:
        """Takes the numbers of one optimizer step."""

    def finish(self) -> None:
        """Sends what is left, and closes."""


class _WandbLike:
    """wandb, or trackio, which has the same interface."""

    def __init__(self, name: str, project: str, run_name: str | None, config: dict[str, Any]) -> None:
        self.name = name
        self._run = importlib.import_module(name).init(project=project, name=run_name, config=config)

    def log(self, values: dict[str, Any], step: int) -> None:
        self._run.log(values, step=step)

    def finish(self) -> None:
        self._run.finish()


class _TensorBoard:
    name = "tensorboard"

    def __init__(self, folder: Path, run_name: str | None, config: dict[str, Any], start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # What an interrupted run wrote past its last checkpoint is hidden, for those steps come again.
        self._writer = SummaryWriter(str(folder), purge_step=start_step + 1 if start_step else None)
        self._writer.add_text("config", f"```json\n{json.dumps({'run_name': run_name, **config}, indent=2)}\n```")

    def log(self, values: dict[str, Any], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, global_step=step)
        self._writer.flush()

    def finish(self) -> None:
        self._writer.close()


_ADVICE = "metrics.jsonl has every number"


def start_trackers(
    report_to: Sequence[str], output: Path, *, run_name: str | None, config: dict[str, Any], start_step: int
) -> tuple[list[Tracker], list[str]]:
    """The trackers that could be started, and for each other one a notice: none is a reason not to train."""
    ready, notices = usable_trackers(report_to)
    started: list[Tracker] = []
    for name in ready:
        try:
            if name == "tensorboard":
                started.append(_TensorBoard(output / TENSORBOARD_FOLDER, run_name, config, start_step))
            else:
                started.append(_WandbLike(name, os.environ.get(f"{name.upper()}_PROJECT", "ibft"), run_name, config))
        except Exception as error:  # of many kinds, of the network too
            notices.append(f"{name} could not start ({_reason(error)}); {_ADVICE}.")
    return started, notices


def usable_trackers(report_to: Sequence[str]) -> tuple[list[str], list[str]]:
    """The trackers of --report_to that are installed and have the key they need, and a notice for each other one.

    "all" stands for those that are installed.
    """
    ready, notices = [], []
    for name in TRACKERS:
        if name not in report_to and not ("all" in report_to and _is_installed(name)):
            continue
        if not _is_installed(name):
            notices.append(f"report_to names {name}, which is not installed (pip install {name}); {_ADVICE}.")
        elif name == "wandb" and not _is_offline() and not _has_wandb_key():
            notices.append(f"report_to names wandb, but there is no key (wandb login, or WANDB_API_KEY); {_ADVICE}.")
        else:
            ready.append(name)
    return ready, notices


def _is_installed(name: str) -> bool:
    """Without importing it. A folder of that name, such as wandb makes where it runs, is no package."""
    if name in sys.modules:
        return True
    spec = find_spec(name)
    return spec is not None and spec.origin is not None


def _is_offline() -> bool:
    return os.environ.get("WANDB_MODE") in ("offline", "disabled")


def _has_wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
