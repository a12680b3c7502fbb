"""What a model said, as a reward sees it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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


def finite(value: Any) -> float:
    """What a reward returned, as a number: int, float, bool, or numpy's and torch's scalars.

    Raises:
        RewardError: it is none, or not finite.
    """
    try:
        number = math.nan if isinstance(value, (str, bytes)) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise RewardError(f"returned {value!r:.100}, no finite number")
    return number


def told(failure: BaseException) -> str:
    """An exception as one text: our own by their message, others with their type."""
    if isinstance(failure, RewardError):
        return str(failure)
    try:
        return repr(failure)
    except Exception:  # noqa: BLE001  an exception of the user's may fail to say what it is
        return type(failure).__name__
