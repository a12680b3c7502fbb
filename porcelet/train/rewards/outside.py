"""Rewards that may hang, grow or be hostile, and therefore run in a process of their own (`children.py`).

`make` is what that process calls. Mathematics goes through math-verify without its own time limits: they rest on
SIGALRM, which works in main threads alone and never interrupts a power tower; the process is killed instead.
"""

from __future__ import annotations

import importlib.util
import inspect
import logging
import re
import sys
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from porcelet.train.options import check_options
from porcelet.train.rewards.answer import Answer, Reward, RewardError
from porcelet.train.tasks import gym
from porcelet.train.tasks.problem import Problem


def mathematics() -> Reward:
    """1 if math-verify finds the last mathematical expression of the answer equal to the problem's."""
    import math_verify

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it warns that we gave it no time limit

    @lru_cache(maxsize=1024)
    def parsed_gold(text: str) -> Any:
        found = math_verify.parse(text, parsing_timeout=None) or math_verify.parse(f"${text}$", parsing_timeout=None)
        if not found:
            raise RewardError(f"math-verify cannot read the problem's own answer {text!r}")
        return found

    def reward(problem: Problem, answer: Answer) -> float:
        gold = parsed_gold(problem.answer)
        found = math_verify.parse(answer.content, parsing_timeout=None)
        return float(math_verify.verify(gold, found, timeout_seconds=None))

    return reward


def reasoning_gym() -> Reward:
    """The score that a reasoning-gym family gives, 0 ... 1."""
    import reasoning_gym  # noqa: F401  now, where the time to start counts, rather than with the first answer

    return lambda problem, answer: gym.score(problem.data, answer.content.strip())


def matches(*, pattern: str) -> Reward:
    """1 if the pattern is found in all that was said; here because a pattern can take exponential time."""
    compiled = re.compile(pattern, re.DOTALL)
    return lambda problem, answer: float(compiled.search(answer.text) is not None)


def user_function(path: str, function: str, **options: Any) -> Reward:
    """Any function `(problem, answer, **options) -> float` of a Python file, which is imported here and only here."""
    file = Path(path).resolve()
    name = f"_porcelet_reward_{file.stem}"  # by its own, `json.py` would stand for the library's
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise RewardError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.path.append(str(file.parent))
    sys.modules[name] = module
    spec.loader.exec_module(module)
    if function not in vars(module):
        raise RewardError(f"{path} has no function {function!r}")
    found = vars(module)[function]
    try:
        inspect.signature(found).bind(None, None, **options)
    except TypeError as problem:
        raise RewardError(f"{path}: {function} must take (problem, answer) and its options: {problem}") from problem
    return partial(found, **options)


OUTSIDE: dict[str, Callable[..., Reward]] = {
    "math": mathematics,
    "reasoning-gym": reasoning_gym,
    "regex": matches,
}


def make(name: str, options: Mapping[str, Any]) -> Reward:
    """One of `OUTSIDE`, or `path/file.py:function`."""
    if name in OUTSIDE:
        check_options(OUTSIDE[name], options, f"reward {name}")
        return OUTSIDE[name](**options)
    path, _, function = name.rpartition(":")
    return user_function(path, function, **options)
