"""Where a run's numbers go: metrics.jsonl always, the terminal, and the trackers that were asked for and are there."""

import importlib.util
import json
import netrc
import os
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tqdm import tqdm

_SHOWN = ("loss", "ce", "kl_nats", "ce_ib", "active_share", "tokens_per_second")


class Metrics:
    """One record per optimizer step, on the main process only.

    `progress` is a bar on a terminal, and a line at a time elsewhere, where a bar would leave a mess of a log.
    """

    def __init__(self, path: Path, *, total_steps: int, start_step: int, tracker: Any | None) -> None:
        self._file = path.open("a")
        self._tracker = tracker
        self._total = total_steps
        self._bar = tqdm(total=total_steps, initial=start_step, unit="step", dynamic_ncols=True, disable=_no_terminal())

    def write(self, records: list[dict[str, Any]]) -> None:
        """Appends the records of a logging window and shows the newest."""
        for record in records:
            self._file.write(json.dumps(record) + "\n")
            if self._tracker is not None:
                self._tracker.log(record, step=record["step"])
        self._file.flush()
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
        """Closes file, bar and tracker."""
        self._bar.close()
        self._file.close()
        if self._tracker is not None:
            self._tracker.finish()


def start_tracker(report_to: list[str], run_name: str | None, config: dict[str, Any]) -> tuple[Any | None, str | None]:
    """(wandb run or None, warning or None): a tracker that is not installed or has no key is no reason to stop."""
    if "wandb" not in report_to:
        return None, None
    advice = "the metrics go to metrics.jsonl alone"
    if importlib.util.find_spec("wandb") is None:
        return None, f"report_to names wandb, which is not installed (pip install wandb); {advice}."
    if os.environ.get("WANDB_MODE") not in ("offline", "disabled") and not _has_wandb_key():
        return None, f"report_to names wandb, but there is no key (wandb login, or WANDB_API_KEY); {advice}."
    import wandb

    try:
        project = os.environ.get("WANDB_PROJECT", "ibft")
        return wandb.init(project=project, name=run_name, config=config), None
    except Exception as error:  # wandb raises errors of many kinds, of the network too: none is worth a training run
        return None, f"wandb could not start ({error}); {advice}."


def _has_wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _no_terminal() -> bool:
    return not sys.stderr.isatty()
