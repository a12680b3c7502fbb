"""What every dialect's request comes down to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from porcelet.chat import Message
from porcelet.chat.tools import AUTO, ToolChoice
from porcelet.types import Constraint, SamplingParams


@dataclass(frozen=True, kw_only=True)
class Ask:
    """A conversation to be answered. `messages` and `tools` are in the form of chat/messages.py.

    `params` leave `constraint` and `reasoning` empty: they follow from the other fields. `answer` is what the answer
    must look like if it is no tool call. `thinking` None is the model's own habit; `budget` limits the tokens of the
    reasoning.
    """

    messages: Sequence[Message]
    params: SamplingParams
    tools: Sequence[Mapping[str, Any]] = ()
    tool_choice: ToolChoice = AUTO
    parallel_calls: bool = True
    thinking: bool | None = None
    budget: int | None = None
    answer: Constraint | None = None


# DeepSeek's names for how hard to think, and what it and others call the same.
EFFORTS = {
    "minimal": "low",
    "low": "low",
    "medium": "high",
    "high": "high",
    "xhigh": "high",
    "max": "max",
    "ultra": "max",
}
