from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from porcelet.train.rewards.arithmetic import solves
from porcelet.train.tasks import Problem, load_task
from tests.train.rewards.answers import said

PROBLEM = Problem("3 3 8 8 = 24", "8/(3-8/3)", data={"numbers": [3, 3, 8, 8], "target": 24})


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("8/(3-8/3)", 1),
        (" 8 / (3 - 8 / 3) = 24\n", 1),
        ("8÷(3−8÷3)", 1),
        ("8/(3-8/3)=25", 0),
        ("8/(3-8/3)=24=24", 0),
        ("8*3", 0),  # not all numbers
        ("8+8+3+3+1+1", 0),  # too many
        ("24", 0),
        ("8/(3-9/3)", 0),  # another number, and a division by zero
        ("8*(8-8)+24", 0),
        ("the answer is 8/(3-8/3)", 0),
        ("__import__('os').abort()", 0),
        ("", 0),
    ],
)
def test_only_an_exact_use_of_all_numbers_counts(text: str, value: float) -> None:
    """Right by fractions, where floating point would miss by a rounding; everything else is worth nothing."""
    assert solves(PROBLEM, said(text)) == value


def test_the_tasks_own_answers_count() -> None:
    """What the generator gives as the answer is right for the reward."""
    task = load_task("countdown", {"num_numbers": 4})
    for problem in (task.draw(0, i) for i in range(50)):
        assert solves(problem, said(problem.answer)) == 1.0


@given(st.text(alphabet="0123456789+-*/()=. x\n", max_size=40))
def test_any_text_is_judged(text: str) -> None:
    """No text raises."""
    assert solves(PROBLEM, said(text)) in (0.0, 1.0)
