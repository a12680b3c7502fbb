"""Rewards in processes that can be killed: each answer gets its seconds by the wall clock, then the process dies.

A call takes an idle process or starts one, so as many run as there are callers at a time; `judge` has one a core. A
process lives until it hangs, dies, or the reward is dropped. Memory is limited too. A
process starts in tenths of a second, with math-verify or reasoning-gym in one to three: that is not counted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Mapping, Sequence
from threading import Lock
from typing import Any

from porcelet.errors import InputError
from porcelet.train.rewards.answer import Answer, RewardError
from porcelet.train.rewards.frames import receive, send
from porcelet.train.sandbox import shielded
from porcelet.train.tasks.gym_process import HASH_SEED
from porcelet.train.tasks.problem import Problem

EXIT_SECONDS = 1.0  # between hanging up and ending
START_SECONDS = 60.0  # a cold disk, a busy machine: no answer is waiting yet
KEPT_VARIABLES = ("PATH", "HOME", "LD_LIBRARY_PATH", "PYTHONHOME", "PYTHONPATH", "PYTHONUSERBASE", "LANG", "LC_ALL")


class ChildReward:
    """A reward by name (`outside.py`) that can be called from several threads."""

    def __init__(
        self, name: str, options: Mapping[str, Any], *, seconds: float, memory: int, own_code: bool = False
    ) -> None:
        """`memory` in bytes of address space; `own_code`: it is the user's, and may see our environment.

        Raises:
            InputError: the reward cannot be made: its file, its function, its options.
        """
        self._wanted = {"name": name, "options": dict(options), "seconds": seconds, "memory": memory}
        self._own_code = own_code
        self._idle: list[_Child] = []
        self._lock = Lock()
        self._idle.append(self._start())

    def __call__(self, problem: Problem, answer: Answer) -> float:
        """The reward.

        Raises:
            RewardError: it raised, took too long, or ended its process.
        """
        with self._lock:
            child = self._idle.pop() if self._idle else None
        child = child or self._start()
        try:
            reply = child.ask({"problem": dataclasses.asdict(problem), "answer": dataclasses.asdict(answer)})
        except BaseException:  # an interrupt too: the next answer would be this one's
            child.stop()
            raise
        with self._lock:
            self._idle.append(child)
        if "error" in reply:
            raise RewardError(reply["error"])
        return float(reply["value"])

    def _start(self) -> _Child:
        return _Child(self._wanted, self._own_code)


class _Child:
    """A running process and the socket to it."""

    def __init__(self, wanted: Mapping[str, Any], own_code: bool) -> None:
        self._seconds = wanted["seconds"]
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-P", "-m", "porcelet.train.rewards.child", str(theirs.fileno())]
            # math-verify and reasoning-gym let sympy evaluate the answer; the user's own code may do what it likes.
            with _unshielded(command) if own_code else shielded(command) as (command, fds):
                process = _popen(command, [theirs.fileno(), *fds], _environment(own_code))
        self._socket = ours
        self._process = process
        self.stop = weakref.finalize(self, _stop, process, ours)
        try:
            reply = self._exchange(dict(wanted), START_SECONDS)
        except RewardError as problem:
            raise InputError(f"reward {wanted['name']} does not start: {problem}") from problem
        if "error" in reply:
            self.stop()
            raise InputError(f"reward {wanted['name']} cannot be used: {reply['error']}")

    def ask(self, message: Any) -> dict[str, Any]:
        return self._exchange(message, self._seconds)

    def _exchange(self, message: Any, seconds: float) -> dict[str, Any]:
        deadline = time.monotonic() + seconds
        try:
            send(self._socket, message, deadline)
            reply: dict[str, Any] = receive(self._socket, deadline)
        except TimeoutError as problem:
            self.stop()
            raise RewardError(f"took more than {seconds:g} s and was stopped") from problem
        except (OSError, EOFError) as problem:
            raise RewardError(f"its process ended{self._exit()}; out of memory perhaps") from problem
        return reply

    def _exit(self) -> str:
        """How it ended, if it did before we end it."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(EXIT_SECONDS)
        code = self._process.returncode
        self.stop()
        return "" if code is None else f" by signal {-code}" if code < 0 else f" with exit code {code}"


def _unshielded(command: list[str]) -> contextlib.AbstractContextManager[tuple[list[str], list[int]]]:
    return contextlib.nullcontext((command, []))


def _popen(command: Sequence[str], fds: Sequence[int], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    silent = subprocess.DEVNULL
    return subprocess.Popen(
        command, stdin=silent, stdout=silent, stderr=silent, pass_fds=fds, env=environment, process_group=0
    )


def _stop(process: subprocess.Popen[bytes], connection: socket.socket) -> None:
    connection.close()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _environment(everything: bool) -> dict[str, str]:
    """What the interpreter needs to start; tokens and keys stay here unless the user's own code is to run."""
    kept = os.environ if everything else {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
    fixed = {} if everything else HASH_SEED
    return {**kept, **fixed, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
