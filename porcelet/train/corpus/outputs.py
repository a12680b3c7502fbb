"""Results that appear under their name when they are complete, a file or a folder.

Until then they are NAME.PID.unfinished: two writers never share a place, and what a dead one left is told from what a
living one still fills. A mistake removes it; what a killed run left, the next writer of that name does.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from porcelet.errors import InputError

SUFFIX = ".unfinished"


@contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """The place to write at; it becomes `path` when the block ends without an error.

    Raises:
        InputError: `path` exists, or cannot be written.
    """
    try:
        _require_unused(path)
        unfinished = path.with_name(f"{path.name}.{os.getpid()}{SUFFIX}")
        path.parent.mkdir(parents=True, exist_ok=True)
        _clear(path)
        try:
            yield unfinished
            _require_unused(path)
            unfinished.rename(path)
        finally:
            _remove(unfinished)
    except OSError as problem:
        raise InputError(f"{path} cannot be written: {problem.strerror or problem}; choose another output") from problem


def _require_unused(path: Path) -> None:
    if path.exists():
        raise InputError(f"{path} exists; delete it or choose another output")


def _clear(path: Path) -> None:
    """Remove what dead writers left. What has this process's number is from one before it."""
    for left in path.parent.iterdir():
        pid = left.name.removeprefix(f"{path.name}.").removesuffix(SUFFIX)
        if left.name == f"{path.name}.{pid}{SUFFIX}" and pid.isdecimal() and not _is_other(int(pid)):
            _remove(left)


def _is_other(pid: int) -> bool:
    """Whether another process of that number lives."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return pid != os.getpid()


def _remove(place: Path) -> None:
    if place.is_dir():
        shutil.rmtree(place)
    else:
        place.unlink(missing_ok=True)
