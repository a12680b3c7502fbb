"""Rewards by their names, as a recipe's tables say.

    [[reward]]            [[reward]]            [[reward]]
    name = "math"         name = "format"       name = "rewards/taste.py:politeness"
                          weight = 0.1          weight = 0.2
                          only_if = "math"      seconds = 2.0

`weight` and `only_if` belong to the sum (`judge.py`), `seconds` and `memory_mb` to the process of a reward that has
one; the rest are the reward's own options.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from porcelet.config import RewardConfig, TrainConfig
from porcelet.errors import InputError, MissingExtraError
from porcelet.train.options import check_options, nearest
from porcelet.train.rewards.answer import Reward
from porcelet.train.rewards.arithmetic import countdown
from porcelet.train.rewards.children import ChildReward
from porcelet.train.rewards.judge import Term
from porcelet.train.rewards.outside import OUTSIDE
from porcelet.train.rewards.program import programs
from porcelet.train.rewards.text import exact, form, language, length
from porcelet.train.sandbox import check_limits
from porcelet.train.tasks.gym import PREFIX

HERE: dict[str, Callable[..., Reward]] = {
    "exact": exact,
    "countdown": countdown,
    "format": form,
    "length": length,
    "language": language,
}
EXTRAS = {"math": "math_verify", "reasoning-gym": "reasoning_gym"}  # the modules that they need
SECONDS = {"reasoning-gym": 30.0}  # it makes the problem once more, and slow families take seconds for that
DEFAULT_SECONDS = 5.0
DEFAULT_MEMORY_MB = 4096


def rewards_of(config: TrainConfig, *, unsafe_sandbox: bool = False) -> tuple[Term, ...]:
    """The rewards of a run: those that its recipe names, else the one that can judge its task's answers.

    Raises what `load_rewards` raises.
    """
    return load_rewards(config.rewards or (own_reward(config.task.name),), unsafe_sandbox=unsafe_sandbox)


def own_reward(task: str) -> RewardConfig:
    """The reward of a task's own: where many answers are right, none that compares texts."""
    if task.startswith(PREFIX):
        return RewardConfig(name="reasoning-gym")
    return RewardConfig(name="countdown" if task == "countdown" else "exact")


def load_rewards(configs: Sequence[RewardConfig], *, unsafe_sandbox: bool = False) -> tuple[Term, ...]:
    """The terms of a recipe's rewards, ready to judge: processes are started and the sandbox is tried here.

    Raises:
        InputError: an unknown name or option (the nearest is named), a file or function that is not there, no sandbox,
            or a name that comes twice.
        MissingExtraError: math-verify or reasoning-gym is not installed.
    """
    names = [config.name for config in configs]
    if not names:
        raise InputError(f"no reward is named; known: {', '.join(_known())}")
    for i, config in enumerate(configs):
        if config.name in names[:i]:
            raise InputError(f"reward {config.name} comes twice; give it one weight")
        others = [name for name in names if name != config.name]
        only_if = config.options.get("only_if", "")
        if only_if and only_if not in others:
            raise InputError(f"reward {config.name}: only_if is {only_if!r}, no other reward{nearest(only_if, others)}")
    return tuple(_term(config, unsafe_sandbox) for config in configs)


def _term(config: RewardConfig, unsafe_sandbox: bool) -> Term:
    name, options = config.name, dict(config.options)
    only_if = options.pop("only_if", "")
    if name in HERE:
        check_options(HERE[name], options, f"reward {name}")
        return Term(name, HERE[name](**options), config.weight, only_if)
    if name == "code":
        if "unsafe_sandbox" in options:  # a recipe may come from anywhere
            raise InputError("reward code: going without a sandbox is said on the command line, by --unsafe-sandbox")
        check_options(programs, options, f"reward {name}")
        return Term(name, programs(**options, unsafe_sandbox=unsafe_sandbox), config.weight, only_if, concurrent=True)
    return Term(name, _child(name, options), config.weight, only_if, concurrent=True)


def _child(name: str, options: dict[str, Any]) -> ChildReward:
    seconds = options.pop("seconds", SECONDS.get(name, DEFAULT_SECONDS))
    memory_mb = options.pop("memory_mb", DEFAULT_MEMORY_MB)
    check_limits(seconds, memory_mb, f"reward {name}")
    own = name in OUTSIDE
    if own:
        check_options(OUTSIDE[name], options, f"reward {name}")
    elif not _is_function(name):
        raise InputError(f"reward {name!r} is not known{nearest(name, _known())}")
    if name in EXTRAS and importlib.util.find_spec(EXTRAS[name]) is None:
        raise MissingExtraError(EXTRAS[name].replace("_", "-"), "train")
    return ChildReward(name, options, seconds=float(seconds), memory=int(memory_mb) << 20, own_code=not own)


def _is_function(name: str) -> bool:
    """Whether it is `path/file.py:function`, of a file that is there."""
    path, _, function = name.rpartition(":")
    if not path.endswith(".py"):
        return False
    if not Path(path).is_file():
        raise InputError(f"reward {name}: the file {path} is not there")
    return function.isidentifier()


def _known() -> tuple[str, ...]:
    return (*HERE, *OUTSIDE, "code", "path/file.py:function")
