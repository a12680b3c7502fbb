from __future__ import annotations

import itertools
import random

import pytest

from porcelet.train.estimate import difference, estimate, pass_at_k


def test_pass_at_k_counts_subsets() -> None:
    """The share of all k-subsets of the samples that hold a right one, by enumeration."""
    for num_samples, num_right, k in [(5, 0, 2), (5, 1, 2), (5, 3, 2), (6, 2, 5), (4, 4, 1), (7, 3, 7)]:
        samples = [True] * num_right + [False] * (num_samples - num_right)
        subsets = list(itertools.combinations(samples, k))
        expected = sum(any(subset) for subset in subsets) / len(subsets)
        assert pass_at_k(num_samples, num_right, k) == pytest.approx(expected)


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    """Of 200 experiments with 100 problems each, the 95 % interval covers the true mean in about 190."""
    draw, covered = random.Random(0), 0
    for _ in range(200):
        found = estimate([float(draw.random() < 0.3) for _ in range(100)])
        assert found.low <= found.value <= found.high
        covered += found.low <= 0.3 <= found.high
    assert 180 <= covered <= 198


def test_equal_values_give_equal_estimates_and_pairs_cancel() -> None:
    """Nothing random remains; a constant gain has an interval of no width, however different the problems are."""
    values = [random.Random(1).random() for _ in range(50)]
    assert estimate(values) == estimate(values)
    gain = difference([value + 0.25 for value in values], values)
    assert (gain.value, gain.low, gain.high) == pytest.approx((0.25, 0.25, 0.25))
    assert str(estimate([1.0, 1.0])) == "100.0% [100.0%, 100.0%]"
    with pytest.raises(ValueError, match="value"):
        estimate([])
