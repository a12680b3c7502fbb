"""What OpenAI's dialect answers: the bodies' types, which OpenAPI shows, and the event stream as those bodies.

The shapes are DeepSeek's, which OpenAI's clients read. A thinking answer's chunks have both of `content` and
`reasoning_content`, one of them null; other answers' chunks have `content` alone, those of tool calls neither.

Usage is on one chunk alone, the last one, which also carries the finish reason: clients add usages up, so a second one
would count twice, and a chunk without choices, where OpenAI puts it, breaks those that read `choices[0]`. As DeepSeek
does, it comes without being asked for; `include_usage` adds "usage": null to the chunks before, and
`continuous_usage_stats` the counts so far.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Literal, NotRequired, cast
from uuid import uuid4

import msgspec
from fastapi import Request
from typing_extensions import TypedDict

from porcelet.chat import Content, Event, Reasoning, ToolCallArguments, ToolCallStart
from porcelet.errors import PorceletError
from porcelet.server.dialects.fields import StreamOptions
from porcelet.server.errors import fault_body, fault_of
from porcelet.server.generation.events import (
    Ended,
    Events,
    Piece,
    Sample,
    Started,
    TokenLogprob,
    Usage,
    call_id,
    collect,
)
from porcelet.server.generation.models import Model
from porcelet.server.sse import Frames, frame

LEAST_LOGPROB = -9999.0  # JSON has no infinity; OpenAI's number for what is as good as impossible
DONE = b"data: [DONE]\n\n"

# What OpenAPI says of an answer that may also be streamed.
STREAMED: dict[str, Any] = {
    "description": "the answer, or with `stream` its chunks as server-sent events",
    "content": {"text/event-stream": {"schema": {"type": "string"}}},
}


def failed(request: Request) -> Callable[[PorceletError], bytes]:
    """Writes an error into a stream that has begun."""
    return lambda problem: frame(fault_body(fault_of(problem), request.url.path))


# ---- types ----------------------------------------------------------------------------------------------------------


class CachedTokens(TypedDict):
    cached_tokens: int


class ReasoningTokens(TypedDict):
    reasoning_tokens: int


class UsageBody(TypedDict):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens
    completion_tokens_details: ReasoningTokens
    prompt_cache_hit_tokens: int
    prompt_cache_miss_tokens: int


class TopLogprob(TypedDict):
    token: str
    logprob: float
    bytes: list[int]


class LogprobEntry(TopLogprob):
    top_logprobs: list[TopLogprob]


class Logprobs(TypedDict):
    """`reasoning_content` is there where the tokens so far hold reasoning."""

    content: list[LogprobEntry]
    reasoning_content: NotRequired[list[LogprobEntry]]


class FunctionBody(TypedDict):
    name: NotRequired[str]
    arguments: str


class CallBody(TypedDict):
    index: NotRequired[int]
    id: NotRequired[str]
    type: NotRequired[Literal["function"]]
    function: FunctionBody


class MessageBody(TypedDict):
    """A whole message, or what a chunk adds to it."""

    role: NotRequired[Literal["assistant"]]
    content: NotRequired[str | None]
    reasoning_content: NotRequired[str | None]
    tool_calls: NotRequired[list[CallBody]]


FinishReason = Literal["stop", "length", "tool_calls"]


class Choice(TypedDict):
    index: int
    message: MessageBody
    logprobs: Logprobs | None
    finish_reason: str


class ChunkChoice(TypedDict):
    index: int
    delta: MessageBody
    logprobs: Logprobs | None
    finish_reason: str | None


class ChatCompletion(TypedDict):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: UsageBody
    system_fingerprint: str


class Chunk(TypedDict):
    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChunkChoice]
    usage: NotRequired[UsageBody | None]


# ---- parts ----------------------------------------------------------------------------------------------------------


def usage_body(usage: Usage) -> UsageBody:
    return {
        "prompt_tokens": usage.num_prompt_tokens,
        "completion_tokens": usage.num_generated,
        "total_tokens": usage.num_prompt_tokens + usage.num_generated,
        "prompt_tokens_details": {"cached_tokens": usage.num_cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.num_reasoning},
        "prompt_cache_hit_tokens": usage.num_cached_tokens,
        "prompt_cache_miss_tokens": usage.num_missed_tokens,
    }


@dataclass
class Tally:
    """What a stream's usage is so far; `generated` by sample."""

    num_prompt_tokens: int = 0
    generated: dict[int, int] = field(default_factory=dict)

    def add(self, event: Started | Piece | Ended | Usage, first_sample: int = 0) -> None:
        """One more event; its samples are counted from `first_sample`."""
        match event:
            case Started():
                self.num_prompt_tokens += event.num_prompt_tokens
            case Piece():
                self.generated[first_sample + event.index] = event.num_generated

    def body(self, options: StreamOptions) -> dict[str, Any]:
        """What it adds to a chunk that is not the last."""
        if not options.continuous_usage_stats:
            return {"usage": None} if options.include_usage else {}
        prompt, generated = self.num_prompt_tokens, sum(self.generated.values())
        usage = {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated}
        return {"usage": usage}


def logprobs_body(entries: Sequence[TokenLogprob]) -> Logprobs | None:
    """The model's own log-probabilities of an output's tokens; None if the request did not ask for them."""
    if not entries:
        return None
    body: Logprobs = {"content": [logprob_entry(entry) for entry in entries if not entry.reasoning]}
    if reasoning := [logprob_entry(entry) for entry in entries if entry.reasoning]:
        body["reasoning_content"] = reasoning
    return body


def logprob_entry(entry: TokenLogprob) -> LogprobEntry:
    best = [_top(text, value) for _, text, value in entry.top]
    return {**_top(entry.text, entry.logprob), "top_logprobs": best}


def _top(text: bytes, logprob: float) -> TopLogprob:
    return {"token": shown(text), "logprob": max(logprob, LEAST_LOGPROB), "bytes": list(text)}


def shown(token: bytes) -> str:
    """A token as text, though it may be a part of a character."""
    return token.decode("utf-8", "replace")


@dataclass(frozen=True)
class Head:
    """What all bodies of one answer have in common."""

    id: str
    created: int
    model: str
    fingerprint: str

    @classmethod
    def new(cls, kind: str, name: str, model: Model) -> Head:
        """`kind` begins the id; `name` is what the request called the model."""
        return cls(f"{kind}-{uuid4().hex}", int(time.time()), name, model.fingerprint)


# ---- whole answers --------------------------------------------------------------------------------------------------


async def whole_body(head: Head, events: Events, num_samples: int) -> bytes:
    samples, usage = await collect(events, num_samples)
    body: ChatCompletion = {
        "id": head.id,
        "object": "chat.completion",
        "created": head.created,
        "model": head.model,
        "choices": [_choice(index, sample) for index, sample in enumerate(samples)],
        "usage": usage_body(usage),
        "system_fingerprint": head.fingerprint,
    }
    return msgspec.json.encode(body)


def _choice(index: int, sample: Sample) -> Choice:
    message: MessageBody = {"role": "assistant", "content": sample.content or (None if sample.calls else "")}
    if sample.reasoning:
        message["reasoning_content"] = sample.reasoning
    if sample.calls:
        message["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in sample.calls
        ]
    logprobs = logprobs_body(sample.logprobs)
    return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": sample.reason}


# ---- streamed answers -----------------------------------------------------------------------------------------------


async def chunk_frames(head: Head, events: Events, options: StreamOptions) -> Frames:
    """The answer as server-sent events. A sample's last chunk waits for what follows: it may be the usage."""
    chunks = Chunks(head, options)
    last: Chunk | None = None
    async with aclosing(events):
        async for event in events:
            if last and not isinstance(event, Usage):
                yield frame(last)
                last = None
            chunks.tally.add(event)
            match event:
                case Piece():
                    for chunk in chunks.of(event):
                        yield frame(chunk)
                case Ended():
                    for chunk in chunks.opening(event.index, thinking=False):
                        yield frame(chunk)
                    last = chunks.last(event)
                case Usage():
                    assert last, "an answer has at least one sample"
                    yield frame(last | {"usage": usage_body(event)})
    yield DONE


class Chunks:
    """Writes the chunks of one answer. A sample thinks if the first thing it gives is reasoning."""

    def __init__(self, head: Head, options: StreamOptions) -> None:
        self.tally = Tally()
        self._head = head
        self._options = options
        self._thinking: dict[int, bool] = {}  # of the samples that have begun

    def of(self, piece: Piece) -> Iterator[Chunk]:
        """One chunk for each part; the first has the log-probabilities."""
        logprobs = logprobs_body(piece.logprobs)
        parts = piece.parts or (Reasoning("") if piece.logprobs[0].reasoning else Content(""),)
        yield from self.opening(piece.index, isinstance(parts[0], Reasoning))
        for part in parts:
            yield self._chunk(piece.index, self._delta(piece.index, part), logprobs)
            logprobs = None

    def opening(self, index: int, thinking: bool) -> Iterator[Chunk]:
        """The chunk that says who speaks, unless it was sent."""
        if index not in self._thinking:
            self._thinking[index] = thinking
            text: MessageBody = {"content": None, "reasoning_content": ""} if thinking else {"content": ""}
            yield self._chunk(index, {"role": "assistant", **text})

    def last(self, ended: Ended) -> Chunk:
        return self._chunk(ended.index, self._content(ended.index, ""), finish_reason=ended.reason)

    def _delta(self, index: int, part: Event) -> MessageBody:
        match part:
            case Reasoning(text):
                self._thinking[index] = True  # even if it began with something else
                return {"content": None, "reasoning_content": text}
            case Content(text):
                return self._content(index, text)
            case ToolCallStart(number, name):
                function: FunctionBody = {"name": name, "arguments": ""}
                call: CallBody = {"index": number, "id": call_id(number), "type": "function", "function": function}
                return {"tool_calls": [call]}
            case ToolCallArguments(number, text):
                return {"tool_calls": [{"index": number, "function": {"arguments": text}}]}

    def _content(self, index: int, text: str) -> MessageBody:
        return {"content": text, "reasoning_content": None} if self._thinking[index] else {"content": text}

    def _chunk(
        self, index: int, delta: MessageBody, logprobs: Logprobs | None = None, finish_reason: str | None = None
    ) -> Chunk:
        chunk: Chunk = {
            "id": self._head.id,
            "object": "chat.completion.chunk",
            "created": self._head.created,
            "model": self._head.model,
            "system_fingerprint": self._head.fingerprint,
            "choices": [{"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}],
        }
        return cast(Chunk, chunk | self.tally.body(self._options))
