"""What the engines of several processes share: the process group, and handing out weights that only one has read."""

import os
from datetime import timedelta
from itertools import zip_longest
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ibft.engines.base import Engine
from ibft.errors import InputError


class Distributed(Engine):
    """A member of a process group: NCCL between GPUs; gloo between CPUs and for what the host alone has to know."""

    def __init__(self, device: torch.device, timeout: timedelta) -> None:
        super().__init__(device)
        cuda = device.type == "cuda"
        options: dict[str, Any] = {"timeout": timeout}
        if "RANK" not in os.environ:  # one process, not started by torchrun
            options |= {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        if cuda:
            options["device_id"] = device
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", **options)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        processes = f"{self.world_size} process{'es' if self.world_size > 1 else ''}"
        self._group = f"{processes} ({'nccl' if cuda else 'gloo'})"

    def sum(self, values: Tensor) -> Tensor:
        """All-reduce."""
        dist.all_reduce(values)
        return values

    def highest(self, value: int) -> int:
        """All-reduce of a tensor in the host's memory."""
        values = torch.tensor(value)
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return int(values)

    def share(self, value: Any) -> Any:
        """Broadcast from rank 0."""
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def gather(self, value: Any) -> list[Any]:
        """Gather at rank 0."""
        values: list[Any] | None = [None] * self.world_size if self.is_main else None
        dist.gather_object(value, values, dst=0)
        return values or []

    def close(self) -> None:
        """Leaves the process group."""
        dist.destroy_process_group()

    def _check_outline(self, model: nn.Module) -> None:
        """Raises InputError where the ranks' models differ in more than weights, which a broadcast would mix up."""
        outline = [
            f"{name} {list(tensor.shape)} in {str(tensor.dtype).removeprefix('torch.')}"
            + ", trained" * tensor.requires_grad
            for name, tensor in [*model.named_parameters(), *model.named_buffers()]
        ]
        if (found := self.differing(outline)) is not None:
            rank, its, mains = found
            pairs = zip_longest(its, mains, fillvalue="no more")
            own, main = next((own, main) for own, main in pairs if own != main)
            raise InputError(
                f"the base model's files do not give the model that its config.json describes (process {rank} has "
                f"{own}, the main one {main}), so it cannot be sharded by {self.name}; train it with --engine ddp."
            )

    def _receive(self, module: nn.Module) -> None:
        """Puts what is not yet sharded of a module on the device, with the main process's values.

        Whether it is an outline here, as on all ranks but one, or not. Tensors that are shared stay so.
        """
        placed: dict[int, Tensor] = {}
        for part in module.modules():
            for tensors in (part._parameters, part._buffers):
                for name, tensor in tensors.items():
                    if tensor is None or isinstance(tensor, DTensor) or hasattr(tensor, "ds_id"):
                        continue
                    if id(tensor) not in placed:
                        placed[id(tensor)] = self._received(tensor)
                    tensors[name] = placed[id(tensor)]  # type: ignore[assignment]

    def _received(self, tensor: Tensor) -> Tensor:
        here = torch.empty_like(tensor, device=self.device) if tensor.is_meta else tensor.detach().to(self.device)
        here = here.contiguous()
        dist.broadcast(here.reshape(-1).view(torch.uint8), src=0)  # as bytes: gloo does not know every dtype
        return nn.Parameter(here, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else here
