"""Problems from files: a row with "question" and "answer", perhaps "trace", in JSON Lines, Parquet or a dataset.

Whatever else a row holds becomes the problem's data, for rewards that need more than the answer ("tests", "cases").
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from porcelet.errors import InputError
from porcelet.train.corpus.readers import rows
from porcelet.train.tasks.problem import FiniteTask, Problem, split

TEXTS = ("question", "answer", "trace")


def jsonl(*, path: str) -> FiniteTask:
    """The problems of a file, a folder or a pattern; a value that is null counts as absent."""
    return split((_problem(row, place) for place, row in rows(path)), f"{path}: add problems")


def _problem(row: Mapping[str, Any], place: str) -> Problem:
    fields = {name: value for name, value in row.items() if value is not None}
    if "question" not in fields or "answer" not in fields:
        raise InputError(f"{place}: the fields are {', '.join(fields) or 'none'}; a problem has question and answer")
    texts = {name: fields.pop(name) for name in TEXTS if name in fields}
    strange = [name for name, text in texts.items() if not isinstance(text, str)]
    if strange:
        raise InputError(f"{place}: {strange[0]} is {texts[strange[0]]!r}; it must be a string")
    return Problem(**texts, data=fields)
