"""`ibft lab --quick | --full`: runs the plan piece by piece in several processes, and puts the results together.

Every piece leaves its own result.json; what is there is not run again, so that the same command goes on where another
one stopped. results.json is made of those files alone, by `ibft lab report` too, of an experiment that is not finished.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ibft.errors import FailedElsewhere, InputError, Interrupted
from ibft.flags import AT_LEAST_1, NOT_EMPTY, Check, check_fields, flag
from ibft.lab.plan import TRIAL_SEEDS, Arm, Plan, Regime, full_plan, quick_plan

PARTS = ("bases", "runs")
PLAN_NAME, RESULTS_NAME = "lab.json", "results.json"
# Numerical libraries read their number of threads when they are loaded; DeepSpeed, where it is installed, need not look
# for a GPU.
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
}
_SECONDS_TO_CTRL_C = 0.5  # how often it is looked at
SEEDS = 4  # of --full
FIRST_SEED = 10  # none of plan.TRIAL_SEEDS, on which settings were chosen
SEED: Check = (lambda v: 0 <= v < 2**31, "between 0 and 2**31 - 1")


@dataclass(frozen=True, kw_only=True)
class LabConfig:
    """The flags of `ibft lab`."""

    quick: bool = flag("lab", False, "one seed, two regimes, the arms that tell the story: minutes on two cores")
    full: bool = flag(
        "lab", False, "every regime and arm, several seeds: about an hour on two free cores, two hours at the most"
    )
    output_dir: str = flag("lab", "ibft-lab", "folder for models, results and report", NOT_EMPTY, path=True)
    seed: int = flag(
        "lab", FIRST_SEED, "the first seed; settings were chosen on 0 to 2, which therefore flatter them", SEED
    )
    seeds: int | None = flag("lab", None, "number of seeds of --full; 4 if not given", AT_LEAST_1)
    workers: int | None = flag("lab", None, "processes of one thread; if not given, one a core, at most 8", AT_LEAST_1)
    overwrite: bool = flag("lab", False, "start over in a folder that holds an experiment")
    debug: bool = flag("lab", False, "show the traceback of an error")

    def __post_init__(self) -> None:
        check_fields(self)
        if self.quick == self.full:
            raise InputError("`ibft lab` takes one of --quick (minutes) and --full (about an hour).")
        if self.quick and self.seeds is not None:
            raise InputError(f"--seeds {self.seeds} needs --full: --quick has one seed, which --seed chooses.")

    @property
    def plan(self) -> Plan:
        """What is to be run."""
        if self.quick:
            return quick_plan(self.seed)
        return full_plan(tuple(range(self.seed, self.seed + (SEEDS if self.seeds is None else self.seeds))))


class Piece(NamedTuple):
    """A job of one process: what it makes, what must be there before, and what is said when it is done."""

    folder: Path
    needs: tuple[Path, ...]
    run: Callable[..., None]
    arguments: tuple[Any, ...]
    said: Callable[[dict[str, Any]], str]

    @property
    def result(self) -> Path:
        """Whose presence says that the piece is finished."""
        return self.folder / "result.json"


def run_lab(config: LabConfig, plan: Plan | None = None) -> dict[str, Any]:
    """Runs what is missing of the plan; writes results.json and report.html, prints the table, returns the results.

    InputError for an output folder that holds another experiment, before anything is run.
    """
    from ibft.lab.figures import check_plotting
    from ibft.lab.report import write_report
    from ibft.lab.results import gather
    from ibft.run_folder import prepare_output, write_json

    plan, folder = plan or config.plan, Path(config.output_dir)
    check_plotting()
    _refuse_other_plan(folder, plan, overwrite=config.overwrite)
    prepare_output(folder, overwrite=True, resume=False)
    with _held(folder):
        if config.overwrite:
            for name in PARTS:
                shutil.rmtree(folder / name, ignore_errors=True)
            for name in (PLAN_NAME, RESULTS_NAME):
                (folder / name).unlink(missing_ok=True)
        write_json(folder / PLAN_NAME, plan.to_dict())
        if tried := sorted({*plan.seeds} & {*TRIAL_SEEDS}):
            print(
                f"warning: settings were chosen in trials on the seeds {', '.join(map(str, TRIAL_SEEDS))}; what they "
                f"gain on seed {', '.join(map(str, tried))} flatters them.",
                file=sys.stderr,
                flush=True,
            )
        workers = config.workers or min(_cores(), 8)
        pieces = list(_pieces(plan, folder))
        missing = [piece for piece in pieces if not piece.result.exists()]
        print(
            f"{len(pieces)} base models and fine-tunings, {len(missing)} of them to do, {workers} processes of one "
            f"thread; all in {folder}.",
            flush=True,
        )
        failure = _run_pieces(missing, workers)
        results = gather(plan, folder, [piece.folder for piece in pieces])
        if failure and not results["runs"]:
            raise failure
        write_json(folder / RESULTS_NAME, results)
        print(f"\n{write_report(folder)}\n\nThe report: {folder / 'report.html'}, made from {folder / RESULTS_NAME}.")
        if failure:
            raise failure
        return results


def report(folder: Path) -> str:
    """Writes the report of what there is of an experiment, finished or not; returns its table for the terminal.

    Where the pieces lie beside it, results.json is made of them first; else it is read as it is. InputError where there
    is neither, or what there is was not written by this version.
    """
    from ibft.lab.figures import check_plotting
    from ibft.lab.report import write_report

    check_plotting()
    if (folder / PLAN_NAME).exists() and any((folder / name).is_dir() for name in PARTS):
        from ibft.lab.results import gather
        from ibft.run_folder import write_json

        try:
            plan = _plan_of(json.loads((folder / PLAN_NAME).read_text()))
            results = gather(plan, folder, [piece.folder for piece in _pieces(plan, folder)])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(
                f"{folder} holds an experiment that this version cannot read ({type(error).__name__}: {error})."
            ) from error
        if not results["runs"]:
            raise InputError(f"{folder} holds no finished fine-tuning yet, so there is nothing to report.")
        write_json(folder / RESULTS_NAME, results)
    return write_report(folder)


def _plan_of(found: Any) -> Plan:
    """A plan from what its `to_dict` left as JSON."""

    def made(kind: type[Any], values: dict[str, Any]) -> Any:
        return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})

    regimes, arms = ([made(kind, each) for each in found[name]] for kind, name in ((Regime, "regimes"), (Arm, "arms")))
    return made(Plan, {**found, "regimes": regimes, "arms": arms})


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    """The folder for this process alone. InputError where another one has it."""
    lock = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"output_dir {folder} is in use by another `ibft lab`; wait for it, or end it.") from error
        yield
    finally:
        os.close(lock)


def _refuse_other_plan(folder: Path, plan: Plan, *, overwrite: bool) -> None:
    """Refuses a folder with another experiment's pieces, and, even to overwrite, with things of other origin."""
    file = folder / PLAN_NAME
    if not file.exists():
        if foreign := [name for name in (*PARTS, RESULTS_NAME) if (folder / name).exists()]:
            raise InputError(
                f"output_dir {folder} holds {foreign[0]}, which is of no experiment; choose another folder."
            )
        return
    if overwrite:
        return
    try:
        found = json.loads(file.read_text())
    except ValueError as error:
        raise InputError(f"{file} cannot be read ({error}); choose another folder, or pass --overwrite.") from error
    wanted = json.loads(json.dumps(plan.to_dict()))
    if found == wanted:
        return
    different = [name for name in wanted if found.get(name) != wanted[name]] if isinstance(found, dict) else []
    raise InputError(
        f"output_dir {folder} holds an experiment with other settings ({', '.join(different) or 'of another kind'}); "
        "choose another folder, or pass --overwrite to start over."
    )


def _pieces(plan: Plan, output: Path) -> Iterator[Piece]:
    """All of them, each after those that it needs."""
    from ibft.lab import jobs

    for seed in plan.seeds:
        first = jobs.base_folder(output, seed, jobs.FIRST_READING)
        yield Piece(first, (), jobs.first_reading, (plan, output, seed), _said_of_reading)
        for name, regime in {regime.base: regime for regime in plan.regimes}.items():
            base = jobs.base_folder(output, seed, name)
            yield Piece(base, (first,), jobs.make_base, (plan, output, seed, regime), _said_of_base)
        for regime in plan.regimes:
            base = jobs.base_folder(output, seed, regime.base)
            for arm in plan.arms:
                if plan.includes(regime, arm):
                    folder = jobs.run_folder(output, regime, arm, seed)
                    yield Piece(folder, (base,), jobs.run_arm, (plan, output, seed, regime, arm), _said_of_run)


def _cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _run_pieces(pieces: Sequence[Piece], workers: int) -> Exception | None:
    """Runs them in processes of one thread, each as soon as what it needs is there, and says what came of each.

    A piece that fails takes those with it that need it, and no others; its error is returned, the first of several.
    Where a process is killed, the pieces that then run are lost and no others are begun.
    """
    before = {name: os.environ.get(name) for name in _ENVIRONMENT}
    os.environ.update(_ENVIRONMENT)
    try:
        # A fresh interpreter for each process: a forked one would inherit the threads of the libraries.
        with (
            ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_one_thread) as pool,
            _ctrl_c_noted() as noted,
        ):
            return _work_off(pieces, pool, workers, noted)
    except BrokenProcessPool:
        return FailedElsewhere(
            "a process of the experiment was killed (was there too little memory?); the same command goes on where it "
            "stopped."
        )
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


def _work_off(
    pieces: Sequence[Piece], pool: ProcessPoolExecutor, workers: int, ctrl_c: Sequence[int]
) -> Exception | None:
    others = multiprocessing.active_children()
    done = 0
    failure: Exception | None = None
    waiting, running = list(pieces), dict[Future[None], Piece]()
    while waiting or running:
        ready = (piece for piece in waiting if all((need / "result.json").exists() for need in piece.needs))
        for piece in list(itertools.islice(ready, workers - len(running))):
            waiting.remove(piece)
            with _ctrl_c_held_back():
                running[pool.submit(piece.run, *piece.arguments)] = piece
        assert running, "a piece needs what no piece makes"
        finished, _ = wait(running, timeout=_SECONDS_TO_CTRL_C, return_when=FIRST_COMPLETED)
        if ctrl_c:
            for process in multiprocessing.active_children():
                if process not in others:
                    process.terminate()
            raise KeyboardInterrupt
        for future in finished:
            piece = running.pop(future)
            try:
                future.result()
            except (Interrupted, BrokenProcessPool):
                raise
            except Exception as error:
                failure = failure or error
                waiting = _without(waiting, piece)
                print(f"failed: {piece.folder}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            else:
                done += 1
                print(f"{done:4}/{len(pieces)}  {piece.said(_read(piece.result))}", flush=True)
    return failure


@contextlib.contextmanager
def _ctrl_c_noted() -> Iterator[Sequence[int]]:
    """Ctrl-C adds to what this gives. An exception might come while a lock of a future is held, and leave it so."""
    noted: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: noted.append(number))
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _ctrl_c_held_back() -> Iterator[None]:
    """Processes started within never see Ctrl-C, which a terminal sends to all, nor print a traceback of it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _without(pieces: Sequence[Piece], lost: Piece) -> list[Piece]:
    """Those that need the lost one neither themselves nor through another; `pieces` are in the order of their needs."""
    folders, kept = {lost.folder}, []
    for piece in pieces:
        if folders.isdisjoint(piece.needs):
            kept.append(piece)
        else:
            folders.add(piece.folder)
    return kept


def _one_thread() -> None:
    """At the start of a process, which ends with the one that started it, however that ended."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    import datasets
    import torch

    from ibft.loading import quiet_libraries

    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # tiny numbers would make a small model crawl on a CPU
    quiet_libraries(progress_bars=False)
    datasets.disable_progress_bars()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text())


def _seconds(result: dict[str, Any]) -> str:
    return f"{result['processor_seconds']:.0f} s"


def _said_of_reading(result: dict[str, Any]) -> str:
    return f"seed {result['seed']}  first reading: loss {result['curve'][-1]['loss']:.3f}  {_seconds(result)}"


def _said_of_base(result: dict[str, Any]) -> str:
    recalled = {name: sum(result[name]["recalled"]) for name in ("training", "decoys")}
    return (
        f"seed {result['seed']}  base {result['base']}: recalls by name {recalled['training']} programs of the "
        f"training set, {recalled['decoys']} other ones  {_seconds(result)}"
    )


def _said_of_run(result: dict[str, Any]) -> str:
    kl = result["curve"][-1]["kl_nats"]
    return (
        f"seed {result['seed']}  {result['regime']:9}  {result['arm']:20}  training {result['training']['greedy']:4.0%}"
        f"  held out {result['held_out']['greedy']:4.0%}"
        + (f"  KL {kl:.3g} nats" if kl is not None else "")
        + f"  {_seconds(result)}"
    )
