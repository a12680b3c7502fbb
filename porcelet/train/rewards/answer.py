"""What a model said, as a reward sees it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from porcelet.errors import PorceletError
from porcelet.train.tasks.problem import Problem


@dataclass(frozen=True)
class Answer:
    """One completion. `text` is all of it; `reasoning` the part inside the think tags, `content` what follows."""

    text: str
    reasoning: str
    content: str
    finished: bool  # a stop token ended it, not the length
    num_tokens: int


Reward = Callable[[Problem, Answer], float]


class RewardError(PorceletError):
    """A reward that could not be had: its process hung, died, or told of an exception. It ends no run."""
