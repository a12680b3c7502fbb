from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from porcelet.train.rewards.text import exact, form, language, length, words
from porcelet.train.tasks import Problem
from tests.train.rewards.answers import said

PROBLEM = Problem("1+2=", "3")


def test_exact_answer_is_exact() -> None:
    """The number and nothing else; white space around it is forgiven."""
    texts = ("3", " 3\n", "03", "3.", "", "13")
    assert [exact()(PROBLEM, said(text)) for text in texts] == [1, 1, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("<think>so</think>3", 1),
        ("so</think>\n3", 1),  # the prompt ended with the opening tag
        ("  <think>so</think>3", 1),
        ("3", 0),
        ("<think>so", 0),
        ("<think></think>3", 0),
        ("<think>so</think> ", 0),
        ("<think>so</think>3</think>", 0),
        ("<think>so<think>so</think>3", 0),
        ("<think>so</think>3<think>", 0),
        ("so<think>so</think>3", 0),
    ],
)
def test_form_wants_one_closed_thought_and_an_answer(text: str, value: float) -> None:
    """Tags once each and in order, something in the thought and something behind it."""
    assert form()(PROBLEM, said(text)) == value
    assert form()(PROBLEM, said(text, finished=False)) == 0
    tags = {"open_tag": "[", "close_tag": "]"}
    assert form(**tags)(PROBLEM, said(text.replace("<think>", "[").replace("</think>", "]"))) == value


@pytest.mark.parametrize("shape", ["linear", "cosine"])
@given(a=st.integers(0, 40), b=st.integers(0, 40))
def test_length_falls_from_one_to_zero(shape: str, a: int, b: int) -> None:
    """Never rising, 1 up to the minimum, 0 from the maximum, half in the middle."""
    reward = length(min_tokens=10, max_tokens=30, shape=shape)
    first, second = (reward(PROBLEM, said("", num_tokens=number)) for number in sorted((a, b)))
    assert 1.0 >= first >= second >= 0.0
    values = [reward(PROBLEM, said("", num_tokens=number)) for number in (10, 20, 30)]
    assert values == pytest.approx([1.0, 0.5, 0.0])


def test_language_is_the_share_of_words() -> None:
    """Latin words and Chinese characters are counted one by one; numbers and signs belong to no language."""
    assert words("two 两个 x2=4 naïve") == ["two", "两", "个", "x", "naïve"]
    cases = [
        ("we add 3", 1.0, 0.0),
        ("我们", 0.0, 1.0),
        ("so 我们 go on", 0.6, 0.4),
        ("3+4=7", 1.0, 1.0),
        ("", 1.0, 1.0),
    ]
    for text, latin, cjk in cases:
        assert language(script="latin")(PROBLEM, said(text)) == pytest.approx(latin)
        assert language(script="cjk")(PROBLEM, said(text)) == pytest.approx(cjk)
    assert language(script="latin")(PROBLEM, said("我们</think>three", reasoning="我们")) == 0.0
    assert language(script="latin")(PROBLEM, said("рaypal")) == 0.0  # a Cyrillic letter among Latin ones


@given(st.text(max_size=30))
def test_text_rewards_take_any_text(text: str) -> None:
    """Whatever a model says, they give a number between 0 and 1."""
    answer = said(text, reasoning=text, num_tokens=len(text))
    for reward in (exact(), form(), length(max_tokens=9), language(script="cjk")):
        assert 0.0 <= reward(PROBLEM, answer) <= 1.0
