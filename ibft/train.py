"""`ibft train`: fine-tunes a causal language model with LoRA and an information bottleneck (or without: SFT).

Reads top to bottom: set up, describe, loop, finish. Also `python -m ibft.train`, and for several processes
`torchrun --nproc_per_node N -m ibft.train`.
"""

import gc
import json
import math
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch.optim import AdamW
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel, PreTrainedTokenizerBase, get_scheduler, set_seed

from ibft.adapter import lora_config
from ibft.architecture import CausalLM, default_target_layer
from ibft.attention import Attention, select_attention
from ibft.checkpoint import (
    METRICS_NAME,
    RECORD_NAME,
    checkpoints,
    clear_output,
    leave_no_empty_folder,
    load_checkpoint,
    prepare_output,
    save_checkpoint,
    save_result,
    saving_in,
    steps_done,
    trim_metrics,
    write_json,
)
from ibft.config import TrainConfig, parse_args
from ibft.data import BatchPlan, EncodedDataset, load_batches, load_data
from ibft.engine import Engine, start_engine
from ibft.errors import InputError, TrainingDiverged
from ibft.loading import (
    check_vocabulary,
    fingerprint,
    load_base_model,
    load_base_outline,
    load_tokenizer,
    quiet_libraries,
    resolve_dtype,
)
from ibft.model import IBModel
from ibft.objective import IBConfig
from ibft.record import describe_dry_run, describe_run, run_record
from ibft.step_records import SUMMARY, StepRecord, is_finite, stack_terms, to_host, what_diverged
from ibft.tracking import Metrics, start_trackers, usable_trackers
from ibft.validation import Validation

_COLLAPSED = (
    "warning: the posterior has collapsed: no dimension of the bottleneck varies with the input (all have "
    "Var(mu) <= 0.01), so KL and CE_ib teach nothing. A larger --beta, a smaller --alpha or another --target_layer may "
    "help."
)


@dataclass
class Run:
    """Everything that the loop works with."""

    config: TrainConfig
    engine: Engine
    attention: Attention
    tokenizer: PreTrainedTokenizerBase
    data: EncodedDataset
    plan: BatchPlan
    model: IBModel
    optimizer: AdamW
    schedule: LRScheduler
    base_fingerprint: str
    total_steps: int
    warmup_steps: int
    start_step: int = 0
    validation: EncodedDataset | None = None

    @property
    def output(self) -> Path:
        """The folder that the run writes to."""
        return Path(self.config.output_dir)

    @property
    def identity(self) -> dict[str, Any]:
        """What a resumed run must match: its settings, and what came of them."""
        return {
            **self.config.to_dict(),
            "ib": None if self.model.ib_config is None else asdict(self.model.ib_config),
            "adapter": self.adapter,
            "base": self.base_fingerprint,
            "data": self.data.fingerprint,
            "validation": None if self.validation is None else self.validation.fingerprint,
            "rows_per_step": self.plan.rows_per_step,
            "total_steps": self.total_steps,
        }

    @property
    def adapter(self) -> dict[str, Any]:
        """PEFT's configuration of the adapter, JSON-able."""
        values = self.model.peft_config["default"].to_dict()
        values = {name: value for name, value in values.items() if name != "base_model_name_or_path"}
        return json.loads(
            json.dumps(values, default=lambda value: sorted(value) if isinstance(value, set) else str(value))
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Parses the command line and trains."""
    config, notices = parse_args(sys.argv[1:] if argv is None else argv)
    train(config, notices)


def train(config: TrainConfig, notices: Sequence[str] = ()) -> dict[str, Any]:
    """Runs a whole training and returns its record, which is also written to output_dir/ibft.json.

    Raises InputError, before training starts, for what the configuration asks and the world does not have;
    TrainingDiverged when loss or gradient stop being finite; and SavingFailed when the disk is full. With `dry_run` it
    says what it would do and returns the record of a run that has not begun; nothing is written.
    """
    engine = start_engine(config.use_cpu, config.ddp_timeout)
    quiet_libraries(progress_bars=engine.is_main and sys.stderr.isatty())
    try:
        with leave_no_empty_folder(Path(config.output_dir)) if engine.is_main else nullcontext():
            run = _set_up(config, engine)
        if config.dry_run:
            if engine.is_main:
                print(describe_dry_run(run, [*notices, *usable_trackers(config.report_to)[1]]))
            return run_record(run, result=None)
        with saving_in(run.output):
            metrics = _announce(run, notices)
            try:
                summary = _loop(run, metrics)
            finally:
                if metrics is not None:
                    metrics.close()
            record = run_record(run, result=summary)
            if engine.is_main:
                save_result(run.output, run.model, run.tokenizer, record)
        if engine.is_main:
            print(f"adapter written to {run.output}")
        engine.barrier()
        return record
    finally:
        engine.close()


def _set_up(config: TrainConfig, engine: Engine) -> Run:
    """The cheap checks first, then data, then the model, so that a wrong input costs seconds."""
    with engine.main_first():  # the others find the folder there, and writable
        prepare_output(
            Path(config.output_dir), overwrite=config.overwrite, resume=config.resume, dry_run=config.dry_run
        )
    attention = select_attention(config.attn_implementation, config.packing, engine.device.type)
    adapter = lora_config(config)
    tokenizer = load_tokenizer(config.base_model)
    data, validation = load_data(config, tokenizer)
    plan = BatchPlan(
        data.lengths,
        max_length=config.max_length,
        packing=config.packing,
        rows_per_batch=config.rows_per_batch,
        accumulation=config.gradient_accumulation_steps,
        world_size=engine.world_size,
        seed=config.seed,
    )
    total_steps = config.max_steps if config.max_steps > 0 else plan.total_steps(config.num_train_epochs)
    warmup_steps = config.warmup_steps or math.ceil(config.warmup_ratio * total_steps)

    # One seed makes the same initial weights on every rank; each rank's dropout then has a seed of its own.
    set_seed(config.seed % 2**32)
    dtype = resolve_dtype(config.dtype, engine.device)
    if config.dry_run:  # without the weights: `describe_dry_run` says what that leaves unchecked
        base, base_fingerprint = load_base_outline(config.base_model, dtype, attention.implementation), ""
    else:
        base = load_base_model(config.base_model, dtype, attention.implementation, engine.device)
        parts = CausalLM.of(base)
        parts.check_causal()
        if config.packing != "none":
            parts.check_packing()
        base_fingerprint = fingerprint(base)
    check_vocabulary(config.base_model, base, tokenizer, [data, *([] if validation is None else [validation])])
    model = _with_adapter(base, adapter, _ib_config(config, base))
    if config.gradient_checkpointing:
        model.enable_input_require_grads()  # the embeddings are frozen: without this no gradient would enter
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    set_seed((config.seed + engine.rank) % 2**32)

    optimizer = _build_optimizer(config, model)
    schedule = get_scheduler(config.lr_scheduler_type, optimizer, warmup_steps, total_steps)
    run = Run(
        config,
        engine,
        attention,
        tokenizer,
        data,
        plan,
        model,
        optimizer,
        schedule,
        base_fingerprint,
        total_steps,
        warmup_steps,
        validation=validation,
    )
    if config.resume:
        newest = checkpoints(run.output)[-1]
        if config.dry_run:
            run.start_step = steps_done(newest, run.identity, unknown={"base"})
        else:
            run.start_step = load_checkpoint(newest, engine, model, optimizer, schedule, run.identity)
    return run


def _announce(run: Run, notices: Sequence[str]) -> Metrics | None:
    """Says what the run will do, and makes room for it; the metrics on the main process, None on the others."""
    if not run.engine.is_main:
        return None
    config = run.config
    if config.resume:
        trim_metrics(run.output / METRICS_NAME, run.start_step)
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


def _loop(run: Run, metrics: Metrics | None) -> dict[str, Any]:
    """Trains. Scalars stay on the device until they are logged: a step never waits for the host."""
    config, engine, plan, data, optimizer = run.config, run.engine, run.plan, run.data, run.optimizer
    model = engine.wrap(run.model).train()
    trainable = [parameter for parameter in run.model.parameters() if parameter.requires_grad]
    batches = load_batches(
        data,
        plan,
        range(run.start_step, run.total_steps),
        rank=engine.rank,
        device=engine.device,
        tokenizer=run.tokenizer,
    )
    batch = next(batches)
    noise_rng = torch.tensor([config.seed, run.start_step], device=engine.device)  # (seed, step) of the noise stream
    one_step = torch.tensor([0, 1], device=engine.device)
    diverged = torch.zeros((), device=engine.device)  # sticky: from the first bad step on, no step moves a weight
    validation = Validation(config, run.validation, run.tokenizer, engine) if run.validation is not None else None
    window: list[StepRecord] = []
    window_start = time.perf_counter()
    summary: dict[str, Any] = {}
    # Logged windows in a row, after the warm-up, with no active dimension of the bottleneck and a KL that did not rise.
    inactive, last_kl = 0, math.inf

    for step in range(run.start_step, run.total_steps):
        # Every term is a mean over the whole step, all micro-batches and ranks. The plan knows the counts.
        documents = plan.documents(step)
        num_labels, num_tokens = int(data.label_tokens[documents].sum()), int(data.lengths[documents].sum())
        num_micro_batches = len(plan.micro_batches(step, engine.rank))
        done = step + 1
        saving = config.save_strategy == "steps" and done % config.save_steps == 0 and done < run.total_steps
        evaluating = validation is not None and validation.is_due(done, plan.steps_in_epoch(0), run.total_steps)
        # Before a checkpoint too, so that none is written of a run that has diverged, or ahead of its metrics.
        logged = done % config.logging_steps == 0 or done == run.total_steps or saving or evaluating
        terms = torch.zeros(4, device=engine.device)

        for micro in range(num_micro_batches):
            last = micro == num_micro_batches - 1
            with engine.micro_batch(last):
                output = model(
                    **batch,
                    num_items_in_batch=num_labels,
                    num_kl_items_in_batch=num_tokens,
                    noise_rng=noise_rng,
                    return_active_share=logged and last,
                    return_stats=False,
                )
                batch = next(batches, {})  # fetched while the GPU is busy with the forward pass
                (output.loss * engine.loss_scale).backward()
            terms += stack_terms(output)

        terms = engine.sum(terms)  # one collective: the ranks must agree on whether the step is sound
        grad_norm = torch.nn.utils.clip_grad_norm_(trainable, config.max_grad_norm or float("inf"))
        finite = torch.isfinite(terms).all() & torch.isfinite(grad_norm)
        diverged = torch.maximum(diverged, 1 - finite.float())
        optimizer.found_inf = diverged  # type: ignore[attr-defined]  # fused AdamW leaves the weights alone at 1
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        learning_rate = run.schedule.get_last_lr()[0]
        run.schedule.step()
        noise_rng = noise_rng + one_step

        scalars = torch.cat([terms, grad_norm.float().reshape(1)])
        window.append(StepRecord(done, documents, num_tokens, num_labels, learning_rate, scalars))
        if logged:
            records = to_host(run, window, output.active_share, time.perf_counter() - window_start)
            sound = next((index for index, values in enumerate(records) if not is_finite(values)), len(records))
            if validation is not None and evaluating and sound == len(records):
                records[-1]["eval_loss"] = validation.loss(model)
            if metrics is not None and sound:
                metrics.write(records[:sound])
            if sound < len(records):
                raise TrainingDiverged(what_diverged(run, records[sound], window[sound]))
            summary = {name: records[-1][name] for name in SUMMARY}
            idle = summary["active_share"] == 0 and done > run.warmup_steps and summary["kl_nats"] <= last_kl
            inactive, last_kl = inactive + 1 if idle else 0, summary["kl_nats"]
            if metrics is not None and inactive == 2:
                metrics.say(_COLLAPSED)
            window, window_start = [], time.perf_counter()
        if saving:
            save_checkpoint(
                run.output,
                done,
                engine,
                run.model,
                optimizer,
                run.schedule,
                run.identity,
                config.save_total_limit,
            )
        if step == run.start_step:
            gc.collect()
            gc.freeze()  # what lives now lives to the end: no use walking it in every later collection
    return summary


def _with_adapter(base: PreTrainedModel, adapter: LoraConfig, ib: IBConfig | None) -> IBModel:
    try:
        model = IBModel.from_base(base, adapter, ib)
    except InputError:
        raise
    except ValueError as error:  # PEFT's, of modules that the model has not, or cannot adapt
        raise InputError(f"the adapter does not fit the base model: {error}") from error
    if ib is not None and not _reaches_below(model, ib.target_layer):
        raise InputError(
            f"no adapter is at or below target_layer {ib.target_layer}, so the bottleneck would shape nothing; lower "
            "layers_to_transform, or raise --target_layer."
        )
    return model


def _reaches_below(model: IBModel, target_layer: int) -> bool:
    """Whether something is trained other than the layers above the target, whose output the bottleneck reads."""
    parts = CausalLM.of(model.get_base_model())
    layers = [parts.layer(index) for index in range(target_layer, parts.num_layers)]
    above = {id(parameter) for layer in layers for parameter in layer.parameters()}
    trained = [p for name, p in model.named_parameters() if p.requires_grad and not name.startswith("bottleneck.")]
    return any(id(parameter) not in above for parameter in trained)


def _ib_config(config: TrainConfig, base: torch.nn.Module) -> IBConfig | None:
    if config.method == "sft":
        return None
    layer = config.target_layer or default_target_layer(CausalLM.of(base).num_layers)
    return IBConfig(
        target_layer=layer,
        bottleneck_dim=config.bottleneck_dim,
        encoder=config.encoder,
        encoder_rank=config.encoder_rank or 32,
        alpha=config.alpha,
        beta=config.beta,
        kl_tokens=config.kl_tokens,
        kl_reduction=config.kl_reduction,
        sample=config.sample,
    )


def _build_optimizer(config: TrainConfig, model: IBModel) -> AdamW:
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    adapter = [parameter for name, parameter in named if not name.startswith("bottleneck.")]
    bottleneck = [parameter for name, parameter in named if name.startswith("bottleneck.")]
    return AdamW(
        [{"params": group} for group in (adapter, bottleneck) if group],
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
        fused=not config.dry_run,  # fused AdamW refuses parameters that are nowhere
    )


if __name__ == "__main__":
    from ibft.cli import run_command

    sys.exit(run_command(main, sys.argv[1:]))
