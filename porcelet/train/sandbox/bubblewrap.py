"""The sandbox's walls: what bubblewrap is told.

`sandboxed` is for programs that nobody has read: an empty root with the system's programs read-only, folders in memory,
no network, no other processes, no environment, no user that owns anything, and the seccomp filter. `shielded` is for
programs of ours that read what a model wrote: they see the programs and Python's packages, and can harm none.

Run by root, bubblewrap makes no user namespace: root's processes are never counted against a limit, so the launcher
becomes one of a thousand users that nobody is. Run by anyone else, it makes one, in which the user is nobody.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

import porcelet
from porcelet.errors import InputError
from porcelet.train.sandbox.filter import seccomp_filter
from porcelet.train.sandbox.limits import LAUNCHER, Limits, launched

WORK = "/box"
NOBODY = "65534"
FIRST_UID, NUM_UIDS = 64000, 1000
NAMESPACES = ("--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try")
TRIAL_SECONDS = 20.0
REMEDY = "install bubblewrap (apt-get install bubblewrap), or run untrusted code unprotected with --unsafe-sandbox"
_run_numbers = itertools.count(os.getpid())


@cache
def require_sandbox(unsafe: bool) -> None:
    """See once that the sandbox works, or say once that there is none.

    Raises:
        InputError: bubblewrap is missing or may not make namespaces here.
    """
    if unsafe:
        logging.getLogger(__name__).warning(
            "UNSAFE SANDBOX: untrusted code runs as this user, with the network and all files; only time and memory "
            "are limited"
        )
        return
    if shutil.which("bwrap") is None:
        raise InputError(f"untrusted code needs a sandbox, and bwrap is not there; {REMEDY}")
    try:
        with (
            tempfile.TemporaryFile() as status,
            sandboxed(["/usr/bin/true"], {}, Limits(), status.fileno()) as (command, fds),
        ):
            trial = subprocess.run(command, pass_fds=fds, env={}, capture_output=True, timeout=TRIAL_SECONDS)
    except subprocess.TimeoutExpired as problem:
        raise InputError(f"bwrap does not start within {TRIAL_SECONDS:g} s here; {REMEDY}") from problem
    if trial.returncode != 0:
        told = trial.stderr.decode(errors="replace").strip()
        raise InputError(f"bwrap cannot make a sandbox here ({told}); let it make namespaces, or: {REMEDY}")


@contextlib.contextmanager
def sandboxed(
    command: Sequence[str], files: Mapping[str, bytes], limits: Limits, status: int
) -> Iterator[tuple[list[str], list[int]]]:
    """The command that runs `command` in the sandbox beside `files`, and the descriptors that it must be given. To
    `status` bubblewrap alone writes: "exit-code" is in it if the command was started and ended."""
    as_root = os.geteuid() == 0
    uid = str(FIRST_UID + next(_run_numbers) % NUM_UIDS) if as_root else ""
    with contextlib.ExitStack() as stack:
        fds = {f"{WORK}/{name}": stack.enter_context(readable(body)) for name, body in files.items()}
        fds["/launch.py"] = stack.enter_context(readable(LAUNCHER.read_bytes()))
        rules = stack.enter_context(readable(seccomp_filter()))
        arguments = [
            _program(),
            "--json-status-fd",
            str(status),
            "--die-with-parent",
            "--new-session",
            "--clearenv",
            *NAMESPACES,
            *_user(as_root),
        ]
        arguments += ["--hostname", "sandbox", "--setenv", "PATH", "/usr/bin:/bin", "--setenv", "HOME", WORK]
        arguments += ["--setenv", "LANG", "C.UTF-8", *_folders(limits), *_system()]
        for path, fd in fds.items():
            arguments += ["--perms", "0644", "--file", str(fd), path]
        arguments += ["--remount-ro", "/dev", "--remount-ro", "/", "--chdir", WORK, "--seccomp", str(rules)]
        inside = launched(command, limits, launcher="/launch.py", uid=uid, count=True)
        yield [*arguments, "--", *inside], [*fds.values(), rules, status]


@contextlib.contextmanager
def shielded(command: Sequence[str]) -> Iterator[tuple[list[str], list[int]]]:
    """`command` behind bubblewrap as far as a program of ours can be that reads what a model wrote, and the descriptors
    that it must be given: it sees the system and Python's packages, and can change nothing and reach no network, no
    socket or pipe of ours and no other process. Without bubblewrap, the command itself, and a warning.
    """
    if not can_shield():
        yield list(command), []
        return
    arguments = ["--dev", "/dev", "--proc", "/proc", *_system(), *_packages()]
    arguments += ["--size", str(Limits().disk), "--tmpfs", "/dev/shm", "--setenv", "TMPDIR", "/dev/shm"]
    arguments += ["--remount-ro", "/dev", "--remount-ro", "/"]
    own_user = [] if os.geteuid() == 0 else ["--unshare-user"]
    with readable(seccomp_filter(sockets=False)) as rules:
        shield = [*own_user, *NAMESPACES, "--cap-drop", "ALL", *arguments, "--seccomp", str(rules)]
        yield [_program(), *shield, "--", *command], [rules]


@cache
def can_shield() -> bool:
    try:
        require_sandbox(unsafe=False)
    except InputError as problem:
        logging.getLogger(__name__).warning("what a model wrote is verified without a shield: %s", problem)
        return False
    return True


@contextlib.contextmanager
def readable(body: bytes) -> Iterator[int]:
    """A descriptor to read `body` from, which cannot be written to."""
    with tempfile.TemporaryFile() as file:
        file.write(body)
        file.flush()
        fd = os.open(f"/proc/self/fd/{file.fileno()}", os.O_RDONLY)
    try:
        yield fd
    finally:
        os.close(fd)


def _program() -> str:
    return shutil.which("bwrap") or "bwrap"


def _user(as_root: bool) -> list[str]:
    if as_root:  # what the launcher needs to become another user; it loses them by that
        return ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    return ["--unshare-user", "--uid", NOBODY, "--gid", NOBODY]


def _folders(limits: Limits) -> list[str]:
    """Processes and devices, and what can be written to, in memory."""
    arguments = ["--proc", "/proc", "--dev", "/dev"]
    for folder in ("/tmp", WORK, "/dev/shm"):
        arguments += ["--perms", "1777", "--size", str(limits.disk), "--tmpfs", folder]
    return arguments


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


def _packages() -> list[str]:
    """What Python imports from, and the libraries of that, read-only."""
    libraries = os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep)
    ours = str(Path(porcelet.__file__).parent)
    paths = (sys.prefix, sys.base_prefix, *sys.path, *libraries, ours)
    folders = {os.path.abspath(path) for path in paths if path}
    folders -= {str(folder) for folder in (Path.home(), *Path.home().parents)}  # `python -m` puts where it was started
    arguments = ["--ro-bind-try", "/etc/alternatives", "/etc/alternatives"]
    for folder in sorted(folders):  # parents first: they would hide what is in them
        arguments += ["--ro-bind-try", folder, folder]
    return arguments
