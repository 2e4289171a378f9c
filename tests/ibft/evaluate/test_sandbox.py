"""Each tier that works here: what a program may not do, and that nothing of it is left."""

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ibft.errors import InputError
from ibft.evaluate import sandbox as module
from ibft.evaluate.python_verdict import INTERPRETER
from ibft.evaluate.sandbox import Limits, Sandbox, Tier, choose_sandbox, readable_folders

LIMITS = Limits(wall_seconds=20, cpu_seconds=2, memory_mib=512, file_mib=4, processes=16, output_bytes=10_000)
MARK = 4_000_000 + os.getpid()  # seconds, and a word that no other process has in its command
WALLS: tuple[Tier, ...] = ("bubblewrap", "namespaces")


@pytest.fixture(params=[*WALLS, "rlimits"])
def any_tier(request: pytest.FixtureRequest) -> Sandbox:
    return of_tier(request.param)


@pytest.fixture(params=WALLS)
def walled(request: pytest.FixtureRequest) -> Sandbox:
    return of_tier(request.param)


def of_tier(tier: Tier) -> Sandbox:
    try:
        return choose_sandbox(tier=tier, readable=readable_folders(INTERPRETER))
    except InputError as error:
        if tier == "bubblewrap" and os.environ.get("IBFT_REQUIRE_SANDBOX") == "1":
            pytest.fail(str(error))
        pytest.skip(str(error))


def python(source: str) -> list[str]:
    return [INTERPRETER, "-s", "-S", "-P", "-c", source]


def commands() -> list[bytes]:
    """Of all processes."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            found.append(file.read_bytes())
    return found


def test_a_program_runs(any_tier: Sandbox) -> None:
    outcome = any_tier.run(["sh", "-c", "cat; echo here > file; cat file >&2; exit 3"], LIMITS, stdin=b"given\n")
    assert (outcome.exit_code, outcome.stopped) == (3, None)
    assert (outcome.stdout, outcome.stderr) == (b"given\n", b"here\n")


def test_the_environment_is_scrubbed(any_tier: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    outcome = any_tier.run(["env"], LIMITS)
    assert b"secret" not in outcome.stdout and b"HOME=" in outcome.stdout


def test_other_open_files_are_not_inherited(any_tier: Sandbox, tmp_path: Path) -> None:
    with open(tmp_path / "open", "w") as file:
        os.set_inheritable(file.fileno(), True)
        outcome = any_tier.run(python(f"import os; os.write({file.fileno()}, b'x')"), LIMITS)
    assert outcome.exit_code != 0 and b"Bad file descriptor" in outcome.stderr


@pytest.mark.parametrize(
    ("source", "stopped"),
    [
        ("while True: pass", "timeout"),
        ("import os\nfor _ in range(3): os.fork()\nwhile True: pass", "timeout"),
        ("while True: print('x' * 1000)", "output_limit"),
        ("import os\nos.close(1)\nwhile True: os.write(2, b'x' * 1000)", "output_limit"),
        ("import os, time\nfor _ in range(3): os.fork()\nkept = b'x' * (1 << 28)\ntime.sleep(15)", "memory"),
    ],
)
def test_limits_end_a_program(any_tier: Sandbox, source: str, stopped: str) -> None:
    started = time.monotonic()
    outcome = any_tier.run(python(source), LIMITS)
    assert outcome.stopped == stopped
    assert len(outcome.stdout) <= LIMITS.output_bytes and len(outcome.stderr) <= LIMITS.output_bytes
    assert time.monotonic() - started < LIMITS.wall_seconds + 5


def test_the_wall_clock_ends_a_program_that_sleeps(any_tier: Sandbox) -> None:
    assert any_tier.run(["sleep", "60"], Limits(wall_seconds=0.5)).stopped == "timeout"


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("kept = bytearray(1 << 30)", b"MemoryError"),
        ("open('large', 'wb').write(bytes(5 << 20))", b"File too large"),
        (
            "import os, time\nfor _ in range(40):\n    if os.fork() == 0: time.sleep(10); os._exit(0)\ntime.sleep(3)",
            b"Resource temp",
        ),
    ],
)
def test_limits_refuse_what_is_too_much(any_tier: Sandbox, source: str, error: bytes) -> None:
    outcome = any_tier.run(python(source), LIMITS)
    if any_tier.tier == "rlimits" and os.geteuid() == 0 and outcome.stopped == "processes":
        return  # root's processes, which are counted from outside
    assert outcome.exit_code == 1 and error in outcome.stderr


def test_the_private_folder_holds_no_more_than_it_may(walled: Sandbox) -> None:
    source = "for n in range(9): open(f'file{n}', 'wb').write(bytes(1 << 20))"
    assert b"No space left" in walled.run(python(source), LIMITS).stderr


def test_nothing_outside_is_seen_or_written(walled: Sandbox, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("answer")
    for path in (tmp_path / "secret", Path(__file__), Path("/etc/passwd")):
        assert walled.run(["cat", str(path)], LIMITS).exit_code != 0
    for folder in ("/", "/usr", "/dev", "/etc", "/proc/sys/kernel"):
        assert walled.run(["touch", f"{folder}/harmed"], LIMITS).exit_code != 0
    assert walled.run(["ls", "/tmp"], LIMITS).stdout == b""


def test_other_processes_are_not_seen(walled: Sandbox) -> None:
    outcome = walled.run(["sh", "-c", "ls -d /proc/[0-9]*"], LIMITS)
    assert len(outcome.stdout.split()) <= 3
    assert str(os.getpid()).encode() not in outcome.stdout


def test_there_is_no_network(walled: Sandbox) -> None:
    source = (
        "import socket\nprint([name for _, name in socket.if_nameindex()])\nsocket.create_connection(('1.1.1.1', 53))"
    )
    outcome = walled.run(python(source), LIMITS)
    assert b"unreachable" in outcome.stderr and outcome.stdout in (b"['lo']\n", b"[]\n")


def test_a_program_has_no_privileges(walled: Sandbox) -> None:
    outcome = walled.run(
        ["sh", "-c", "grep -E 'CapEff|CapPrm|NoNewPrivs' /proc/self/status; mount -t tmpfs t /tmp"], LIMITS
    )
    assert b"CapEff:\t0000000000000000" in outcome.stdout and b"NoNewPrivs:\t1" in outcome.stdout
    assert outcome.exit_code != 0


@pytest.mark.parametrize(
    "hide", ["", "os.setsid()", "os.setpgid(0, 0)", "signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))"]
)
def test_what_a_program_starts_ends_with_it(any_tier: Sandbox, hide: str) -> None:
    source = (
        "import os, signal, time\nif os.fork() == 0:\n    if os.fork() == 0:\n"
        f"        {hide or 'pass'}\n        os.close(1); os.close(2)\n        time.sleep({MARK})\n"
        "    os._exit(0)\nos.wait()"
    )
    outcome = any_tier.run(python(source), LIMITS)
    assert outcome.exit_code == 0 and outcome.seconds < 15
    assert not any(f"sleep({MARK})".encode() in command for command in commands())


def test_the_private_folder_is_gone_whatever_is_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(Sandbox, "for_others", False)  # who could not enter the folder of this test
    source = "import os\nfor _ in range(1500):\n    os.mkdir('d'); os.chdir('d')\nopen('f', 'w')\nos.chmod('.', 0)"
    of_tier("rlimits").run(python(source), LIMITS)
    assert list(tmp_path.iterdir()) == []


def test_a_killed_run_takes_its_programs_with_it(walled: Sandbox) -> None:
    script = (
        "from ibft.evaluate.sandbox import *\nimport sys\n"
        f"sandbox = Sandbox({walled.tier!r}, '', {walled.readable!r})\n"
        f"program = sandbox.start(['sleep', '{MARK}'], Limits())\nprint('started', flush=True)\nsupervise(program)"
    )
    run = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=Path(__file__).parents[3])
    assert run.stdout is not None and run.stdout.readline() == b"started\n"
    time.sleep(0.5)
    run.kill()
    run.wait()
    run.stdout.close()
    deadline = time.monotonic() + 10
    while f"sleep\0{MARK}\0".encode() in commands():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_limits_alone_must_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_why_not", lambda tier, _: None if tier == "rlimits" else "no such thing")
    with pytest.raises(InputError, match=r"bubblewrap: no such thing; namespaces.*--allow_unsafe"):
        choose_sandbox()
    chosen = choose_sandbox(allow_unsafe=True)
    assert chosen.tier == "rlimits" and "no such thing" in chosen.reason


def test_the_safest_tier_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_why_not", lambda tier, _: "not installed" if tier == "bubblewrap" else None)
    chosen = choose_sandbox(allow_unsafe=True)
    assert chosen.tier == "namespaces" and chosen.reason == "bubblewrap: not installed"


def test_a_tier_that_cannot_work_says_why() -> None:
    module._why_not.cache_clear()
    with pytest.raises(InputError, match=r"bubblewrap: .*nowhere"):
        choose_sandbox(tier="bubblewrap", readable=("/nowhere",))
