"""Rewards: what an answer earns. `rewards_of` a recipe are loaded, `judge` applies them."""

from porcelet.train.rewards.answer import Answer, Reward, RewardError
from porcelet.train.rewards.judge import Judgement, Term, judge, summarize
from porcelet.train.rewards.load import load_rewards, rewards_of

__all__ = ["Answer", "Judgement", "Reward", "RewardError", "Term", "judge", "load_rewards", "rewards_of", "summarize"]
