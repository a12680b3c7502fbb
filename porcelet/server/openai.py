"""OpenAI's dialect: /v1/chat/completions, streamed or whole, and /v1/models.

A field that we do not know, or whose value we could not honour, is refused by name: an answer that silently ignored
half of the request would be worse than none. `top_k`, `min_p` and `repetition_penalty` are ours, under the names
that other servers gave them. Left out so far: tools, structured output, n > 1.
"""

from __future__ import annotations

import time
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Literal
from uuid import uuid4

import msgspec
from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, field_validator, model_validator
from starlette.responses import Response

from porcelet.chat import Content, Reasoning
from porcelet.errors import PorceletError
from porcelet.server.ask import Ask
from porcelet.server.errors import FieldError, error_body
from porcelet.server.events import Ended, Events, Piece, Sample, Started, TokenLogprob, Usage, collect
from porcelet.server.models import Models
from porcelet.server.sse import Frames, frame, stream, whole
from porcelet.server.watch import caller_of
from porcelet.types import SamplingParams

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

    def plain(self) -> dict[str, str]:
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

    def whole(self, sample: Sample, usage: Usage) -> dict[str, Any]:
        message = {"role": "assistant", "content": sample.content, "refusal": None}
        if sample.reasoning:
            message["reasoning_content"] = sample.reasoning
        logprobs = _logprobs(sample.logprobs)
        choice = {"index": 0, "message": message, "logprobs": logprobs, "finish_reason": sample.reason}
        return self._body("chat.completion", [choice]) | {"usage": _usage(usage)}

    def first_chunk(self) -> dict[str, Any]:
        return self._chunk({"role": "assistant", "content": ""})

    def chunk(self, piece: Piece) -> dict[str, Any]:
        content = "".join(part.text for part in piece.parts if isinstance(part, Content))
        reasoning = "".join(part.text for part in piece.parts if isinstance(part, Reasoning))
        delta = {"content": content} | ({"reasoning_content": reasoning} if reasoning else {})
        return self._chunk(delta, _logprobs(piece.logprobs))

    def last_chunk(self, ended: Ended) -> dict[str, Any]:
        return self._chunk({}, finish_reason=ended.reason)

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        return self._body("chat.completion.chunk", []) | {"usage": _usage(usage)}

    def _chunk(
        self, delta: dict[str, str], logprobs: dict[str, Any] | None = None, finish_reason: str | None = None
    ) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        return self._body("chat.completion.chunk", [choice])

    def _body(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.num_prompt_tokens,
        "completion_tokens": usage.num_generated,
        "total_tokens": usage.num_prompt_tokens + usage.num_generated,
        "prompt_cache_hit_tokens": usage.num_cached_tokens,
        "prompt_cache_miss_tokens": usage.num_missed_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.num_cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.num_reasoning},
    }


def _logprobs(entries: tuple[TokenLogprob, ...] | list[TokenLogprob]) -> dict[str, Any] | None:
    """The model's own log-probabilities of an output's tokens; None if the request did not ask for them."""
    if not entries:
        return None
    content = [
        _entry(entry.text, entry.logprob) | {"top_logprobs": [_entry(text, value) for _, text, value in entry.top]}
        for entry in entries
    ]
    return {"content": content, "refusal": None}


def _entry(text: bytes, logprob: float) -> dict[str, Any]:
    # JSON has no infinity; the number is OpenAI's for what is as good as impossible.
    return {"token": text.decode("utf-8", "replace"), "logprob": max(logprob, LEAST_LOGPROB), "bytes": list(text)}


async def _frames(reply: Reply, events: Events, include_usage: bool) -> Frames:
    async with aclosing(events):
        async for event in events:
            match event:
                case Started():
                    yield frame(reply.first_chunk())
                case Piece():
                    yield frame(reply.chunk(event))
                case Ended():
                    yield frame(reply.last_chunk(event))
                case Usage() if include_usage:
                    yield frame(reply.usage_chunk(event))
    yield b"data: [DONE]\n\n"


def _failed(problem: PorceletError) -> bytes:
    return frame(error_body(str(problem), problem.kind))


async def _body(reply: Reply, events: Events) -> bytes:
    samples, usage = await collect(events)
    return msgspec.json.encode(reply.whole(samples[0], usage))


# ---- the routes -----------------------------------------------------------------------------------------------------


def routes(models: Models) -> APIRouter:
    """The dialect over the served models."""
    router = APIRouter(prefix="/v1")
    keep_alive = models.config.server.keep_alive

    @router.get("/models")
    async def list_models() -> dict[str, Any]:
        created = models.default.created
        data = [{"id": name, "object": "model", "created": created, "owned_by": "porcelet"} for name in models.names]
        return {"object": "list", "data": data}

    @router.post("/chat/completions")
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        model, thinking = await models.find(body.model)
        messages = [message.plain() for message in body.messages]
        ask = Ask(messages=messages, params=body.params(model.max_length), thinking=thinking)
        events = model.answer(ask, caller_of(request))
        reply = Reply(f"chatcmpl-{uuid4().hex}", int(time.time()), body.model)
        if body.stream:
            frames = _frames(reply, events, body.stream_options.include_usage)
            return await stream(request, frames, _failed, keep_alive)
        return await whole(request, _body(reply, events), keep_alive)

    return router
