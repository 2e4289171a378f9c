"""`ibft train`: fine-tunes a causal language model with LoRA and an information bottleneck (or without: SFT).

Reads top to bottom: set up (run.py), describe, loop, finish. Also `python -m ibft.train`, and for several processes
`torchrun --nproc_per_node N -m ibft.train`.
"""

import gc
import math
import signal
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from ibft.arguments import parse_args
from ibft.checkpoint import save_checkpoint
from ibft.config import TrainConfig
from ibft.data import load_batches
from ibft.engines import start_engine
from ibft.errors import Interrupted, TrainingDiverged
from ibft.loading import autocast, quiet_libraries
from ibft.record import describe_dry_run, describe_run, run_record
from ibft.run import Run, set_up
from ibft.run_folder import (
    INTERRUPTED_NAME,
    METRICS_NAME,
    RECORD_NAME,
    clear_output,
    hold_output,
    remove_partial,
    save_result,
    saving_in,
    trim_metrics,
    write_json,
)
from ibft.signals import StopSignals
from ibft.speed import Speedometer, tracing
from ibft.step_records import SUMMARY, StepRecord, is_finite, stack_terms, to_host, what_diverged
from ibft.tracking import Metrics, start_trackers, usable_trackers
from ibft.validation import Validation

INTERRUPTED = "; `--resume` continues from the newest checkpoint, if there is one"  # a second Ctrl-C, or an early one
_COLLAPSED = (
    "warning: the posterior has collapsed: no dimension of the bottleneck varies with the input (all have "
    "Var(mu) <= 0.01), so KL and CE_ib teach nothing. A larger --beta, a smaller --kl_weight, --free_bits, "
    "--ib_rate_target or another --target_layer may help."
)


def main(argv: Sequence[str]) -> None:
    """Parses the command line and trains."""
    config, notices = parse_args(argv)
    train(config, notices)


def train(config: TrainConfig, notices: Sequence[str] = ()) -> dict[str, Any]:
    """Runs a whole training and returns its record, which is also written to output_dir/ibft.json.

    Raises InputError, before training starts, for what the configuration asks and the world does not have;
    TrainingDiverged when loss or gradient stop being finite; SavingFailed when the disk is full; Interrupted after a
    SIGTERM, SIGINT or SIGUSR1. With `dry_run` it says what it would do and returns the record of a run that has not
    begun; nothing is written.
    """
    engine = start_engine(config)
    quiet_libraries(progress_bars=engine.is_main and sys.stderr.isatty())
    try:
        with ExitStack() as held:
            engine.on_main(
                held.enter_context,
                hold_output(
                    Path(config.output_dir), overwrite=config.overwrite, resume=config.resume, dry_run=config.dry_run
                ),
            )
            return _train(set_up(config, engine), [*notices, *engine.notices])
    finally:
        engine.close()


def _train(run: Run, notices: Sequence[str]) -> dict[str, Any]:
    config, engine = run.config, run.engine
    if config.dry_run:
        if engine.is_main:
            print(describe_dry_run(run, [*notices, *usable_trackers(config.report_to)[1]]))
        return run_record(run, result=None)
    with saving_in(run.output), StopSignals() as signals:
        metrics = engine.on_main(_begin, run, notices)
        try:
            with tracing(config.profile, run.output / "profile", engine.rank) as profiler:
                summary = _loop(run, metrics, signals, profiler)
        finally:
            if metrics is not None:
                metrics.close()
        record = run_record(run, result=summary)
        weights = engine.weights(run.model)
        engine.on_main(save_result, run.output, run.model, weights, run.tokenizer, record)
    if engine.is_main:
        print(f"adapter written to {run.output}")
    return record


def _begin(run: Run, notices: Sequence[str]) -> Metrics:
    """Makes room in the folder for what the run will write, and says what it will do; on the main process."""
    config = run.config
    if run.start_step:
        trim_metrics(run.output / METRICS_NAME, run.start_step)
        remove_partial(run.output)
        (run.output / INTERRUPTED_NAME).unlink(missing_ok=True)
    else:
        clear_output(run.output)
    trackers, warnings = start_trackers(
        config.report_to, run.output, run_name=config.run_name, config=config.to_dict(), start_step=run.start_step
    )
    for notice in [*notices, *warnings]:
        print(f"note: {notice}")
    print(describe_run(run))
    write_json(run.output / RECORD_NAME, run_record(run, result=None))
    return Metrics(run.output / METRICS_NAME, total_steps=run.total_steps, start_step=run.start_step, trackers=trackers)


def _loop(run: Run, metrics: Metrics | None, signals: StopSignals, profiler: Any) -> dict[str, Any]:
    """Trains. Scalars stay on the device until they are logged: a step never waits for the host."""
    config, engine, plan, data, optimizer = run.config, run.engine, run.plan, run.data, run.optimizer
    model = run.wrapped
    model.train()
    validation = Validation(run, run.validation) if run.validation is not None else None
    batches = load_batches(
        data,
        plan,
        range(run.start_step, run.total_steps),
        rank=engine.rank,
        device=engine.device,
        tokenizer=run.tokenizer,
        lengths=run.attention.lengths,
    )
    batch = next(batches)
    noise_rng = torch.tensor([config.seed, run.start_step], device=engine.device)  # (seed, step) of the noise stream
    one_step = torch.tensor([0, 1], device=engine.device)
    diverged = torch.zeros((), device=engine.device)  # sticky: from the first bad step on, no step moves a weight
    window: list[StepRecord] = []
    speed = Speedometer(run)
    summary: dict[str, Any] = {}
    # Logged windows in a row, after the warm-up, with no active dimension of the bottleneck and a KL that did not rise.
    inactive, last_kl = 0, math.inf

    for step in range(run.start_step, run.total_steps):
        # Every term is a mean over the whole step, all micro-batches and ranks. The plan knows the counts.
        documents = plan.documents(step)
        num_labels, num_tokens = int(data.label_tokens[documents].sum()), int(data.lengths[documents].sum())
        positions = plan.positions(step) if engine.is_main else 0
        num_micro_batches = len(plan.micro_batches(step, engine.rank))
        done = step + 1
        saving = config.save_strategy == "steps" and done % config.save_steps == 0 and done < run.total_steps
        evaluating = validation is not None and validation.is_due(done)
        # Before a checkpoint too, so that none is written of a run that has diverged, or ahead of its metrics.
        logged = done % config.logging_steps == 0 or done == run.total_steps or saving or evaluating
        terms = torch.zeros(4, device=engine.device)

        for micro in range(num_micro_batches):
            last = micro == num_micro_batches - 1
            with engine.micro_batch(last):
                with autocast(engine.device, run.dtype):
                    output = model(
                        **batch,
                        num_items_in_batch=num_labels,
                        num_kl_items_in_batch=num_tokens,
                        noise_rng=noise_rng,
                        return_active_share=logged and last,
                        return_stats=False,
                    )
                speed.mark("forward")
                batch = next(batches, {})  # fetched while the GPU is busy with the forward pass
                speed.mark("data")
                engine.backward(output.loss)
                speed.mark("backward")
            terms += stack_terms(output)

        terms = engine.sum(terms)  # one collective: the ranks must agree on whether the step is sound
        diverged = torch.maximum(diverged, 1 - torch.isfinite(terms).all().float())
        grad_norm, diverged = engine.step(optimizer, config.max_grad_norm, diverged)
        learning_rate = run.schedule.get_last_lr()[0]
        if done < run.total_steps:  # beyond it, a polynomial that all steps warm up for divides by zero
            run.schedule.step()
        weights = {} if run.model.objective is None else run.model.objective.varying()
        run.model.step_objective()
        noise_rng = noise_rng + one_step

        scalars = torch.cat([terms, grad_norm.float().reshape(1)])
        window.append(StepRecord(done, documents, num_tokens, num_labels, positions, learning_rate, scalars, weights))
        speed.mark("optimizer")
        if profiler is not None:
            profiler.step()
        # The ranks agree on it between their processors, so that all leave after the same step.
        stopped_by = engine.highest(signals.received) if done < run.total_steps else 0
        if logged or stopped_by:
            records = to_host(run, window, output.active_share, speed.read(window))
            sound = next((index for index, values in enumerate(records) if not is_finite(values)), len(records))
            if validation is not None and evaluating and sound == len(records):
                records[-1]["eval_loss"] = validation.loss(model, signals)
                stopped_by = engine.highest(signals.received) if done < run.total_steps else 0  # one may have come
            if sound:
                engine.on_main(Metrics.write, metrics, records[:sound])
            if sound < len(records):
                raise TrainingDiverged(what_diverged(run, records[sound], window[sound]))
            summary = {name: records[-1][name] for name in SUMMARY}
            idle = summary["active_share"] == 0 and done > run.warmup_steps and summary["kl_nats"] <= last_kl
            inactive, last_kl = inactive + 1 if idle else 0, summary["kl_nats"]
            if metrics is not None and inactive == 2:
                metrics.say(_COLLAPSED)
            window = []
        if saving or stopped_by:
            save_checkpoint(run, done)
        if stopped_by:
            raise _interruption(run, done, stopped_by)
        if logged:
            speed.restart()
        if step == run.start_step:
            gc.collect()
            gc.freeze()  # what lives now lives to the end: no use walking it in every later collection
    return summary


def _interruption(run: Run, done: int, number: int) -> Interrupted:
    """Leaves a marker beside the checkpoint: a launcher's exit code does not tell a run saved from one that failed."""
    name = signal.Signals(number).name
    resume = "the same command with --resume, and without --overwrite, goes on from there"
    marker = {"signal": name, "step": done, "steps": run.total_steps, "command": sys.argv, "resume": resume}
    run.engine.on_main(write_json, run.output / INTERRUPTED_NAME, marker)
    return Interrupted(
        f"stopped by {name} after step {done} of {run.total_steps}, and saved to {run.output}/checkpoint-{done}; "
        f"{resume}.",
        number,
    )


if __name__ == "__main__":
    from ibft.cli import run_command

    sys.exit(run_command(main, sys.argv[1:], interrupted=INTERRUPTED))
