"""Escapes are tried here; each of these programs would succeed outside."""

from __future__ import annotations

import logging
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from porcelet.errors import InputError, PorceletError
from porcelet.train.sandbox import PYTHON, Limits, Run, require_sandbox, run, shielded
from porcelet.train.sandbox.bubblewrap import can_shield

MISSING = shutil.which("bwrap") is None and "CI" not in os.environ  # where CI runs, its absence is a failure
pytestmark = pytest.mark.skipif(MISSING, reason="bubblewrap is not installed (apt-get install bubblewrap)")
SYSCALL = """\
import ctypes, os, platform
libc = ctypes.CDLL(None, use_errno=True)
def call(x86, arm, *arguments):
    ctypes.set_errno(0)
    result = libc.syscall(x86 if platform.machine() == "x86_64" else arm, *arguments)
    return os.strerror(ctypes.get_errno()) if result == -1 else "done"
"""


def python(program: str, stdin: str = "", **limits: float) -> Run:
    values = {"seconds": 20.0} | limits
    return run([PYTHON, "-B", "main.py"], {"main.py": program}, stdin=stdin, limits=Limits(**values))


def said(program: str, **limits: float) -> str:
    done = python(program, **limits)
    assert done.ended == "exit" and done.exit_code == 0, done
    return done.output.strip()


def test_a_program_runs_with_its_files_and_input() -> None:
    """Files, standard input, both outputs and the exit code are the program's."""
    files = {"main.py": "import sys, part.other\nprint(sys.stdin.read() + part.other.x, file=sys.stderr)\nsys.exit(3)"}
    done = run([PYTHON, "-B", "main.py"], files | {"part/other.py": "x = '!'"}, stdin="grüße")
    assert (done.exit_code, done.output, done.errors, done.ended) == (3, "", "grüße!\n", "exit")
    assert (
        said(
            "import threading, subprocess; t = threading.Thread(target=print, args=(1,)); t.start(); t.join()\n"
            "print(subprocess.run(['/bin/echo', 'hello'], capture_output=True).stdout)"
        )
        == "1\nb'hello\\n'"
    )


def test_it_owns_nothing_and_sees_no_files_of_ours(tmp_path: Path) -> None:
    """No password file, no home, none of our folders; the user is not ours."""
    secret = tmp_path / "secret"
    secret.write_text("secret")
    secret.chmod(0o644)
    program = f"""
import os
for path in ("/etc/passwd", "/etc/shadow", {str(secret)!r}, {str(Path.home())!r} + "/.bashrc", "/sys/kernel", "/run"):
    print(os.path.exists(path))
print(os.getuid() < 64000, sorted(os.listdir("/box")))
"""
    assert said(program).split("\n") == ["False"] * 6 + ["False ['main.py']"]


def test_it_writes_nowhere_but_into_memory() -> None:
    """The system is read-only, and what the work folder takes is bounded."""
    program = """
for path in ("/usr/x", "/x", "/dev/x", "/etc/x", "/launch.py", "/proc/sys/kernel/hostname"):
    try:
        open(path, "w")
        print(path)
    except OSError:
        pass
for path in ("/box/x", "/tmp/x", "/dev/shm/x"):
    open(path, "w").write("x")
try:
    for i in range(100):
        open(f"/tmp/{i}", "wb").write(bytes(1 << 20))
except OSError as problem:
    print(i, problem.strerror)
try:
    open("/box/large", "wb").write(bytes(20 << 20))
except OSError as problem:
    print(problem.strerror)
"""
    count, *words = said(program).replace("\n", " ").split()
    assert int(count) <= 64 and " ".join(words) == "No space left on device File too large"


def test_it_reaches_no_network() -> None:
    """No address family but the local one, and there is nobody to talk to."""
    program = """
import socket
for family in (socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK, socket.AF_PACKET):
    try:
        socket.socket(family, socket.SOCK_RAW if family > 10 else socket.SOCK_STREAM)
        print("made", family)
    except OSError as problem:
        print(problem.strerror)
a, b = socket.socketpair()
a.send(b"x")
print(b.recv(1))
"""
    assert said(program).split("\n") == ["Address family not supported by protocol"] * 4 + ["b'x'"]


def test_it_sees_neither_our_environment_nor_our_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys in the environment stay outside, also those of the processes around it; the other processes are its own."""
    monkeypatch.setenv("SECRET_KEY", "sesame")
    program = """
import glob, os
print(dict(os.environ).keys() - {"PATH", "HOME", "LANG", "PWD", "LC_CTYPE"})
for path in glob.glob("/proc/[0-9]*/environ"):
    try:
        print("sesame" in open(path).read())
    except PermissionError:
        pass
print(len([name for name in os.listdir("/proc") if name.isdigit()]) <= 3)
print(sorted(os.listdir("/proc/self/fd")))
"""
    lines = said(program).split("\n")
    assert lines[0] == "set()" and set(lines[1:-2]) <= {"False"}
    assert lines[-2:] == ["True", "['0', '1', '2', '3']"]


@pytest.mark.parametrize(
    ("name", "program"),
    [
        ("ptrace", "print(call(101, 117, 0, 0, 0, 0))"),
        ("mount", "print(call(165, 40, b'none', b'/tmp', b'tmpfs', 0, None))"),
        ("chroot", "print(call(161, 51, b'/tmp'))"),
        ("unshare", "print(call(272, 97, 0x10000000))"),
        ("bpf", "print(call(321, 280, 0, None, 0))"),
        ("io_uring", "print(call(425, 425, 8, None))"),
        ("userfaultfd", "print(call(323, 282, 0))"),
        ("keyctl", "print(call(250, 219, 0, 0))"),
        ("perf_event_open", "print(call(298, 241, None, 0, -1, -1, 0))"),
        ("memfd_create", "print(call(319, 279, b'x', 0))"),
        ("kexec", "print(call(246, 104, 0, 0, None, 0))"),
    ],
)
def test_the_kernels_wide_doors_are_shut(name: str, program: str) -> None:
    """The filter answers before the kernel does; the program goes on."""
    assert said(SYSCALL + program) == "Operation not permitted", name


def test_a_new_namespace_is_not_to_be_had() -> None:
    """Neither by clone nor by clone3; a plain fork is."""
    program = """
print(call(56, 220, 0x10000000 | 17, None, None, None, 0))
print(call(435, 435, None, 88))
pid = os.fork()
if pid == 0:
    os._exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    assert said(SYSCALL + program).split("\n") == ["Operation not permitted", "Function not implemented", "7"]


def test_it_cannot_become_root_again() -> None:
    """No user id, no capability, and no program with the set-user-id bit gives anything back."""
    program = """
import os
try:
    os.setuid(0)
    print("root")
except OSError:
    print("refused")
status = dict(line.split(":\\t") for line in open("/proc/self/status").read().splitlines() if ":\\t" in line)
print(int(status["CapEff"], 16), int(status["CapPrm"], 16), status["NoNewPrivs"], status["Seccomp"])
"""
    assert said(program) == "refused\n0 0 1 2"


def test_killing_everyone_kills_itself_alone() -> None:
    """Its parent, the first process and all it may signal are its own namespace's."""
    program = """
import os
for pid in (os.getppid(), 1):
    try:
        os.kill(pid, 9)
    except OSError:
        pass
print("alive", flush=True)
os.kill(-1, 9)
"""
    assert python(program).output in ("", "alive\n")
    assert said("print(1)") == "1"


def test_a_fork_bomb_has_a_small_bang() -> None:
    """Processes are counted for this run alone, root or not."""
    program = """
import os, time
made = 0
try:
    for made in range(1000):
        if os.fork() == 0:
            time.sleep(60)
            os._exit(0)
except OSError as problem:
    print(made, problem.strerror)
"""
    made, *reason = said(program, processes=12).split()
    assert 5 <= int(made) <= 12 and " ".join(reason) == "Resource temporarily unavailable"


def test_a_memory_bomb_ends_in_an_error() -> None:
    """Address space is limited."""
    done = python("x = bytearray(1 << 30)", memory=256 << 20)
    assert done.exit_code == 1 and "MemoryError" in done.errors


def test_a_program_cannot_pretend_that_the_sandbox_failed() -> None:
    """Whatever it writes and however it ends, its end is its own."""
    for end in ("sys.exit(1)", "os.kill(os.getpid(), 9)"):
        done = python(f"import os, sys; print('bwrap: no', file=sys.stderr, flush=True); {end}")
        assert done.exit_code != 0 and done.errors == "bwrap: no\n"


def test_a_sandbox_that_fails_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no failure of the program's."""
    monkeypatch.setattr("porcelet.train.sandbox.bubblewrap.WORK", "/dev/null/work")
    with pytest.raises(PorceletError, match="could not be set up: bwrap"):
        python("print(1)")


@pytest.mark.parametrize("program", ["while True: pass", "import time; time.sleep(60)", "input()\nwhile True: pass"])
def test_a_program_that_does_not_end_is_ended(program: str) -> None:
    """By the clock, whether it computes or waits."""
    began = time.monotonic()
    done = python(program, stdin="\n", seconds=1.0)
    assert done.ended == "time" and time.monotonic() - began < 5


def test_endless_output_is_cut() -> None:
    """We keep no more than was allowed."""
    done = python("while True: print('x' * 1000)", output=50_000)
    assert done.ended == "output" and len(done.output) <= 50_000


def test_a_daemon_does_not_outlive_its_run() -> None:
    """What was left behind, in a session of its own, ends with the namespace, and is not waited for."""
    mark = f"{os.getpid()}.{time.monotonic_ns()}"
    program = f"""
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.execv("/bin/sh", ["/bin/sh", "-c", "sleep 60; : {mark}"])
    os._exit(0)
time.sleep(0.3)
print("gone")
"""
    began = time.monotonic()
    assert said(program) == "gone"
    assert time.monotonic() - began < 15
    assert not [path for path in Path("/proc").glob("[0-9]*/cmdline") if mark in _text(path)]


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode(errors="replace")
    except OSError:  # it ended while we looked
        return ""


def test_links_lead_nowhere(tmp_path: Path) -> None:
    """A symbolic link out of the work folder points at the sandbox's own empty places."""
    (tmp_path / "target").write_text("secret")
    program = f"""
import os
os.symlink({str(tmp_path / "target")!r}, "link")
os.symlink("/proc/1/root/etc/passwd", "other")
for name in ("link", "other"):
    try:
        print(open(name).read())
    except OSError:
        print("nothing")
"""
    assert said(program).split("\n") == ["nothing", "nothing"]
    assert (tmp_path / "target").read_text() == "secret"


@pytest.mark.parametrize("name", ["../x", "/x", "a/../../x", ""])
def test_file_names_stay_in_the_folder(name: str) -> None:
    """Names come from data files: they must not lead out."""
    with pytest.raises(InputError, match="leads out"):
        run([PYTHON, "main.py"], {name: ""})


def test_without_bubblewrap_nothing_runs(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """The refusal names the remedy. Unsafe runs must be asked for, are announced, and keep time and memory."""
    require_sandbox.cache_clear()
    can_shield.cache_clear()
    monkeypatch.setenv("PATH", "/nowhere")
    try:
        with pytest.raises(InputError, match="apt-get install bubblewrap.*--unsafe-sandbox"):
            run([PYTHON, "main.py"], {"main.py": "print(1)"})
        with caplog.at_level(logging.WARNING):
            with shielded(["x"]) as (command, fds):
                assert (command, fds) == (["x"], []) and "without a shield" in caplog.text
            done = run([PYTHON, "-B", "main.py"], {"main.py": "import os; print(len(os.environ))"}, unsafe=True)
        assert "UNSAFE SANDBOX" in caplog.text
        assert done.exit_code == 0 and int(done.output) <= 1
        endless = run([PYTHON, "m.py"], {"m.py": "while True: pass"}, limits=Limits(seconds=1.0), unsafe=True)
        assert endless.ended == "time"
        bomb = run([PYTHON, "m.py"], {"m.py": "bytearray(1 << 30)"}, unsafe=True)
        assert "MemoryError" in bomb.errors
    finally:
        require_sandbox.cache_clear()
        can_shield.cache_clear()


def test_our_own_verifiers_are_shielded() -> None:
    """They import what we do, and can neither write nor see our files nor signal others."""
    done = in_shield("import os, porcelet; print(os.listdir('/etc'), sum(map(str.isdigit, os.listdir('/proc'))))")
    assert "passwd" not in done.stdout and done.stdout.split()[-1] == "2", done.stderr
    writes = in_shield(f"open({str(Path(sys.prefix, 'porcelet-shield'))!r}, 'w')")
    assert writes.returncode == 1 and "Read-only file system" in writes.stderr


def test_our_own_verifiers_reach_no_socket_or_pipe_of_ours() -> None:
    """A read-only mount does not keep a program from either; even where it sees them, no socket can be made."""
    with tempfile.TemporaryDirectory(dir=Path.home()) as folder, socket.socket(socket.AF_UNIX) as server:
        pipe, name = f"{folder}/pipe", f"{folder}/socket"
        os.mkfifo(pipe)
        reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
        server.bind(name)
        server.listen()
        try:
            done = in_shield(f"open({pipe!r}, 'wb', 0).write(b'escaped')")
            assert "FileNotFoundError" in done.stderr and not os.read(reader, 9)
        finally:
            os.close(reader)
        for make in ("socket.socket(socket.AF_UNIX)", "socket.socketpair(type=socket.SOCK_DGRAM)[0]"):
            assert "Address family not supported" in in_shield(f"import socket; {make}.connect({name!r})").stderr


def in_shield(program: str) -> subprocess.CompletedProcess[str]:
    with shielded([sys.executable, "-c", program]) as (command, fds):
        return subprocess.run(command, pass_fds=fds, capture_output=True, text=True, timeout=60)
