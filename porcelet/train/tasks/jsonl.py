"""Problems from a file: one JSON object a line with "question" and "answer", perhaps "trace".

Whatever else a line holds becomes the problem's data, for rewards that need more than the answer ("tests", "cases").
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from porcelet.errors import InputError
from porcelet.train.tasks.problem import FiniteTask, Problem, split

TEXTS = ("question", "answer", "trace")


def jsonl(*, path: str) -> FiniteTask:
    """The problems of a file; blank lines count for nothing."""
    return split(_problems(Path(path)), f"{path}: add problems")


def _problems(path: Path) -> Iterator[Problem]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # `splitlines` would cut at U+2028 too
    except (OSError, ValueError) as problem:
        raise InputError(f"problems {path} cannot be read: {problem}") from problem
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield _problem(line, f"{path} line {number}")


def _problem(line: str, place: str) -> Problem:
    try:
        fields: Any = json.loads(line)
    except ValueError as problem:
        raise InputError(f"{place} is no JSON: {problem}") from problem
    if not isinstance(fields, dict) or "question" not in fields or "answer" not in fields:
        raise InputError(f'{place} needs to be an object with "question" and "answer"')
    texts = {name: fields.pop(name) for name in TEXTS if name in fields}
    strange = [name for name, text in texts.items() if not isinstance(text, str)]
    if strange:
        raise InputError(f"{place}: {strange[0]} is {texts[strange[0]]!r}; it must be a string")
    return Problem(**texts, data=fields)
