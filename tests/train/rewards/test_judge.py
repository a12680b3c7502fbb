from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from porcelet.train.rewards import Answer, Term, judge, summarize
from porcelet.train.tasks import Problem
from tests.train.rewards.answers import said

PROBLEM = Problem("?", "!")


def constant(value: Any) -> Callable[[Problem, Answer], float]:
    return lambda problem, answer: value


def by_text(problem: Problem, answer: Answer) -> float:
    return float(answer.text)


def test_the_total_is_the_weighted_sum() -> None:
    """Each answer's own, in order; parts are kept before the weights."""
    terms = [Term("text", by_text, 2.0), Term("one", constant(1.0), -0.5)]
    found = judge(terms, [PROBLEM] * 3, [said("0"), said("0.5"), said("1")])
    assert [judgement.total for judgement in found] == [-0.5, 0.5, 1.5]
    assert found[2].parts == {"text": 1.0, "one": 1.0} and not found[2].failed
    assert judge(terms, [], []) == []


def test_a_gated_term_counts_only_beside_its_condition() -> None:
    """Form is worth something in right answers alone; its own value is shown all the same."""
    terms = [Term("form", constant(1.0), 0.1, only_if="right"), Term("right", by_text)]
    wrong, right = judge(terms, [PROBLEM] * 2, [said("0"), said("1")])
    assert (wrong.total, right.total) == (0.0, 1.1)
    assert wrong.parts["form"] == right.parts["form"] == 1.0


def raises(problem: Problem, answer: Answer) -> float:
    raise ValueError("strange text")


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise ValueError

    __repr__ = __str__


def raises_unspeakable(problem: Problem, answer: Answer) -> float:
    raise Unspeakable


def leaves(problem: Problem, answer: Answer) -> float:
    sys.exit("gone")


@pytest.mark.parametrize(
    ("reward", "reason"),
    [
        (raises, "strange text"),
        (constant(float("nan")), "no finite number"),
        (constant(float("inf")), "no finite number"),
        (lambda problem, answer: "1", "'1', no finite number"),
        (lambda problem, answer: None, "None, no finite number"),
        (lambda problem, answer: 10**400, "no finite number"),
        (lambda problem, answer: 1j, "no finite number"),
        (raises_unspeakable, "Unspeakable"),
        (leaves, "SystemExit('gone')"),
    ],
)
def test_a_failing_reward_is_zero_named_and_counted(reward: Callable[..., float], reason: str) -> None:
    """It stops neither the others nor the run, and the metrics say which and how often."""
    found = judge([Term("bad", reward), Term("text", by_text)], [PROBLEM] * 2, [said("1"), said("0")])
    assert [judgement.total for judgement in found] == [1.0, 0.0]
    assert all(judgement.failed == ("bad",) and reason in judgement.reasons[0] for judgement in found)
    assert summarize(found) == {
        "reward": 0.5,
        "reward/bad": 0.0,
        "reward/text": 0.5,
        "reward_failures": 2,
        "reward_failures/bad": 2,
    }


def test_numbers_of_other_libraries_count() -> None:
    """What numpy's comparisons and torch's give is a number."""
    for value in (np.True_, np.float32(1), torch.tensor(True), torch.tensor([1.0])):
        assert judge([Term("one", constant(value))], [PROBLEM], [said("")])[0].total == 1.0


def test_each_reason_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    """A reward that is broken says so in the log, not a thousand times."""
    with caplog.at_level(logging.WARNING):
        judge([Term("broken", by_text)], [PROBLEM] * 3, [said("no number"), said("no number"), said("1")])
        judge([Term("broken", by_text)], [PROBLEM], [said("no number")])
    (message,) = [record.getMessage() for record in caplog.records]
    assert "reward broken" in message and "no number" in message


def test_nothing_failed_is_logged_as_zero() -> None:
    """The count is there in every step, so that a plot of it has no holes."""
    assert summarize(judge([Term("text", by_text)], [PROBLEM], [said("1")]))["reward_failures"] == 0
