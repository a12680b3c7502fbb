from __future__ import annotations

import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from porcelet.train.advantages import ADVANTAGES, advantages, has_signal, overlong_penalty
from porcelet.train.policy import FAMILY

REWARDS = [1.0, 0.0, 0.0, 0.5]
BY_HAND = {
    "standardised": [1.50755, -0.90453, -0.90453, 0.30151],
    "centred": [0.625, -0.375, -0.375, 0.125],
    "leave_one_out": [5 / 6, -0.5, -0.5, 1 / 6],
}


@pytest.mark.parametrize("kind", BY_HAND)
def test_advantages_by_hand(kind: str) -> None:
    """Mean 0.375, population's std 0.41458; the others' means 1/6, 1/2 and 1/3."""
    assert advantages(REWARDS, kind) == pytest.approx(BY_HAND[kind], abs=1e-4)


@given(st.lists(st.sampled_from([0.0, 0.1, 0.3, 1.0]), min_size=2, max_size=9), st.sampled_from(sorted(ADVANTAGES)))
def test_advantages_cancel_out(rewards: list[float], kind: str) -> None:
    """They sum to zero; equal rewards give exact zeros, whatever rounding does to their mean."""
    found = advantages(rewards, kind)
    assert sum(found) == pytest.approx(0.0, abs=1e-9)
    assert any(found) == has_signal(rewards) == (len(set(rewards)) > 1)
    if kind == "standardised" and has_signal(rewards):
        assert statistics.pstdev(found) == pytest.approx(1.0, rel=1e-4)


def test_every_member_of_the_family_has_an_advantage() -> None:
    """The table of losses names none that does not exist, and all that do."""
    assert {member.advantage for member in FAMILY.values()} == set(ADVANTAGES)


def test_overlong_answers_lose_up_to_one() -> None:
    """With 20 tokens allowed and a buffer of 4: free up to 16, a quarter a token from there, 1 at the limit."""
    assert [overlong_penalty(count, 20, 4) for count in (1, 16, 17, 18, 20)] == [0, 0, -0.25, -0.5, -1]
    assert overlong_penalty(20, 20, 0) == 0
