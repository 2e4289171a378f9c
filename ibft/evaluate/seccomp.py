"""A filter of system calls for programs in Python, against what neither namespaces nor limits on processes hold back.

Refused are memory that belongs to no process (files in memory, System V segments, keys, another tmpfs in a user
namespace of its own), sockets that a network namespace does not bind (vsock reaches the host of a virtual machine), and
io_uring, which makes calls that no filter sees.
"""

from __future__ import annotations

import errno
import platform
import struct
import sys
from typing import NamedTuple


class _Machine(NamedTuple):
    """The kernel's numbers on a kind of machine."""

    audit: int
    socket: int
    clone: int
    refused: tuple[int, ...]


# Refused: memfd_create memfd_secret, shmget semget msgget, add_key request_key keyctl, unshare clone3, io_uring_setup.
_MACHINES = {
    "x86_64": _Machine(0xC000003E, 41, 56, (319, 447, 29, 64, 68, 248, 249, 250, 272, 435, 425)),
    "aarch64": _Machine(0xC00000B7, 198, 220, (279, 447, 194, 190, 186, 217, 218, 219, 97, 435, 425)),
}
_FAMILIES = (1, 2, 10, 16)  # unix, inet, inet6, netlink: those of the network namespace
_NEW_NAMESPACES = 0x7E020000  # flags of clone; those of clone3 no filter sees, and without it clone is called
_X32 = 0x40000000  # numbers from here on are another machine's
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _AUDIT, _ARGUMENT = 0, 4, 16  # places in what the filter is shown
_ALLOW, _REFUSE = 0x7FFF0000, 0x00050000


def program() -> bytes:
    """The filter as the kernel takes it, 8 bytes an instruction; empty on a machine whose numbers are not known."""
    machine = _MACHINES.get(platform.machine())
    if machine is None or sys.maxsize < 1 << 32:
        return b""
    allow, refuse = (_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _REFUSE | errno.ENOSYS)
    code = [
        (_LOAD, 0, 0, _AUDIT),
        (_EQUAL, 1, 0, machine.audit),
        refuse,
        (_LOAD, 0, 0, _NUMBER),
        (_AT_LEAST, 0, 1, _X32),
        refuse,
    ]
    for number in machine.refused:
        code += [(_EQUAL, 0, 1, number), refuse]
    code += [(_EQUAL, 0, 3, machine.clone), (_LOAD, 0, 0, _ARGUMENT), (_ANY_BIT, 0, 1, _NEW_NAMESPACES), refuse]
    # What was loaded last may be clone's argument, which has been answered.
    code += [(_LOAD, 0, 0, _NUMBER), (_EQUAL, 1, 0, machine.socket), allow, (_LOAD, 0, 0, _ARGUMENT)]
    for family in _FAMILIES:
        code += [(_EQUAL, 0, 1, family), allow]
    code.append(refuse)
    return b"".join(struct.pack("HBBI", *instruction) for instruction in code)
