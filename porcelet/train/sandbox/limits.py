"""What a run may take, and the command that holds a program to it from inside the sandbox."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from porcelet.errors import InputError

PYTHON = os.path.realpath(sys.executable)  # the interpreter inside, with its standard library and nothing else
LAUNCHER = Path(__file__).with_name("launch.py")
MAX_SECONDS = 86400.0
MAX_MEMORY_MB = 1 << 24


@dataclass(frozen=True)
class Limits:
    """Sizes in bytes."""

    seconds: float = 5.0  # by the wall clock; a process gets as many of processor time
    memory: int = 512 << 20  # address space of a process
    processes: int = 16  # and threads
    files: int = 64  # open ones of a process
    file_size: int = 16 << 20
    disk: int = 64 << 20  # each of the work folder, /tmp and /dev/shm
    output: int = 1 << 20  # standard output and error together


def launched(command: Sequence[str], limits: Limits, *, launcher: str, uid: str, count: bool) -> list[str]:
    """`command`, started by the launcher at that path as that user. `count`: whether processes are limited, which
    makes sense only for a user whose other processes are not counted too."""
    values = {
        "CPU": int(limits.seconds) + 1,
        "AS": limits.memory,
        "NOFILE": limits.files,
        "FSIZE": limits.file_size,
        "CORE": 0,
    }
    if count:
        values["NPROC"] = limits.processes
    packed = ",".join(f"{name}={value}" for name, value in values.items())
    return [PYTHON, "-I", "-S", "-B", launcher, uid, packed, *command]


def check_limits(seconds: object, memory_mb: object, place: str) -> None:
    """Refuse what the kernel would, and what is no limit.

    Raises:
        InputError: names the place, the value and what would do.
    """
    for name, value, low, high in (("seconds", seconds, 1e-3, MAX_SECONDS), ("memory_mb", memory_mb, 1, MAX_MEMORY_MB)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            raise InputError(f"{place}: {name} is {value!r}; it must be a number in {low:g} ... {high:g}")
