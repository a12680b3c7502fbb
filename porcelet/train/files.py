"""Writes that neither a crash nor a full disk leaves half done."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from porcelet.errors import CapacityError, InputError


@contextmanager
def writing(place: Path) -> Iterator[None]:
    """Turn what goes wrong on the disk into an error for a person.

    Raises:
        CapacityError: there is no room.
        InputError: writing there is not allowed.
    """
    try:
        yield
    except (OSError, SafetensorError) as problem:
        kind = InputError if isinstance(problem, PermissionError) else CapacityError
        reason = problem.strerror if isinstance(problem, OSError) else problem
        raise kind(
            f"{place} cannot be written: {reason}; earlier checkpoints are intact, so remedy it and resume"
        ) from (problem)


def write_durably(path: Path, text: str) -> None:
    """A file that has its name only once all of it is on the disk. Its folder is made where it is missing."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".unfinished")
        unfinished.write_text(text, encoding="utf-8")
        flush(unfinished)
        os.replace(unfinished, path)
        flush(path.parent)


def flush(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
