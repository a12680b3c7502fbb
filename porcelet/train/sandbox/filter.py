"""The seccomp filter: system calls that no solution of an exercise needs and most escapes begin with.

A program for the kernel's classic BPF machine, which reads the call's number, the architecture and the low halves of
the arguments, and answers allow or an error number (man 2 seccomp). Denied calls fail with EPERM, so that what only
tries them goes on; a foreign architecture's calls (32-bit ones, whose numbers mean other things) kill the process.
`clone` may not make namespaces; `clone3`, whose flags a filter cannot read, does not exist, so the C library
falls back to `clone`. Sockets are local ones only, or none at all: a path is enough to speak through a local one.
"""

from __future__ import annotations

import errno
import platform
import struct
from dataclasses import dataclass

from porcelet.errors import InputError

# Names and numbers on x86-64 and arm64; None where an architecture has no such call.
DENIED: dict[str, tuple[int, int | None]] = {
    # other processes
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "kcmp": (312, 272),
    "pidfd_getfd": (438, 438),
    # mounts, roots, namespaces
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "mount_setattr": (442, 442),
    "unshare": (272, 97),
    "setns": (308, 268),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    # wide doors of the kernel
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "fanotify_init": (300, 262),
    "personality": (135, 92),
    "modify_ldt": (154, None),
    # memory that no limit counts, and its placement
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mbind": (237, 235),
    "set_mempolicy": (238, 237),
    "set_mempolicy_home_node": (450, 450),
    "migrate_pages": (256, 238),
    "move_pages": (279, 239),
    # the machine
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "reboot": (169, 142),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "acct": (163, 89),
    "syslog": (103, 116),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "clock_adjtime": (305, 266),
    "adjtimex": (159, 171),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "iopl": (172, None),
    "ioperm": (173, None),
    "vhangup": (153, 58),
}


@dataclass(frozen=True)
class Machine:
    """An architecture: its audit number, its column in `DENIED`, and the calls whose arguments are looked at."""

    audit: int
    column: int
    clone: int
    socket: int
    socketpair: int
    ioctl: int


MACHINES = {
    "x86_64": Machine(0xC000003E, 0, clone=56, socket=41, socketpair=53, ioctl=16),
    "aarch64": Machine(0xC00000B7, 1, clone=220, socket=198, socketpair=199, ioctl=29),
}
CLONE3 = 435
X32_BIT = 0x40000000  # x86-64's third set of numbers
NEW_NAMESPACES = 0x7E020080  # CLONE_NEWTIME, NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET
AF_UNIX = 1
TIOCSTI, TIOCLINUX = 0x5412, 0x541C  # put characters into a terminal's input

LOAD, JUMP_EQUAL, JUMP_GREATER_EQUAL, JUMP_SET, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
ALLOW, KILL, FAIL = 0x7FFF0000, 0x80000000, 0x00050000
NUMBER, ARCHITECTURE, ARGUMENT_0, ARGUMENT_1 = 0, 4, 16, 24  # offsets in struct seccomp_data, little endian


def seccomp_filter(machine: str = "", *, sockets: bool = True) -> bytes:
    """The filter's instructions for an architecture, this machine's by default. `sockets`: whether local ones may be
    made; those that are inherited work in any case.

    Raises:
        InputError: for this architecture none was written.
    """
    machine = machine or platform.machine()
    if machine not in MACHINES:
        raise InputError(
            f"the sandbox knows no system calls of {machine!r}, only {', '.join(MACHINES)}; use --unsafe-sandbox"
        )
    here = MACHINES[machine]
    deny = _return(FAIL | errno.EPERM)
    program = [
        _load(ARCHITECTURE),
        _jump(JUMP_EQUAL, here.audit, 1, 0),
        _return(KILL),
        _load(NUMBER),
        _jump(JUMP_GREATER_EQUAL, X32_BIT, 0, 1),
        deny,
    ]
    for numbers in DENIED.values():
        number = numbers[here.column]
        if number is not None:
            program += [_jump(JUMP_EQUAL, number, 0, 1), deny]
    program += [_jump(JUMP_EQUAL, CLONE3, 0, 1), _return(FAIL | errno.ENOSYS)]
    program += _when(here.clone, [_load(ARGUMENT_0), _jump(JUMP_SET, NEW_NAMESPACES, 0, 1), deny])
    for number in (here.socket, here.socketpair):
        refuse = _return(FAIL | errno.EAFNOSUPPORT)
        local = [_load(ARGUMENT_0), _jump(JUMP_EQUAL, AF_UNIX, 1, 0)] if sockets else []
        program += _when(number, [*local, refuse])
    terminal = [_jump(JUMP_EQUAL, TIOCSTI, 1, 0), _jump(JUMP_EQUAL, TIOCLINUX, 0, 1), deny]
    program += _when(here.ioctl, [_load(ARGUMENT_1), *terminal])
    return b"".join([*program, _return(ALLOW)])


def _when(number: int, body: list[bytes]) -> list[bytes]:
    """The body for one call; what falls out of it is allowed."""
    return [_jump(JUMP_EQUAL, number, 0, len(body) + 1), *body, _return(ALLOW)]


def _load(offset: int) -> bytes:
    return _instruction(LOAD, 0, 0, offset)


def _jump(code: int, value: int, skip_if_true: int, skip_if_false: int) -> bytes:
    return _instruction(code, skip_if_true, skip_if_false, value)


def _return(value: int) -> bytes:
    return _instruction(RETURN, 0, 0, value)


def _instruction(code: int, skip_if_true: int, skip_if_false: int, value: int) -> bytes:
    """struct sock_filter."""
    return struct.pack("<HBBI", code, skip_if_true, skip_if_false, value)
