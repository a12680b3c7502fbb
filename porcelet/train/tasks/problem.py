"""A problem, and what a task has to offer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

HELD_OUT_SHARE = 10  # one problem in so many is never trained on


@dataclass(frozen=True)
class Problem:
    """A question, and what an answer to it is judged by.

    `answer` is one that is right, `trace` a worked solution that may be shown before it, and `data` whatever else the
    reward needs.
    """

    question: str
    answer: str
    trace: str = ""
    data: Mapping[str, Any] = field(default_factory=dict, hash=False)


class Task(Protocol):
    """A source of problems."""

    @property
    def held_out(self) -> Sequence[Problem]:
        """Problems that `draw` never gives."""
        ...

    def draw(self, seed: int, position: int) -> Problem:
        """The training problem at a position of the stream."""
        ...
