from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from porcelet.config import RewardConfig, TaskConfig, TrainConfig
from porcelet.errors import InputError
from porcelet.train.rewards import judge, load_rewards, rewards_of
from porcelet.train.tasks import Problem
from tests.train.rewards.answers import said


def test_a_recipes_rewards_become_terms() -> None:
    """Weights, conditions and options reach where they belong."""
    terms = load_rewards(
        [
            RewardConfig(name="exact"),
            RewardConfig(name="length", weight=0.5, options={"max_tokens": 10, "only_if": "exact"}),
        ]
    )
    right, wrong = judge(terms, [Problem("", "3")] * 2, [said("3", num_tokens=5), said("4", num_tokens=5)])
    assert (right.total, wrong.total) == (1.25, 0.0)


@pytest.mark.parametrize(
    ("configs", "named"),
    [
        ([], "no reward is named"),
        ([RewardConfig(name="exakt")], "did you mean 'exact'"),
        ([RewardConfig(), RewardConfig()], "comes twice"),
        ([RewardConfig(name="format", options={"only_if": "exact"})], "only_if is 'exact'"),
        ([RewardConfig(name="length")], "'max_tokens' is missing"),
        ([RewardConfig(name="length", options={"max_tokens": "9"})], "max_tokens is '9'; it must be int"),
        ([RewardConfig(name="length", options={"max_token": 9})], "did you mean 'max_tokens'"),
        ([RewardConfig(name="length", options={"max_tokens": 9, "shape": "step"})], "linear or cosine"),
        ([RewardConfig(name="length", options={"max_tokens": 9, "min_tokens": 9})], "min_tokens 9"),
        ([RewardConfig(name="language", options={"script": "runes"})], "known: latin"),
        ([RewardConfig(name="format", options={"open_tag": ""})], "two different ones"),
        ([RewardConfig(name="regex", options={"pattern": "("})], "regex cannot be used"),
        ([RewardConfig(name="regex", options={"pattern": "a", "seconds": 0})], "seconds is 0"),
        ([RewardConfig(name="code", options={"seconds": -1.0})], "seconds is -1"),
        ([RewardConfig(name="code", options={"seconds": float("inf")})], "seconds is inf"),
        ([RewardConfig(name="code", options={"seconds": float("nan")})], "seconds is nan"),
        ([RewardConfig(name="code", options={"memory_mb": 10**30})], "memory_mb is 1000"),
        ([RewardConfig(name="regex", options={"pattern": "a", "seconds": 1e300})], "seconds is 1e.300"),
        ([RewardConfig(name="regex", options={"pattern": "a", "memory_mb": 1e30})], "memory_mb is 1e.30"),
        ([RewardConfig(name="regex", options={"pattern": "a", "memory_mb": True})], "memory_mb is True"),
        ([RewardConfig(name="code", options={"unsafe_sandbox": True})], "on the command line"),
        ([RewardConfig(name="nowhere.py:reward")], "nowhere.py is not there"),
    ],
)
def test_unusable_rewards_are_refused(configs: list[RewardConfig], named: str) -> None:
    """Before the run begins, by a message that says what would do."""
    with pytest.raises(InputError, match=named):
        load_rewards(configs)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("x = 1", "no function 'reward'"),
        ("1 / 0", "ZeroDivisionError"),
        ("def", "SyntaxError"),
        ("raise SystemExit(3)", "SystemExit"),
        ("def reward(problem): return 1.0", "too many positional"),
        ("def reward(problem, answer, *, scale): return 1.0", "'scale'"),
        ("reward = 3", "must take"),
    ],
)
def test_a_users_file_that_cannot_be_used_is_refused(tmp_path: Path, text: str, named: str) -> None:
    """What its import raises is told, rather than a run of zeros."""
    (tmp_path / "mine.py").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=named):
        load_rewards([RewardConfig(name=f"{tmp_path}/mine.py:reward")])


@pytest.mark.parametrize(
    ("task", "answer", "own"),
    [("sums", "3", "exact"), ("countdown", "2+1", "countdown"), ("reasoning-gym:gcd", "3", "reasoning-gym")],
)
def test_a_task_without_a_reward_is_judged_by_its_own(task: str, answer: str, own: str) -> None:
    """By text where one answer is right; by what it comes to where many are. Rewards that are named stand alone."""
    config = TrainConfig(task=TaskConfig(name=task))
    (term,) = rewards_of(config)
    assert term.name == own
    if own != "reasoning-gym":
        problem = Problem("1 2 = 3", answer="1+2" if own == "countdown" else "3", data={"numbers": [1, 2], "target": 3})
        assert [one.total for one in judge([term], [problem] * 2, [said(answer), said("4")])] == [1.0, 0.0]
    named = rewards_of(dataclasses.replace(config, rewards=(RewardConfig(name="format"),)))
    assert [one.name for one in named] == ["format"]
