"""What looking at one thing gives: a finding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from porcelet.errors import PorceletError

State = Literal["ok", "note", "problem"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. `code` is for programs, `cause` says what is so, `remedy` what to do about it."""

    code: str
    state: State
    cause: str
    remedy: str = ""


def told(code: str, state: State, problem: PorceletError) -> Finding:
    """An error as a finding: ours say what is wrong, then what to do about it."""
    cause, _, remedy = str(problem).rpartition("; ")
    return Finding(code, state, cause, remedy) if cause else Finding(code, state, remedy)
