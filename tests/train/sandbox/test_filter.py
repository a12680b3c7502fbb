from __future__ import annotations

import errno
import struct

import pytest

from porcelet.errors import InputError
from porcelet.train.sandbox.filter import CLONE3, DENIED, MACHINES, X32_BIT, seccomp_filter

ALLOW, KILL = 0x7FFF0000, 0x80000000


def verdict(machine: str, number: int, *arguments: int, audit: int | None = None) -> int:
    """What the filter answers: a BPF machine as small as the filter's language."""
    data = struct.pack("<II", number, MACHINES[machine].audit if audit is None else audit) + struct.pack(
        "<Q6Q", 0, *(*arguments, *[0] * (6 - len(arguments)))
    )
    program = list(struct.iter_unpack("<HBBI", seccomp_filter(machine)))
    accumulator = position = 0
    while True:
        code, if_true, if_false, value = program[position]
        position += 1
        if code == 0x20:
            (accumulator,) = struct.unpack_from("<I", data, value)
        elif code == 0x06:
            return value
        else:
            holds = {0x15: accumulator == value, 0x35: accumulator >= value, 0x45: accumulator & value != 0}[code]
            position += if_true if holds else if_false


def refused(error: int) -> int:
    return 0x00050000 | error


@pytest.mark.parametrize("machine", MACHINES)
def test_every_denied_call_fails_and_its_neighbours_do_not(machine: str) -> None:
    """Of all numbers the listed ones are refused, whatever their arguments; the rest passes."""
    here = MACHINES[machine]
    denied = {numbers[here.column] for numbers in DENIED.values()} - {None}
    looked_at = {CLONE3, here.clone, here.socket, here.socketpair, here.ioctl}
    assert not denied & looked_at
    for number in range(470):
        if number in looked_at:
            continue
        wanted = refused(errno.EPERM) if number in denied else ALLOW
        assert verdict(machine, number, 1, 2) == wanted, number


@pytest.mark.parametrize("machine", MACHINES)
def test_arguments_are_looked_at(machine: str) -> None:
    """Threads and processes may be made, namespaces not; local sockets, no others; no typing into terminals."""
    here = MACHINES[machine]
    assert verdict(machine, here.clone, 0x3D0F00) == ALLOW  # a thread's flags
    for namespace in (0x80, 0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000):
        assert verdict(machine, here.clone, namespace | 17) == refused(errno.EPERM)
    assert verdict(machine, CLONE3) == refused(errno.ENOSYS)
    for number in (here.socket, here.socketpair):
        assert verdict(machine, number, 1) == ALLOW
        assert {verdict(machine, number, family) for family in (0, 2, 10, 16, 17, 38, 40)} == {
            refused(errno.EAFNOSUPPORT)
        }
    assert verdict(machine, here.ioctl, 0, 0x5401) == ALLOW
    assert {verdict(machine, here.ioctl, 0, request) for request in (0x5412, 0x541C)} == {refused(errno.EPERM)}


def test_foreign_calls_do_not_pass() -> None:
    """32-bit calls kill; x86-64's third set of numbers is refused; a machine without a filter is refused by name."""
    assert verdict("x86_64", 0, audit=0x40000003) == KILL
    assert verdict("aarch64", 0, audit=MACHINES["x86_64"].audit) == KILL
    assert verdict("x86_64", X32_BIT | 1) == refused(errno.EPERM)
    with pytest.raises(InputError, match="riscv64"):
        seccomp_filter("riscv64")
