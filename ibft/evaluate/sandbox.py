"""Programs that nobody vouches for, run where they can do no harm: limits, and the walls around them.

Three tiers, chosen by trying them: bubblewrap, namespaces made with util-linux, and limits alone, which are no wall and
must be asked for. What each keeps from what is in docs/evaluation.md.
"""

from __future__ import annotations

import contextlib
import functools
import os
import selectors
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Literal, NamedTuple

from ibft.errors import InputError
from ibft.evaluate import walls
from ibft.evaluate.walls import MIB, Limits, Tier

Stopped = Literal["timeout", "memory", "output_limit", "processes", "interrupted"]
_POLL_SECONDS = 0.05
_CLOCK_TICKS = os.sysconf("SC_CLK_TCK")
# Users that neither systemd nor Debian gives out: as root, every program runs as one of its own.
_FIRST_UID, _UIDS = 60578, 600


class Outcome(NamedTuple):
    """How a program ended. `exit_code` as a shell counts: 128 + the signal that killed it."""

    exit_code: int
    stopped: Stopped | None  # the limit for which we ended it
    stdout: bytes
    stderr: bytes
    seconds: float


@dataclass(frozen=True)
class Sandbox:
    """A tier that works here, why it is this one, and the folders that its programs may read beside the system's."""

    tier: Tier
    reason: str
    readable: tuple[str, ...] = ()
    interrupted: threading.Event = field(default_factory=threading.Event, compare=False)  # set: everything is to end

    @property
    def for_others(self) -> bool:
        """Whether users other than root can reach the folders: without walls, those of root's home they cannot."""
        above = {parent for folder in self.readable for parent in (Path(folder), *Path(folder).parents)}
        return self.tier != "rlimits" or all(folder.stat().st_mode & 0o001 for folder in above)

    def start(
        self, argv: Sequence[str], limits: Limits, *, stdin: bytes = b"", pass_fds: Sequence[int] = ()
    ) -> Program:
        """Starts a program in a private folder that is its only writable one, without network or environment.

        It reads `stdin` and then its end; of the open files, it inherits only `pass_fds`.
        """
        return Program(self, argv, limits, stdin, pass_fds)

    def run(self, argv: Sequence[str], limits: Limits, *, stdin: bytes = b"") -> Outcome:
        """Runs a program to its end or to a limit; nothing of it is left when this returns."""
        return supervise(self.start(argv, limits, stdin=stdin))[0]


def choose_sandbox(*, allow_unsafe: bool = False, readable: Sequence[str] = (), tier: Tier | None = None) -> Sandbox:
    """The safest tier that works here, found by trying; or the one named. InputError where there is none."""
    failures: list[str] = []
    for candidate in (tier,) if tier else ("bubblewrap", "namespaces"):
        failure = _why_not(candidate, tuple(readable))
        if failure is None:
            reason = "; ".join(failures) or "it works here"
            return Sandbox(candidate, reason, tuple(readable))
        failures.append(f"{candidate}: {failure}")
    found = "; ".join(failures)
    if allow_unsafe and tier is None and _why_not("rlimits", tuple(readable)) is None:
        return Sandbox("rlimits", found, tuple(readable))
    raise InputError(
        f"No sandbox works here ({found}). Install bubblewrap, or allow user namespaces; --allow_unsafe runs the "
        "samples with limits alone, which let them read and write whatever you can: only where nothing can be lost."
    )


def readable_folders(*programs: str) -> tuple[str, ...]:
    """The folders that these programs (paths) need beside the system's: the one above their bin, links followed."""
    found = {Path(program).resolve().parent.parent for program in programs}
    found |= {Path(program).parent.parent for program in programs if Path(program).is_symlink()}
    return tuple(sorted(str(folder) for folder in found if not folder.is_relative_to("/usr") and str(folder) != "/"))


class Program:
    """A started program: its pipes, and what is needed to end it and all that it started."""

    def __init__(
        self, sandbox: Sandbox, argv: Sequence[str], limits: Limits, stdin: bytes, pass_fds: Sequence[int]
    ) -> None:
        self.limits, self._interrupted = limits, sandbox.interrupted
        self.stopped: Stopped | None = None
        self.output: dict[str, bytearray] = {"stdout": bytearray(), "stderr": bytearray()}
        self._child: int | None = None  # pidfd of the first process inside, whose end is everyone's
        self._identity = _identities.take() if os.geteuid() == 0 and sandbox.for_others else None
        self._folder: str | None = None  # the private one, where it is on the disk
        self._life: int | None = None  # the end of a pipe, whose closing tells the supervisor to stop
        inherited = list(pass_fds)
        try:
            if sandbox.tier == "rlimits":
                self._folder = tempfile.mkdtemp(prefix="ibft-sandbox-")
                if self._identity is not None:
                    os.chown(self._folder, self._identity, self._identity)
                reading, self._life = os.pipe()
                inherited.append(reading)
                command = walls.limits_alone(argv, limits, self._identity, reading)
            else:
                wrap = walls.bubblewrap if sandbox.tier == "bubblewrap" else walls.namespaces
                command = wrap(argv, limits, self._identity, sandbox.readable)
            with _stdin(stdin) as source:
                self.started = time.monotonic()
                self.process = subprocess.Popen(
                    command,
                    stdin=source,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    cwd=self._folder or "/",
                    env=_environment(self._folder or "/tmp"),
                    pass_fds=inherited,
                    start_new_session=True,
                )
        except BaseException:
            self._give_back()
            raise
        finally:
            if sandbox.tier == "rlimits" and len(inherited) > len(pass_fds):
                os.close(inherited[-1])

    def pipes(self) -> Iterator[tuple[str, IO[bytes]]]:
        for name in self.output:
            pipe = getattr(self.process, name)
            os.set_blocking(pipe.fileno(), False)
            yield name, pipe

    def check(self) -> None:
        """Ends it if it takes more than it may."""
        usage = _usage(self.process.pid)
        if self._interrupted.is_set():
            self.stop("interrupted")
        elif (
            time.monotonic() - self.started > self.limits.wall_seconds
            or usage.cpu_seconds > self.limits.cpu_seconds + _POLL_SECONDS
        ):
            self.stop("timeout")
        elif usage.memory > self.limits.memory_mib * MIB:
            self.stop("memory")
        elif usage.processes > self.limits.processes + 4:  # the sandbox's own
            self.stop("processes")

    def stop(self, reason: Stopped | None = None) -> None:
        """Kills every process of it; `reason` is kept if it is the first."""
        self.stopped = self.stopped or reason
        if self._life is not None:
            os.close(self._life)  # the supervisor's sign to end what it started
            self._life = None
        elif self._folder is None:
            self._kill_inside()

    def _kill_inside(self) -> None:
        # The first process inside has everything else killed and reaped by the kernel; its parent, the sandbox's own
        # process, reaps it and exits, so that nothing is left to init. That parent is killed only if it has no child.
        if self.process.poll() is not None:
            return
        if self._child is None:
            with contextlib.suppress(OSError):
                for pid in _children(self.process.pid):
                    self._child = os.pidfd_open(pid)
        if self._child is None:
            self.process.kill()
            return
        with contextlib.suppress(OSError):
            signal.pidfd_send_signal(self._child, signal.SIGKILL)

    def finish(self) -> Outcome:
        """Ends it, if it has not ended, and clears away what it left."""
        deadline = time.monotonic() + 20
        while self.process.poll() is None:
            self.stop()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(0.2)
            if time.monotonic() > deadline:
                self.process.kill()
        seconds = time.monotonic() - self.started
        for name, pipe in self.pipes():
            with pipe:
                self._drain(name, pipe)
        self._give_back()
        code = self.process.returncode
        code = 128 - code if code < 0 else code
        if code == 128 + signal.SIGXCPU:
            self.stopped = self.stopped or "timeout"
        stdout, stderr = (bytes(text) for text in self.output.values())
        return Outcome(code, self.stopped, stdout, stderr, seconds)

    def read(self, name: str, pipe: IO[bytes]) -> bool:
        """Takes what there is of a stream; False at its end. Over the limit, the program is ended."""
        chunk = pipe.read(65536)
        if chunk is None:
            return True
        kept = self.output[name]
        kept += chunk[: self.limits.output_bytes - len(kept)]
        if len(chunk) and len(kept) >= self.limits.output_bytes:
            self.stop("output_limit")
        return bool(chunk)

    def _drain(self, name: str, pipe: IO[bytes]) -> None:
        """What was written before the end; a process that got away (only limits are no wall) could write for ever."""
        for _ in range(64):
            before = len(self.output[name])
            if not self.read(name, pipe) or len(self.output[name]) == before:
                return

    def _give_back(self) -> None:
        for descriptor in (self._child, self._life):
            if descriptor is not None:
                os.close(descriptor)
        self._child = self._life = None
        if self._folder is not None:  # rm, for folders deeper than Python's own removal can go
            subprocess.run(["chmod", "-R", "u+rwX", self._folder], stderr=subprocess.DEVNULL)
            subprocess.run(["rm", "-rf", self._folder], stderr=subprocess.DEVNULL)
        if self._identity is not None:
            _identities.give_back(self._identity)
        self._folder = self._identity = None


def supervise(first: Program, *others: Program) -> list[Outcome]:
    """Watches programs until the first ends, then ends the others; every limit is seen to. All are gone on return."""
    programs = (first, *others)
    try:
        with selectors.DefaultSelector() as selector:
            for program in programs:
                for name, pipe in program.pipes():
                    selector.register(pipe, selectors.EVENT_READ, (program, name))
            ended = os.pidfd_open(first.process.pid)
            try:
                selector.register(ended, selectors.EVENT_READ, None)
                _watch(selector, programs)
            finally:
                os.close(ended)
    finally:
        outcomes = [program.finish() for program in programs]
    return outcomes


def _watch(selector: selectors.BaseSelector, programs: Sequence[Program]) -> None:
    due = time.monotonic() + _POLL_SECONDS
    while True:
        for key, _ in selector.select(max(0.0, due - time.monotonic())):
            if key.data is None:
                return
            program, name = key.data
            if not program.read(name, key.fileobj):
                selector.unregister(key.fileobj)
        if time.monotonic() >= due:
            for program in programs:
                if program.process.poll() is None:
                    program.check()
            due = time.monotonic() + _POLL_SECONDS


class _Identities:
    """User ids for root to give away, one to each program that runs."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._taken: set[int] = set()
        self._next = os.getpid() * 16

    def take(self) -> int:
        with self._lock:
            while (uid := _FIRST_UID + self._next % _UIDS) in self._taken:
                self._next += 1
            self._next += 1
            self._taken.add(uid)
            return uid

    def give_back(self, uid: int) -> None:
        with self._lock:
            self._taken.discard(uid)


_identities = _Identities()


def _environment(folder: str) -> Mapping[str, str]:
    # A fixed hash seed: the order of a set, and with it a verdict, is the same in every run.
    return {
        "PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
        "HOME": folder,
        "TMPDIR": folder,
        "LANG": "C.UTF-8",
        "PYTHONHASHSEED": "0",
        "PYTHONDONTWRITEBYTECODE": "1",
    }


@contextlib.contextmanager
def _stdin(content: bytes) -> Iterator[int]:
    if not content:
        yield subprocess.DEVNULL
        return
    descriptor = os.memfd_create("stdin")
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(content)
        os.lseek(descriptor, 0, os.SEEK_SET)
        yield descriptor
    finally:
        os.close(descriptor)


@functools.cache
def _why_not(tier: Tier, readable: tuple[str, ...]) -> str | None:
    """None if a program runs in this tier as it should; else the first line of what went wrong."""
    needed = {"bubblewrap": ["bwrap"], "namespaces": ["unshare", "pivot_root"], "rlimits": []}[tier]
    path = _environment("/")["PATH"]
    if missing := [name for name in (*needed, "prlimit", "setpriv") if shutil.which(name, path=path) is None]:
        return f"{', '.join(missing)} is not installed"
    probe = "echo works; touch here && cat /proc/self/status > /dev/null"
    outcome = Sandbox(tier, "", readable).run(["sh", "-c", probe], Limits(wall_seconds=10))
    if outcome.stdout == b"works\n" and outcome.exit_code == 0 and not outcome.stderr:
        return None
    said = outcome.stderr.decode(errors="replace").strip().splitlines()
    return said[0].rstrip(".") if said else f"it ended with code {outcome.exit_code}"


class _Usage(NamedTuple):
    processes: int
    memory: int  # bytes in use that no file backs, of all processes
    cpu_seconds: float  # with those of children that ended and were waited for


def _usage(pid: int) -> _Usage:
    count, memory, ticks = 0, 0, 0
    waiting = [pid]
    while waiting:
        each = waiting.pop()
        with contextlib.suppress(OSError):  # it ended meanwhile
            waiting += _children(each)
            fields = Path(f"/proc/{each}/stat").read_text(errors="replace").rpartition(")")[2].split()
            ticks += sum(int(field) for field in fields[11:15])
            count += 1
            for line in Path(f"/proc/{each}/status").read_text(errors="replace").splitlines():
                if line.startswith(("RssAnon:", "RssShmem:")):
                    memory += int(line.split()[1]) << 10
    return _Usage(count, memory, ticks / _CLOCK_TICKS)


def _children(pid: int) -> list[int]:
    """Of all of its threads."""
    threads = os.listdir(f"/proc/{pid}/task")
    return [
        int(child) for thread in threads for child in Path(f"/proc/{pid}/task/{thread}/children").read_text().split()
    ]
