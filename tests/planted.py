"""What tests plant in a training that runs in a process of its own: see `processes.Training`."""

import dataclasses
import errno
import operator
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import ibft.run
import ibft.train
import ibft.validation
from ibft.engines import Engine, num_elements


def record_gradients(file: str) -> None:
    """Writes to `file` what every step is taken with: [{parameter name: whole gradient, before clipping}]."""
    kept: list[dict[str, Tensor]] = []
    loop = ibft.train._loop

    def recorded_loop(run: Any, *rest: Any) -> Any:
        step = run.engine.step

        def recorded_step(*arguments: Any) -> Any:
            named = [(name, p) for name, p in run.model.named_parameters() if p.requires_grad]
            kept.append({name: whole_gradient(run.engine, p).detach().clone() for name, p in named})
            return step(*arguments)

        run.engine.step = recorded_step
        result = loop(run, *rest)
        if run.engine.is_main:
            torch.save(kept, file)
        return result

    ibft.train._loop = recorded_loop


def compiled_gradients(file: str) -> None:
    """`record_gradients` of a training with --compile, by a backend that does not take minutes on a CPU."""
    real = torch.compile
    torch.compile = lambda function: real(function, backend="aot_eager")
    record_gradients(file)


def whole_gradient(engine: Engine, parameter: Tensor) -> Tensor:
    """A parameter's gradient, from wherever its engine keeps it. Collective."""
    if engine.name.startswith("DeepSpeed"):
        from deepspeed.utils import safe_get_full_grad

        return safe_get_full_grad(parameter)
    assert parameter.grad is not None
    return engine._whole(parameter.grad)


def after_micro_batches(count: int, act: Callable[[], None]) -> None:
    """Calls `act` when so many micro-batches have been through forward and backward."""
    real, seen = ibft.train.stack_terms, []

    def counted(*arguments: Any) -> Tensor:
        seen.append(1)
        if len(seen) == count:
            act()
        return real(*arguments)

    ibft.train.stack_terms = counted


def die(rank: int, micro_batches: int, seconds: float) -> None:
    """kill -9 of that rank, `seconds` after so many micro-batches; with 0 of them, after its start."""
    if os.environ.get("RANK", "0") != str(rank):
        return
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL))
    timer.daemon = True
    if micro_batches == 0:
        timer.start()
    else:
        after_micro_batches(micro_batches, timer.start)


def die_while_saving(save: int, event: int) -> None:
    """kill -9 at the `event`th time that anything touches a file from the `save`th checkpoint on."""
    real, saves, events = ibft.train.save_checkpoint, [], []

    def watched(*arguments: Any) -> None:
        saves.append(1)
        real(*arguments)

    def watch(name: str, _: Any) -> None:
        if len(saves) >= save and name in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"):
            events.append(name)
            if len(events) == event:
                os.kill(os.getpid(), signal.SIGKILL)

    ibft.train.save_checkpoint = watched
    sys.addaudithook(watch)


def receive(rank: int, micro_batches: int, number: int, times: int = 1) -> None:
    """A signal for that rank after so many micro-batches, `times` in a row."""
    if os.environ.get("RANK", "0") == str(rank):
        after_micro_batches(micro_batches, lambda: [os.kill(os.getpid(), number) for _ in range(times)] and None)


def receive_in_validation(rank: int, batch: int, number: int, file: str) -> None:
    """A signal for that rank with the `batch`th (from 1) of a validation; `file` has a line for each it was handed."""
    if os.environ.get("RANK", "0") != str(rank):
        return
    real = ibft.validation.load_batches

    def watched(*arguments: Any, **options: Any) -> Any:
        for index, loaded in enumerate(real(*arguments, **options), start=1):
            with open(file, "a") as opened:
                opened.write(f"{index}\n")
            if index == batch:
                os.kill(os.getpid(), number)
            yield loaded

    ibft.validation.load_batches = watched


def start_otherwise(rank: int, options: dict[str, Any]) -> None:
    """That rank is started with other options."""
    if os.environ.get("RANK", "0") == str(rank):
        real = ibft.train.set_up
        ibft.train.set_up = lambda config, engine: real(dataclasses.replace(config, **options), engine)


def fill_the_disk(name: str, call: int) -> None:
    """The main process finds the disk full in a function of ibft.train, of this name, from its `call`th call on."""
    owner, _, function = name.rpartition(".")
    module = operator.attrgetter(owner)(ibft.train) if owner else ibft.train
    real, calls = getattr(module, function), []

    def refused(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) >= call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments)

    if os.environ.get("RANK", "0") == "0":
        setattr(module, function, refused)


def hang(micro_batches: int, file: str) -> None:
    """A step that does not end; `file` appears when it begins."""

    def never_end() -> None:
        with open(file, "w"):
            pass
        time.sleep(600)

    after_micro_batches(micro_batches, never_end)


def measure_share(file: str) -> None:
    """Writes the share of the model's elements that the main process holds between steps."""
    loop = ibft.train._loop

    def held(parameter: Any) -> int:
        if hasattr(parameter, "ds_tensor"):
            return parameter.ds_tensor.numel()
        return parameter.to_local().numel() if hasattr(parameter, "to_local") else parameter.numel()

    def measured(run: Any, *rest: Any) -> Any:
        result = loop(run, *rest)
        parameters = list(run.model.parameters())
        if run.engine.is_main:
            share = sum(map(held, parameters)) / sum(map(num_elements, parameters))
            with open(file, "w") as opened:
                opened.write(str(share))
        return result

    ibft.train._loop = measured


def bucket_size(file: str) -> None:
    """Writes how many elements DeepSpeed's buffer for gradients has."""
    loop = ibft.train._loop

    def watched(run: Any, *rest: Any) -> Any:
        with open(file, "w") as opened:
            opened.write(str(run.engine._zero.reduce_bucket_size))
        return loop(run, *rest)

    ibft.train._loop = watched


def another_outline() -> None:
    """The processes that read no weights make a model of one layer less."""
    real = ibft.run.load_base_outline

    def shorter(*arguments: Any) -> Any:
        model = real(*arguments)
        del model.model.layers[-1]
        model.config.num_hidden_layers -= 1
        return model

    ibft.run.load_base_outline = shorter


def spoil_gradient(rank: int, step: int, file: str) -> None:
    """One rank's loss is infinite in that step; the weights before each step go to files that end in its number."""
    begun: list[int] = []

    def watch(cls: type[Engine]) -> None:
        backward = cls.backward

        def spoilt(engine: Engine, loss: Tensor) -> None:
            spoils = len(begun) == step and engine.rank == rank
            backward(engine, loss * torch.inf if spoils else loss)

        cls.backward = spoilt  # type: ignore[method-assign]

    watch(Engine)
    if "deepspeed" in sys.modules:
        from ibft.engines.zero import Zero

        watch(Zero)
    loop = ibft.train._loop

    def watched(run: Any, *rest: Any) -> Any:
        micro_batch = run.engine.micro_batch

        def counted(last: bool) -> Any:
            begun.append(1)
            weights = run.engine.weights(run.model)
            if run.engine.is_main:
                torch.save({name: weight.clone() for name, weight in weights.items()}, f"{file}.{len(begun)}")
            return micro_batch(last)

        run.engine.micro_batch = counted
        return loop(run, *rest)

    ibft.train._loop = watched


def count_owners_of_reducer(file: str) -> None:
    """Writes who else holds DDP's reducer, and its logger, which does too, when the process group is left."""
    import torch.distributed as dist

    import ibft.engines.ddp as ddp

    wrap, leave = ddp.DataParallel.wrap, dist.destroy_process_group
    kept: list[Any] = []

    def wrapped(*arguments: Any) -> Any:
        module: Any = wrap(*arguments)
        kept.extend((module.reducer, module.logger))
        return module

    def counted() -> None:
        owners = [sys.getrefcount(kept[index]) - 2 for index in range(len(kept))]  # but this list, and the argument
        with open(file, "w") as opened:
            opened.write(str(owners))
        leave()

    ddp.DataParallel.wrap = wrapped  # type: ignore[method-assign]
    dist.destroy_process_group = counted
