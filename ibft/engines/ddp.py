"""DDP: a whole model per process, gradients averaged over the processes."""

import inspect
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ibft.engines.distributed import Distributed


class DataParallel(Distributed):
    """torch's DistributedDataParallel."""

    def __init__(self, device: torch.device, timeout: timedelta) -> None:
        super().__init__(device, timeout)
        self.name = f"DDP, {self._group}"
        self._wrapped: Any = None

    def wrap(self, model: nn.Module, optimizer: Optimizer) -> nn.Module:
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
        return nullcontext() if last else self._wrapped.no_sync()

    def close(self) -> None:
        """Leaves the process group, and drops DDP's reducer first.

        The group's destructor waits for gloo's threads, which may need the GIL to let go of their last tensors.
        Python's handles of the group release the GIL while they wait; the reducer, if it were the last owner, would
        not, and the process would never end.
        """
        if self._wrapped is not None:
            self._wrapped.reducer = self._wrapped.logger = None
        super().close()
