"""Programs and designs that attack the evaluation: each ends in its category, none passes, harms or stays.

All run together, as a file of samples would, and each is bounded in itself, so that a broken sandbox fails a test and
not the machine.
"""

import os
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from hostile_designs import AND, HEADER, VERILOG
from hostile_programs import PYTHON, SQUARE

from ibft.evaluate import python_verdict, verilog_verdict
from ibft.evaluate.python_verdict import Verdict
from ibft.evaluate.sandbox import Limits, Sandbox

LIMITS = Limits(wall_seconds=10, cpu_seconds=2, memory_mib=512, file_mib=8, processes=24)


@pytest.fixture(scope="module")
def canary(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file that everybody may write, in a folder that everybody may enter."""
    folder = Path("/var/tmp") / f"ibft-canary-{os.getpid()}"
    folder.mkdir(mode=0o777)
    folder.chmod(0o777)
    file = folder / "canary"
    file.write_text("alive")
    file.chmod(0o666)
    yield file
    file.unlink(missing_ok=True)
    folder.rmdir()


@pytest.fixture(scope="module")
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        yield server


def filled(source: str, canary: Path, port: int) -> str:
    """Without str.format, whose braces the sources use themselves. A correct design is compared in 39 samples."""
    for name, value in {"canary": canary, "port": port, "pid": os.getpid(), "n": 39}.items():
        source = source.replace(f"{{{name}}}", str(value))
    return source


def judge(sandbox: Sandbox, name: str, source: str) -> Verdict:
    if name in PYTHON or name == "correct":
        return python_verdict.judge(sandbox, SQUARE, source, LIMITS)
    header = "" if source.startswith("module top_module(") else HEADER
    return verilog_verdict.judge(sandbox, AND, f"{header}{source}endmodule\n", LIMITS, samples=39)


def of_ours() -> set[int]:
    """Processes with the environment that only our sandboxes give."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = (folder / "environ").read_bytes()
        except OSError:
            continue
        if b"PYTHONHASHSEED=0\0" in environment and b"PYTHONDONTWRITEBYTECODE=1\0" in environment:
            found.add(int(folder.name))
    return found


def keeper(pid: int, sandboxed: set[int]) -> int:
    """Who runs it: the first process above that is not in a sandbox; init, if it is an orphan."""
    while pid in sandboxed:
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[1])
        except OSError:  # it ended meanwhile
            return 0
    return pid


def assert_gone(before: set[int]) -> None:
    """What is new has ended, but for what another run on this machine has started."""
    deadline = time.monotonic() + 10
    while True:
        sandboxed = of_ours()
        left = {pid for pid in sandboxed - before if keeper(pid, sandboxed) in (1, os.getpid())}
        if not left:
            return
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def zombies() -> list[str]:
    """The parents of processes that ended and that nobody waited for."""
    stats = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            stats.append(file.read_text(errors="replace").rpartition(")")[2].split())
        except OSError:
            continue
    return [stat[1] for stat in stats if stat[0] == "Z"]


def descendants(pid: int) -> list[int]:
    return [child for thread in Path(f"/proc/{pid}/task").iterdir() for child in children(thread)]


def children(thread: Path) -> list[int]:
    return [int(word) for word in (thread / "children").read_text().split()]


@pytest.fixture(scope="module")
def verdicts(
    sandbox: Sandbox, canary: Path, listener: socket.socket, iverilog: None
) -> dict[str, tuple[Verdict, float]]:
    """All attacks and correct programs between them, four at a time: the verdicts, and the seconds until each."""
    port = listener.getsockname()[1]
    sources = {name: filled(attack.source, canary, port) for name, attack in {**PYTHON, **VERILOG}.items()}
    before = of_ours(), set(os.listdir("/tmp")), set(descendants(os.getpid()))

    def one(name: str) -> tuple[Verdict, float]:
        started = time.monotonic()
        return judge(sandbox, name, sources[name]), time.monotonic() - started

    with ThreadPoolExecutor(4) as pool:
        found = dict(zip(sources, pool.map(one, sources), strict=True))
    assert not set(descendants(os.getpid())) - before[2]
    assert_gone(before[0])
    assert not {name for name in set(os.listdir("/tmp")) - before[1] if name.startswith("ibft-sandbox")}
    return found


@pytest.mark.parametrize("name", [*PYTHON, *VERILOG])
def test_an_attack_ends_in_its_category(name: str, verdicts: dict[str, tuple[Verdict, float]]) -> None:
    verdict, seconds = verdicts[name]
    assert verdict.category in {**PYTHON, **VERILOG}[name].categories, verdict
    assert seconds < LIMITS.wall_seconds + 4


def test_no_attack_did_harm(verdicts: dict[str, tuple[Verdict, float]], canary: Path, listener: socket.socket) -> None:
    assert canary.read_text() == "alive"
    assert os.listdir(canary.parent) == [canary.name]
    assert not Path("/usr/lib/harmed").exists()
    with pytest.raises(BlockingIOError):
        listener.accept()


def test_no_attack_leaves_a_zombie(verdicts: dict[str, tuple[Verdict, float]]) -> None:
    time.sleep(0.2)
    assert str(os.getpid()) not in zombies()


def test_honest_programs_pass_beside_attacks(sandbox: Sandbox, iverilog: None) -> None:
    with ThreadPoolExecutor(4) as pool:
        attacks = [
            pool.submit(judge, sandbox, name, PYTHON[name].source)
            for name in ("forks_that_fork", "memory_of_many", "output")
        ]
        honest = [pool.submit(judge, sandbox, "correct", "def f(x):\n    return x * x") for _ in range(6)]
        honest += [pool.submit(judge, sandbox, "and", "  assign y = a & b;\n") for _ in range(4)]
    assert Counter(future.result().category for future in honest) == {"passed": 10}
    assert all(future.result().category != "passed" for future in attacks)


def test_a_patched_end_of_a_loop_does_not_end_the_tests(sandbox: Sandbox) -> None:
    mapped = replace(
        SQUARE, test="def check(candidate):\n    for value in map(candidate, [1, 2]):\n        assert value"
    )
    verdict = python_verdict.judge(sandbox, mapped, "def f(x):\n    raise StopIteration", LIMITS)
    assert verdict.category == "runtime_error"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_thousand_mixed_samples_leave_nothing(
    sandbox: Sandbox, canary: Path, listener: socket.socket, iverilog: None
) -> None:
    port = listener.getsockname()[1]
    quick = {
        name: attack
        for name, attack in {**PYTHON, **VERILOG}.items()
        if not attack.categories & {"timeout"} and name not in ("memory_of_many", "forks")
    }
    slow = [name for name in {**PYTHON, **VERILOG} if name not in quick]
    rng = random.Random(0)
    names = [name for name in slow for _ in range(4)]
    names += [rng.choice([*quick, "correct"]) for _ in range(2000 - len(names))]
    rng.shuffle(names)
    before = of_ours(), set(os.listdir("/tmp")), threading.active_count(), len(os.listdir("/proc/self/fd"))
    others = set(descendants(os.getpid()))

    def one(name: str) -> str:
        if name == "correct":
            return judge(sandbox, name, "def f(x):\n    return x * x").category
        return judge(sandbox, name, filled({**PYTHON, **VERILOG}[name].source, canary, port)).category

    with ThreadPoolExecutor(4) as pool:
        found = list(zip(names, pool.map(one, names), strict=True))
    for name, category in found:
        assert category in ({"passed"} if name == "correct" else {**PYTHON, **VERILOG}[name].categories), name
    assert not set(descendants(os.getpid())) - others
    assert_gone(before[0])
    assert {name for name in os.listdir("/tmp") if name.startswith("ibft-sandbox")} <= before[1]
    assert threading.active_count() == before[2]
    assert len(os.listdir("/proc/self/fd")) == before[3]
    assert str(os.getpid()) not in zombies()
    assert canary.read_text() == "alive"
