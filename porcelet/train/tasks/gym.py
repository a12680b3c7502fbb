"""Every family of reasoning-gym as a task: `reasoning-gym:chain_sum`, with the family's own options.

A family gives item i of a data set in about a millisecond, but some read their size (`acre` makes a list of it when it
starts, `word_ladder` refuses large ones), so a stream is cut into chunks of `CHUNK` items, each a data set of its own.
What a reward needs beside the answer cannot be sent as JSON in general; so a problem says where it came from, and the
process that judges it makes it once more, in `gym_process.py`, where that gives the same problem.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from typing import Any

from porcelet.errors import InputError, MissingExtraError
from porcelet.train.hashing import hashed
from porcelet.train.options import nearest
from porcelet.train.tasks.gym_process import CHUNK, ask
from porcelet.train.tasks.problem import GeneratedTask, Problem

PREFIX = "reasoning-gym:"
OURS = ("seed", "size")  # options of every family that the stream sets


def reasoning_gym(family: str, /, *, num_held_out: int = 200, **options: Any) -> GeneratedTask:
    """A family's problems.

    Raises:
        InputError: no such family, or options that it refuses.
        MissingExtraError: reasoning-gym is not installed.
    """
    if importlib.util.find_spec("reasoning_gym") is None:
        raise MissingExtraError("reasoning-gym", "train")
    place = f"task {PREFIX}{family}"
    taken = [name for name in OURS if name in options]
    if taken:
        raise InputError(f"{place}: {taken[0]} is the stream's; leave it out")
    packed = json.dumps(options, sort_keys=True)
    _check(family, packed, place)

    def generate(seed: int, position: int) -> Problem:
        chunk, index = divmod(position, CHUNK)
        source = {"family": family, "options": options, "seed": hashed(seed, family, chunk) % 2**32, "index": index}
        question, answer = ask("make", family, packed, source["seed"], index)
        return Problem(question, answer, data=source)

    return GeneratedTask(generate, num_held_out)


def score(source: Mapping[str, Any], text: str) -> float:
    """What the family's own scorer gives for an answer, 0 ... 1. `source` is a problem's `data`."""
    packed = json.dumps(source["options"], sort_keys=True)
    return float(ask("score", source["family"], packed, source["seed"], source["index"], text))


def _check(family: str, options: str, place: str) -> None:
    families = ask("families")
    if family not in families:
        raise InputError(f"{place}: reasoning-gym has no such family{nearest(family, families)}")
    try:
        ask("check", family, options)
    except InputError as problem:
        raise InputError(f"{place}: {problem}") from problem
