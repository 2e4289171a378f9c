"""The seam between the loop and how a step is distributed; the class itself is the engine of one process.

The loop asks an engine to place the model, to bracket each micro-batch, to run backward so that gradients come out as
sums over ranks, to move the weights, and to order the processes around files. Nothing else knows of ranks. What an
engine hands out to be saved, and takes back, are whole tensors by parameter name, so that a checkpoint fits every
engine and every number of processes.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ibft.errors import FailedElsewhere

T = TypeVar("T")
Kind = Literal["ddp", "fsdp2", "zero1", "zero2", "zero3"]
# parameter name -> what the optimizer keeps of it, "step", "exp_avg" and "exp_avg_sq"; on the CPU
OptimizerState = dict[str, dict[str, Tensor]]


class Engine:
    """One process. Every method that is collective elsewhere must be called on all ranks, in the same order."""

    name = "one process"
    kind: Kind = "ddp"  # as `ibft estimate --engine` calls it; alone, DDP costs nothing more
    rank = 0
    world_size = 1
    shards_weights = False  # whether the base model is spread over the processes, so that none holds all of it

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.notices: list[str] = []  # for the main process to print

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0

    @property
    def loads_weights(self) -> bool:
        """Whether this process reads the base model's weights; else an outline will do, which `shard` fills."""
        return self.is_main or not self.shards_weights

    @property
    def loading_device(self) -> torch.device:
        """Where they are loaded to: a model that has to be sharded may not fit on one device."""
        return torch.device("cpu") if self.shards_weights else self.device

    # Collectives

    def sum(self, values: Tensor) -> Tensor:
        """The sum over the ranks of a small tensor on the engine's device, in place."""
        return values

    def highest(self, value: int) -> int:
        """The largest of the ranks' numbers. Between the processors: no device waits for it."""
        return value

    def share(self, value: Any) -> Any:
        """The main process's value, on every rank."""
        return value

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value in order, on the main process; elsewhere nothing."""
        return [value]

    def differing(self, value: Any) -> tuple[int, Any, Any] | None:
        """(rank, its value, the main process's) of the first rank that has another one; None where all are alike."""
        mains = self.share(value)
        others = self.gather(None if value == mains else (self.rank, value, mains))
        return self.share(next(filter(None, others), None))

    def on_all(self, work: Callable[[], T]) -> T:
        """Runs `work`, in which no rank waits for another; where it fails on one, all fail, and none waits for ever.

        Raises what `work` raised; where it did so on other ranks alone, FailedElsewhere.
        """
        failed = 1
        try:
            result = work()
            failed = 0
        finally:
            failed = self.highest(failed)
        if failed:
            raise FailedElsewhere("another process could not go on; its message says why.")
        return result

    def on_main(self, work: Callable[..., T], *arguments: Any) -> T | None:
        """`on_all` of what the main process does alone while the others wait; they get None."""
        return self.on_all(lambda: work(*arguments) if self.is_main else None)

    def close(self) -> None:
        """Leaves the process group."""

    # The model and its step

    def shard(self, model: Any) -> None:
        """Spreads an IBModel over the processes, before the optimizer is made. All get the main process's weights."""

    def wrap(self, model: nn.Module, optimizer: Optimizer) -> nn.Module:
        """What the loop calls forward on; the model itself stays the one that is saved."""
        return model

    def micro_batch(self, last: bool) -> AbstractContextManager[None]:
        """Brackets forward and backward of a micro-batch; gradients meet the other ranks' in the step's last."""
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Adds to the gradients, which in the step's last micro-batch become those of the sum of all ranks' losses."""
        (loss * self.world_size).backward()  # the engines average over the ranks; with global counts the sum is wanted

    def step(self, optimizer: Optimizer, max_norm: float, diverged: Tensor) -> tuple[Tensor, Tensor]:
        """Clips the gradients (max_norm 0: not), moves the weights, and forgets the gradients.

        Once `diverged` (a scalar on the device) is 1, or the gradients' norm is not finite, no weight moves. Returns
        the norm before clipping and `diverged` after.
        """
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        norm = self._whole(torch.nn.utils.clip_grad_norm_(parameters, max_norm or float("inf")))
        diverged = torch.maximum(diverged, 1 - torch.isfinite(norm).float())
        optimizer.found_inf = diverged  # type: ignore[attr-defined]  # fused AdamW leaves the weights alone at 1
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm, diverged

    # What is saved

    def weights(self, model: Any) -> dict[str, Tensor]:
        """What `model.save_pretrained` needs, whole, on the main process; elsewhere nothing. Collective."""
        return self._to_main((name, self._whole(parameter)) for name, parameter in saved_parameters(model))

    def optimizer_state(self, model: nn.Module, optimizer: Optimizer) -> OptimizerState:
        """What the optimizer keeps of each trained parameter, whole, on the main process. Collective."""
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        found = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                if id(parameter) not in held:  # nothing would be saved of it, and a resumed run begin anew with it
                    raise RuntimeError(f"{name} of the model is not the parameter that the optimizer holds")
                kept = optimizer.state[parameter].items()  # empty where it never had a gradient
                found[name] = self._to_main((key, self._whole(value)) for key, value in kept)
        return found

    def load_optimizer_state(self, model: nn.Module, optimizer: Optimizer, state: OptimizerState) -> None:
        """Takes back what `optimizer_state` gave, to be read by every rank."""
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                optimizer.state[parameter] = {
                    # A fused step counts on the parameters' device; the other tensors are laid out as the parameter.
                    key: value.to(self.device, copy=True) if key == "step" else self._like(value, parameter)
                    for key, value in state[name].items()
                }

    def _whole(self, tensor: Tensor) -> Tensor:
        return tensor

    def _like(self, whole: Tensor, parameter: Tensor) -> Tensor:
        """`whole` as this rank holds `parameter`: on its device, and its part of it. A copy: `whole` may be a file."""
        return whole.to(parameter.device, copy=True)

    def _to_main(self, tensors: "Iterator[tuple[str, Tensor]]") -> dict[str, Tensor]:
        """Runs through the (collective) tensors one by one, so that only the main process ever holds them all."""
        found = {}
        for name, tensor in tensors:
            if self.is_main:
                found[name] = tensor.detach().cpu()
        return found


def saved_parameters(model: Any) -> Iterator[tuple[str, nn.Parameter]]:
    """What an adapter's files are made of: the trained parameters, and an embedding that carries an adapter whole."""
    embedding = model.get_input_embeddings()
    adapted = set() if type(embedding) is nn.Embedding else {id(parameter) for parameter in embedding.parameters()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or id(parameter) in adapted:
            yield name, parameter


def num_elements(parameter: Tensor) -> int:
    """The size of a parameter before any sharding; under ZeRO-3 `numel` is that of what happens to be here.

    4-bit weights count as those that they stand for.
    """
    if (quantized := getattr(parameter, "quant_state", None)) is not None:
        return quantized.shape.numel()
    return getattr(parameter, "ds_numel", parameter.numel())
