"""One program in a sandbox of its own.

`bubblewrap.py` says what the program sees (next to nothing), `filter.py` which system calls it has not, `limits.py` how
much it may take. Here a clock ends it, and what it says is cut; a daemon that it left behind ends with its namespace.

Without bubblewrap nothing runs, unless `unsafe` is said: then only the limits and the clock hold. Limits left: memory
is bounded per process and per file system, not in sum (`processes` times `memory` at worst); a kernel's own holes.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from porcelet.errors import InputError, PorceletError
from porcelet.train.sandbox.bubblewrap import readable, require_sandbox, sandboxed
from porcelet.train.sandbox.limits import LAUNCHER, Limits, launched


@dataclass(frozen=True)
class Run:
    """What became of it. `ended`: "exit", "time" (killed by the clock) or "output" (killed for saying too much)."""

    exit_code: int
    output: str
    errors: str
    ended: str


def run(
    command: Sequence[str],
    files: Mapping[str, str],
    *,
    stdin: str = "",
    limits: Limits | None = None,
    unsafe: bool = False,
) -> Run:
    """Run `command` (an absolute path first, `PYTHON` for instance) beside `files`: relative paths and their text.

    Raises:
        InputError: there is no sandbox and `unsafe` was not said, or a file's name leads out of the folder.
        PorceletError: bubblewrap could not set the sandbox up.
    """
    limits = limits or Limits()
    for name in files:
        if not name or PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise InputError(f"sandbox: the file name {name!r} leads out of the work folder")
    require_sandbox(unsafe)
    bodies = {name: body.encode() for name, body in files.items()}
    with readable(stdin.encode()) as text:
        if unsafe:
            with _unprotected(command, bodies, limits) as (arguments, fds):
                return _wait(_popen(arguments, text, fds), limits)
        with tempfile.TemporaryFile() as status:
            with sandboxed(command, bodies, limits, status.fileno()) as (arguments, fds):
                result = _wait(_popen(arguments, text, fds), limits)
            status.seek(0)
            if result.ended == "exit" and b'"exit-code"' not in status.read():
                raise PorceletError(f"the sandbox could not be set up: {result.errors.strip()}")
            return result


def _popen(command: Sequence[str], stdin: int, fds: Sequence[int]) -> subprocess.Popen[bytes]:
    # The environment is empty already here: inside, bubblewrap's own is there to be read.
    return subprocess.Popen(
        command,
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        pass_fds=fds,
        env={},
        start_new_session=True,
    )


def _wait(process: subprocess.Popen[bytes], limits: Limits) -> Run:
    """Read until it ends, or until it is to be ended."""
    assert process.stdout and process.stderr
    texts: dict[int, bytearray] = {process.stdout.fileno(): bytearray(), process.stderr.fileno(): bytearray()}
    try:
        ended = _read(process, texts, limits)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    output, errors = (bytes(text[: limits.output]).decode(errors="replace") for text in texts.values())
    process.stdout.close()
    process.stderr.close()
    return Run(process.returncode, output, errors, ended)


def _read(process: subprocess.Popen[bytes], texts: Mapping[int, bytearray], limits: Limits) -> str:
    deadline = time.monotonic() + limits.seconds
    with selectors.DefaultSelector() as selector:
        for fd in texts:
            selector.register(fd, selectors.EVENT_READ)
        while selector.get_map():
            ready = selector.select(max(0.0, deadline - time.monotonic()))
            if time.monotonic() >= deadline:
                return "time"
            for key, _ in ready:
                part = os.read(key.fd, 1 << 16)
                texts[key.fd].extend(part)
                if not part:
                    selector.unregister(key.fd)
            if sum(map(len, texts.values())) > limits.output:
                return "output"
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(max(0.0, deadline - time.monotonic()))
        return "exit"
    return "time"


@contextlib.contextmanager
def _unprotected(
    command: Sequence[str], files: Mapping[str, bytes], limits: Limits
) -> Iterator[tuple[list[str], list[int]]]:
    """`sandboxed` without a sandbox: a folder that is removed, and limits."""
    with tempfile.TemporaryDirectory(prefix="porcelet-unsafe-") as folder:
        for name, body in files.items():
            path = Path(folder, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(body)
        inside = launched(command, limits, launcher=str(LAUNCHER), uid="", count=False)
        yield ["/usr/bin/env", "-C", folder, *inside], []
