"""Runs that are killed and resumed until they are through, as a program: `killed_run.py FOLDER METHOD KILLER STRIDE`.

Children are forked from a process that has imported torch and trained once, so that one costs milliseconds. KILLER
"events" kills the n-th child at its n-th event (stride 1): before or after a system call that makes something durable,
or an update. "clock" kills it after a while. It writes FOLDER/whole, FOLDER/killed and prints how often it killed.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from porcelet.config import TrainConfig
from porcelet.train import checkpoint, loop, step
from porcelet.train.hashing import hashed
from porcelet.train.rewards import Answer
from porcelet.train.tasks import Problem
from tests.train.tiny_run import FIELDS, config

CALLS = ((os, "fsync"), (os, "replace"), (os, "rename"), (os, "unlink"), (shutil, "rmtree"), (step, "_update"))


def run_of(folder: Path, name: str, method: str) -> tuple[TrainConfig, dict[str, Any]]:
    """Six steps with a checkpoint every two."""
    if method == "pretrain":
        return config(folder / name, steps=6, checkpoint_every=2), FIELDS
    changes = {"method": "grpo", "model": str(folder / "start"), "max_new_tokens": 3, "group_size": 4}
    return config(folder / name, steps=6, checkpoint_every=2, updates_per_rollout=2, **changes), {}


def by_length(problem: Problem, answer: Answer) -> float:
    """A reward that always tells answers apart."""
    return float(len(answer.text))


def by_chance(problem: Problem, answer: Answer) -> float:
    """A reward that no second call repeats."""
    return float(os.urandom(1)[0])


def die_at(event: int) -> None:
    """Have this process kill itself at its n-th event."""
    events = itertools.count(1)

    def reached() -> None:
        if next(events) == event:
            os.kill(os.getpid(), signal.SIGKILL)

    def watched(call: Callable[..., Any]) -> Callable[..., Any]:
        def both(*arguments: Any, **options: Any) -> Any:
            reached()
            result = call(*arguments, **options)
            reached()
            return result

        return both

    for module, name in CALLS:
        setattr(module, name, watched(getattr(module, name)))


def forked(work: Callable[[], object], seconds: float = 60.0) -> bool:
    """Whether a child came through; it is killed after `seconds`."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException as problem:  # noqa: BLE001  the child must not go on as its parent
            print(repr(problem), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.002)
    else:
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the run failed by itself"
    return os.WIFEXITED(status)


def main(folder: Path, method: str, killer: str, stride: int) -> None:
    """The whole run, then the killed one."""
    torch.set_num_threads(1)
    loop.train(config(folder / "start", steps=30, learning_rate=1e-2), FIELDS)
    reward = by_chance if killer == "chance" else by_length
    start = time.monotonic()
    if killer != "chance":
        assert forked(lambda: loop.train(*run_of(folder, "whole", method), reward=reward))
    whole = time.monotonic() - start
    killed = run_of(folder, "killed", method)

    def work(event: int) -> None:
        die_at(event)
        loop.train(*killed, reward=reward, resume=True)

    before = -1
    for attempt in itertools.count(1):
        timed = killer == "clock" and attempt <= 8
        wait = whole * (hashed("clock", attempt) % 1000) / 1500 if timed else 60.0
        if forked(lambda event=attempt * stride: work(0 if killer == "clock" else event), wait):  # type: ignore[misc]
            break
        found = checkpoint.newest(folder / "killed")
        done = int(found.name.removeprefix("step-")) if found else -1
        assert done >= before, f"the checkpoint of step {before} is lost"
        before = done
    print(attempt - 1)
    if killer == "chance":  # no run repeats the rewards, but one that is given the killed one's rollouts must equal it
        shutil.copytree(folder / "killed" / "rollouts", folder / "whole" / "rollouts")
        (folder / "whole" / "sessions.jsonl").touch()
        loop.train(*run_of(folder, "whole", method), reward=reward, resume=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]))
