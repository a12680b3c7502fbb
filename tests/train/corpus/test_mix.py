from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from porcelet.errors import InputError
from porcelet.train.corpus.mix import BLOCK, Mixture
from porcelet.train.corpus.permutation import Permutation


@given(size=st.integers(1, 3000), seed=st.integers(0, 2**40))
def test_a_permutation_meets_everything_once(size: int, seed: int) -> None:
    """Whatever the size; and a single place is what the whole has there."""
    permutation = Permutation(size, seed)
    whole = permutation(np.arange(size))
    assert sorted(whole.tolist()) == list(range(size))
    assert permutation(np.array([size // 2])) == whole[size // 2]


def test_a_permutation_is_shuffled_and_depends_on_its_key() -> None:
    """Neighbours are as far apart as chance has it (n/3 on average), and other keys give other orders."""
    whole = Permutation(10_000, 0)(np.arange(10_000))
    assert abs(np.abs(np.diff(whole)).mean() - 10_000 / 3) < 100
    assert (whole == Permutation(10_000, 1)(np.arange(10_000))).sum() < 10
    assert 0 <= Permutation(10**15, 0)(np.array([123])) < 10**15


@given(
    weights=st.lists(st.integers(0, 40), min_size=1, max_size=5).filter(any),
    seed=st.integers(0, 99),
    begin=st.integers(0, 3 * BLOCK),
)
def test_draws_count_each_source_without_gaps(weights: list[int], seed: int, begin: int) -> None:
    """From any position on, a source's counts go up by one; the counts are those a run from the start would have."""
    mixture = Mixture(weights, seed)
    seen: dict[int, list[int]] = {}
    for position in range(begin, begin + 60):
        source, count = mixture.draw(position)
        seen.setdefault(source, []).append(count)
    assert all(weights[source] for source in seen)
    again = Mixture(weights, seed)
    assert again.draw(begin + 59) == mixture.draw(begin + 59)
    for counts in seen.values():
        assert counts == list(range(counts[0], counts[0] + len(counts)))


def test_a_block_holds_the_shares_exactly_and_in_a_new_order() -> None:
    """4096 draws at weights 1, 2 and 5 are 512, 1024 and 2560, with every count once; blocks differ in order."""
    mixture = Mixture([1, 2, 5], seed=3)
    draws = [mixture.draw(position) for position in range(2 * BLOCK)]
    assert Counter(source for source, _ in draws) == {0: 1024, 1: 2048, 2: 5120}
    assert len(set(draws)) == len(draws)
    for source in range(3):
        counts = [count for found, count in draws if found == source]
        assert counts == list(range(len(counts)))
    first, second = ([source for source, _ in draws[a : a + BLOCK]] for a in (0, BLOCK))
    assert first != second
    assert max(abs(first[:n].count(2) / n - 5 / 8) for n in range(512, BLOCK)) < 0.07


@pytest.mark.parametrize("weights", [[], [0.0, 0.0], [1.0, -1.0], [float("nan")], [1.0, 1e-6]])
def test_unusable_weights_are_refused(weights: list[float]) -> None:
    """None, all zero, negative, not a number, or too small to be kept."""
    with pytest.raises(InputError, match="weight"):
        Mixture(weights, 0)
