from __future__ import annotations

from pathlib import Path

import pytest

from porcelet.train.loop import train
from porcelet.train.rewards import Answer
from porcelet.train.rollout import advantages, held_out_accuracy, to_samples
from porcelet.train.tasks import Problem
from porcelet.types import Episode
from tests.train.tiny_run import FIELDS, config, metrics_of


def episode(reward: float, tokens: tuple[int, ...] = (7, 1)) -> Episode:
    return Episode(prompt=(5, 6), tokens=tokens, logprobs=tuple(-0.5 for _ in tokens), text="", reward=reward)


def test_advantages_are_normalised_in_the_group() -> None:
    """Mean 0, standard deviation 1; by hand for one right answer of four."""
    assert advantages([1.0, 0.0, 0.0, 0.0]) == pytest.approx([3**0.5, -(3**-0.5), -(3**-0.5), -(3**-0.5)], rel=1e-5)


def test_only_drawn_tokens_of_groups_with_a_signal_carry_weight() -> None:
    """Prompts weigh nothing, the stop token counts, and a group of equal rewards gives no samples."""
    assert to_samples([episode(1.0), episode(1.0)]) == []
    right, wrong = to_samples([episode(1.0), episode(0.0, (8, 9, 1))])
    assert right.tokens == (5, 6, 7, 1) and right.old_logprobs == (0.0, 0.0, -0.5, -0.5)
    assert right.advantages == pytest.approx((0.0, 0.0, 1.0, 1.0), rel=1e-5) and not right.weights
    assert wrong.advantages == pytest.approx((0.0, 0.0, -1.0, -1.0, -1.0), rel=1e-5)


def test_failing_reward_scores_zero_and_is_counted(tmp_path: Path) -> None:
    """A reward that raises or returns no number cannot end a run, and the metrics say how often it happened."""
    start = train(config(tmp_path / "start", steps=1), FIELDS)

    def broken(problem: Problem, answer: Answer) -> float:
        raise ValueError(answer.text)

    train(config(tmp_path / "rl", method="grpo", model=str(start), steps=1, max_new_tokens=2), {}, reward=broken)
    (line,) = metrics_of(tmp_path / "rl")
    assert (line["reward_failures"], line["reward"], line["no_signal"], line["tokens"]) == (8, 0, 1, 0)


def test_reward_rises_and_trainer_agrees_with_sampler(tmp_path: Path) -> None:
    """A bandit: answers that begin with a digit earn 1. At every step the two passes give the same
    log-probabilities."""
    start = train(config(tmp_path / "start", steps=1), FIELDS)
    run = config(
        tmp_path / "rl",
        method="grpo",
        model=str(start),
        steps=25,
        samples_per_step=32,
        max_new_tokens=2,
        learning_rate=2e-2,
        min_learning_rate=2e-2,
    )
    train(run, {}, reward=lambda problem, answer: float(answer.text[:1].isdigit()))
    lines = metrics_of(tmp_path / "rl")
    rewards = [line["reward"] for line in lines]
    assert sum(rewards[:3]) / 3 < 0.4 and sum(rewards[-5:]) / 5 > 0.8
    assert all(line.get("mismatch", 0.0) < 1e-4 for line in lines)


def test_further_updates_on_a_rollout_are_clipped_ones(tmp_path: Path) -> None:
    """Two updates a rollout move further than one; the logged mismatch is that of the first."""
    start = train(config(tmp_path / "start", steps=1), FIELDS)
    finals = []
    for count in (1, 2):
        run = config(
            tmp_path / str(count),
            method="grpo",
            model=str(start),
            steps=1,
            samples_per_step=32,
            max_new_tokens=2,
            updates_per_rollout=count,
        )
        train(run, {}, reward=lambda problem, answer: float(answer.text[:1] < "m"))
        (line,) = metrics_of(tmp_path / str(count))
        assert line["mismatch"] < 1e-4 and line["clipped"] == 0
        finals.append((tmp_path / str(count) / "model.safetensors").read_bytes())
    assert finals[0] != finals[1]


def test_held_out_accuracy_counts_the_held_out_problems(tmp_path: Path) -> None:
    """An untrained model answers none of about a tenth of the pairs."""
    run = config(tmp_path, steps=1, max_number=10)
    accuracy, count = held_out_accuracy(train(run, FIELDS), run)
    assert accuracy < 0.2 and 3 <= count <= 20
