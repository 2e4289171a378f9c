"""Checkpoints to resume from: written whole or not at all, read back to the bit, on any engine and number of processes.

A checkpoint is written under a temporary name, flushed, and renamed; checkpoint.json, its last file, lists the others
with their digests. Weights and optimizer state are whole tensors by name.
"""

import dataclasses
import hashlib
import json
import re
import shutil
import socket
from collections.abc import Set
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ibft.config import TrainConfig
from ibft.engines import Engine
from ibft.errors import InputError
from ibft.flags import REQUIRED, default_of
from ibft.model import IBModel
from ibft.objective import STATE_NAME, IBConfig
from ibft.run_folder import MARK_NAME, checkpoints, flush, flush_folder, remove_checkpoint, write_json

if TYPE_CHECKING:
    from ibft.run import Run

_STATE_NAME = "state.pt"
_TAKE_ANOTHER = "Remove that checkpoint to continue from the one before it, or start over with --overwrite."
# A run continues the same whatever these are.
_FREE_TO_CHANGE = {
    *("output_dir", "overwrite", "resume", "save_strategy", "save_steps", "save_total_limit", "logging_steps"),
    *("eval_steps", "validation_dataset", "validation"),  # evaluating leaves no trace in a run
    *("report_to", "run_name", "num_proc", "ddp_timeout", "debug", "dry_run"),
    *("engine", "use_deepspeed", "deepspeed_config"),  # the same steps, up to rounding
    *("gradient_checkpointing", "profile", "peak_tflops"),
    # Where things came from, and how they were asked for: what came of it is compared.
    *("base_model", "dataset", "training_config", "adapter_config", "preset", "dtype", "use_cpu"),
    *("memorization_scores", "drop_memorized", "memorization_measure"),
    *("per_device_train_batch_size", "tokens_per_batch", "gradient_accumulation_steps"),
    *("max_steps", "num_train_epochs"),
}


class Checkpoint(NamedTuple):
    """What checkpoint.json says."""

    path: Path
    step: int  # steps done
    run: dict[str, Any]  # what a resumed run must match
    rows_per_process: int  # of a step
    files: dict[str, str]  # name -> sha256


def save_checkpoint(run: "Run", step: int) -> None:
    """Writes checkpoint-<step> (steps done) on all ranks together, then removes the oldest beyond save_total_limit."""
    engine, model, folder = run.engine, run.model, run.output
    weights, optimizer_state = engine.weights(model), engine.optimizer_state(model, run.optimizer)
    generators = engine.gather(_generators(engine))
    target, partial = folder / f"checkpoint-{step}", folder / f".checkpoint-{step}.partial"

    def write() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        model.save_pretrained(partial, state_dict=weights)
        state = {"optimizer": optimizer_state, "schedule": run.schedule.state_dict(), "generators": generators}
        torch.save(state, partial / _STATE_NAME)
        files = {path.name: _digest(path) for path in sorted(partial.iterdir())}
        rows = run.config.rows_per_process
        write_json(partial / MARK_NAME, {"step": step, "run": run.identity, "rows_per_process": rows, "files": files})
        flush_folder(partial)
        partial.rename(target)  # nothing of that name is there: see `refuse_in_the_way`
        flush(folder)
        if (keep := run.config.save_total_limit) is not None:
            for old in checkpoints(folder)[:-keep]:
                remove_checkpoint(old)

    engine.on_main(write)


def newest_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest complete one; None where there is none. Raises InputError where a file is not what was written."""
    if not (found := checkpoints(folder)):
        return None
    path = found[-1]
    try:
        checkpoint = Checkpoint(path, **json.loads((path / MARK_NAME).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path / MARK_NAME} cannot be read: {error}. {_TAKE_ANOTHER}") from error
    for name, digest in checkpoint.files.items():
        file = path / name
        try:
            if _digest(file) != digest:
                raise InputError(f"{file} is damaged: it is not what was written. {_TAKE_ANOTHER}")
        except OSError as error:
            raise InputError(f"{file} cannot be read: {error.strerror}. {_TAKE_ANOTHER}") from error
    return checkpoint


def check_run(checkpoint: Checkpoint, identity: dict[str, Any], unknown: Set[str]) -> None:
    """Raises InputError where configuration or data differ in what shapes the run, with the differences.

    What is `unknown` of its identity is not compared.
    """
    before = {**_defaults(TrainConfig), **checkpoint.run}
    if before.get("ib") is not None:
        before["ib"] = {**_defaults(IBConfig), **before["ib"]}
    if differences := _differences(before, identity, unknown):
        raise InputError(f"{checkpoint.path} is of a different run; resuming would mix them: {'; '.join(differences)}.")


def check_shared(checkpoint: Checkpoint) -> None:
    """Raises InputError on a machine that does not have the checkpoint, of which every process reads its part."""
    if not (checkpoint.path / MARK_NAME).is_file():
        raise InputError(
            f"{checkpoint.path} is not to be found on {socket.gethostname()}; the machines of a run that is resumed "
            "must share its output_dir."
        )


def load_weights(checkpoint: Checkpoint, model: IBModel) -> None:
    """Adapter and bottleneck into a model that is not distributed yet."""
    device = next(model.parameters()).device
    model.load_adapter(checkpoint.path, "default", is_trainable=True, torch_device=str(device))


def load_state(
    checkpoint: Checkpoint, engine: Engine, model: IBModel, optimizer: Optimizer, schedule: LRScheduler
) -> None:
    """Optimizer, schedules and this rank's random generators."""
    # Mapped, because every rank reads its part.
    state = torch.load(checkpoint.path / _STATE_NAME, map_location="cpu", weights_only=True, mmap=True)
    if model.objective is not None and model.objective.varies:
        model.objective.load(checkpoint.path / STATE_NAME)
    engine.load_optimizer_state(model, optimizer, state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    for group, learning_rate in zip(optimizer.param_groups, schedule.get_last_lr(), strict=True):
        group["lr"] = learning_rate  # of the next step; the schedule sets it only when it moves on
    if engine.rank < len(state["generators"]):  # with more processes than before, a new one goes on with its own seed
        generators = state["generators"][engine.rank]
        torch.set_rng_state(generators["cpu"].clone())
        if engine.device.type == "cuda" and "cuda" in generators:
            torch.cuda.set_rng_state(generators["cuda"].clone(), engine.device)


def _generators(engine: Engine) -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if engine.device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(engine.device)
    return state


def _digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _defaults(settings: type) -> dict[str, Any]:
    """What an older version's run did about options that it did not have yet; as JSON gives it back."""
    defaults = {field.name: default_of(field) for field in dataclasses.fields(settings)}
    return json.loads(json.dumps({name: value for name, value in defaults.items() if value is not REQUIRED}))


def _differences(before: dict[str, Any], now: dict[str, Any], unknown: Set[str]) -> list[str]:
    found = []
    for name in sorted({*before, *now} - _FREE_TO_CHANGE - unknown):
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            found += [f"{name}.{difference}" for difference in _differences(old, new, unknown)]
        elif old != new:
            found.append(f"{name} was {shown(old)}, is {shown(new)}")
    return found


def shown(value: Any) -> str:
    """A value of a run as a sentence names it."""
    fingerprint = isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value)
    return f"one of fingerprint {value[:12]}" if fingerprint else repr(value)
