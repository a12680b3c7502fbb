"""Every family of reasoning-gym as a task: `reasoning-gym:chain_sum`, with the family's own options.

A family gives item i of a data set in about a millisecond, but some read their size (`acre` makes a list of it when it
starts, `word_ladder` refuses large ones), so a stream is cut into chunks of `CHUNK` items, each a data set of its own.
What a reward needs beside the answer cannot be sent as JSON in general; so a problem says where it came from, and the
process that judges it makes it once more.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from porcelet.errors import InputError, MissingExtraError
from porcelet.train.hashing import hashed
from porcelet.train.options import nearest
from porcelet.train.tasks.problem import GeneratedTask, Problem

PREFIX = "reasoning-gym:"
CHUNK = 256
OURS = ("seed", "size")  # options of every family that the stream sets
EXAMPLES = ("possible_answer", "example_answer", "example_correct_answer")  # where many answers are right


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
        entry = _entry(family, packed, source["seed"], index)
        return Problem(str(entry["question"]), gold(entry), data=source)

    return GeneratedTask(generate, num_held_out)


def gold(entry: Mapping[str, Any]) -> str:
    """An answer that is right; empty where the family knows none, only how to judge (`boxnet`, `rush_hour`)."""
    if entry["answer"] is not None:
        return str(entry["answer"])
    for name in EXAMPLES:
        if name in entry["metadata"]:
            example = entry["metadata"][name]
            return example.strip() if isinstance(example, str) else json.dumps(example)
    return ""


def score(source: Mapping[str, Any], text: str) -> float:
    """What the family's own scorer gives for an answer, 0 ... 1. `source` is a problem's `data`."""
    packed = json.dumps(source["options"], sort_keys=True)
    entry = _entry(source["family"], packed, source["seed"], source["index"])
    return float(_dataset(source["family"], packed, source["seed"]).score_answer(text, entry))


@lru_cache(maxsize=1024)
def _entry(family: str, options: str, seed: int, index: int) -> dict[str, Any]:
    return _dataset(family, options, seed)[index]


@lru_cache(maxsize=16)
def _dataset(family: str, options: str, seed: int) -> Any:
    import reasoning_gym

    return reasoning_gym.create_dataset(family, size=CHUNK, seed=seed, **_values(family, options))


def _values(family: str, options: str) -> dict[str, Any]:
    """A family's options; the parts of `composite`, a mixture of families, are objects of its own."""
    values: dict[str, Any] = json.loads(options)
    if family == "composite":
        from reasoning_gym.composite import DatasetSpec

        parts = values.get("datasets", [])
        values["datasets"] = [DatasetSpec(**({"weight": 1.0, "config": {}} | part)) for part in parts]
    return values


def _check(family: str, options: str, place: str) -> None:
    from reasoning_gym.factory import DATASETS

    if family not in DATASETS:
        raise InputError(f"{place}: reasoning-gym has no such family{nearest(family, sorted(DATASETS))}")
    try:
        _dataset(family, options, 0)
    except (TypeError, ValueError, AssertionError) as problem:
        raise InputError(f"{place}: the family refuses the options {options}: {problem}") from problem
