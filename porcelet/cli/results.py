"""The answers of a batch on disk: one JSON line a request, appended as it ends; a run that was killed goes on here.

    {"id": "a", "text": "...", "finish_reason": "stop", "usage": {...}, "error": null}

A line is written whole by one call, so a killed process leaves at most a beginning of one at the end of the file, or
zeros, which the next run cuts off. Every second, and at the end, the file is forced to the disk: a power cut costs the
answers of that second, which are computed again. The file is locked while it is written; its process's end unlocks it.
"""

from __future__ import annotations

import fcntl
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from porcelet.errors import CapacityError, InputError

SYNC_SECONDS = 1.0
START = b'{"id":'  # of each of our lines


class Result(msgspec.Struct, forbid_unknown_fields=True):
    """One request's answer, or why there is none. With n > 1 `text` and `finish_reason` are lists of n."""

    id: str
    text: str | list[str] | None = None
    finish_reason: str | list[str] | None = None
    usage: dict[str, int] | None = None
    error: str | None = None


_decoder = msgspec.json.Decoder(Result)
_encoder = msgspec.json.Encoder()


class ResultFile:
    """An open, locked file of results. `done` are the ids it holds, `num_failed` how many of them are errors."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self.done: set[str] = set()
        self.num_failed = 0
        self._descriptor = descriptor
        self._synced = time.monotonic()
        self._is_dirty = False
        with _told(path):
            size, is_open = self._read()
            os.ftruncate(descriptor, size)
            if is_open:
                os.write(descriptor, b"\n")

    def append(self, result: Result) -> None:
        """Write one line.

        Raises:
            CapacityError: the disk is full, or fails.
        """
        assert result.id not in self.done
        line = _encoder.encode(result) + b"\n"
        self._is_dirty = True
        with _told(self.path):
            while line:
                line = line[os.write(self._descriptor, line) :]
        self._enter(result)
        self.sync_if_due()

    def sync_if_due(self) -> None:
        """Force what was appended to the disk, at most once a second. Call it often, whether anything was or not."""
        if self._is_dirty and time.monotonic() - self._synced > SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        """Wait until everything is on the disk.

        Raises:
            CapacityError: the disk is full, or fails.
        """
        with _told(self.path):
            os.fsync(self._descriptor)
        self._is_dirty = False
        self._synced = time.monotonic()

    def _enter(self, result: Result) -> None:
        self.done.add(result.id)
        self.num_failed += result.error is not None

    def _read(self) -> tuple[int, bool]:
        """Enter the lines that are there. The bytes that they take, without a half-written one at the end, and whether
        the last lacks nothing but its newline.

        Raises:
            InputError: the file holds something else, so it is left as it is.
        """
        size = 0
        with open(self._descriptor, "rb", closefd=False) as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    tail = self._enter_tail(line.rstrip(b"\0"), number)
                    return size + tail, tail > 0
                self._enter(self._result(line, number))
                size += len(line)
        return size, False

    def _enter_tail(self, tail: bytes, number: int) -> int:
        """Enter a last line without its newline; how many bytes of it stay: all, or none if it is half-written."""
        if not tail.startswith(START[: len(tail)]):
            raise InputError(f"{self.path}:{number} is no result; give another --output")
        try:
            msgspec.json.decode(tail)
        except msgspec.DecodeError:
            return 0
        self._enter(self._result(tail, number))
        return len(tail)

    def _result(self, line: bytes, number: int) -> Result:
        try:
            result = _decoder.decode(line)
        except msgspec.MsgspecError as problem:
            raise InputError(f"{self.path}:{number} is no result: {problem}; give another --output") from problem
        if result.id in self.done:
            raise InputError(f"{self.path}:{number} repeats id {result.id!r}; remove one of the two lines")
        return result


@contextmanager
def open_results(path: Path) -> Iterator[ResultFile]:
    """The file at `path`, made if there is none, for this process alone.

    Raises:
        InputError: it cannot be opened, another run writes it, or it holds something else than results.
        CapacityError: the disk is full, or fails.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    except OSError as problem:
        raise InputError(f"{path} cannot be written: {problem.strerror}; give another --output") from problem
    try:
        _check_kind(descriptor, path)
        _lock(descriptor, path)
        results = ResultFile(path, descriptor)
        try:
            yield results
        finally:
            results.sync()
    finally:
        os.close(descriptor)


def _check_kind(descriptor: int, path: Path) -> None:
    """Refuse what is no regular file; make sure that the name of a new one is on the disk."""
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"{path} is no regular file; give another --output")
    if status.st_size == 0:
        with _told(path):
            folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """What the operating system says of `path`, as our own error."""
    try:
        yield
    except OSError as problem:
        raise CapacityError(f"{path} cannot be written: {problem.strerror}; mend that, then run it again") from problem


def _lock(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as problem:
        raise InputError(f"{path} is being written by another run; wait for it, or give another --output") from problem
    except OSError as problem:
        raise InputError(f"{path} cannot be locked: {problem.strerror}; give an --output elsewhere") from problem
