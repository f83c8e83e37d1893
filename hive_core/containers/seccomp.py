"""The filter of system calls that every sandbox is started with: a classic BPF program, as seccomp(2) takes it.

The namespaces keep an agent from the host's files, processes and network. Some calls know no namespace, or reach code
of the kernel that an agent has no use for: those are refused. ptrace(2) and process_vm_readv(2) stay: debuggers and
strace need them, and there is nobody in the agent's pid namespace but the agent.
"""

from __future__ import annotations

import errno
import os
import struct
import sys
from collections.abc import Iterator

# What <linux/audit.h> calls a processor: the ABI that a call was made by.
_ABIS = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
# What systemd-nspawn's own filter lets pass besides for a harness in the host's network, which shuts itself in further
# (hive_agent/own_sockets.py).
LANDLOCK = tuple(f"--system-call-filter=landlock_{call}" for call in ("create_ruleset", "restrict_self"))
# Refused with EPERM, as the kernel does to those without the right: programs are used to that. (x86_64, aarch64)
REFUSED = {
    # Keys belong to a uid and a login session, and no namespace keeps them apart.
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    # The kernel's log is the host's.
    "syslog": (103, 116),
    # Code in the kernel, and what watches it.
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    # Operations in a ring are not seen by a filter, and one of them makes sockets.
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    # A file by its number instead of its path, and mounts: both need a capability that no agent has.
    "open_by_handle_at": (304, 265),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
}
_SOCKET = (41, 198)
# unix, inet, inet6, netlink: the last is how libc lists interfaces. All four stay in the network namespace; others,
# vsock first, do not, or are doors to rarely used code of the kernel.
_FAMILIES = (1, 2, 10, 16)
_X32_BIT = 0x40000000

# Of <linux/bpf_common.h> and <linux/seccomp.h>.
_LOAD, _JUMP_EQUAL, _JUMP_AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_ALLOW, _ERROR = 0x7FFF0000, 0x00050000
_AT_NUMBER, _AT_ABI, _AT_FIRST_ARGUMENT = 0, 4, 16  # the low half of it: the kernel takes a family as an int


def filter_program(machine: str | None = None) -> bytes | None:
    """The program for a processor (this one), or None where none is known."""
    machine = machine or os.uname().machine
    if machine not in _ABIS or sys.maxsize <= 2**32:  # a 32-bit Python makes the calls of another ABI
        return None
    return b"".join(_instructions(_ABIS[machine], list(_ABIS).index(machine)))


def _instructions(abi: int, column: int) -> Iterator[bytes]:
    """Jumps name how many instructions are left out: (when it is so, when not)."""
    # Another ABI has other numbers for the same calls. No program of this one makes such a call: it does not exist.
    yield _instruction(_LOAD, _AT_ABI)
    yield _instruction(_JUMP_EQUAL, abi, 1, 0)
    yield _instruction(_RETURN, _ERROR | errno.ENOSYS)
    yield _instruction(_LOAD, _AT_NUMBER)
    yield _instruction(_JUMP_AT_LEAST, _X32_BIT, 0, 1)
    yield _instruction(_RETURN, _ERROR | errno.ENOSYS)
    for numbers in REFUSED.values():
        yield _instruction(_JUMP_EQUAL, numbers[column], 0, 1)
        yield _instruction(_RETURN, _ERROR | errno.EPERM)
    yield _instruction(_JUMP_EQUAL, _SOCKET[column], 1, 0)
    yield _instruction(_RETURN, _ALLOW)
    yield _instruction(_LOAD, _AT_FIRST_ARGUMENT)
    for family in _FAMILIES:
        yield _instruction(_JUMP_EQUAL, family, 0, 1)
        yield _instruction(_RETURN, _ALLOW)
    yield _instruction(_RETURN, _ERROR | errno.EAFNOSUPPORT)


def _instruction(code: int, value: int, if_so: int = 0, if_not: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_so, if_not, value)
