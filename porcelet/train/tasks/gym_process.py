"""reasoning-gym in a process of its own: `python -m porcelet.train.tasks.gym_process`, a line of JSON in, one out.

Some families walk through sets of strings (`word_ladder`, `knight_swap`), whose order is PYTHONHASHSEED's, others draw
from the global generators (`list_functions`, `pool_matrix`). A problem that is made once more, to judge an answer or to
resume a run, must be the same one: so the process has the hash seed 0, and both generators start anew with each item.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import cache, lru_cache
from threading import Lock
from typing import Any

from porcelet.errors import InputError, PorceletError

HASH_SEED = {"PYTHONHASHSEED": "0"}
CHUNK = 256  # items of a data set; see gym.py
EXAMPLES = ("possible_answer", "example_answer", "example_correct_answer")  # where many answers are right
_lock = Lock()


def ask(request: str, *arguments: Any) -> Any:
    """What one of `REQUESTS` returns there.

    Raises:
        InputError: the family refuses its options.
        PorceletError: it raised anything else, or the process ended.
    """
    if os.environ.get("PYTHONHASHSEED") == "0":  # there already
        return _told(_answered(request, arguments))
    with _lock:
        process = _started()
        try:
            line = _exchanged(process, json.dumps([request, arguments]))
        except BaseException:  # an interrupt: the next reply would be this one's
            process.kill()
            _started.cache_clear()
            raise
        if not line:
            _started.cache_clear()
            raise PorceletError(f"reasoning-gym's process ended with exit code {process.wait()} at {arguments}")
    return _told(json.loads(line))


def _exchanged(process: subprocess.Popen[str], line: str) -> str:
    assert process.stdin and process.stdout
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(line + "\n")
        process.stdin.flush()
    return process.stdout.readline()


def _told(reply: Mapping[str, Any]) -> Any:
    if "refused" in reply:
        raise InputError(reply["refused"])
    if "error" in reply:
        raise PorceletError(f"reasoning-gym: {reply['error']}")
    return reply["value"]


@cache
def _started() -> subprocess.Popen[str]:
    """It ends when its input does, with us at the latest."""
    command = [sys.executable, "-P", "-m", "porcelet.train.tasks.gym_process"]
    environment = {**os.environ, **HASH_SEED}
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8", env=environment, process_group=0
    )
    atexit.register(process.__exit__, None, None, None)  # closes its input and waits
    return process


def check(family: str, options: str) -> None:
    """Raise ValueError if the family refuses the options."""
    try:
        _dataset(family, options, 0)
    except (TypeError, ValueError, AssertionError) as problem:
        raise ValueError(f"the family refuses the options {options}: {problem}") from problem


def families() -> list[str]:
    from reasoning_gym.factory import DATASETS

    return sorted(DATASETS)


def make(family: str, options: str, seed: int, index: int) -> tuple[str, str]:
    """Question, and an answer that is right."""
    entry = _entry(family, options, seed, index)
    return str(entry["question"]), gold(entry)


def score(family: str, options: str, seed: int, index: int, text: str) -> float:
    """What the family's own scorer gives for an answer, 0 ... 1."""
    entry = _entry(family, options, seed, index)
    return float(_dataset(family, options, seed).score_answer(text, entry))


def gold(entry: Mapping[str, Any]) -> str:
    """An answer that is right; empty where the family knows none, only how to judge (`boxnet`, `rush_hour`)."""
    if entry["answer"] is not None:
        return str(entry["answer"])
    for name in EXAMPLES:
        if name in entry["metadata"]:
            example = entry["metadata"][name]
            return example.strip() if isinstance(example, str) else json.dumps(example)
    return ""


@lru_cache(maxsize=1024)
def _entry(family: str, options: str, seed: int, index: int) -> dict[str, Any]:
    import numpy

    dataset = _dataset(family, options, seed)
    random.seed(seed + index)
    numpy.random.seed((seed + index) % 2**32)
    entry: dict[str, Any] = dataset[index]
    return entry


@lru_cache(maxsize=16)
def _dataset(family: str, options: str, seed: int) -> Any:
    import numpy
    import reasoning_gym

    random.seed(seed)
    numpy.random.seed(seed)
    return reasoning_gym.create_dataset(family, size=CHUNK, seed=seed, **_values(family, options))


def _values(family: str, options: str) -> dict[str, Any]:
    """A family's options; the parts of `composite`, a mixture of families, are objects of its own."""
    values: dict[str, Any] = json.loads(options)
    if family == "composite":
        from reasoning_gym.composite import DatasetSpec

        parts = values.get("datasets", [])
        values["datasets"] = [DatasetSpec(**({"weight": 1.0, "config": {}} | part)) for part in parts]
    return values


REQUESTS: dict[str, Callable[..., Any]] = {"families": families, "check": check, "make": make, "score": score}


def _answered(request: str, arguments: Any) -> dict[str, Any]:
    try:
        return {"value": REQUESTS[request](*arguments)}
    except ValueError as problem:
        return {"refused" if request == "check" else "error": str(problem)}
    except Exception as problem:  # noqa: BLE001  it is told on the other side
        return {"error": repr(problem)}


def main() -> None:
    """Answer until there is nothing more to read. What families print goes nowhere."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        for line in sys.stdin:
            print(json.dumps(_answered(*json.loads(line))), file=replies, flush=True)


if __name__ == "__main__":
    main()
