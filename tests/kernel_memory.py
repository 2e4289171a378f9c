"""What a GPU's memory checker would find in a kernel, found in Triton's interpreter.

The interpreter runs programs one after the other and reads whatever lies at an address. A GPU runs them at once, in any
order, and ends the process where an address is nobody's.
"""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
from torch import Tensor
from triton.runtime import interpreter

# These read and write what pads a row, up to its stride: whole vectors, whatever its width.
PADDED_ROWS = {"softmax_grad_kernel"}


@contextlib.contextmanager
def watch() -> Iterator[None]:
    """Within the block a launch raises AssertionError (or Triton's InterpreterError with its message) if

    - a load or a store uses an address that is no element of one and the same tensor of its arguments;
    - a store writes an element twice;
    - an element that one program writes is read or written by another;
    - a program reads and then writes an element, or the other way round, without a barrier between: what a thread
      holds in the one need not be what it holds in the other, and several threads may hold the same;
    - there is an atomic, whose order is left to chance.
    """
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    init, call = executor._init_args_hst, executor.__call__
    set_grid_idx, load, store = builder.set_grid_idx, builder.create_masked_load, builder.create_masked_store
    launch = Launch("", [])

    def begin(self: Any, *args: Any) -> Any:
        nonlocal launch
        positional, named = init(self, *args)
        launch = Launch(self.fn.__name__, [*positional, *named.values()])
        return positional, named

    def run(self: Any, *args: Any, **kwargs: Any) -> None:
        call(self, *args, **kwargs)
        launch.check()

    def next_program(self: Any, *index: int) -> None:
        launch.program, launch.barriers = index, 0
        set_grid_idx(self, *index)

    def watched_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        launch.add(pointers, mask, writes=False)
        return load(self, pointers, mask, *rest)

    def watched_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        launch.add(pointers, mask, writes=True)
        return store(self, pointers, value, mask, *rest)

    def barrier(self: Any) -> None:
        launch.barriers += 1

    def atomic(*args: Any) -> Any:
        raise AssertionError(f"{launch.name}: an atomic at {_place()}")

    with (
        mock.patch.multiple(executor, _init_args_hst=begin, __call__=run),
        mock.patch.multiple(
            builder,
            set_grid_idx=next_program,
            create_masked_load=watched_load,
            create_masked_store=watched_store,
            create_barrier=barrier,
            create_atomic_cas=atomic,
            create_atomic_rmw=atomic,
        ),
    ):
        yield


class Access(NamedTuple):
    """One load or store of one program."""

    addresses: np.ndarray  # of the elements that the mask keeps
    size: int  # bytes of an element
    writes: bool
    program: tuple[int, ...]
    barriers: int  # that the program has passed
    place: str  # file and line

    def pieces(self, size: int) -> np.ndarray:
        """Addresses of what it uses, in pieces of so many bytes."""
        return (self.addresses[:, None] + np.arange(0, self.size, size)).reshape(-1)

    def touches(self, addresses: np.ndarray) -> bool:
        """Whether it may use any of the sorted addresses."""
        first, end = self.addresses.min(), self.addresses.max() + self.size
        return bool(np.searchsorted(addresses, first) < np.searchsorted(addresses, end))

    def __str__(self) -> str:
        return f"program {self.program} {'writes' if self.writes else 'reads'} at {self.place}"


class Launch:
    """What the programs of a grid do with the tensors of its arguments."""

    def __init__(self, name: str, arguments: list[Any]) -> None:
        self.name = name
        self.tensors = [argument for argument in arguments if isinstance(argument, Tensor) and argument.numel()]
        self.accesses: list[Access] = []
        self.program: tuple[int, ...] = ()
        self.barriers = 0

    def add(self, pointers: Any, mask: Any, writes: bool) -> None:
        """Before it happens: outside of the tensors it might end the process."""
        addresses = np.broadcast_to(pointers.data, mask.data.shape)[mask.data.astype(bool)].astype(np.int64)
        if not len(addresses):
            return
        size = pointers.get_element_ty().primitive_bitwidth // 8
        access = Access(addresses, size, writes, self.program, self.barriers, _place())
        padded = self.name in PADDED_ROWS
        assert any(_has(tensor, access, padded) for tensor in self.tensors), (
            f"{self.name}: outside of its tensors {access}"
        )
        assert not writes or len(np.unique(addresses)) == len(addresses), f"{self.name}: an element twice {access}"
        self.accesses.append(access)

    def check(self) -> None:
        """What the accesses are to one another."""
        written = [access for access in self.accesses if access.writes]
        if not written:
            return
        piece = min(access.size for access in self.accesses)  # elements of different sizes may share memory
        targets = np.unique(np.concatenate([access.pieces(piece) for access in written]))
        accesses = [access for access in self.accesses if access.touches(targets)]
        pieces = [access.pieces(piece) for access in accesses]
        address, index = np.concatenate(pieces), np.repeat(np.arange(len(pieces)), [len(part) for part in pieces])
        order = np.argsort(address, kind="stable")  # those of one address stay in the order of the accesses
        address, index = address[order], index[order]
        neighbours = np.stack((index[:-1], index[1:]))[:, address[:-1] == address[1:]]
        for one, other in ((accesses[i], accesses[j]) for i, j in np.unique(neighbours, axis=1).T):
            if one.writes or other.writes:
                assert one.program == other.program, f"{self.name}: {one} what {other}"
                assert one.barriers < other.barriers, f"{self.name}: no barrier, {one} what {other}"


def _has(tensor: Tensor, access: Access, padded: bool) -> bool:
    """Whether all of it are elements of the tensor; `padded`: or pad the rows of a matrix."""
    if access.size != tensor.element_size():
        return False
    rest = access.addresses - tensor.data_ptr()
    if (rest < 0).any() or (rest % access.size).any():
        return False
    rest //= access.size
    shape = (tensor.shape[0], tensor.stride(0)) if padded and tensor.dim() == 2 else tensor.shape
    for stride, size in sorted(zip(tensor.stride(), shape, strict=True), reverse=True):
        if stride and size > 1:
            index = np.minimum(rest // stride, size - 1)
            rest -= index * stride
    return not rest.any()


def _place() -> str:
    """The kernel's line that is running: the nearest frame that is neither Triton's nor of this file."""
    frame = sys._getframe(2)
    while frame.f_globals["__name__"] == __name__ or frame.f_globals["__name__"].startswith("triton."):
        assert frame.f_back is not None
        frame = frame.f_back
    return f"{frame.f_code.co_filename.rsplit('/', 1)[-1]}:{frame.f_lineno}"
