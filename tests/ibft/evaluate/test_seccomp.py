"""The filter of system calls, run by an interpreter of its own, and by the kernel in test_hostile.py."""

import platform
import struct
import sys

import pytest

from ibft.evaluate import python_verdict, seccomp
from ibft.evaluate.problems import Problem
from ibft.evaluate.sandbox import Limits, Sandbox

ALLOWED, REFUSED = 0x7FFF0000, 0x00050000 | 38  # ENOSYS
X86, ARM, I386 = 0xC000003E, 0xC00000B7, 0x40000003
LIMITS = Limits(wall_seconds=30, cpu_seconds=5, memory_mib=512)


def answer(program: bytes, audit: int, number: int, argument: int = 0) -> int:
    """What the filter answers to a call, by the semantics of classic BPF."""
    shown = struct.pack("<IIQQ", number, audit, 0, argument)
    code = [struct.unpack_from("HBBI", program, place) for place in range(0, len(program), 8)]
    at = value = 0
    while True:
        operation, yes, no, k = code[at]
        at += 1
        if operation == 0x06:
            return int(k)
        if operation == 0x20:
            value = struct.unpack_from("<I", shown, k)[0]
        else:
            taken = {0x15: value == k, 0x35: value >= k, 0x45: value & k != 0}[operation]
            at += yes if taken else no


@pytest.fixture(params=["x86_64", "aarch64"])
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(platform, "machine", lambda: request.param)
    return str(request.param)


# read write openat mmap execve exit_group futex socketpair pipe2
ORDINARY = {"x86_64": (0, 1, 257, 9, 59, 231, 202, 53, 293), "aarch64": (63, 64, 56, 222, 221, 94, 98, 199, 59)}
MEMFD, SHMGET, UNSHARE = {"x86_64": 319, "aarch64": 279}, {"x86_64": 29, "aarch64": 194}, {"x86_64": 272, "aarch64": 97}
CLONE, SOCKET = {"x86_64": 56, "aarch64": 220}, {"x86_64": 41, "aarch64": 198}
FORK, THREAD = 0x01200011, 0x3D0F00  # flags that glibc gives


def test_what_is_refused(machine: str) -> None:
    program, audit = seccomp.program(), {"x86_64": X86, "aarch64": ARM}[machine]
    for number in ORDINARY[machine]:
        assert answer(program, audit, number) == ALLOWED, number
    for number in (MEMFD[machine], SHMGET[machine], UNSHARE[machine], 425, 435, 447):
        assert answer(program, audit, number) == REFUSED, number
    for family, expected in {1: ALLOWED, 2: ALLOWED, 10: ALLOWED, 16: ALLOWED, 40: REFUSED, 17: REFUSED}.items():
        assert answer(program, audit, SOCKET[machine], family) == expected, family
    for flags, expected in {FORK: ALLOWED, THREAD: ALLOWED, 0x10000011: REFUSED, 0x40000011: REFUSED}.items():
        assert answer(program, audit, CLONE[machine], flags) == expected, flags
    # calls in the words of another machine
    assert answer(program, I386, ORDINARY[machine][0]) == REFUSED
    assert answer(program, audit, 0x40000000 | ORDINARY[machine][0]) == REFUSED


def test_no_filter_where_the_numbers_are_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    assert seccomp.program() == b""
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(sys, "maxsize", 2**31 - 1)
    assert seccomp.program() == b""


SQUARE = Problem(
    "square", "python", "def f(x):\n", "    return x * x\n", "def check(f):\n    assert f(3) == 9\n", entry_point="f"
)
HONEST = """import asyncio, socket, subprocess, threading
async def late(x):
    await asyncio.sleep(0)
    return x * x
def f(x):
    found = [int(subprocess.run(["echo", str(x)], capture_output=True).stdout) * x]
    thread = threading.Thread(target=lambda: found.append(asyncio.run(late(x))))
    thread.start()
    thread.join()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM):
        return found[0] if len(set(found)) == 1 else None
"""


@pytest.mark.parametrize("isolated", [True, False])
def test_threads_processes_and_sockets_work(isolated: bool, sandbox: Sandbox) -> None:
    verdict = python_verdict.judge(sandbox, SQUARE, HONEST, LIMITS, isolated=isolated)
    assert verdict.category == "passed", verdict


@pytest.mark.parametrize("isolated", [True, False])
def test_both_ways_of_running_are_filtered(isolated: bool, sandbox: Sandbox) -> None:
    if not seccomp.program():
        pytest.skip(f"no filter is known for {platform.machine()}")
    source = "import os\ndef f(x):\n    os.memfd_create('m')\n    return x * x\n"
    verdict = python_verdict.judge(sandbox, SQUARE, source, LIMITS, isolated=isolated)
    assert verdict.category == "runtime_error" and "not implemented" in verdict.detail


@pytest.mark.parametrize("isolated", [True, False])
def test_a_kernel_that_takes_no_filter_is_no_verdict(
    isolated: bool, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seccomp, "program", lambda: bytes(8))  # it does not end with an answer
    verdict = python_verdict.judge(sandbox, SQUARE, "def f(x):\n    return x * x", LIMITS, isolated=isolated)
    assert verdict.category == "harness_error" and "takes no filter" in verdict.detail
