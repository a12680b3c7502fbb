"""From a group's rewards to its advantages: how much better than its fellows an answer is.

    standardised    (r - mean) / (std + ε)           DeepSeekMath (2402.03300), section 4.1.2
    centred         r - mean                         Dr. GRPO (2503.20783): without a std, easy and hard prompts count
                                                     for what they are
    leave_one_out   r - mean of the others           RLOO (2402.14740)

All are zero where all rewards are equal: such a group teaches nothing.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

STD_EPSILON = 1e-6


def standardised(rewards: Sequence[float]) -> list[float]:
    """With the population's std."""
    std = statistics.pstdev(rewards)
    return [difference / (std + STD_EPSILON) for difference in centred(rewards)]


def centred(rewards: Sequence[float]) -> list[float]:
    mean = statistics.fmean(rewards)
    return [reward - mean for reward in rewards]


def leave_one_out(rewards: Sequence[float]) -> list[float]:
    """Two rewards at least."""
    assert len(rewards) > 1, "a single answer has no others to compare with"
    total, others = sum(rewards), len(rewards) - 1
    return [reward - (total - reward) / others for reward in rewards]


ADVANTAGES: dict[str, Callable[[Sequence[float]], list[float]]] = {
    "standardised": standardised,
    "centred": centred,
    "leave_one_out": leave_one_out,
}


def advantages(rewards: Sequence[float], kind: str) -> list[float]:
    """One an answer of the group; exact zeros where all rewards are equal."""
    return ADVANTAGES[kind](rewards) if has_signal(rewards) else [0.0] * len(rewards)


def has_signal(rewards: Sequence[float]) -> bool:
    """Whether any answer of the group did better than another."""
    return min(rewards) < max(rewards)


def overlong_penalty(num_tokens: int, max_tokens: int, buffer: int) -> float:
    """0 up to `buffer` tokens before the limit, from there linearly to -1 at it (DAPO 2503.14476, eq. 13)."""
    return -max(0.0, (num_tokens - (max_tokens - buffer)) / buffer) if buffer else 0.0
