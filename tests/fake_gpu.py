"""The Triton backend's host code as it runs on an H100, on tensors that have shapes and no memory.

A launch does nothing, a library product gives its result; whatever asks for a value of a tensor raises. `Memory` counts
what torch would be asked to allocate, without the rounding of its allocator and a library's workspace.
"""

import contextlib
import importlib
import pkgutil
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import CustomOpDef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ibkernels import backends, bottleneck, cross_entropy_ops, gpu
from ibkernels.gpu import configs

_OPS = {
    op._qualname: op._init_fn
    for module in (bottleneck, cross_entropy_ops)
    for op in vars(module).values()
    if isinstance(op, CustomOpDef)
}


class Inside(TorchDispatchMode):
    """Sees every operation, those within our ops too, which are closed to a dispatch mode."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        own = _OPS.get(func._schema.name)
        with self if own else contextlib.nullcontext():
            result = (own or func)(*args, **(kwargs or {}))
        self.saw(func, args, result)
        return result

    def saw(self, func: Any, args: Any, result: Any) -> None:
        """An operation, what it was given, and what it gave."""
        raise NotImplementedError


class Memory(Inside):
    """Counts the bytes of all storages alive: now, and at the highest point."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: set[int] = set()

    def saw(self, func: Any, args: Any, result: Any) -> None:
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (key := tensor.untyped_storage()._cdata) not in self._alive:
                storage = tensor.untyped_storage()
                self._alive.add(key)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._remove, key, storage.nbytes())

    def _remove(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.now -= size


class _Launched:
    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments, **settings: None


def _product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    return torch.empty(a.shape[0], b.shape[1]) if out is None else out


def pretend(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on tensors of the CPU take the Triton backend, as those of an H100 would."""
    for info in pkgutil.iter_modules(gpu.__path__):
        module = importlib.import_module(f"ibkernels.gpu.{info.name}")
        for name in vars(module).copy():
            if name.endswith("_kernel"):
                monkeypatch.setattr(module, name, _Launched())
            elif name == "mm_float32":
                monkeypatch.setattr(module, name, _product)
    monkeypatch.setattr(backends, "implementation", lambda op, tensor, requested: gpu)
    monkeypatch.setattr(configs, "chip", lambda device: "sm_90")
    monkeypatch.setattr(configs, "processors", lambda device: 132)
