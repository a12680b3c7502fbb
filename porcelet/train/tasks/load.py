"""A task by its name, with its options: the keyword arguments of the function that makes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from porcelet.errors import InputError
from porcelet.train.options import check_options, nearest
from porcelet.train.tasks.countdown import countdown
from porcelet.train.tasks.gym import PREFIX, reasoning_gym
from porcelet.train.tasks.jsonl import jsonl
from porcelet.train.tasks.problem import Task
from porcelet.train.tasks.sums import chain_sums, sums

TASKS: dict[str, Callable[..., Task]] = {
    "sums": sums,
    "chain-sums": chain_sums,
    "countdown": countdown,
    "jsonl": jsonl,
}


def load_task(name: str, options: Mapping[str, Any]) -> Task:
    """One of `TASKS`, or `reasoning-gym:FAMILY`.

    Raises:
        InputError: an unknown name or option (the nearest is named), a value that cannot be used, or too few problems.
        MissingExtraError: reasoning-gym is not installed.
    """
    if name.startswith(PREFIX):
        check_options(reasoning_gym, options, f"task {name}")
        return reasoning_gym(name.removeprefix(PREFIX), **options)
    if name not in TASKS:
        known = (*TASKS, f"{PREFIX}FAMILY")
        raise InputError(f"task is {name!r}{nearest(name, known)}")
    check_options(TASKS[name], options, f"task {name}")
    return TASKS[name](**options)
