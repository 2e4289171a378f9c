"""Which engine a run gets: the one that was asked for, or an error."""

import os
from datetime import timedelta

import torch

from ibft.config import TrainConfig
from ibft.engines.base import Engine
from ibft.errors import InputError

_RENDEZVOUS = ("RANK", "MASTER_ADDR", "MASTER_PORT")
_TORCHRUN = "torchrun --nproc_per_node N -m ibft.train, with the options after it"


def start_engine(config: TrainConfig) -> Engine:
    """The engine of --engine; "auto" is DDP where torchrun set WORLD_SIZE to more than one, else one process.

    Raises InputError when a process has no GPU of its own while others have, when the environment contradicts itself,
    and when the engine that was asked for cannot be had.
    """
    cuda = torch.cuda.is_available() and not config.use_cpu
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
    engine = config.chosen_engine
    if engine in ("ddp", "fsdp2") and "RANK" not in os.environ:
        raise InputError(f"--engine {engine} spreads a run over processes, and this is one alone; start {_TORCHRUN}.")
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    timeout = timedelta(seconds=config.ddp_timeout)
    # Imported where they are used: torch.distributed's parts, and DeepSpeed, take seconds.
    if engine == "deepspeed":
        from ibft.engines.zero import Zero
        from ibft.engines.zero_config import zero_config

        return Zero(device, timeout, *zero_config(config.deepspeed_config, config, world_size))
    if engine == "fsdp2":
        from ibft.engines.fsdp import FullyShardedDataParallel

        return FullyShardedDataParallel(device, timeout)
    if engine == "ddp" or world_size > 1:
        from ibft.engines.ddp import DataParallel

        return DataParallel(device, timeout)
    return Engine(device)


def _from_environment(name: str, *, default: int, least: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.strip().isdecimal() or int(text) < least:
        raise InputError(
            f"the environment variable {name} is {text!r}; torchrun sets it, to a number of at least {least}."
        )
    return int(text)
