"""What a model can do: answers to problems it was not trained on, judged like those of reinforcement learning.

Several answers a problem, drawn at a temperature, give pass@1 and pass@k without bias; intervals come from resampling
the problems. An answer is right if the first of the recipe's rewards gives it 1. The result is a JSON file beside the
model, which the report reads.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from porcelet.config import DRAWING, EngineConfig, EvaluateConfig, PolicyConfig, TrainConfig
from porcelet.engine.engine import Engine
from porcelet.errors import InputError, ModelError
from porcelet.train.answers import ask
from porcelet.train.estimate import Estimate, estimate, pass_at_k
from porcelet.train.files import write_durably
from porcelet.train.hashing import hashed
from porcelet.train.rendering import Renderer
from porcelet.train.rewards import Answer, Term, judge, rewards_of
from porcelet.train.tasks import Problem, load_task
from porcelet.types import SamplingParams

NUM_SHOWN = 8  # problems whose first answer the file keeps as it was said
MAX_NEW_TOKENS = 256  # of an answer about whose length the recipe says nothing
# In full precision. Guesses are made while they pay by the clock, and with them the shapes of steps and the last bits
# of log-probabilities would change from call to call (sampler.py).
SETTINGS = EngineConfig(weights="float32", speculation="off")


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
    `asked` is what was asked for, which may be more problems than the task has; none where a file does not say it.
    """

    num_problems: int
    num_samples: int
    temperature: float
    pass_at: dict[int, Estimate]
    solved: tuple[float, ...]
    num_tokens: float
    finished: float
    shown: tuple[Shown, ...] = ()
    asked: EvaluateConfig = EvaluateConfig()


def evaluate_folder(path: Path, config: TrainConfig, *, unsafe_sandbox: bool = False) -> Evaluation:
    """What a saved model, a folder or a GGUF file, does with the held-out problems of a recipe's task, as the recipe's
    [evaluate] table says.

    Raises:
        InputError: the recipe's task or rewards cannot be used.
        ModelError: the model cannot be read.
    """
    wanted = asked(config)
    problems = load_task(config.task.name, config.task.options).held_out[: wanted.num_problems]
    rewards = rewards_of(config, unsafe_sandbox=unsafe_sandbox)
    return evaluate(Engine.load(path, SETTINGS), Renderer(path), problems, rewards, wanted)


def asked(config: TrainConfig) -> EvaluateConfig:
    """The recipe's [evaluate] table, with a number of tokens in the place of max_new_tokens 0."""
    policy, own = config.policy, config.evaluate.max_new_tokens
    is_given = config.method in DRAWING or policy != PolicyConfig()
    longest = own or (policy.max_new_tokens if is_given else MAX_NEW_TOKENS)
    return dataclasses.replace(config.evaluate, max_new_tokens=longest)


def held_out_accuracy(path: Path, config: TrainConfig, *, unsafe_sandbox: bool = False) -> tuple[float, int]:
    """The share of all held-out problems of the task that a saved model solves greedily; and their number."""
    whole = dataclasses.replace(config.evaluate, num_problems=sys.maxsize, temperature=0.0)
    found = evaluate_folder(path, dataclasses.replace(config, evaluate=whole), unsafe_sandbox=unsafe_sandbox)
    return found.pass_at[1].value, found.num_problems


def is_measured(path: Path, config: TrainConfig) -> bool:
    """Whether the file at `path` is an evaluation as the recipe's [evaluate] table asks for; False without a file."""
    return path.exists() and read_evaluation(path).asked == asked(config)


def evaluate(
    engine: Engine,
    renderer: Renderer,
    problems: Sequence[Problem],
    rewards: Sequence[Term],
    config: EvaluateConfig,
) -> Evaluation:
    """What the engine's model does with some problems; equal calls draw equal answers if the engine has `SETTINGS`."""
    params = [
        SamplingParams(
            max_tokens=config.max_new_tokens,
            temperature=config.temperature,
            seed=hashed("evaluate", i),
            n=config.num_samples if config.temperature else 1,
        )
        for i in range(len(problems))
    ]
    groups = ask(engine, renderer, problems, params)
    each = [problem for problem, group in zip(problems, groups, strict=True) for _ in group]
    judged = iter(judge(rewards, each, [answer for group in groups for answer in group]))
    attempts = [
        [
            Attempt(problem.question, answer.text, is_right(next(judged).parts[rewards[0].name]), *_extent(answer))
            for answer in group
        ]
        for problem, group in zip(problems, groups, strict=True)
    ]
    return dataclasses.replace(summarize(attempts, config.temperature), asked=config)


def is_right(value: float) -> bool:
    """Whether the first reward's value says that an answer is right."""
    return value >= 1.0


def _extent(answer: Answer) -> tuple[int, bool]:
    return answer.num_tokens, answer.finished


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
    write_durably(path, json.dumps(dataclasses.asdict(evaluation), ensure_ascii=False, indent=1))


def read_evaluation(path: Path) -> Evaluation:
    """What `save_evaluation` wrote.

    Raises:
        ModelError: the file is damaged.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        values["pass_at"] = {int(k): Estimate(**found) for k, found in values["pass_at"].items()}
        values["solved"] = tuple(values["solved"])
        values["shown"] = tuple(Shown(**shown) for shown in values["shown"])
        values["asked"] = EvaluateConfig(**values.get("asked", {}))
        return Evaluation(**values)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, InputError) as problem:
        raise ModelError(f"{path} cannot be read: {problem}; delete it to measure again") from problem
