"""What answers earn: a weighted sum of rewards, any of which may fail without ending anything.

    total = sum over terms of weight * value;  a term with `only_if` counts where that other term's value is positive

So a right form can be worth something only in right answers: added to wrong ones, it would be what a model learns first
(open-instruct's reason for not adding format rewards). A reward that raises, hangs, or returns what is no finite number
is worth zero; the judgement names it and says why, each new reason is logged once, and `summarize` counts.
"""

from __future__ import annotations

import logging
import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import repeat

from porcelet.train.rewards.answer import Answer, Reward, finite, told
from porcelet.train.tasks.problem import Problem

MAX_REASON = 200  # characters of an exception that are kept


@dataclass(frozen=True)
class Term:
    """A reward in the sum. `concurrent`: it works in a process of its own, so that calls may overlap; every other
    reward is called from one thread."""

    name: str
    reward: Reward
    weight: float = 1.0
    only_if: str = ""
    concurrent: bool = False


@dataclass(frozen=True)
class Judgement:
    """`parts` are the values before weights and conditions; `reasons` say why the rewards in `failed` did."""

    total: float
    parts: Mapping[str, float]
    failed: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()


def judge(rewards: Sequence[Term], problems: Sequence[Problem], answers: Sequence[Answer]) -> list[Judgement]:
    """A judgement for each answer to the problem at its place. Hanging answers are waited for side by side."""
    assert len(problems) == len(answers), "an answer belongs to a problem"
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        columns = [_column(term, pool, problems, answers) for term in rewards]  # all begin before one is waited for
        values = [list(column) for column in columns]
    rows = zip(*values, strict=True) if values else repeat((), len(answers))
    judgements = [_combined(rewards, row) for row in rows]
    for judgement in judgements:
        for name, reason in zip(judgement.failed, judgement.reasons, strict=True):
            _warn_once(name, reason)
    return judgements


def _column(
    term: Term, pool: ThreadPoolExecutor, problems: Sequence[Problem], answers: Sequence[Answer]
) -> Iterator[tuple[float, str]]:
    """The term's value and its failure, for every answer."""
    mapped = pool.map if term.concurrent else map
    return mapped(partial(_value, term.reward), problems, answers)


def _value(reward: Reward, problem: Problem, answer: Answer) -> tuple[float, str]:
    try:
        return finite(reward(problem, answer)), ""
    except (Exception, SystemExit) as failure:  # a reward may be the user's code, and the text is the model's
        return 0.0, told(failure)[:MAX_REASON]


@lru_cache(maxsize=1024)
def _warn_once(name: str, reason: str) -> None:
    """Reasons may quote the answer: were they without end, the oldest would be told again."""
    logging.getLogger(__name__).warning("reward %s failed, and counts as 0: %s", name, reason)


def _combined(rewards: Sequence[Term], row: Sequence[tuple[float, str]]) -> Judgement:
    parts = {term.name: value for term, (value, _) in zip(rewards, row, strict=True)}
    failures = [(term.name, reason) for term, (_, reason) in zip(rewards, row, strict=True) if reason]
    total = sum(term.weight * parts[term.name] for term in rewards if not term.only_if or parts[term.only_if] > 0)
    return Judgement(total, parts, tuple(name for name, _ in failures), tuple(reason for _, reason in failures))


def summarize(judgements: Sequence[Judgement]) -> dict[str, float]:
    """What to log about a step: means of the total and of each part, and how often which reward failed."""
    if not judgements:
        return {}
    metrics = {"reward": statistics.fmean(judgement.total for judgement in judgements)}
    for name in judgements[0].parts:
        metrics[f"reward/{name}"] = statistics.fmean(judgement.parts[name] for judgement in judgements)
    failed = [name for judgement in judgements for name in judgement.failed]
    metrics["reward_failures"] = len(failed)
    return metrics | {f"reward_failures/{name}": failed.count(name) for name in sorted(set(failed))}
