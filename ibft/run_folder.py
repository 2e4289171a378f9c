"""The folder of a run: whether it may be written to, what lies in it, and its final artefacts.

Whatever bears its final name is whole: it is written under another one, flushed to the disk, and renamed.
"""

import errno
import fcntl
import json
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ibft.errors import InputError, SavingFailed
from ibft.model import HEAD_NAME, IBModel
from ibft.model_card import CARD_NAME, may_replace, render_card
from ibft.objective import CONFIG_NAME, STATE_NAME
from ibft.tracking import TENSORBOARD_FOLDER

RECORD_NAME = "ibft.json"
METRICS_NAME = "metrics.jsonl"
MARK_NAME = "checkpoint.json"  # the last file of a checkpoint to be written
INTERRUPTED_NAME = "interrupted.json"  # of a run that a signal ended, until it goes on
LOCK_NAME = ".lock"  # there while a run writes to its folder
CHECKPOINT = re.compile(r"checkpoint-(\d+)")
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
    if resume and not checkpoints(folder) and not (folder / RECORD_NAME).exists():
        raise InputError(f"--resume: there is no checkpoint in {folder} to continue from.")
    if overwrite:
        return
    if _is_finished(folder):
        raise InputError(f"output_dir {folder} holds a finished run; choose another, or pass --overwrite.")
    if resume:
        return
    if checkpoints(folder):
        raise InputError(f"output_dir {folder} holds an unfinished run; pass --resume, or --overwrite to start over.")
    if (folder / RECORD_NAME).exists():
        raise InputError(
            f"output_dir {folder} holds a run that ended before its first checkpoint; pass --resume or --overwrite, "
            "either of which starts over."
        )
    if (folder / "adapter_config.json").exists():
        raise InputError(f"output_dir {folder} holds another adapter; choose another, or pass --overwrite.")


@contextmanager
def hold_output(folder: Path, *, overwrite: bool, resume: bool, dry_run: bool = False) -> Iterator[None]:
    """`prepare_output`, and no other run in the folder while the block runs; InputError where there is one."""
    with leave_no_empty_folder(folder):
        prepare_output(folder, overwrite=overwrite, resume=resume, dry_run=dry_run)
        with nullcontext() if dry_run else _locked(folder):
            yield


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """By `lockf`, since `flock` would outlive a process that was killed in those that it had forked."""
    path = folder / LOCK_NAME
    with path.open("a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            taken = os.fstat(file.fileno()).st_nlink == 0  # by one that then ended, and has just removed the file
        except (BlockingIOError, PermissionError):
            taken = True
        except OSError:  # a network file system without locks
            taken = False
        if taken:
            file.seek(0)
            raise InputError(
                f"output_dir {folder} is being written to by another run ({file.read() or 'which has just begun'}); "
                f"wait for it, or end it. If there is none, remove {path}."
            )
        try:
            try:
                file.truncate(0)
                os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode())
            except OSError as error:  # a full disk, before anything expensive
                raise InputError(f"output_dir {folder} cannot be written to: {error.strerror}.") from error
            yield
        finally:
            with suppress(OSError):
                path.unlink()


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
            remove_partial(folder)
        newest = [path.name for path in checkpoints(folder)[-1:]]
        survived = (
            f"{newest[0]} is whole: when this is mended, --resume continues from it."
            if newest
            else "No checkpoint had been written, so --resume starts over."
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
        remove_checkpoint(checkpoint)
    remove_partial(folder)
    for name in (
        *(RECORD_NAME, METRICS_NAME, INTERRUPTED_NAME, HEAD_NAME, CONFIG_NAME, STATE_NAME),
        *("adapter_model.safetensors", "adapter_config.json"),
    ):
        (folder / name).unlink(missing_ok=True)
    if may_replace(folder / CARD_NAME):
        (folder / CARD_NAME).unlink(missing_ok=True)
    for events in (folder / TENSORBOARD_FOLDER).glob("events.out.tfevents.*"):
        events.unlink()  # and nothing else: in the current folder, `runs` may hold what is not ours


def remove_partial(folder: Path) -> None:
    """Removes what was being written when a run was cut off."""
    for partial in folder.glob(".*.partial"):
        shutil.rmtree(partial) if partial.is_dir() else partial.unlink()


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in a run's folder, oldest step first."""
    if not folder.is_dir():
        return []
    named = [(match, path) for path in folder.iterdir() if (match := CHECKPOINT.fullmatch(path.name))]
    # Another trainer's folders of that name are none of ours.
    return [path for _, path in sorted((int(match[1]), path) for match, path in named if (path / MARK_NAME).is_file())]


def refuse_in_the_way(folder: Path, steps: range) -> None:
    """Raises InputError for what bears the name of a checkpoint after one of these steps, and is none of ours.

    Ours are never in the way: a run goes on from the newest, or `clear_output` removes them all.
    """
    for path in folder.glob("checkpoint-*"):
        match = CHECKPOINT.fullmatch(path.name)
        if match and int(match[1]) in steps and not (path / MARK_NAME).is_file():
            raise InputError(
                f"{path} is in the way of the checkpoint after step {match[1]}, and has no {MARK_NAME}, so that it may "
                "be another program's; move it, or choose another output_dir."
            )


def save_result(
    folder: Path,
    model: IBModel,
    weights: dict[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    record: dict[str, Any],
) -> None:
    """The final artefacts: adapter, bottleneck, tokenizer, model card; last ibft.json, whose result says "finished".

    `weights` are the engine's. A README.md that someone wrote, or changed, is left alone.
    """
    partial = folder / ".result.partial"
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial, state_dict=weights)
    tokenizer.save_pretrained(partial)
    (partial / CARD_NAME).write_text(render_card(record, "run"), encoding="utf-8")  # in place of PEFT's template
    write_json(partial / RECORD_NAME, record)
    flush_folder(partial)
    names = sorted(path.name for path in partial.iterdir())
    for name in sorted(names, key=lambda name: name == RECORD_NAME):
        if name == CARD_NAME and not may_replace(folder / name):
            print(f"note: {folder / name} is yours and stays; it says nothing of this run unless you do.")
            continue
        if (folder / name).is_dir():
            shutil.rmtree(folder / name)
        os.replace(partial / name, folder / name)
    (folder / INTERRUPTED_NAME).unlink(missing_ok=True)
    flush(folder)
    shutil.rmtree(partial)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Readable JSON, whole or not at all."""
    _write_whole(path, json.dumps(values, indent=2) + "\n")


def _write_whole(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    flush(partial)
    os.replace(partial, path)


def flush(path: Path) -> None:
    """Waits until a file's content, or a folder's list of names, is on the disk: a power cut must not undo a rename."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def flush_folder(folder: Path) -> None:
    """`flush` for everything in a folder, and for itself."""
    for path in folder.rglob("*"):
        flush(path)
    flush(folder)


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
    _write_whole(path, "".join(f"{line}\n" for line in kept))


def remove_checkpoint(checkpoint: Path) -> None:
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
