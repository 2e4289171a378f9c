"""The command lines that put a program behind the walls of each tier, and hold it to its limits.

Each takes the command of the program, its limits, and `identity`: the user id that root lets it run as; None: our own.
`readable` are the folders that it may read beside the system's.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal

Tier = Literal["bubblewrap", "namespaces", "rlimits"]
MIB = 1 << 20
_SYSTEM_FOLDERS = tuple(Path(name) for name in ("/bin", "/sbin", "/lib", "/lib32", "/lib64"))
_WITH_PARENT = ["setpriv", "--pdeathsig", "SIGKILL", "--"]

# bubblewrap's walls in the words of util-linux. $1 is the size of /tmp, then folders up to "--", then the command.
_NAMESPACES_SCRIPT = """set -e
size=$1; shift
mount -t tmpfs -o size=1m,mode=755 tmpfs /tmp
cd /tmp
while [ "$1" != -- ]; do
    mkdir -p ".$1"; mount --bind "$1" ".$1"; mount -o remount,bind,ro ".$1"; shift
done
shift
for name in bin sbin lib lib32 lib64; do
    if [ -L /$name ]; then ln -s "$(readlink /$name)" $name
    elif [ -d /$name ]; then mkdir $name; mount --bind /$name $name; mount -o remount,bind,ro $name; fi
done
mkdir -p etc dev tmp proc old
if [ -e /etc/ld.so.cache ]; then cp /etc/ld.so.cache etc; fi
for name in null zero random urandom; do touch dev/$name; mount --bind /dev/$name dev/$name; done
mount -t proc -o nosuid,nodev,noexec proc proc
mount -t tmpfs -o "nosuid,nodev,size=$size,mode=1777" tmpfs tmp
if [ -n "$OWN_USERS" ]; then echo 0 > proc/sys/user/max_user_namespaces; fi
unset OWN_USERS
pivot_root . old
umount -l /old
mount -o remount,bind,ro /
cd /tmp
exec "$@"
"""


@dataclass(frozen=True)
class Limits:
    """What one program may take, all of its processes together; reaching any of it ends them all."""

    wall_seconds: float = 60.0
    cpu_seconds: float = 20.0
    memory_mib: int = 1024  # of address space for each process, of memory in use for all
    file_mib: int = 64  # for each file, and for the private folder
    processes: int = 32
    output_bytes: int = 1_000_000  # for each of stdout and stderr


def bubblewrap(argv: Sequence[str], limits: Limits, identity: int | None, readable: Sequence[str]) -> list[str]:
    """As root without a user namespace, in which the limit on processes would not hold for root's own processes."""
    alone = ["--unshare-user", "--disable-userns"] if identity is None else ["--cap-drop", "ALL"]
    if identity is not None:
        alone += [word for name in ("CAP_SETUID", "CAP_SETGID") for word in ("--cap-add", name)]
    # Then the first process inside is root's too: bubblewrap, which has given up its power over others, can kill it
    # should we be killed; the program is its child, and ends with it.
    first = ["sh", "-c", '"$@"; exit $?', "sandbox"] if identity is not None else []
    # bubblewrap makes the folders on the way for root alone, unless told.
    above = sorted({str(parent) for folder in readable for parent in Path(folder).parents if parent != Path("/")})
    folders = [word for folder in above for word in ("--perms", "0755", "--dir", folder)]
    folders += [word for folder in ("/usr", *readable) for word in ("--ro-bind", folder, folder)]
    for path in _SYSTEM_FOLDERS:
        if path.is_symlink():
            folders += ["--symlink", os.readlink(path), str(path)]
        elif path.is_dir():
            folders += ["--ro-bind", str(path), str(path)]
    return [
        *("bwrap", *alone, "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"),
        *("--die-with-parent", "--new-session", "--as-pid-1"),
        *folders,
        *("--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache", "--proc", "/proc", "--dev", "/dev"),
        *("--size", str(limits.file_mib * MIB), "--perms", "1777", "--tmpfs", "/tmp", "--chdir", "/tmp"),
        *("--remount-ro", "/dev", "--remount-ro", "/", "--"),
        *first,
        *_resource_limits(limits),
        *_without_privileges(identity),
        *argv,
    ]


def namespaces(argv: Sequence[str], limits: Limits, identity: int | None, readable: Sequence[str]) -> list[str]:
    """The same walls, made by util-linux' `unshare` and a script; root needs no user namespace for it."""
    own_users = ["--user", "--map-root-user"] if identity is None else []
    mark = ["env", "OWN_USERS=1"] if identity is None else []
    drop = _without_privileges(identity)
    drop[1:1] = ["--bounding-set=-all"]
    return [
        *(*_WITH_PARENT, "unshare", *own_users, "--mount", "--pid", "--net", "--ipc", "--uts", "--cgroup"),
        *("--fork", "--kill-child=SIGKILL", *mark, "sh", "-c", _NAMESPACES_SCRIPT, "sandbox"),
        *(str(limits.file_mib * MIB), "/usr", *readable, "--"),
        *_resource_limits(limits),
        *drop,
        *argv,
    ]


def limits_alone(argv: Sequence[str], limits: Limits, identity: int | None, life: int) -> list[str]:
    """No wall: below a supervisor, which ends everything when the other end of the pipe `life` is closed."""
    supervisor = resources.files("ibft.evaluate").joinpath("supervisor.py").read_text("utf-8")
    drop = _without_privileges(identity)
    if os.geteuid() == 0:  # who stays root is kept out of other processes as an ordinary user is
        drop[1:1] = ["--bounding-set=-all"]
    limited = [*_resource_limits(limits), *drop, *argv]
    return [os.path.realpath(sys.executable), "-s", "-S", "-P", "-c", supervisor, str(life), *limited]


def _resource_limits(limits: Limits) -> list[str]:
    cpu = math.ceil(limits.cpu_seconds) + 2  # for what escapes the watch over all processes, which ends them earlier
    return [
        "prlimit",
        f"--as={limits.memory_mib * MIB}",
        f"--cpu={cpu}:{cpu + 1}",
        f"--fsize={limits.file_mib * MIB}",
        f"--nproc={limits.processes}",
        "--nofile=256",
        "--core=0",
        "--",
    ]


def _without_privileges(identity: int | None) -> list[str]:
    user = ["--reuid", str(identity), "--regid", str(identity), "--clear-groups"] if identity is not None else []
    # Dying with its parent is asked for last, because a change of user takes it back.
    return ["setpriv", *user, "--no-new-privs", "--inh-caps=-all", "--", *_WITH_PARENT]
