"""What a model can do: answers to problems it was not trained on, judged like those of reinforcement learning.

Several answers a problem, drawn at a temperature, give pass@1 and pass@k without bias; intervals come from resampling
the problems. The result is a JSON file beside the model, which the report reads.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from porcelet.train.estimate import Estimate, estimate, pass_at_k

NUM_SHOWN = 8  # problems whose first answer the file keeps as it was said


@dataclass(frozen=True)
class Shown:
    """One answer, as it was said."""

    question: str
    text: str
    is_right: bool


@dataclass(frozen=True)
class Evaluation:
    """Answers to `num_problems` held-out problems, `num_samples` each.

    `pass_at` maps k to the share of problems that k answers solve; `solved` is each problem's share of right answers,
    for comparisons in pairs. `num_tokens` is an answer's mean length, `finished` the share that ended by themselves.
    """

    num_problems: int
    num_samples: int
    temperature: float
    pass_at: dict[int, Estimate]
    solved: tuple[float, ...]
    num_tokens: float
    finished: float
    shown: tuple[Shown, ...] = ()


@dataclass(frozen=True)
class Attempt:
    """One answer with its verdict."""

    question: str
    text: str
    is_right: bool
    num_tokens: int
    finished: bool


def summarize(groups: Sequence[Sequence[Attempt]], temperature: float) -> Evaluation:
    """The evaluation of some problems' attempts, equally many each; k runs over the powers of two."""
    num_samples = len(groups[0])
    assert all(len(group) == num_samples for group in groups)
    right = [sum(attempt.is_right for attempt in group) for group in groups]
    powers = [2**i for i in range(num_samples.bit_length()) if 2**i <= num_samples]
    everything = [attempt for group in groups for attempt in group]
    return Evaluation(
        num_problems=len(groups),
        num_samples=num_samples,
        temperature=temperature,
        pass_at={k: estimate([pass_at_k(num_samples, count, k) for count in right]) for k in powers},
        solved=tuple(count / num_samples for count in right),
        num_tokens=statistics.fmean(attempt.num_tokens for attempt in everything),
        finished=statistics.fmean(attempt.finished for attempt in everything),
        shown=tuple(Shown(group[0].question, group[0].text, group[0].is_right) for group in groups[:NUM_SHOWN]),
    )


def save_evaluation(evaluation: Evaluation, path: Path) -> None:
    """Write it as JSON."""
    path.write_text(json.dumps(dataclasses.asdict(evaluation), ensure_ascii=False, indent=1), encoding="utf-8")


def read_evaluation(path: Path) -> Evaluation:
    """What `save_evaluation` wrote."""
    values = json.loads(path.read_text(encoding="utf-8"))
    values["pass_at"] = {int(k): Estimate(**found) for k, found in values["pass_at"].items()}
    values["solved"] = tuple(values["solved"])
    values["shown"] = tuple(Shown(**shown) for shown in values["shown"])
    return Evaluation(**values)
