"""A+B= for all A and B below `max_number`: the smallest task that a model can be seen to learn."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from porcelet.errors import InputError
from porcelet.train.hashing import hashed
from porcelet.train.tasks.problem import HELD_OUT_SHARE, Problem


@dataclass(frozen=True)
class Sums:
    """All sums of two numbers, split by hash."""

    training: tuple[Problem, ...]
    held_out: tuple[Problem, ...]

    def draw(self, seed: int, position: int) -> Problem:
        return self.training[hashed(seed, position) % len(self.training)]


def sums(max_number: int = 20) -> Sums:
    """The task for operands below `max_number`.

    Raises:
        InputError: there are too few of them to hold any out.
    """
    split: tuple[list[Problem], list[Problem]] = ([], [])
    for a, b in itertools.product(range(max_number), repeat=2):
        split[hashed(f"{a}+{b}=") % HELD_OUT_SHARE == 0].append(Problem(f"{a}+{b}=", str(a + b)))
    if not all(split):
        raise InputError(f"max_number is {max_number}; too few problems to hold any out, raise it")
    return Sums(*map(tuple, split))


def load_task(name: str, options: Mapping[str, Any]) -> Sums:
    """The task of that name.

    Raises:
        InputError: no task has that name, or it does not take these options.
    """
    if name != "sums":
        raise InputError(f"task is {name!r}; known: sums")
    return sums(**options)
