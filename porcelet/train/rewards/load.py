"""Rewards by their names: a recipe's table of weights, or of tables with options.

    [train.rewards]
    math = 1.0
    format = { weight = 0.1, only_if = "math" }
    "rewards/taste.py:politeness" = { weight = 0.2, seconds = 2.0 }

`weight` and `only_if` belong to the sum (`judge.py`), `seconds` and `memory_mb` to the process of a reward that has
one; the rest are the reward's own options.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from porcelet.errors import InputError, MissingExtraError
from porcelet.train.options import check_options, nearest
from porcelet.train.rewards.answer import Reward
from porcelet.train.rewards.arithmetic import countdown
from porcelet.train.rewards.children import ChildReward
from porcelet.train.rewards.judge import Term
from porcelet.train.rewards.outside import OUTSIDE
from porcelet.train.rewards.program import code
from porcelet.train.rewards.text import exact, form, language, length

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


def load_rewards(tables: Mapping[str, Any], *, unsafe_sandbox: bool = False) -> tuple[Term, ...]:
    """The terms of a recipe's table, ready to judge: processes are started and the sandbox is tried here.

    Raises:
        InputError: an unknown name or option (the nearest is named), a weight that is no number, a file or function
            that is not there, or no sandbox.
        MissingExtraError: math-verify or reasoning-gym is not installed.
    """
    terms = tuple(_term(name, table, unsafe_sandbox) for name, table in tables.items())
    if not terms:
        raise InputError("no reward is named; known: " + ", ".join(_known()))
    for term in terms:
        others = [other.name for other in terms if other is not term]
        if term.only_if and term.only_if not in others:
            raise InputError(f"reward {term.name}: only_if names {term.only_if!r}{nearest(term.only_if, others)}")
    return terms


def _term(name: str, table: Any, unsafe_sandbox: bool) -> Term:
    options = dict(table) if isinstance(table, Mapping) else {"weight": table}
    weight, only_if = options.pop("weight", 1.0), options.pop("only_if", "")
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
        raise InputError(f"reward {name}: the weight is {weight!r}; it must be a finite number")
    if name in HERE:
        check_options(HERE[name], options, f"reward {name}")
        return Term(name, HERE[name](**options), float(weight), only_if)
    if name == "code":
        check_options(code, options, f"reward {name}")
        return Term(name, code(**{"unsafe_sandbox": unsafe_sandbox} | options), float(weight), only_if, concurrent=True)
    return Term(name, _child(name, options), float(weight), only_if, concurrent=True)


def _child(name: str, options: dict[str, Any]) -> ChildReward:
    seconds = options.pop("seconds", SECONDS.get(name, DEFAULT_SECONDS))
    memory_mb = options.pop("memory_mb", DEFAULT_MEMORY_MB)
    for field, value in (("seconds", seconds), ("memory_mb", memory_mb)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise InputError(f"reward {name}: {field} is {value!r}; it must be a positive number")
    own = name in OUTSIDE
    if own:
        check_options(OUTSIDE[name], options, f"reward {name}")
    elif not _is_function(name):
        raise InputError(f"reward {name!r} is not known{nearest(name, _known())}")
    if name in EXTRAS and importlib.util.find_spec(EXTRAS[name]) is None:
        raise MissingExtraError(EXTRAS[name].replace("_", "-"), "train")
    return ChildReward(name, options, seconds=float(seconds), memory=int(memory_mb) << 20, secrets=not own)


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
