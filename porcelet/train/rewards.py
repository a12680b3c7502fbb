"""What an answer earns: a reward is a pure function of (problem, text). Left out so far: rewards that run code."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from porcelet.train.tasks import Problem

Reward = Callable[[Problem, str], float]


def exact_answer(problem: Problem, text: str) -> float:
    """1 for the answer and nothing else, 0 otherwise."""
    return float(text.strip() == problem.answer)


def score(reward: Reward, problem: Problem, text: str) -> tuple[float, bool]:
    """The reward, and whether it failed: one that raises or is not finite scores 0, so no strange answer ends a run.

    Failures are counted in the metrics (`reward_failures`).
    """
    try:
        value = float(reward(problem, text))
    except Exception:  # noqa: BLE001  a reward is the user's code, and the text is the model's
        return 0.0, True
    return (value, False) if math.isfinite(value) else (0.0, True)


@dataclass(frozen=True)
class Answer:
    """One completion. `text` is all of it; `reasoning` the part inside the think tags, `content` what follows."""

    text: str
    reasoning: str
    content: str
    finished: bool  # a stop token ended it, not the length
    num_tokens: int


@dataclass(frozen=True)
class Term:
    """A reward under its name."""

    name: str
    reward: Reward


@dataclass(frozen=True)
class Judgement:
    """What one answer earned, by rewards; those in `failed` are worth zero."""

    total: float
    parts: Mapping[str, float]
    failed: tuple[str, ...] = ()


def judge(rewards: Sequence[Term], problems: Sequence[Problem], answers: Sequence[Answer]) -> list[Judgement]:
    """A judgement for each answer to the problem at its place."""
    judgements = []
    for problem, answer in zip(problems, answers, strict=True):
        scores = {term.name: score(term.reward, problem, answer.text) for term in rewards}
        parts = {name: value for name, (value, _) in scores.items()}
        failed = tuple(name for name, (_, failed) in scores.items() if failed)
        judgements.append(Judgement(sum(parts.values()), parts, failed))
    return judgements


def summarize(judgements: Sequence[Judgement]) -> dict[str, float]:
    """What to log: means of the total and of each part, and how many rewards failed."""
    metrics = {"reward": statistics.fmean(judgement.total for judgement in judgements)}
    for name in judgements[0].parts:
        metrics[f"reward/{name}"] = statistics.fmean(judgement.parts[name] for judgement in judgements)
    return metrics | {"reward_failures": sum(len(judgement.failed) for judgement in judgements)}
