"""One seam over how a step is distributed: one process, or DDP under torchrun.

The loop asks an engine to wrap the model, to bracket each micro-batch, to scale the loss so that gradients come out
as sums over ranks, to add up small tensors, and to order the processes around files. Nothing else knows of ranks.
"""

import inspect
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ibft.errors import InputError


class Engine:
    """One process."""

    name = "one process"
    rank = 0
    world_size = 1
    loss_scale = 1.0  # what the loss is multiplied by before backward

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0

    def wrap(self, model: nn.Module) -> nn.Module:
        """What the loop calls forward on; the model itself stays the one that is saved."""
        return model

    def micro_batch(self, last: bool) -> AbstractContextManager[None]:
        """Brackets forward and backward of a micro-batch; gradients meet the other ranks' in the step's last."""
        return nullcontext()

    def sum(self, values: Tensor) -> Tensor:
        """The sum over the ranks of a small tensor on the engine's device."""
        return values

    def barrier(self) -> None:
        """Waits for every rank."""

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """The main process runs the block before the others do, which then find its work done (caches)."""
        if not self.is_main:
            self.barrier()
        yield
        if self.is_main:
            self.barrier()

    def close(self) -> None:
        """Leaves the process group."""


class DataParallel(Engine):
    """DDP: a whole model per process, gradients averaged over the processes."""

    def __init__(self, device: torch.device, timeout: timedelta) -> None:
        super().__init__(device)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timeout, device_id=device if backend == "nccl" else None)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.name = f"DDP, {self.world_size} processes ({backend})"
        self.loss_scale = float(self.world_size)  # DDP averages; with global counts the sum is what is wanted
        self._wrapped: DistributedDataParallel | None = None

    def wrap(self, model: nn.Module) -> nn.Module:
        """Wraps in DistributedDataParallel."""
        device_ids = [self.device.index] if self.device.type == "cuda" else None
        # Every trainable parameter gets a gradient in every micro-batch, of an empty rank too (a connected zero).
        buffers = "forward_sync_buffers"  # torch 2.13's name for it
        if buffers not in inspect.signature(DistributedDataParallel).parameters:
            buffers = "broadcast_buffers"
        options: dict[str, Any] = {buffers: False}  # they are constants: no collective in every forward pass
        self._wrapped = DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True, **options)
        return self._wrapped

    def micro_batch(self, last: bool) -> AbstractContextManager[None]:
        """no_sync on all but the last."""
        if last or self._wrapped is None:
            return nullcontext()
        return self._wrapped.no_sync()

    def sum(self, values: Tensor) -> Tensor:
        """All-reduce."""
        dist.all_reduce(values)
        return values

    def barrier(self) -> None:
        """Waits for every rank."""
        dist.barrier()

    def close(self) -> None:
        """Leaves the process group."""
        dist.destroy_process_group()


def start_engine(use_cpu: bool, timeout_seconds: int) -> Engine:
    """The engine that the environment asks for: DDP where torchrun set WORLD_SIZE, else one process.

    Raises InputError when a process has no GPU of its own while others have, and when the environment contradicts
    itself.
    """
    cuda = torch.cuda.is_available() and not use_cpu
    world_size = _from_environment("WORLD_SIZE", default=1, least=1)
    local_rank = _from_environment("LOCAL_RANK", default=0, least=0)
    if world_size > 1 and (missing := [name for name in _RENDEZVOUS if name not in os.environ]):
        raise InputError(
            f"WORLD_SIZE is {world_size}, but {missing[0]} is not set; torchrun sets both, and for one process neither "
            "should be (unset WORLD_SIZE)."
        )
    if cuda and local_rank >= torch.cuda.device_count():
        raise InputError(
            f"process {local_rank} of this machine has no GPU: there are {torch.cuda.device_count()}; "
            "start fewer with --nproc_per_node, or pass --use_cpu."
        )
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if world_size == 1:
        return Engine(device)
    return DataParallel(device, timedelta(seconds=timeout_seconds))


_RENDEZVOUS = ("RANK", "MASTER_ADDR", "MASTER_PORT")


def _from_environment(name: str, *, default: int, least: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.strip().isdecimal() or int(text) < least:
        raise InputError(
            f"the environment variable {name} is {text!r}; torchrun sets it, to a number of at least {least}."
        )
    return int(text)
