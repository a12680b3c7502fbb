"""One program in a sandbox of its own.

Bubblewrap gives it an empty root with the system's programs read-only, a work folder and a /tmp in memory, no network,
no other processes, no environment, no user that owns anything; the filter takes away the system calls that escapes
begin with; limits bound processor time, memory, processes, files; a clock ends it all, and a daemon that it left
behind ends with it, as their process namespace does.

Without bubblewrap nothing runs, unless `unsafe` is said: then only the limits and the clock hold. Limits left: memory
is bounded per process and per file system, not in sum (`processes` times `memory` at worst); a kernel's own holes.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath

from porcelet.errors import InputError, PorceletError
from porcelet.train.sandbox.filter import seccomp_filter

PYTHON = os.path.realpath(sys.executable)  # the interpreter inside, with its standard library and nothing else
LAUNCHER = Path(__file__).with_name("launch.py")
WORK = "/work"
NOBODY = 65534
FIRST_UID, NUM_UIDS = 64000, 1000  # users that nobody is, for runs started by root: each counts its own processes
TRIAL_SECONDS = 20.0
REMEDY = "install bubblewrap (apt-get install bubblewrap), or run untrusted code unprotected with --unsafe-sandbox"
_run_numbers = itertools.count(os.getpid())


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
    with contextlib.ExitStack() as stack:
        text = stack.enter_context(_readable(stdin.encode()))
        if unsafe:
            folder = stack.enter_context(_folder(files))
            process = _popen(_launched("", limits, PYTHON, str(LAUNCHER), command), text, (), folder)
        else:
            fds = {name: stack.enter_context(_readable(body.encode())) for name, body in files.items()}
            rules = stack.enter_context(_readable(seccomp_filter()))
            launcher = stack.enter_context(_readable(LAUNCHER.read_bytes()))
            arguments = _bubblewrap(limits, fds, rules, launcher)
            process = _popen([*arguments, *_inside(limits, command)], text, (rules, launcher, *fds.values()), None)
        result = _wait(process, limits)
    if not unsafe and result.exit_code != 0 and result.errors.startswith("bwrap: "):
        raise PorceletError(f"the sandbox could not be set up: {result.errors.strip()}")
    return result


@cache
def require_sandbox(unsafe: bool) -> None:
    """See once that the sandbox works, or say once that there is none.

    Raises:
        InputError: bubblewrap is missing or may not make namespaces here.
    """
    if unsafe:
        logging.getLogger(__name__).warning(
            "UNSAFE SANDBOX: untrusted code runs as this user, with the network and all files; only time, memory and "
            "processes are limited"
        )
        return
    if shutil.which("bwrap") is None:
        raise InputError(f"untrusted code needs a sandbox, and bwrap is not there; {REMEDY}")
    try:
        trial = run_trial()
    except subprocess.TimeoutExpired as problem:
        raise InputError(f"bwrap does not start within {TRIAL_SECONDS:g} s here; {REMEDY}") from problem
    if trial.returncode != 0:
        told = trial.stderr.decode(errors="replace").strip()
        raise InputError(f"bwrap cannot make a sandbox here ({told}); let it make namespaces, or: {REMEDY}")


def shielded(command: Sequence[str]) -> list[str]:
    """`command` behind bubblewrap as far as a program of ours can be that reads what a model wrote: it sees the files,
    and can change none, reach no network and no other process. Without bubblewrap, the command itself, and a warning.
    """
    if not _can_shield():
        return list(command)
    names = "pid net ipc uts cgroup-try".split()
    namespaces = [f"--unshare-{name}" for name in ([] if os.geteuid() == 0 else ["user"]) + names]
    files = f"--ro-bind / / --dev /dev --proc /proc --size {64 << 20} --tmpfs /dev/shm --setenv TMPDIR /dev/shm".split()
    return [shutil.which("bwrap") or "bwrap", *namespaces, "--cap-drop", "ALL", *files, "--", *command]


@cache
def _can_shield() -> bool:
    try:
        require_sandbox(unsafe=False)
    except InputError as problem:
        logging.getLogger(__name__).warning("what a model wrote is verified without a shield: %s", problem)
        return False
    return True


def run_trial() -> subprocess.CompletedProcess[bytes]:
    """`true`, under all that a run is under."""
    with _readable(seccomp_filter()) as rules, _readable(LAUNCHER.read_bytes()) as launcher:
        command = [*_bubblewrap(Limits(), {}, rules, launcher), *_inside(Limits(), ["/usr/bin/true"])]
        return subprocess.run(
            command, pass_fds=[rules, launcher], env={}, capture_output=True, timeout=TRIAL_SECONDS, check=False
        )


def _bubblewrap(limits: Limits, files: Mapping[str, int], rules: int, launcher: int) -> list[str]:
    """The command up to the program: what is there, and what is shared with outside (nothing)."""
    memory_folder = ["--size", str(limits.disk), "--tmpfs"]
    command = [shutil.which("bwrap") or "bwrap", "--die-with-parent", "--new-session", "--clearenv"]
    command += ["--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
    if os.geteuid() == 0:  # root needs no user namespace; inside, the launcher becomes a user without rights
        command += ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    else:
        command += ["--unshare-user", "--disable-userns", "--uid", str(NOBODY), "--gid", str(NOBODY)]
    command += ["--hostname", "sandbox", "--setenv", "PATH", "/usr/bin:/bin", "--setenv", "HOME", WORK]
    command += ["--setenv", "LANG", "C.UTF-8", *_system(), "--proc", "/proc", "--dev", "/dev"]
    for folder in ("/tmp", WORK, "/dev/shm"):
        command += ["--perms", "1777", *memory_folder, folder]
    for name, fd in files.items():
        command += ["--perms", "0644", "--file", str(fd), f"{WORK}/{name}"]
    command += ["--perms", "0444", "--file", str(launcher), "/launch.py"]
    command += ["--remount-ro", "/dev", "--remount-ro", "/", "--chdir", WORK, "--seccomp", str(rules)]
    return command


def _system() -> list[str]:
    """Programs and libraries, read-only, and the interpreter if it is installed elsewhere."""
    arguments = ["--ro-bind", "/usr", "/usr", "--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"]
    for folder in ("/bin", "/sbin", "/lib", "/lib32", "/lib64"):
        if os.path.islink(folder):
            arguments += ["--symlink", os.readlink(folder), folder]
        elif os.path.isdir(folder):  # a system from before /usr was merged
            arguments += ["--ro-bind", folder, folder]
    prefix = Path(os.path.realpath(sys.base_prefix))
    if prefix.is_relative_to("/usr"):
        return arguments
    for parent in reversed(prefix.parents[:-1]):  # made by `--ro-bind`, they would be root's alone
        arguments += ["--dir", str(parent)]
    return [*arguments, "--ro-bind", str(prefix), str(prefix)]


def _inside(limits: Limits, command: Sequence[str]) -> list[str]:
    uid = str(FIRST_UID + next(_run_numbers) % NUM_UIDS) if os.geteuid() == 0 else ""
    return _launched(uid, limits, PYTHON, "/launch.py", command)


def _launched(uid: str, limits: Limits, python: str, launcher: str, command: Sequence[str]) -> list[str]:
    values = {
        "CPU": int(limits.seconds) + 1,
        "AS": limits.memory,
        "NPROC": limits.processes,
        "NOFILE": limits.files,
        "FSIZE": limits.file_size,
        "CORE": 0,
    }
    if os.geteuid() != 0 and launcher == str(LAUNCHER):
        del values["NPROC"]  # outside a namespace it would count all that this user runs
    packed = ",".join(f"{name}={value}" for name, value in values.items())
    return [python, "-I", "-S", "-B", launcher, uid, packed, *command]


def _popen(command: Sequence[str], stdin: int, fds: Sequence[int], folder: Path | None) -> subprocess.Popen[bytes]:
    # The environment is empty already here: inside, bubblewrap's own is there to be read.
    return subprocess.Popen(
        command,
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        pass_fds=fds,
        cwd=folder,
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
def _readable(body: bytes) -> Iterator[int]:
    """A descriptor to read `body` from, which cannot be written to."""
    with tempfile.TemporaryFile() as file:
        file.write(body)
        file.flush()
        fd = os.open(f"/proc/self/fd/{file.fileno()}", os.O_RDONLY)
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def _folder(files: Mapping[str, str]) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="porcelet-unsafe-") as folder:
        for name, body in files.items():
            path = Path(folder, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(body, encoding="utf-8")
        yield Path(folder)
