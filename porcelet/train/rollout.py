"""GRPO's samples: the model answers each prompt G times, and what beats its group's mean is reinforced.

    prompts → engine.generate, G draws each → reward → Episode → advantage in the group → Sample → the one loop

The engine holds the trainer's own parameters, so nothing is copied, and the log-probabilities it drew with serve as
p_old without a second forward pass. Advantages are (r - mean) / std over the group (DeepSeekMath, section 4.1.2); a
group whose rewards are all equal teaches nothing and is skipped. The engine computes each prompt once for its G
answers. The update computes it once too.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TypeVar

from porcelet.config import EngineConfig, TrainConfig
from porcelet.engine.engine import Engine
from porcelet.train.hashing import hashed
from porcelet.train.rendering import Renderer
from porcelet.train.rewards import Answer, Reward, Term, judge
from porcelet.train.rewards.text import exact_answer
from porcelet.train.tasks import Problem, Task, load_task
from porcelet.types import Episode, Output, Sample, SamplingParams

STD_EPSILON = 1e-6

Item = TypeVar("Item")


@dataclass(frozen=True)
class Rollout:
    """The source of a GRPO run: `rollout(step)` draws that step's samples with the parameters of the moment."""

    engine: Engine
    task: Task
    renderer: Renderer
    config: TrainConfig
    reward: Reward = exact_answer

    def __call__(self, step: int) -> tuple[list[Sample], dict[str, float]]:
        """Samples of the groups with a signal, and what is to log about all groups."""
        num_groups = self.config.samples_per_step // self.config.policy.group_size
        problems = [self.task.draw(self.config.seed, step * num_groups + i) for i in range(num_groups)]
        outputs = self._generate(problems, step)
        episodes, num_failures = [], 0
        for problem, output in zip(_repeat(problems, self.config.policy.group_size), outputs, strict=True):
            episode, failed = self._episode(problem, output)
            episodes.append(episode)
            num_failures += failed
        size = self.config.policy.group_size
        groups = [to_samples(episodes[i : i + size]) for i in range(0, len(episodes), size)]
        metrics = {
            "reward": statistics.fmean(episode.reward for episode in episodes),
            "no_signal": sum(not group for group in groups) / num_groups,
            "reward_failures": num_failures,
            "answer_tokens": statistics.fmean(len(episode.tokens) for episode in episodes),
        }
        return list(chain.from_iterable(groups)), metrics

    def _generate(self, problems: Sequence[Problem], step: int) -> list[Output]:
        params = [
            SamplingParams(
                max_tokens=self.config.policy.max_new_tokens,
                temperature=self.config.policy.temperature,
                seed=hashed(self.config.seed, "rollout", step, i),
                n=self.config.policy.group_size,
            )
            for i in range(len(problems))
        ]
        self.engine.weights_changed()
        return self.engine.generate([self.renderer.prompt(problem.question) for problem in problems], params)

    def _episode(self, problem: Problem, output: Output) -> tuple[Episode, bool]:
        """What was drawn, the stop token included, and what it earned; cut answers are scored as they stand."""
        text = self.renderer.tokenizer.decode(output.tokens)
        (judgement,) = judge([Term("reward", self.reward)], [problem], [to_answer(text, output)])
        stop = () if output.stop_token is None else (output.stop_token,)
        episode = Episode(
            prompt=self.renderer.prompt(problem.question),
            tokens=output.tokens + stop,
            logprobs=output.logprobs,
            text=text,
            reward=judgement.total,
            finished=output.finish_reason == "stop",
        )
        return episode, bool(judgement.failed)


def to_answer(text: str, output: Output) -> Answer:
    """Nothing is thought yet: all that was said is the answer."""
    return Answer(text, "", text, output.finish_reason == "stop", len(output.tokens))


def advantages(rewards: Sequence[float]) -> list[float]:
    """(r - mean) / std of one group; the population's std, and zeros where all are equal."""
    mean, std = statistics.fmean(rewards), statistics.pstdev(rewards)
    return [(reward - mean) / (std + STD_EPSILON) for reward in rewards]


def to_samples(group: Sequence[Episode]) -> list[Sample]:
    """One sample an episode; none if the group has no signal."""
    if len({episode.reward for episode in group}) == 1:
        return []
    samples = []
    for episode, advantage in zip(group, advantages([episode.reward for episode in group]), strict=True):
        silent = (0.0,) * len(episode.prompt)
        samples.append(
            Sample(
                tokens=episode.prompt + episode.tokens,
                advantages=silent + (advantage,) * len(episode.tokens),
                old_logprobs=silent + episode.logprobs,
                num_prompt=len(episode.prompt),
            )
        )
    return samples


def held_out_accuracy(folder: Path, config: TrainConfig) -> tuple[float, int]:
    """The share of the task's held-out problems that a saved model answers exactly, greedily; and their number."""
    engine, renderer = Engine.load(folder, EngineConfig(weights="float32")), Renderer(folder)
    problems = load_task(config.task.name, config.task.options).held_out
    params = SamplingParams(max_tokens=config.policy.max_new_tokens, temperature=0.0)
    outputs = engine.generate([renderer.prompt(problem.question) for problem in problems], params)
    answers = [to_answer(renderer.tokenizer.decode(output.tokens), output) for output in outputs]
    return statistics.fmean(map(exact_answer, problems, answers)), len(problems)


def _repeat(items: Sequence[Item], times: int) -> list[Item]:
    return [item for item in items for _ in range(times)]
