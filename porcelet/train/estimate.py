"""Shares with their uncertainty: pass@k without bias, and 95 % intervals over problems.

Every number about what a model can do is a mean over problems, so its interval comes from resampling problems
(Efron's percentile bootstrap); the answers to one problem are no independent evidence. Pure arithmetic, no torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

NUM_RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.1%} [{self.low:.1%}, {self.high:.1%}]"


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """The chance that k of the samples, drawn without replacement, hold a right one (Chen et al. 2021, eq. 1)."""
    assert 0 <= num_right <= num_samples and 1 <= k <= num_samples
    return 1.0 - math.comb(num_samples - num_right, k) / math.comb(num_samples, k)


def estimate(values: Sequence[float]) -> Estimate:
    """The mean over problems; equal values give equal intervals, as the resampling is seeded by nothing else."""
    if not values:
        raise ValueError("an estimate needs a value at least")
    array = np.asarray(values, dtype=np.float64)
    chosen = np.random.default_rng(0).integers(0, len(array), (NUM_RESAMPLES, len(array)))
    low, high = np.quantile(array[chosen].mean(axis=1), (0.025, 0.975))
    return Estimate(float(array.mean()), float(low), float(high))


def difference(after: Sequence[float], before: Sequence[float]) -> Estimate:
    """How much better the same problems went; resampled in pairs, so what is hard for both cancels.

    Raises:
        ValueError: they are not the same number of problems.
    """
    return estimate([a - b for a, b in zip(after, before, strict=True)])
