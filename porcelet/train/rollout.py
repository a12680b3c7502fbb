"""A rollout: the model answers each prompt G times, and what beats its group's mean is to be reinforced.

    problems → engine.generate, G draws each → judge → Episode → advantage in the group → Sample → the one loop

A rollout is a function of (seed, step, parameters) alone. The engine holds the trainer's own parameters, so nothing is
copied, each prompt is computed once for its G answers, and the log-probabilities it drew with serve as p_old without a
second forward pass. An engine in 8 bits (train/sampler.py) draws unlike the trainer; with `importance_cap` the trainer
then computes p_old itself. A group whose rewards are all equal has zeros for advantages: it counts, but no update
computes it. With `redraws` further problems are drawn in its place (DAPO 2503.14476, section 3.2).

In on-policy distillation a teacher takes the place of the rewards, which are then only logged: what it would rather
have said than the student is a token's advantage (train/policy.py).

Left out: nucleus and top-k sampling, after which p_old would be another distribution than the trainer's, and stop
strings, whose tokens the policy would never learn to say.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

from porcelet.config import PolicyConfig, TrainConfig
from porcelet.engine.engine import Engine
from porcelet.errors import InputError
from porcelet.models.transformer import Transformer
from porcelet.train.advantages import advantages, has_signal, overlong_penalty
from porcelet.train.answers import read_answer
from porcelet.train.hashing import hashed
from porcelet.train.policy import FAMILY
from porcelet.train.reference import Reference
from porcelet.train.rendering import Renderer
from porcelet.train.rewards import Answer, Judgement, Term, judge, summarize
from porcelet.train.sampler import refresh
from porcelet.train.scoring import score_drawn
from porcelet.train.tasks import Task
from porcelet.types import Episode, Output, Sample, SamplingParams


@dataclass(frozen=True)
class Group:
    """The answers to one prompt, and what the judges said before any penalty."""

    episodes: tuple[Episode, ...]
    judgements: tuple[Judgement, ...]

    @property
    def rewards(self) -> list[float]:
        return [episode.reward for episode in self.episodes]


@dataclass(frozen=True)
class Rollout:
    """The source of a run with rewards: `rollout(step)` draws that step's samples with the parameters of the moment."""

    engine: Engine
    model: Transformer
    task: Task
    renderer: Renderer
    config: TrainConfig
    rewards: Sequence[Term]
    reference: Reference | None = None
    teacher: Transformer | None = None

    def __call__(self, step: int) -> tuple[list[Sample], dict[str, float]]:
        """The samples of a step's groups, and what is to log about all that was drawn."""
        refresh(self.engine, self.model)
        drawn = self._draw(step)
        num_groups = self.config.samples_per_step // self.config.policy.group_size
        # Groups with a signal first: what was drawn too much is what teaches nothing.
        groups = sorted(drawn, key=lambda group: not has_signal(group.rewards))[:num_groups]
        samples = list(chain.from_iterable(to_samples(group.episodes, self.config.policy) for group in groups))
        metrics = describe(drawn) | {"redrawn": len(drawn) - num_groups}
        samples = self._compared(samples, step)
        if self.teacher is not None:
            samples = taught(samples, score_drawn(self.teacher, samples, self.config))
            metrics["distance"] = distance(samples)
            del metrics["no_signal"]  # equal rewards are no loss to who does not learn from them
        return samples, metrics

    def _draw(self, step: int) -> list[Group]:
        """All groups of a step, in the order of their drawing."""
        size, redraws = self.config.policy.group_size, self.config.policy.redraws
        num_groups = self.config.samples_per_step // size
        groups: list[Group] = []
        for attempt in range(redraws + 1):
            missing = num_groups - sum(has_signal(group.rewards) for group in groups)
            first = (step * (redraws + 1) + attempt) * num_groups  # every attempt has problems of its own
            groups += self._groups(range(first, first + missing))
        return groups

    def _groups(self, positions: Sequence[int]) -> list[Group]:
        """The groups at some positions of the task's stream, which also decide the draws."""
        if not positions:
            return []
        size = self.config.policy.group_size
        problems = [self.task.draw(self.config.seed, position) for position in positions]
        prompts = [self.renderer.prompt(problem.question) for problem in problems]
        for problem, prompt in zip(problems, prompts, strict=True):
            require_room(problem.question, prompt, self.model.config.max_position_embeddings)
        outputs = self.engine.generate(prompts, [self._sampling(position) for position in positions])
        each = [problem for problem in problems for _ in range(size)]
        answers = [read_answer(output, self.renderer) for output in outputs]
        judgements = judge(self.rewards, each, answers)
        episodes = [
            self._episode(prompts[i // size], outputs[i], answers[i], judgements[i].total) for i in range(len(outputs))
        ]
        cuts = [slice(i, i + size) for i in range(0, len(episodes), size)]
        return [Group(tuple(episodes[cut]), tuple(judgements[cut])) for cut in cuts]

    def _sampling(self, position: int) -> SamplingParams:
        policy = self.config.policy
        return SamplingParams(
            max_tokens=policy.max_new_tokens,
            temperature=policy.temperature,
            seed=hashed(self.config.seed, "rollout", position),
            n=policy.group_size,
        )

    def _episode(self, prompt: tuple[int, ...], output: Output, answer: Answer, reward: float) -> Episode:
        """What was drawn, the stop token included, and what it earned; cut answers are judged as they stand."""
        policy, stop = self.config.policy, () if output.stop_token is None else (output.stop_token,)
        return Episode(
            prompt=prompt,
            tokens=output.tokens + stop,
            logprobs=output.logprobs,
            text=answer.text,
            reward=reward + overlong_penalty(answer.num_tokens, policy.max_new_tokens, policy.overlong_buffer),
            finished=answer.finished,
        )

    def _compared(self, samples: list[Sample], step: int) -> list[Sample]:
        """With the log-probabilities that others than the sampler give the tokens, where the recipe needs them."""
        if self.config.policy.importance_cap:
            own = score_drawn(self.model, samples, self.config)
            samples = [
                dataclasses.replace(sample, old_logprobs=logprobs, sampler_logprobs=sample.old_logprobs)
                for sample, logprobs in zip(samples, own, strict=True)
            ]
        if self.reference is None:
            return samples
        frozen = self.reference.at(step)
        return [
            dataclasses.replace(sample, reference_logprobs=logprobs)
            for sample, logprobs in zip(samples, score_drawn(frozen, samples, self.config), strict=True)
        ]


def require_room(question: str, prompt: Sequence[int], longest: int) -> None:
    """Refuse a prompt behind which not one token has room.

    Raises:
        InputError: names the question.
    """
    if len(prompt) >= longest:
        raise InputError(
            f"the problem {question[:60]!r} has a prompt of {len(prompt)} tokens; the model has "
            f"max_position_embeddings {longest}, for prompt and answer: leave it out, or start from a model with "
            "a longer context"
        )


def to_samples(group: Sequence[Episode], config: PolicyConfig) -> list[Sample]:
    """One sample an episode, but for cut ones if they are not to be learnt from."""
    relative = advantages([episode.reward for episode in group], FAMILY[config.loss].advantage)
    samples = []
    for episode, advantage in zip(group, relative, strict=True):
        if config.overlong_filter and not episode.finished:
            continue
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


def taught(samples: Sequence[Sample], scores: Sequence[tuple[float, ...]]) -> list[Sample]:
    """The samples with log p_teacher - log p_student as each drawn token's advantage, given the teacher's scores."""
    return [
        dataclasses.replace(
            sample,
            advantages=tuple(score - own for score, own in zip(teacher, sample.old_logprobs, strict=True)),
        )
        for sample, teacher in zip(samples, scores, strict=True)
    ]


def distance(samples: Sequence[Sample]) -> float:
    """The divergence KL(student, teacher) a token, in nats, as the drawn tokens estimate it."""
    num_drawn = sum(sample.num_drawn for sample in samples)
    return -sum(sum(sample.advantages) for sample in samples) / num_drawn if num_drawn else 0.0


def describe(groups: Sequence[Group]) -> dict[str, float]:
    """What to log about answers and rewards, under TRL's names where it has them."""
    episodes = [episode for group in groups for episode in group.episodes]
    return {
        **summarize([judgement for group in groups for judgement in group.judgements]),
        "reward_std": statistics.fmean(statistics.pstdev(group.rewards) for group in groups),
        "no_signal": statistics.fmean(not has_signal(group.rewards) for group in groups),
        "completions/mean_length": statistics.fmean(len(episode.tokens) for episode in episodes),
        "completions/clipped_ratio": statistics.fmean(not episode.finished for episode in episodes),
    }
