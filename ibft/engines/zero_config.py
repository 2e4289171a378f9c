"""A DeepSpeed JSON made to agree with the run: what our own options decide is set from them, each change reported.

A setting that DeepSpeed would follow and we cannot vouch for is refused, so that nothing is asked for in vain.
"""

from typing import Any

from ibft.config import TrainConfig
from ibft.config_file import is_empty, read_json_object
from ibft.engines.base import Kind
from ibft.errors import InputError

DEFAULT: dict[str, Any] = {"zero_optimization": {"stage": 2}}
KINDS: dict[int, Kind] = {1: "zero1", 2: "zero2", 3: "zero3"}  # by stage

# How DeepSpeed shards, talks and reports. But for _CHANGES_STEPS none of it changes what a step computes.
_ACCEPTED = frozenset({
    "zero_optimization", "aio", "wall_clock_breakdown", "memory_breakdown", "dump_state", "steps_per_print",
    "comms_logger", "flops_profiler", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "log_level",
})  # fmt: skip
# In zero_optimization, as DeepSpeed 0.19 has it: rounded weights and gradients, steps that are taken late.
_CHANGES_STEPS = (
    "zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients", "zenflow",
)  # fmt: skip
# What the loop does itself, and the option that asks for it.
_OURS = {
    "optimizer": "--learning_rate, --weight_decay and the --adam_ options say how AdamW steps",
    "scheduler": "--lr_scheduler_type and the --warmup_ options say how the learning rate runs",
    "activation_checkpointing": "--gradient_checkpointing recomputes activations",
    "torch_autocast": "--dtype says what is computed in",
    "data_types": "gradients add up in float32",
}


def zero_config(path: str | None, config: TrainConfig, world_size: int) -> tuple[dict[str, Any], list[str]]:
    """The configuration for deepspeed.initialize, and a notice for each value of the file at `path` that it replaces.

    Values of "auto" are DeepSpeed's defaults. Raises InputError for a file that is no JSON object, a stage other than
    1 to 3, and a setting that is not supported.
    """
    given = DEFAULT if path is None else {**read_json_object(path)}
    given = _without_auto(given)
    zero = given.get("zero_optimization")
    stage = zero.get("stage", 0) if isinstance(zero, dict) else zero
    if stage not in tuple(KINDS) or not isinstance(zero, dict):
        raise InputError(
            f'{path}: zero_optimization.stage is {stage!r}; accepted are 1, 2 and 3, as in {{"zero_optimization": '
            '{"stage": 2}}. Without sharding, --engine ddp does the same.'
        )
    if stage == 3 and config.compile:
        raise InputError(
            f"{path}: --compile does not go with ZeRO stage 3, which gathers each parameter in the middle of a layer; "
            "take stage 2, or --engine fsdp2."
        )
    for name in ("offload_param", "offload_optimizer"):
        if (zero.get(name) or {}).get("device") == "nvme":
            raise InputError(
                f"{path}: zero_optimization.{name}.device is 'nvme', which is not supported; 'cpu' and 'none' are."
            )
    if changing := [name for name in _CHANGES_STEPS if not is_empty(zero.get(name))]:
        raise InputError(
            f"{path}: zero_optimization.{changing[0]} is {_shown(zero[changing[0]])}, which changes what a step "
            "computes; leave it out of the file."
        )
    if zero.get("compute_grad_norm") is False:
        raise InputError(f"{path}: zero_optimization.compute_grad_norm is False, but every step needs that norm.")

    accumulation = config.gradient_accumulation_steps
    rows = config.rows_per_batch
    decided = {
        "train_batch_size": (rows * accumulation * world_size, "rows x accumulation x processes"),
        "train_micro_batch_size_per_gpu": (rows, "--per_device_train_batch_size or --tokens_per_batch"),
        "gradient_accumulation_steps": (accumulation, "--gradient_accumulation_steps"),
        "gradient_clipping": (config.max_grad_norm, "--max_grad_norm"),
        # Off, because ibft keeps what is trained in float32 and casts in the forward pass, whatever the base is in.
        "bf16": ({"enabled": False}, "--dtype, for the base model; what is trained stays float32"),
        "fp16": ({"enabled": False}, "--dtype; float16 is not supported"),
        "communication_data_type": ("fp32", "gradients, which stay float32 on their way"),
    }
    notices = []
    for name, (value, source) in decided.items():
        if name in given and not _agrees(given[name], value):
            notices.append(f"{path}: {name} is {_shown(given[name])}, set to {_shown(value)} (by {source}).")
    for name, value in given.items():
        if name in _OURS:
            if not is_empty(value):
                notices.append(f"{path}: {name} has no effect; {_OURS[name]}.")
        elif name not in _ACCEPTED and name not in decided and not _is_off(value):
            raise InputError(
                f"{path}: {name} is {_shown(value)}, which `ibft train` does not support; leave it out of the file."
            )
    kept = {name: value for name, value in given.items() if name in _ACCEPTED}
    kept.setdefault("steps_per_print", 2**31 - 1)  # the loop prints
    kept["zero_force_ds_cpu_optimizer"] = False  # the optimizer is ours, also where its state is on the CPU
    return kept | {name: value for name, (value, _) in decided.items()}, notices


def fit_bucket(config: dict[str, Any], trained: int) -> list[str]:
    """Makes DeepSpeed's buffer for gradients as large as they are, in place; a notice where that replaces a value.

    DeepSpeed makes a float32 buffer of reduce_bucket_size elements, 5e8 by default, which is 1.9 GiB, whatever is
    trained. `trained`: elements that are.
    """
    zero = config["zero_optimization"]
    given = zero.get("reduce_bucket_size", trained)
    zero["reduce_bucket_size"] = min(int(given), trained)
    if given <= trained:
        return []
    return [
        f"zero_optimization.reduce_bucket_size is {int(given):,}, set to {trained:,} (by the number of parameters that "
        "are trained, whose gradients are all that it holds)."
    ]


def _without_auto(value: Any) -> Any:
    """transformers' "auto" means that it fills the value in; with DeepSpeed alone it would be an error."""
    if isinstance(value, dict):
        return {name: _without_auto(item) for name, item in value.items() if item != "auto"}
    return value


def _agrees(given: Any, decided: Any) -> bool:
    if isinstance(decided, dict):
        return _is_off(given)
    return given is None or given == decided


def _is_off(value: Any) -> bool:
    return is_empty(value) or (isinstance(value, dict) and not value.get("enabled", True))


def _shown(value: Any) -> str:
    if isinstance(value, dict) and "enabled" in value:
        return f"enabled: {value['enabled']}"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
