"""FSDP2: every parameter is spread over the processes, and whole only while its layer runs."""

from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from ibft.architecture import CausalLM
from ibft.engines.base import OptimizerState
from ibft.engines.distributed import Distributed


class FullyShardedDataParallel(Distributed):
    """torch's `fully_shard`, around each decoder layer and then around the IBModel.

    What belongs to no layer (embeddings, final norm, output head, bottleneck) is in the outermost group, which is
    gathered before IBModel's forward and stays so until backward has passed: there the loss reads the head's weight.
    After a forward without backward, such as validation's, that group's parameters are still those that were gathered,
    and not the shards that the optimizer holds.
    """

    kind = "fsdp2"
    shards_weights = True

    def __init__(self, device: torch.device, timeout: timedelta) -> None:
        super().__init__(device, timeout)
        self.name = f"FSDP2, {self._group}"
        self._mesh = init_device_mesh(device.type, (self.world_size,))

    def shard(self, model: Any) -> None:
        """Layer by layer, so that a device never holds more than its shards and one whole layer."""
        self._check_outline(model)
        for layer in CausalLM.of(model.get_base_model()).layers:
            self._receive(layer)
            fully_shard(layer, mesh=self._mesh)
        self._receive(model)
        fully_shard(model, mesh=self._mesh)
        whole = [name for name, parameter in model.named_parameters() if not isinstance(parameter, DTensor)]
        if whole:
            raise RuntimeError(f"FSDP2 left {whole[0]} unsharded")
        self._model = model

    def micro_batch(self, last: bool) -> AbstractContextManager[None]:
        """Gradients are reduced and scattered in the last only."""
        self._model.set_requires_gradient_sync(last)
        return nullcontext()

    def weights(self, model: Any) -> dict[str, Tensor]:
        """Gathered from the shards, none of them a view of what `reshard` would free."""
        self._model.reshard()
        return super().weights(model)

    def optimizer_state(self, model: nn.Module, optimizer: Optimizer) -> OptimizerState:
        """Gathered from the shards, whose states they are."""
        self._model.reshard()
        return super().optimizer_state(model, optimizer)

    def _whole(self, tensor: Tensor) -> Tensor:
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def _like(self, whole: Tensor, parameter: Tensor) -> Tensor:
        assert isinstance(parameter, DTensor)
        return distribute_tensor(whole.to(self.device, copy=True), parameter.device_mesh, parameter.placements)
