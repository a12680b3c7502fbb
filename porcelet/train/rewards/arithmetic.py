"""Countdown's reward: the expression must use every given number once and be exactly the target."""

from __future__ import annotations

from porcelet.train.rewards.answer import Answer, Reward
from porcelet.train.tasks.expression import ExpressionError, evaluate
from porcelet.train.tasks.problem import Problem


def countdown() -> Reward:
    """1 for an expression that solves the problem, 0 for anything else. `= target` may follow it."""
    return solves


def solves(problem: Problem, answer: Answer) -> float:
    numbers, target = problem.data["numbers"], problem.data["target"]
    expression, equals, claimed = answer.content.strip().partition("=")
    if equals and claimed.strip() != str(target):
        return 0.0
    try:
        value, used = evaluate(expression)
    except ExpressionError:
        return 0.0
    return float(value == target and sorted(used) == sorted(numbers))
