"""OpenAI's dialect: /v1/chat/completions, streamed or whole, and /v1/models.

A field that we do not know, or whose value we could not honour, is refused by name: an answer that silently ignored
half of the request would be worse than none. `top_k`, `min_p` and `repetition_penalty` are ours, under the names
that other servers gave them. Left out so far: tools, structured output, n > 1.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Literal, TypeVar
from uuid import uuid4

import msgspec
from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, field_validator, model_validator
from starlette.requests import ClientDisconnect
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from porcelet.errors import PorceletError
from porcelet.server.errors import FieldError, error_body, error_response
from porcelet.server.service import Message, Pieces, Service
from porcelet.tokenizer import Tokenizer
from porcelet.types import Output, SamplingParams, join_outputs

Result = TypeVar("Result")
Events = AsyncGenerator[bytes, None]

LEAST_LOGPROB = -9999.0

# Fields that change nothing in the answer.
HARMLESS = frozenset(
    [
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "parallel_tool_calls",
    ]
)
# Fields that are accepted with the one value that asks for nothing.
NEUTRAL: dict[str, object] = {
    "n": 1,
    "response_format": {"type": "text"},
    "modalities": ["text"],
    "tools": [],
}


# ---- the request ----------------------------------------------------------------------------------------------------


class _Body(BaseModel):
    """Types are taken as they are; null means absent, and what is absent has its default."""

    model_config = ConfigDict(strict=True, extra="ignore")

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, values: object) -> object:
        return (
            {key: value for key, value in values.items() if value is not None} if isinstance(values, dict) else values
        )


class ChatMessage(_Body):
    """One turn; `content` may arrive as a list of text parts. Unknown fields are refused: they would change the
    prompt."""

    model_config = ConfigDict(strict=True, extra="forbid")
    role: Literal["system", "developer", "user", "assistant"]
    content: str

    @field_validator("content", mode="before")
    @classmethod
    def _join_parts(cls, content: object) -> object:
        if not isinstance(content, list):
            return content
        texts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
        strings = [text for text in texts if isinstance(text, str)]
        if len(strings) < len(content):
            raise ValueError("only parts of the form {'type': 'text', 'text': '...'} are supported")
        return "".join(strings)

    def plain(self) -> Message:
        return {"role": "system" if self.role == "developer" else self.role, "content": self.content}


class StreamOptions(_Body):
    model_config = ConfigDict(strict=True, extra="forbid")

    include_usage: bool = False


class ChatRequest(_Body):
    """The fields we honour. Ranges are checked where they are used, by `SamplingParams`."""

    model: str
    messages: list[ChatMessage]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[str, float] = {}
    logprobs: bool = False
    top_logprobs: int | None = None
    stop: list[str] = []
    seed: int | None = None
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()

    @model_validator(mode="before")
    @classmethod
    def _refuse_others(cls, values: object) -> object:
        if not isinstance(values, dict):
            return values
        for name, value in values.items():
            if name in NEUTRAL:
                if value is not None and value != NEUTRAL[name]:
                    raise FieldError(name, f"{name} is not supported yet; leave it out or send {NEUTRAL[name]!r}")
            elif name not in cls.model_fields and name not in HARMLESS:
                raise FieldError(name, f"{name!r} is not supported; supported: {', '.join(cls.model_fields)}")
        return values

    @field_validator("stop", mode="before")
    @classmethod
    def _one_or_several(cls, stop: object) -> object:
        return [stop] if isinstance(stop, str) else stop

    def params(self, max_length: int) -> SamplingParams:
        """How to draw; without a limit of the client's, an answer may fill the context."""
        limits = (self.max_completion_tokens, self.max_tokens, max_length)
        return SamplingParams(
            max_tokens=next(limit for limit in limits if limit is not None),
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            logit_bias=tuple((_token_id(key), bias) for key, bias in self.logit_bias.items()),
            logprobs=self._num_logprobs(),
            stop=tuple(self.stop),
            seed=self.seed,
        )

    def _num_logprobs(self) -> int | None:
        if self.logprobs:
            return self.top_logprobs or 0
        if self.top_logprobs is not None:
            raise FieldError("top_logprobs", "top_logprobs needs logprobs; send logprobs true, too")
        return None


def _token_id(key: str) -> int:
    if not (key.isascii() and key.isdigit() and len(key) < 10):
        raise FieldError("logit_bias", f"logit_bias names {key[:80]!r}, which is no token id")
    return int(key)


# ---- the answer -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reply:
    """What all bodies of one answer have in common."""

    id: str
    created: int
    model: str
    tokenizer: Tokenizer

    def whole(self, text: str, output: Output) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        logprobs = _logprobs(output, self.tokenizer)
        choice = {"index": 0, "message": message, "logprobs": logprobs, "finish_reason": output.finish_reason}
        return self._body("chat.completion", [choice]) | {"usage": _usage(output)}

    def first_chunk(self) -> dict[str, Any]:
        return self._chunk({"role": "assistant", "content": ""})

    def chunk(self, text: str, output: Output) -> dict[str, Any] | None:
        """A piece of the answer; None if there is nothing to tell."""
        if not text and not (output.tokens and output.raw_logprobs):
            return None
        return self._chunk({"content": text}, _logprobs(output, self.tokenizer))

    def last_chunk(self, output: Output) -> dict[str, Any]:
        return self._chunk({}, finish_reason=output.finish_reason)

    def usage_chunk(self, last: Output) -> dict[str, Any]:
        return self._body("chat.completion.chunk", []) | {"usage": _usage(last)}

    def _chunk(
        self, delta: dict[str, str], logprobs: dict[str, Any] | None = None, finish_reason: str | None = None
    ) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        return self._body("chat.completion.chunk", [choice])

    def _body(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}


def _usage(last: Output) -> dict[str, int]:
    return {
        "prompt_tokens": last.num_prompt_tokens,
        "completion_tokens": last.num_generated,
        "total_tokens": last.num_prompt_tokens + last.num_generated,
    }


def _logprobs(output: Output, tokenizer: Tokenizer) -> dict[str, Any] | None:
    """The model's own log-probabilities of an output's tokens; None if the request did not ask for them."""
    if not output.raw_logprobs:
        return None
    # The stop token, whose numbers come last, is not part of the answer.
    entries = zip(output.tokens, output.raw_logprobs, output.top_logprobs, strict=False)
    content = [
        _entry(token, logprob, tokenizer) | {"top_logprobs": [_entry(*other, tokenizer) for other in top]}
        for token, logprob, top in entries
    ]
    return {"content": content, "refusal": None}


def _entry(token: int, logprob: float, tokenizer: Tokenizer) -> dict[str, Any]:
    text = tokenizer.token_bytes(token)
    # JSON has no infinity; the number is OpenAI's for what is as good as impossible.
    return {"token": text.decode("utf-8", "replace"), "logprob": max(logprob, LEAST_LOGPROB), "bytes": list(text)}


async def _events(reply: Reply, pieces: Pieces, first: tuple[str, Output], include_usage: bool) -> Events:
    """The stream of server-sent events; an error that comes too late for a status is its last event."""
    async with aclosing(pieces):
        yield _event(reply.first_chunk())
        try:
            text, output = first
            while True:
                if chunk := reply.chunk(text, output):
                    yield _event(chunk)
                if output.finish_reason:
                    break
                text, output = await anext(pieces)
        except PorceletError as problem:
            yield _event(error_body(str(problem), problem.kind))
            return
        yield _event(reply.last_chunk(output))
        if include_usage:
            yield _event(reply.usage_chunk(output))
        yield b"data: [DONE]\n\n"


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(body) + b"\n\n"


class EventStream(StreamingResponse):
    """Server-sent events; the generator is closed as soon as the client is gone."""

    def __init__(self, events: Events) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self.events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self.events):
            await super().__call__(scope, receive, send)


# ---- the routes -----------------------------------------------------------------------------------------------------


def routes(service: Service) -> APIRouter:
    """The dialect over one served model."""
    router = APIRouter(prefix="/v1")

    @router.get("/models")
    async def models() -> dict[str, Any]:
        model = {"id": service.name, "object": "model", "created": service.created, "owned_by": "porcelet"}
        return {"object": "list", "data": [model]}

    @router.post("/chat/completions")
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        if body.model != service.name:
            message = f"model {body.model!r} is not served here; served: {service.name}"
            return error_response(404, message, param="model", code="model_not_found")
        reply = Reply(f"chatcmpl-{uuid4().hex}", int(time.time()), service.name, service.tokenizer)
        pieces = service.answer([message.plain() for message in body.messages], body.params(service.facts.max_length))
        if body.stream:
            first = await _unless_gone(request, anext(pieces))  # what is refused is refused before the headers go out
            return EventStream(_events(reply, pieces, first, body.stream_options.include_usage))
        text, output = await _unless_gone(request, _collect(pieces))
        return Response(msgspec.json.encode(reply.whole(text, output)), media_type="application/json")

    return router


async def _collect(pieces: Pieces) -> tuple[str, Output]:
    async with aclosing(pieces):
        parts = [part async for part in pieces]
    return "".join(text for text, _ in parts), join_outputs([output for _, output in parts])


async def _unless_gone(request: Request, work: Awaitable[Result]) -> Result:
    """The result of `work`, which is cancelled when the client hangs up first.

    Raises:
        ClientDisconnect: it did.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_hang_up(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        gone.cancel()
        task.cancel()


async def _hang_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
