"""Reasoning's end and its forced close, against the words of the contract spelled out over whole answers."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from porcelet.engine.thinking import Thinking
from porcelet.types import Reasoning

TOKENS = st.integers(0, 2)  # few, so that ends and their beginnings come up by chance
END = st.lists(TOKENS, min_size=1, max_size=4).map(tuple)
WORDS = st.lists(st.integers(0, 4), max_size=4).map(tuple)


def read(reasoning: Reasoning, model: list[int]) -> tuple[list[int], list[bool]]:
    """The answer's tokens while it reasons, each with whether it was forced; `model` is what the model would draw."""
    thinking, tokens, forced = Thinking(reasoning), list[int](), list[bool]()
    while thinking.active and len(tokens) < len(model):
        token = model[len(tokens)] if thinking.forced is None else thinking.forced
        forced.append(thinking.forced is not None)
        tokens.append(token)
        thinking.push(token)
    assert thinking.active == (tuple(tokens[-len(reasoning.end) :]) != reasoning.end)
    return tokens, forced


def first_end(tokens: list[int], end: tuple[int, ...]) -> int | None:
    """The number of tokens up to the first `end`."""
    return next((i for i in range(len(end), len(tokens) + 1) if tuple(tokens[i - len(end) : i]) == end), None)


@given(end=END, model=st.lists(TOKENS, max_size=30))
def test_without_a_budget_the_model_ends_by_itself(end: tuple[int, ...], model: list[int]) -> None:
    """Nothing is ever forced, and reasoning ends with the first end, across whatever steps."""
    tokens, forced = read(Reasoning(end=end), model)
    assert tokens == model[: first_end(model, end)] and not any(forced)


@given(end=END, words=WORDS, budget=st.integers(0, 12), model=st.lists(TOKENS, min_size=30, max_size=30))
def test_a_budget_closes_at_once(end: tuple[int, ...], words: tuple[int, ...], budget: int, model: list[int]) -> None:
    """An end within the budget is the model's own; else what follows the budget is forced up to the end: the rest of
    an end that the model has begun, the closing words otherwise."""
    closing = words + end
    tokens, forced = read(Reasoning(end=end, budget=budget, closing=closing), model)
    own = first_end(model[:budget], end)
    if own is not None:
        assert tokens == model[:own] and not any(forced)
        return
    assert tokens[:budget] == model[:budget] and forced == [False] * budget + [True] * (len(tokens) - budget)
    begun = max(n for n in range(min(budget, len(end)) + 1) if tuple(model[budget - n : budget]) == end[:n])
    expected = end[begun:] if begun else closing
    whole = model[:budget] + list(expected)
    assert tokens == whole[: first_end(whole, end)]


def test_a_fork_goes_its_own_way() -> None:
    """Tokens of one sample do not count in the other."""
    thinking = Thinking(Reasoning(end=(9,), budget=2, closing=(7, 9)))
    thinking.push(1)
    other = thinking.fork()
    thinking.push(9)
    other.push(1)
    assert (thinking.active, thinking.forced) == (False, None) and (other.active, other.forced) == (True, 7)
