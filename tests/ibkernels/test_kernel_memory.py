"""The watch over the interpreted kernels of these tests (conftest.py) sees what a GPU's memory checker would."""

import pytest
import torch

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("there is a GPU: kernels run there, not in the interpreter", allow_module_level=True)

import triton
import triton.language as tl


@triton.jit
def copy_kernel(source, target, n, first, stride, ragged: tl.constexpr):
    """target[i] = source[first + i * stride], i < n, four a program; the loads of the last one masked if `ragged`."""
    o = tl.program_id(0) * 4 + tl.arange(0, 4)
    b = tl.load(source + first + o * stride, mask=(o < n) | (not ragged))
    tl.store(target + o, b, mask=o < n)


@triton.jit
def shift_kernel(tensor, n, barriers: tl.constexpr):
    """tensor[i + 1] = tensor[i] for n of them from the program's first on, four at a time."""
    for first in range(0, n, 4):
        o = tl.program_id(0) * 4 + first + tl.arange(0, 4)
        b = tl.load(tensor + o)
        if barriers > 0:
            tl.debug_barrier()
        tl.store(tensor + o + 1, b)
        if barriers > 1:
            tl.debug_barrier()


@triton.jit
def fold_kernel(source, target, width, own: tl.constexpr):
    """target[i % width] = source[i], four a program; `own`: after those that the programs before it write."""
    pid, o = tl.program_id(0), tl.arange(0, 4)
    tl.store(target + o % width + (pid * width if own else 0), tl.load(source + pid * 4 + o))


@triton.jit
def count_kernel(target):
    tl.atomic_add(target, 1.0)


def copy(source: torch.Tensor, n: int, first: int = 0, stride: int = 1, ragged: bool = True) -> None:
    copy_kernel[(triton.cdiv(n, 4),)](source, torch.empty(n), n, first, stride, ragged)


def shift(n: int, programs: int, barriers: int) -> None:
    shift_kernel[(programs,)](torch.arange(n * programs + 1.0), n, barriers)


def fold(width: int, programs: int, own: bool) -> None:
    fold_kernel[(programs,)](torch.arange(4.0 * programs), torch.empty(width * programs), width, own)


def halves(n: int, first: int, last: int) -> None:
    """Of n numbers of four bytes, from the first on, to numbers of two in the same memory, at first .. last - 1."""
    memory = torch.zeros(4)
    copy_kernel[(1,)](memory, memory.view(torch.float16)[first:last], n, 0, 1, True)


NUMBERS = torch.arange(24.0)
TABLE = torch.arange(60.0).view(6, 10)[:, 3:7]  # rows of four, ten apart


@pytest.mark.parametrize(
    "run",
    [
        lambda: copy(NUMBERS, 24),
        lambda: copy(NUMBERS, 7),
        lambda: copy(NUMBERS[::3], 8, stride=3),
        lambda: copy(TABLE, 4, first=50),
        lambda: copy(TABLE, 4, stride=10),
        lambda: copy(NUMBERS.view(4, 6).T, 24),
        lambda: copy(NUMBERS[:1].expand(5), 5, stride=0),
        lambda: shift(n=4, programs=1, barriers=1),
        lambda: shift(n=8, programs=1, barriers=2),
        lambda: fold(width=4, programs=3, own=True),
    ],
)  # fmt: skip
def test_nothing_is_found_where_nothing_is_wrong(run) -> None:
    run()


@pytest.mark.parametrize(
    ("run", "found"),
    [
        (lambda: copy(NUMBERS, 23, ragged=False, first=1), r"outside of its tensors program \(5, 0, 0\) reads"),
        (lambda: copy(NUMBERS, 4, first=-1), "outside of its tensors"),
        (lambda: copy(NUMBERS[::3], 4), "outside of its tensors"),
        (lambda: copy(TABLE, 5), "outside of its tensors"),
        (lambda: copy(TABLE, 7, stride=10), "outside of its tensors"),
        (lambda: copy(NUMBERS[:4], 4, first=8), "outside of its tensors"),
        (lambda: shift(n=4, programs=1, barriers=0), "no barrier"),
        (lambda: shift(n=8, programs=1, barriers=1), "no barrier"),
        (lambda: shift(n=4, programs=2, barriers=2), r"shift_kernel: program \(0, 0, 0\) writes .* what program \(1"),
        (lambda: halves(n=1, first=1, last=2), "no barrier"),
        (lambda: halves(n=4, first=0, last=2), r"outside of its tensors program \(0, 0, 0\) writes"),
        (lambda: fold(width=3, programs=1, own=True), "an element twice"),
        (lambda: fold(width=4, programs=2, own=False), r"fold_kernel: program \(0, 0, 0\) writes .* what program \(1"),
        (lambda: count_kernel[(3,)](torch.zeros(1)), "count_kernel: an atomic at test_kernel_memory.py"),
    ],
)  # fmt: skip
def test_what_a_gpu_would_not_forgive_is_found(run, found: str) -> None:
    with pytest.raises((AssertionError, triton.runtime.interpreter.InterpreterError), match=found):
        run()
