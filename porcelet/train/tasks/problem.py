"""Problems, and tasks that draw them: position i of a stream is a hash of (seed, i), so a stream has no state.

A problem's question decides by its hash whether it is ever trained on; one in ten is held out to measure with, whatever
the seed and however the problems are made. A task is either a finite set of problems (`FiniteTask`) or a generator
(`GeneratedTask`), which draws again where it meets a held-out one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

from porcelet.errors import InputError
from porcelet.train.hashing import hashed

HELD_OUT_SHARE = 10  # one problem in so many is never trained on
MAX_DRAWS = 300  # with a tenth held out, so many held-out ones in a row mean that there is nothing else


@dataclass(frozen=True)
class Problem:
    """A question, and an answer that is right; where many are, or a demonstrator's stands there, the reward judges by
    `data`.

    `trace` is a worked solution to show before the answer (cold start). `data` is what a reward needs besides, of
    JSON's types alone: it travels to other processes.
    """

    question: str
    answer: str
    trace: str = ""
    data: Mapping[str, Any] = field(default_factory=dict, hash=False)


class Task(Protocol):
    """What training and evaluation ask of a task."""

    def draw(self, seed: int, position: int) -> Problem:
        """The training problem at a position of the stream."""
        ...

    @property
    def held_out(self) -> Sequence[Problem]:
        """Problems to measure with: no stream ever draws one."""
        ...


def is_held_out(problem: Problem) -> bool:
    return hashed(problem.question) % HELD_OUT_SHARE == 0


@dataclass(frozen=True)
class FiniteTask:
    """Problems that can be listed."""

    training: tuple[Problem, ...]
    held_out: tuple[Problem, ...]

    def draw(self, seed: int, position: int) -> Problem:
        """The training problem at a position of the stream."""
        return self.training[hashed(seed, position) % len(self.training)]


def split(problems: Iterable[Problem], remedy: str) -> FiniteTask:
    """A finite task, divided by the hash of the questions.

    Raises:
        InputError: too few problems; `remedy` says how to get more.
    """
    parts: tuple[list[Problem], list[Problem]] = ([], [])
    for problem in problems:
        parts[is_held_out(problem)].append(problem)
    if not all(parts):
        raise InputError(f"{remedy}: {len(parts[0]) + len(parts[1])} problems are too few to hold any out")
    return FiniteTask(*map(tuple, parts))


@dataclass(frozen=True)
class GeneratedTask:
    """Problems made on demand: `generate(seed, position)` is a pure function. A held-out one takes ten of them to find,
    which counts where a problem takes seconds to make. With `num_training`, streams draw from so many problems, the
    same for all seeds, with replacement."""

    generate: Callable[[int, int], Problem]
    num_held_out: int
    num_training: int = 0

    def __post_init__(self) -> None:
        if self.num_training < 0:
            raise InputError(f"the number of training problems is {self.num_training}; 0 (no limit) is the least")
        if self.num_held_out < 1:
            raise InputError(f"num_held_out is {self.num_held_out}; it must be at least 1")

    def draw(self, seed: int, position: int) -> Problem:
        """The training problem at a position of the stream."""
        if self.num_training:
            seed, position = hashed("training"), hashed(seed, position) % self.num_training
        for attempt in range(MAX_DRAWS):
            problem = self.generate(hashed(seed, attempt) if attempt else seed, position)
            if not is_held_out(problem):
                return problem
        raise InputError("the task has too few problems: all that were drawn are held out; widen its options")

    @cached_property
    def held_out(self) -> Sequence[Problem]:
        """The first `num_held_out` distinct ones of a stream of its own; fewer if the task has no more."""
        found: dict[str, Problem] = {}
        last = 0  # the position of the newest one: a task that has no more would be searched for ever
        position = 0
        while len(found) < self.num_held_out and position - last < MAX_DRAWS:
            problem = self.generate(hashed("held out"), position)
            if is_held_out(problem) and problem.question not in found:
                found[problem.question] = problem
                last = position
            position += 1
        if not found:
            raise InputError("the task has too few problems to hold any out; widen its options")
        return tuple(found.values())
