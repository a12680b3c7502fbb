"""The one event stream that every dialect encodes: what a generation gives, in the order it becomes certain.

    Started, (Piece | Ended)*, Usage        Ended once for each of the n samples, Usage last of all

A generation that fails raises instead of ending. What a dialect needs of a whole answer is `collect`ed from the same
events, so a streamed answer and a whole one cannot differ.
"""

from __future__ import annotations

import secrets
import string
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field

from porcelet.chat import Content, Reasoning, ToolCallArguments, ToolCallStart
from porcelet.chat import Event as Part


@dataclass(frozen=True)
class Started:
    """The engine has begun; `num_cached_tokens` of the prompt were found in its prefix cache. `prompt_logprobs` are
    `Output`'s, where they were asked for."""

    num_prompt_tokens: int
    num_cached_tokens: int
    prompt_logprobs: tuple[tuple[float, tuple[tuple[int, float], ...]], ...] = ()


@dataclass(frozen=True)
class TokenLogprob:
    """One token of the answer, its bytes, and its log-probability under the model's own distribution. `top` are the
    best (token, bytes, log-probability) there. `reasoning`: it belongs to the reasoning or to the mark that ends it."""

    token: int
    text: bytes
    logprob: float
    top: tuple[tuple[int, bytes, float], ...]
    reasoning: bool


@dataclass(frozen=True)
class Piece:
    """What one step added to sample `index`; a part is held back while it may yet belong to a marker. `num_generated`
    counts the sample's tokens so far. Log-probabilities come with the step that drew the token."""

    index: int
    parts: tuple[Part, ...]
    num_generated: int
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Ended:
    """Sample `index` is whole. `reason` is "stop", "length" or "tool_calls"; `stop` the stop string that ended it."""

    index: int
    reason: str
    stop: str | None = None


@dataclass(frozen=True)
class Usage:
    """Tokens of the whole request; `num_generated` over all samples, `num_reasoning` of them before an answer."""

    num_prompt_tokens: int
    num_cached_tokens: int
    num_generated: int
    num_reasoning: int

    @property
    def num_missed_tokens(self) -> int:
        """Tokens of the prompt that had to be computed."""
        return self.num_prompt_tokens - self.num_cached_tokens


Event = Started | Piece | Ended | Usage
Events = AsyncGenerator[Event, None]


@dataclass
class ToolCall:
    """One call of a whole answer; `arguments` is JSON text as the model wrote it."""

    id: str
    name: str
    arguments: str = ""


@dataclass
class Sample:
    """One whole answer."""

    reasoning: str = ""
    content: str = ""
    calls: list[ToolCall] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    reason: str = ""
    stop: str | None = None

    def add(self, part: Part) -> None:
        match part:
            case Reasoning(text):
                self.reasoning += text
            case Content(text):
                self.content += text
            case ToolCallStart(index, name):
                self.calls.append(ToolCall(call_id(index), name))
            case ToolCallArguments(index, text):
                self.calls[index].arguments += text


async def collect(events: Events, num_samples: int = 1) -> tuple[list[Sample], Usage]:
    """All samples of a generation, whole."""
    samples = [Sample() for _ in range(num_samples)]
    async with aclosing(events):
        async for event in events:
            match event:
                case Piece(index, parts, _, logprobs):
                    for part in parts:
                        samples[index].add(part)
                    samples[index].logprobs += logprobs
                case Ended(index, reason, stop):
                    samples[index].reason, samples[index].stop = reason, stop
                case Usage():
                    return samples, event
    raise AssertionError("a generation ends with its usage")


_CALL_ID_LETTERS = string.ascii_letters + string.digits


def call_id(index: int) -> str:
    """A new id for a tool call, in DeepSeek's form."""
    return f"call_{index:02}_{''.join(secrets.choice(_CALL_ID_LETTERS) for _ in range(24))}"
