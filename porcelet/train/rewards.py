"""What an answer earns: a reward is a pure function of (problem, text). Left out so far: rewards that run code."""

from __future__ import annotations

import math
from collections.abc import Callable

from porcelet.train.tasks import Problem

Reward = Callable[[Problem, str], float]


def exact_answer(problem: Problem, text: str) -> float:
    """1 for the answer and nothing else, 0 otherwise."""
    return float(text.strip() == problem.answer)


def score(reward: Reward, problem: Problem, text: str) -> tuple[float, bool]:
    """The reward, and whether it failed: one that raises or is not finite scores 0, so no strange answer ends a run.

    Failures are counted in the metrics (`reward_failures`).
    """
    try:
        value = float(reward(problem, text))
    except Exception:  # noqa: BLE001  a reward is the user's code, and the text is the model's
        return 0.0, True
    return (value, False) if math.isfinite(value) else (0.0, True)
