"""DeepSpeed ZeRO: optimizer state (stage 1), gradients (2) and parameters (3) spread over the processes."""

import logging
import os
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ibft.architecture import CausalLM
from ibft.engines.base import OptimizerState, num_elements
from ibft.engines.distributed import Distributed
from ibft.engines.zero_config import KINDS, fit_bucket
from ibft.errors import InputError

_MOMENTS = ("exp_avg", "exp_avg_sq")


class Zero(Distributed):
    """DeepSpeed, which is handed the IBModel, our AdamW, and a configuration from `zero_config`.

    It keeps each trained parameter's float32 values, and the optimizer's, in flat partitions, one for each process.
    """

    def __init__(self, device: torch.device, timeout: timedelta, config: dict[str, Any], notices: list[str]) -> None:
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed looks for it, and one process alone has none
        self._deepspeed = import_deepspeed(device)
        super().__init__(device, timeout)
        self.notices = notices
        self._config = config
        self._stage = config["zero_optimization"]["stage"]
        self.kind = KINDS[self._stage]
        self.shards_weights = self._stage == 3
        self.name = f"DeepSpeed {self._deepspeed.__version__} ZeRO-{self._stage}, {self._group}"
        self._deepspeed.init_distributed(dist_backend="nccl" if device.type == "cuda" else "gloo", verbose=False)

    def shard(self, model: Any) -> None:
        """Stage 3: layer by layer, so that a device never holds more than its partitions and one whole layer."""
        if not self.shards_weights:
            return
        self._check_outline(model)
        for module in [*CausalLM.of(model.get_base_model()).layers, model]:
            self._receive(module)
            self._deepspeed.zero.Init(module=module, config_dict_or_path=self._config)

    def wrap(self, model: nn.Module, optimizer: Optimizer) -> nn.Module:
        """deepspeed.initialize."""
        trained = sum(num_elements(parameter) for parameter in model.parameters() if parameter.requires_grad)
        self.notices += fit_bucket(self._config, trained)
        self._engine, zero, *_ = self._deepspeed.initialize(model=model, optimizer=optimizer, config=self._config)
        if self._engine.zero_optimization_stage() != self._stage or not hasattr(zero, "step"):
            raise RuntimeError(f"DeepSpeed made stage {self._engine.zero_optimization_stage()} of stage {self._stage}")
        self._zero = zero
        return self._engine

    def micro_batch(self, last: bool) -> AbstractContextManager[None]:
        """Said for every micro-batch, because the last step of an epoch may have fewer than the others."""
        self._engine.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """DeepSpeed's, which averages over the ranks."""
        self._engine.backward(loss * self.world_size, scale_wrt_gas=False)

    def step(self, optimizer: Optimizer, max_norm: float, diverged: Tensor) -> tuple[Tensor, Tensor]:
        """DeepSpeed's, which clips by its configuration and leaves the weights alone where a gradient is not finite."""
        optimizer.found_inf = diverged  # type: ignore[attr-defined]
        self._engine.step()
        norm = torch.as_tensor(self._engine.get_global_grad_norm(), dtype=torch.float32, device=self.device)
        sound = torch.isfinite(norm) & (norm >= 0)  # -1 is DeepSpeed's word for a norm that is not finite
        norm = torch.where(sound, norm, torch.inf)
        return norm, torch.maximum(diverged, 1 - sound.float())

    def optimizer_state(self, model: nn.Module, optimizer: Optimizer) -> OptimizerState:
        """Gathered from the partitions; the step is the same in all of them."""
        from deepspeed.utils import safe_get_full_optimizer_state

        step = next(iter(optimizer.state.values()))["step"].cpu()
        state = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                moments = ((key, safe_get_full_optimizer_state(parameter, key)) for key in _MOMENTS)
                state[name] = {"step": step.clone(), **self._to_main(moments)}
        return state

    def load_optimizer_state(self, model: nn.Module, optimizer: Optimizer, state: OptimizerState) -> None:
        """Makes the partitions' state, which would come with the first step, and fills it."""
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        step = next(iter(state.values()))["step"]
        zero = self._zero
        flats = zero.fp32_partitioned_groups_flat if self._stage == 3 else zero.single_partition_of_fp32_groups
        for flat in flats:
            optimizer.state[flat] = {"step": step.clone().to(flat.device)}
            optimizer.state[flat] |= {key: torch.zeros_like(flat) for key in _MOMENTS}
        if self._stage < 3:
            zero._lazy_init_hp_params_optimizer_state()  # as its first step would
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            for key in _MOMENTS:
                whole = state[name][key].to(self.device).flatten()
                if self._stage < 3:
                    safe_set_full_optimizer_state(parameter, whole, key)
                    continue
                size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]  # padded: the same on every rank
                padded = whole.new_zeros(size * self.world_size)
                padded[: whole.numel()] = whole
                safe_set_local_optimizer_state(parameter, padded[self.rank * size : (self.rank + 1) * size], key)

    def _whole(self, tensor: Tensor) -> Tensor:
        """A parameter: its float32 values where there are such, not what they are rounded to for the forward pass."""
        from deepspeed.utils import safe_get_full_fp32_param

        if tensor.requires_grad:
            return safe_get_full_fp32_param(tensor)
        with self._deepspeed.zero.GatheredParameters([tensor], enabled=self.shards_weights):
            return tensor.detach().clone()

    def close(self) -> None:
        """DeepSpeed's own handles first."""
        if hasattr(self, "_engine"):
            self._engine.destroy()
        super().close()


def import_deepspeed(device: torch.device) -> Any:
    """DeepSpeed, on the device of the run. Raises InputError where it is not installed."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    try:
        import deepspeed
    except ImportError as error:
        raise InputError(
            f'--engine deepspeed needs DeepSpeed: pip install "ibft[deepspeed]" ({" ".join(str(error).split())}).'
        ) from error
    if device.type == "cpu":
        # Its helper for reductions in shared memory is compiled for a minute on first use, and serves inference only.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
