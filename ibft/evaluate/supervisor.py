"""Between us and a program that only limits hold: whatever it starts stays below this process, and ends with it.

Run as a script: the file descriptor whose end is the sign to stop, then the command.
"""

import ctypes
import os
import select
import signal
import sys

PR_SET_CHILD_SUBREAPER = 36


def main() -> int:
    """The command's exit code as a shell counts it; its descendants are gone, however they hid."""
    life, command = int(sys.argv[1]), sys.argv[2:]
    # Orphans become children of this process, wherever they moved: process groups and sessions can be left.
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    os.set_inheritable(life, False)
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    child = os.posix_spawnp(command[0], command, os.environ, setsigdef=[signal.SIGPIPE, signal.SIGXFSZ])
    status = None
    while status is None:
        ready, _, _ = select.select([life, woken], [], [])
        if life in ready:
            break
        os.read(woken, 4096)
        status = reap().get(child)
    while pids := children():
        for pid in pids:
            kill_tree(pid)
        status = reap().get(child, status)
    return 128 + signal.SIGKILL if status is None else status


def reap() -> dict[int, int]:
    """The exit codes of the children that have ended."""
    ended: dict[int, int] = {}
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return ended
        if pid == 0:
            return ended
        code = os.waitstatus_to_exitcode(status)
        ended[pid] = 128 - code if code < 0 else code


def kill_tree(pid: int) -> None:
    """The process is stopped before its children are looked up, so that it has no more of them."""
    try:
        os.kill(pid, signal.SIGSTOP)
        for child in children(pid):
            kill_tree(child)
        os.kill(pid, signal.SIGKILL)
    except OSError:
        pass  # it ended meanwhile


def children(pid: int | None = None) -> list[int]:
    """Direct children, those of every thread."""
    found = []
    try:
        for thread in os.listdir(f"/proc/{pid or os.getpid()}/task"):
            with open(f"/proc/{pid or os.getpid()}/task/{thread}/children") as file:
                found += [int(word) for word in file.read().split()]
    except OSError:
        pass  # it ended meanwhile
    return found


if __name__ == "__main__":
    sys.exit(main())
