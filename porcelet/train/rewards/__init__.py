"""Rewards: what an answer earns. `load_rewards` reads a recipe's table, `judge` applies it."""

from porcelet.train.rewards.answer import Answer, Reward, RewardError
from porcelet.train.rewards.judge import Judgement, Term, judge, summarize
from porcelet.train.rewards.load import load_rewards

__all__ = ["Answer", "Judgement", "Reward", "RewardError", "Term", "judge", "load_rewards", "summarize"]
