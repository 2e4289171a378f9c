"""Trainings in processes of their own: forked from one that has imported everything, so that each starts at once."""

import importlib.util
import multiprocessing
import multiprocessing.connection
import os
import socket
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        *("processes", "ibft.train", "ibft.engines.fsdp", "torch._inductor.compile_fx"),
        *(["deepspeed.runtime.zero.stage3", "ibft.engines.zero"] if importlib.util.find_spec("deepspeed") else []),
    ]
)


class Training:
    """`ibft train` on `world_size` processes, as torchrun would start them; what they print goes to files beside `log`.

    before: called first in every process, to plant something there; a function of a module, and its arguments.
    """

    def __init__(
        self,
        arguments: str,
        log: Path,
        *,
        world_size: int = 1,
        before: Callable[..., None] | None = None,
        before_arguments: Sequence[Any] = (),
    ) -> None:
        self.logs = [log.with_name(f"{log.name}.{rank}") for rank in range(world_size)]
        port = _free_port()
        self.processes: list[BaseProcess] = [
            _context.Process(
                target=_train,
                args=(arguments.split(), rank, world_size, port, self.logs[rank], before, before_arguments),
            )
            for rank in range(world_size)
        ]
        for process in self.processes:
            process.start()

    def wait(self, timeout: float = 120) -> list[int | None]:
        """The exit codes, by rank; -9 for one that was killed."""
        for process in self.processes:
            process.join(timeout)
        if stuck := [process for process in self.processes if process.is_alive()]:
            self.kill()
            raise TimeoutError(f"{len(stuck)} processes were still running: {self.output()}")
        return [process.exitcode for process in self.processes]

    def wait_for_one(self, timeout: float = 120) -> list[int | None]:
        """Waits until one has ended, and kills the others, as torchrun does."""
        multiprocessing.connection.wait([process.sentinel for process in self.processes], timeout)
        ended = [process.exitcode for process in self.processes]
        self.kill()
        return ended

    def succeed(self) -> None:
        """Waits, and shows what went wrong."""
        codes = self.wait()
        assert set(codes) == {0}, f"exit codes {codes}: {self.output()}"

    def kill(self) -> None:
        """kill -9, all at once."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()

    def signal(self, number: int) -> None:
        """Sends a signal to every process, as torchrun does."""
        for process in self.processes:
            assert process.pid is not None
            os.kill(process.pid, number)

    def output(self) -> str:
        """What was printed, rank by rank."""
        return "\n".join(log.read_text() for log in self.logs if log.exists())


def _train(
    arguments: list[str],
    rank: int,
    world_size: int,
    port: int,
    log: Path,
    before: Callable[..., None] | None,
    before_arguments: Sequence[Any],
) -> None:
    import torch

    from ibft.cli import main

    torch.set_num_threads(1)
    if world_size > 1 or "--engine" in arguments:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world_size)}
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    with log.open("w", buffering=1) as file, redirect_stdout(file), redirect_stderr(file):
        try:
            if before is not None:
                before(*before_arguments)
            code = main(["train", *arguments])
        except BaseException:
            traceback.print_exc()
            code = 70
    sys.exit(code)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
