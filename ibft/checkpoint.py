"""What a run leaves on disk: checkpoints to resume from, and the final adapter. Nothing is ever half-written.

A folder is written under a temporary name and renamed when it is whole, so that whatever bears its final name is.
"""

import errno
import json
import os
import pickle
import re
import shutil
from collections.abc import Iterator, Set
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedTokenizerBase

from ibft.engine import Engine
from ibft.errors import InputError, SavingFailed
from ibft.model import HEAD_NAME, IBModel
from ibft.model_card import CARD_NAME, may_replace, render_card
from ibft.objective import CONFIG_NAME
from ibft.tracking import TENSORBOARD_FOLDER

RECORD_NAME = "ibft.json"
METRICS_NAME = "metrics.jsonl"
_STATE_NAME = "state.pt"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
# Disk full, over quota, file too large, read-only, not allowed, failing, gone.
_REFUSALS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
    errno.ENOENT,
    errno.ENOTDIR,
}
_TORCH_WRITER = "inline_container.cc"  # where torch.save's RuntimeError comes from on a full disk
_TAKE_ANOTHER = "Remove that checkpoint to continue from the one before it, or start over with --overwrite."
# A run continues the same whatever these are.
_FREE_TO_CHANGE = {
    *("output_dir", "overwrite", "resume", "save_strategy", "save_steps", "save_total_limit", "logging_steps"),
    *("eval_steps", "validation_dataset", "validation"),  # evaluating leaves no trace in a run
    *("report_to", "run_name", "num_proc", "ddp_timeout", "debug", "dry_run"),
    # Where things came from, and how they were asked for: what came of it is compared.
    *("base_model", "dataset", "training_config", "adapter_config", "preset", "dtype", "use_cpu"),
    *("per_device_train_batch_size", "tokens_per_batch", "gradient_accumulation_steps"),
    *("max_steps", "num_train_epochs"),
}


def prepare_output(folder: Path, *, overwrite: bool, resume: bool, dry_run: bool = False) -> None:
    """Refuses a folder that holds a run, unless told otherwise; makes it, and checks that it can be written to.

    Raises InputError. Removes nothing: see `clear_output`. With `dry_run` it makes nothing either, and asks the
    file system whether it could.
    """
    try:
        _refuse_occupied(folder, overwrite=overwrite, resume=resume)
        if dry_run:
            nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
            if not nearest.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
            if not os.access(nearest, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            return
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".write-test-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"output_dir {folder} cannot be written to: {error.strerror}.") from error


def _refuse_occupied(folder: Path, *, overwrite: bool, resume: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise InputError(f"output_dir {folder} is a file; name a folder.")
    if (folder / "config.json").exists():  # with an adapter beside it, transformers would load both as one model
        raise InputError(f"output_dir {folder} holds a model (config.json); choose another folder.")
    if resume and not checkpoints(folder):
        raise InputError(f"--resume: there is no checkpoint in {folder} to continue from.")
    if not overwrite:
        if _is_finished(folder):
            raise InputError(f"output_dir {folder} holds a finished run; choose another, or pass --overwrite.")
        if not resume and checkpoints(folder):
            raise InputError(
                f"output_dir {folder} holds an unfinished run; pass --resume, or --overwrite to start over."
            )
        if not resume and (folder / RECORD_NAME).exists():
            raise InputError(
                f"output_dir {folder} holds a run that ended before its first checkpoint; pass --overwrite."
            )
        if not resume and (folder / "adapter_config.json").exists():
            raise InputError(f"output_dir {folder} holds another adapter; choose another, or pass --overwrite.")


@contextmanager
def leave_no_empty_folder(folder: Path) -> Iterator[None]:
    """Where the block fails, the folders down to `folder` that it made are gone again, if they are empty."""
    missing = [path for path in (folder, *folder.parents) if not os.path.exists(path)]
    try:
        yield
    except BaseException:
        with suppress(OSError):
            for path in missing:
                path.rmdir()
        raise


@contextmanager
def saving_in(folder: Path) -> Iterator[None]:
    """Where the system lets the block write no further, SavingFailed says so, and what is whole in the run's `folder`.

    What was half-written is removed: it may be what fills the disk.
    """
    try:
        yield
    except Exception as error:
        if (reason := refusal(error, folder)) is None:
            raise
        with suppress(OSError):
            _remove_partial(folder)
        newest = [path.name for path in checkpoints(folder)[-1:]]
        survived = (
            f"{newest[0]} is whole: when this is mended, --resume continues from it."
            if newest
            else "No checkpoint had been written, so a new run starts over, with --overwrite."
        )
        raise SavingFailed(f"the run stopped, because {folder} could not be written: {reason}. {survived}") from error


def refusal(error: Exception, folder: Path) -> str | None:
    """Why the system let something be written no further, in the words of each library that writes; None: not that."""
    if isinstance(error, OSError):
        return error.strerror or str(error) if error.errno in _REFUSALS else None
    if re.search(r"\(os error \d+\)", str(error)):  # those in Rust: safetensors, tokenizers
        return str(error)
    if _TORCH_WRITER in str(error):  # torch does not say which of the system's errors it met
        return f"torch could write no further; {_free_space(folder)}"
    return None


def _free_space(folder: Path) -> str:
    try:
        return f"{shutil.disk_usage(folder).free / 2**20:,.0f} MiB are free"
    except OSError:
        return "the disk may be full"


def clear_output(folder: Path) -> None:
    """Removes what an earlier run left, so that nothing of it mixes with the new one."""
    for checkpoint in checkpoints(folder):
        _remove(checkpoint)
    _remove_partial(folder)
    for name in (RECORD_NAME, METRICS_NAME, HEAD_NAME, CONFIG_NAME, "adapter_model.safetensors", "adapter_config.json"):
        (folder / name).unlink(missing_ok=True)
    if may_replace(folder / CARD_NAME):
        (folder / CARD_NAME).unlink(missing_ok=True)
    for events in (folder / TENSORBOARD_FOLDER).glob("events.out.tfevents.*"):
        events.unlink()  # and nothing else: in the current folder, `runs` may hold what is not ours


def _remove_partial(folder: Path) -> None:
    for partial in folder.glob(".*.partial"):
        shutil.rmtree(partial) if partial.is_dir() else partial.unlink()


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in a run's folder, oldest step first."""
    if not folder.is_dir():
        return []
    named = [(match, path) for path in folder.iterdir() if (match := _CHECKPOINT.fullmatch(path.name))]
    # Another trainer's folders of that name are none of ours.
    return [
        path for _, path in sorted((int(match[1]), path) for match, path in named if (path / _STATE_NAME).is_file())
    ]


def save_checkpoint(
    folder: Path,
    step: int,
    engine: Engine,
    model: IBModel,
    optimizer: Optimizer,
    schedule: LRScheduler,
    run: dict[str, Any],
    keep: int | None,
) -> None:
    """Writes checkpoint-<step> (steps done) on all ranks together, then removes the oldest beyond `keep`.

    `run` is what a resumed run must match: see `load_checkpoint`.
    """
    target, partial = folder / f"checkpoint-{step}", folder / f".checkpoint-{step}.partial"
    if engine.is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    engine.barrier()
    torch.save(_rng_state(engine), partial / f"rng_{engine.rank}.pt")
    engine.barrier()
    if engine.is_main:
        model.save_pretrained(partial)
        state = {"step": step, "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict(), "run": run}
        torch.save(state, partial / _STATE_NAME)
        if target.exists():
            _remove(target)
        partial.rename(target)
        for old in checkpoints(folder)[: -keep or None] if keep is not None else []:
            _remove(old)
    engine.barrier()


def load_checkpoint(
    checkpoint: Path,
    engine: Engine,
    model: IBModel,
    optimizer: Optimizer,
    schedule: LRScheduler,
    run: dict[str, Any],
) -> int:
    """Restores everything from a checkpoint; returns the steps done.

    Raises InputError when configuration or data differ in what shapes the run, with the differences, and when a file
    of the checkpoint is damaged.
    """
    state = _matching_state(checkpoint, run)
    if model.bottleneck is not None and not (checkpoint / HEAD_NAME).is_file():
        raise InputError(f"{checkpoint} has no {HEAD_NAME}. {_TAKE_ANOTHER}")
    try:
        model.load_adapter(checkpoint, "default", is_trainable=True, torch_device=str(engine.device))
    except (OSError, SafetensorError, RuntimeError) as error:  # cut off, or weights of another shape
        raise InputError(f"the adapter in {checkpoint} cannot be read: {error}. {_TAKE_ANOTHER}") from error
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    rng = checkpoint / f"rng_{engine.rank}.pt"
    if rng.exists():  # with more processes than before, a new one goes on with its own seed
        _restore_rng(_load(rng), engine)
    return state["step"]


def steps_done(checkpoint: Path, run: dict[str, Any], unknown: Set[str]) -> int:
    """The steps done in a checkpoint, which is not restored; what is `unknown` of the run is not compared.

    Raises InputError as `load_checkpoint` does.
    """
    return _matching_state(checkpoint, run, unknown)["step"]


def _matching_state(checkpoint: Path, run: dict[str, Any], unknown: Set[str] = frozenset()) -> dict[str, Any]:
    state = _load(checkpoint / _STATE_NAME)
    if differences := _differences(state["run"], run, unknown):
        raise InputError(f"{checkpoint} is of a different run; resuming would mix them: {'; '.join(differences)}.")
    return state


def _load(file: Path) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        reason = str(error).partition(".")[0] or type(error).__name__
        raise InputError(f"{file} cannot be read: {reason}. {_TAKE_ANOTHER}") from error


def save_result(folder: Path, model: IBModel, tokenizer: PreTrainedTokenizerBase, record: dict[str, Any]) -> None:
    """The final artefacts: adapter, bottleneck, tokenizer, model card; last ibft.json, whose result says "finished".

    A README.md that someone wrote, or changed, is left alone.
    """
    partial = folder / ".result.partial"
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    (partial / CARD_NAME).write_text(render_card(record, "run"), encoding="utf-8")  # in place of PEFT's template
    write_json(partial / RECORD_NAME, record)
    names = sorted(path.name for path in partial.iterdir())
    for name in sorted(names, key=lambda name: name == RECORD_NAME):
        if name == CARD_NAME and not may_replace(folder / name):
            print(f"note: {folder / name} is yours and stays; it says nothing of this run unless you do.")
            continue
        if (folder / name).is_dir():
            shutil.rmtree(folder / name)
        os.replace(partial / name, folder / name)
    shutil.rmtree(partial)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Readable JSON, whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(values, indent=2) + "\n")
    os.replace(partial, path)


def trim_metrics(path: Path, step: int) -> None:
    """Drops the records after `step` that a resumed run will write again, and a last line cut short by a crash."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            break
        if record["step"] > step:
            break
        kept.append(line)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text("".join(f"{line}\n" for line in kept))
    os.replace(partial, path)


def _remove(checkpoint: Path) -> None:
    """Renamed first: a removal cut short leaves nothing that looks like a checkpoint."""
    doomed = checkpoint.with_name(f".{checkpoint.name}.partial")
    shutil.rmtree(doomed, ignore_errors=True)
    checkpoint.rename(doomed)
    shutil.rmtree(doomed)


def _is_finished(folder: Path) -> bool:
    """A record is written when a run starts, and again with its result when everything else is in place."""
    try:
        return json.loads((folder / RECORD_NAME).read_text())["result"] is not None
    except (OSError, ValueError, KeyError):
        return False


def _differences(before: dict[str, Any], now: dict[str, Any], unknown: Set[str]) -> list[str]:
    found = []
    for name in sorted({*before, *now} - _FREE_TO_CHANGE - unknown):
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            found += [f"{name}.{difference}" for difference in _differences(old, new, unknown)]
        elif old != new:
            found.append(f"{name} was {_shown(old)}, is {_shown(new)}")
    return found


def _shown(value: Any) -> str:
    fingerprint = isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value)
    return f"one of fingerprint {value[:12]}" if fingerprint else repr(value)


def _rng_state(engine: Engine) -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if engine.device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(engine.device)
    return state


def _restore_rng(state: dict[str, torch.Tensor], engine: Engine) -> None:
    torch.set_rng_state(state["cpu"])
    if engine.device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], engine.device)
