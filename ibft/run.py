"""A run made ready: checks, data, model and optimizer, distributed as the engine does it, and resumed where asked."""

import functools
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel, PreTrainedTokenizerBase, get_scheduler, set_seed

from ibft.adapter import lora_config
from ibft.architecture import CausalLM, default_target_layer
from ibft.attention import Attention, select_attention
from ibft.checkpoint import Checkpoint, check_run, check_shared, load_state, load_weights, newest_checkpoint, shown
from ibft.config import TrainConfig
from ibft.data import BatchPlan, EncodedDataset, document_lengths, load_data
from ibft.data.sources import refuse_among_data
from ibft.engines import Engine
from ibft.errors import InputError
from ibft.estimate.checkpointing import Checkpointing, choose_checkpointing
from ibft.estimate.cost import ModelCost
from ibft.loading import (
    check_optional_packages,
    check_table_of_positions,
    check_vocabulary,
    compute_in_base_dtype,
    fingerprint,
    load_base_config,
    load_base_model,
    load_base_outline,
    load_tokenizer,
    resolve_dtype,
    use_liger_layers,
)
from ibft.model import IBModel
from ibft.objective import IBConfig
from ibft.run_folder import refuse_in_the_way
from ibft.speed import Peak, peak_of

# Options that a process may have otherwise than the main one: where it finds what is the same, and how it gets there.
_ITS_OWN = {
    *("base_model", "dataset", "validation_dataset", "memorization_scores", "training_config", "adapter_config"),
    *("output_dir", "num_proc", "debug"),
}
# PEFT's initialisations that take a base model's weights apart, of which an outline has none.
_READS_WEIGHTS = ("pissa", "olora")
# Of a compiled layer: windows or none, with and without gradients of what goes in and comes out, a first shape, any
# other, one row alone.
_VARIANTS = 64


@dataclass
class Run:
    """Everything that the loop works with."""

    config: TrainConfig
    engine: Engine
    attention: Attention
    tokenizer: PreTrainedTokenizerBase
    data: EncodedDataset
    validation: EncodedDataset | None
    plan: BatchPlan
    model: IBModel  # what is saved
    wrapped: nn.Module  # what is called
    optimizer: AdamW
    schedule: LRScheduler
    identity: dict[str, Any]  # what a resumed run must match
    start_step: int
    total_steps: int
    warmup_steps: int
    cost: ModelCost | None  # None for a mixture of experts
    checkpointing: Checkpointing
    peak: Peak

    @property
    def output(self) -> Path:
        """The folder that the run writes to."""
        return Path(self.config.output_dir)

    @property
    def dtype(self) -> torch.dtype:
        """The base model's, in which a step computes."""
        return next(self.model.get_base_model().parameters()).dtype


def set_up(config: TrainConfig, engine: Engine) -> Run:
    """The cheap checks first, then data, then the model, so that a wrong input costs seconds.

    With `dry_run` the model has no weights and is not distributed: `describe_dry_run` says what that leaves unchecked.
    """
    output = Path(config.output_dir)
    _check_alike(engine, {name: value for name, value in config.to_dict().items() if name not in _ITS_OWN})
    for name in (*config.dataset, *filter(None, [config.validation_dataset])):
        refuse_among_data(output, name)
    # None too for a run that was cut off before its first checkpoint.
    saved = engine.share(engine.on_main(newest_checkpoint, output)) if config.resume else None
    if saved is not None:
        engine.on_all(lambda: check_shared(saved))
    base_config, dtype = load_base_config(config.base_model), resolve_dtype(config.dtype, engine.device)
    check_optional_packages(liger=config.liger, load_in_4bit=config.load_in_4bit, base_config=base_config)
    attention = select_attention(
        config.attn_implementation,
        packing=config.packing,
        device=engine.device,
        dtype=dtype,
        base_config=base_config,
        compiled=config.compile,
    )
    adapter = lora_config(config)

    tokenizer = load_tokenizer(config.base_model)
    data, validation = engine.on_all(lambda: load_data(config, tokenizer))
    fingerprints = {"data": data.fingerprint, "validation": None if validation is None else validation.fingerprint}
    _check_alike(engine, fingerprints)
    plan = _plan(config, engine, data, saved)
    total_steps = config.max_steps if config.max_steps > 0 else plan.total_steps(config.num_train_epochs)
    warmup_steps = config.warmup_steps or math.ceil(config.warmup_ratio * total_steps)
    start_step = 0 if saved is None else saved.step
    engine.on_main(refuse_in_the_way, output, range(start_step + 1, total_steps))

    # One seed makes the same initial weights on every rank; each rank's dropout then has a seed of its own.
    set_seed(config.seed % 2**32)
    base, base_fingerprint = engine.on_all(lambda: _load_base(config, engine, attention, dtype))
    base_fingerprint = engine.share(base_fingerprint)
    parts = [part for part in (data, validation) if part is not None]
    check_vocabulary(config.base_model, base, tokenizer, parts)
    check_table_of_positions(config.base_model, base, max(_longest_row(config, part) for part in parts))
    model = engine.on_all(lambda: _with_adapter(config, base, adapter, attention))
    if config.liger:  # not before: its kernels run on a GPU alone, and weights that will be sharded are on the CPU yet
        use_liger_layers(base)
    compute_in_base_dtype(model)
    cost = _cost(model)
    checkpointing = engine.share(
        choose_checkpointing(
            config,
            cost,
            adapter,
            num_parameters=base.num_parameters(),
            dtype=dtype,
            engine=engine,
            attention=attention,
        )
    )
    if checkpointing.on:
        model.enable_input_require_grads()  # the embeddings are frozen: without this no gradient would enter
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    identity = _identity(config, model, {"base": base_fingerprint, **fingerprints}, plan, total_steps)
    if saved is not None:
        check_run(saved, identity, unknown={"base"} if config.dry_run else set())
        if not config.dry_run:
            engine.on_all(lambda: load_weights(saved, model) if engine.loads_weights else None)
    if config.compile:
        compile_layers(model)
    set_seed((config.seed + engine.rank) % 2**32)

    if not config.dry_run:
        engine.shard(model)
    optimizer = _build_optimizer(config, model)
    schedule = get_scheduler(config.lr_scheduler_type, optimizer, warmup_steps, total_steps)
    wrapped = model if config.dry_run else engine.wrap(model, optimizer)
    if saved is not None and not config.dry_run:
        load_state(saved, engine, model, optimizer, schedule)
    return Run(
        config=config,
        engine=engine,
        attention=attention,
        tokenizer=tokenizer,
        data=data,
        validation=validation,
        plan=plan,
        model=model,
        wrapped=wrapped,
        optimizer=optimizer,
        schedule=schedule,
        identity=identity,
        start_step=start_step,
        total_steps=total_steps,
        warmup_steps=warmup_steps,
        cost=cost,
        checkpointing=checkpointing,
        peak=peak_of(config, engine.device, dtype),
    )


def _check_alike(engine: Engine, values: Mapping[str, Any]) -> None:
    """Raises InputError where a process has others than the main one: they would wait for each other, or mix runs."""
    if (found := engine.differing(dict(values))) is not None:
        rank, its, mains = found
        differences = [
            f"{name} is {shown(its[name])}, and {shown(mains[name])} in the main process"
            for name in values
            if its[name] != mains[name]
        ]
        raise InputError(
            f"process {rank} is of another run ({'; '.join(differences)}); all processes must be started with the same "
            "options and read the same data."
        )


def _plan(config: TrainConfig, engine: Engine, data: EncodedDataset, saved: Checkpoint | None) -> BatchPlan:
    """The order of the run. On another number of processes a step keeps its rows, which are dealt out anew."""
    keeps_rows = saved is not None and saved.rows_per_process == config.rows_per_process
    return BatchPlan(
        data.lengths,
        max_length=config.max_length,
        packing=config.packing,
        rows_per_batch=config.rows_per_batch,
        accumulation=config.gradient_accumulation_steps,
        world_size=engine.world_size,
        seed=config.seed,
        rows_per_step=saved.run["rows_per_step"] if saved is not None and keeps_rows else None,
    )


def _load_base(
    config: TrainConfig, engine: Engine, attention: Attention, dtype: torch.dtype
) -> tuple[PreTrainedModel, str]:
    """The base model and its fingerprint; an outline and none where the main process reads the weights, or nobody."""
    outline = config.dry_run or not engine.loads_weights
    if outline:
        base = load_base_outline(config.base_model, dtype, attention.implementation)
    else:
        base = load_base_model(
            config.base_model, dtype, attention.implementation, engine.loading_device, config.load_in_4bit
        )
    return base, "" if outline else fingerprint(base)


def _longest_row(config: TrainConfig, data: EncodedDataset) -> int:
    """Positions that a row may take; the padding of a packed one counts from 0 too, up to the length of others."""
    if config.packing == "none":
        return int(data.lengths.max())
    return min(config.max_length, int(data.lengths.sum()))


def _with_adapter(config: TrainConfig, base: PreTrainedModel, adapter: LoraConfig, attention: Attention) -> IBModel:
    """The model that is trained. Making it tries the base model; then it is seen whether documents stay apart in it."""
    ib = _ib_config(config, base)
    init = adapter.init_lora_weights
    if base.device.type == "meta" and str(init).startswith(_READS_WEIGHTS):
        adapter.init_lora_weights = True
    try:
        model = IBModel.from_base(base, adapter, ib)
    except InputError:
        raise
    except ValueError as error:  # PEFT's, of modules that the model has not, or cannot adapt
        raise InputError(f"the adapter does not fit the base model: {error}") from error
    except Exception as error:  # PEFT's too, of as many kinds as a file of settings can be wrong
        if config.adapter_config is None:
            raise
        raise InputError(
            f"{config.adapter_config}: the adapter does not fit the base model: {type(error).__name__}: {error}"
        ) from error
    adapter.init_lora_weights = init
    if ib is not None and not _reaches_below(model, ib.target_layer):
        raise InputError(
            f"no adapter is at or below target_layer {ib.target_layer}, so the bottleneck would shape nothing; lower "
            "layers_to_transform, or raise --target_layer."
        )
    if config.packing != "none":
        CausalLM.of(base).check_packing(attention.lengths and document_lengths([2, 2], attention.lengths))
    return model


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
        alpha_warmup_steps=config.alpha_warmup_steps,
        kl_weight=config.kl_weight,
        free_bits=config.free_bits,
        ib_rate_target=config.ib_rate_target,
        kl_tokens=config.kl_tokens,
        kl_reduction=config.kl_reduction,
        sample=config.sample,
    )


def _reaches_below(model: IBModel, target_layer: int) -> bool:
    """Whether something is trained other than the layers above the target, whose output the bottleneck reads."""
    parts = CausalLM.of(model.get_base_model())
    layers = parts.layers[target_layer:]
    above = {id(parameter) for layer in layers for parameter in layer.parameters()}
    trained = [p for name, p in model.named_parameters() if p.requires_grad and not name.startswith("bottleneck.")]
    return any(id(parameter) not in above for parameter in trained)


def _cost(model: IBModel) -> ModelCost | None:
    try:
        return ModelCost.of(model)
    except InputError:  # a mixture of experts
        return None


def _identity(
    config: TrainConfig,
    model: IBModel,
    fingerprints: dict[str, str | None],
    plan: BatchPlan,
    total_steps: int,
) -> dict[str, Any]:
    """What a resumed run must match: its settings, and what came of them; as JSON gives it back."""
    adapter = model.peft_config["default"].to_dict()
    identity = {
        **config.to_dict(),
        "ib": None if model.ib_config is None else asdict(model.ib_config),
        "adapter": {name: value for name, value in adapter.items() if name != "base_model_name_or_path"},
        **fingerprints,
        "rows_per_step": plan.rows_per_step,
        "total_steps": total_steps,
    }
    return json.loads(
        json.dumps(identity, default=lambda value: sorted(value) if isinstance(value, set) else str(value))
    )


def compile_layers(model: IBModel) -> None:
    """torch.compile of every decoder layer's own computation; hooks stay outside, those of FSDP2 and the tap too."""
    for layer in CausalLM.of(model.get_base_model()).layers:
        layer.forward = _limited(torch.compile(layer.forward))


def _limited(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A compiled forward with room for _VARIANTS, which all layers share; InputError where torch would go on without.

    Its own limit is 8, and from there on layers run uncompiled, with a line in the log.
    """
    from torch._dynamo import config, exc

    # Around each call, because settings are a thread's own, and with checkpointing layers run in autograd's, too.
    limit = config.patch(recompile_limit=_VARIANTS, fail_on_recompile_limit_hit=True)

    @functools.wraps(forward)
    def limited(*arguments: Any, **options: Any) -> Any:
        try:
            with limit:
                return forward(*arguments, **options)
        except exc.FailOnRecompileLimitHit as error:
            raise InputError(
                f"--compile: the decoder's layers were compiled {_VARIANTS} times, for other shapes and settings each, "
                "and there is no end to it; leave it out."
            ) from error

    return limited


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
