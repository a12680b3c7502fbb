"""OpenAI's legacy dialect: /v1/completions, plain continuations, and with `suffix` what fits between two texts.

A prompt is the model's own text: special tokens that are written in it are those, unlike in a chat's messages, and the
model's beginning-of-text token is put before it unless it is there already. Tokens as a prompt are taken as they are.
With `suffix` prompt and suffix are mere text, set between the fill-in-the-middle tokens of the model's vocabulary.

`max_tokens` 0, which asks for nothing but the prompt's log-probabilities, draws one token and does not show it.
"""

from __future__ import annotations

import asyncio
import codecs
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import astuple, dataclass
from typing import Annotated, Any, Literal, NotRequired

import msgspec
from fastapi import APIRouter, Request
from pydantic import PlainValidator, WithJsonSchema
from starlette.responses import Response
from typing_extensions import TypedDict

from porcelet.chat import Content
from porcelet.chat.builtin import BOS
from porcelet.server.dialects.fields import Sampling, TopLogprobs, Within, out_of_range, wrong
from porcelet.server.dialects.replies import DONE, LEAST_LOGPROB, STREAMED, Head, UsageBody, failed, shown, usage_body
from porcelet.server.errors import FieldError
from porcelet.server.generation.events import Ended, Event, Events, Piece, Started, Usage
from porcelet.server.generation.models import Model, Models
from porcelet.server.generation.watch import Caller, caller_of
from porcelet.server.sse import Frames, frame, stream, whole
from porcelet.tokenizer import Tokenizer
from porcelet.types import MAX_SAMPLES, SamplingParams

MAX_PROMPTS = 128
DEFAULT_MAX_TOKENS = 16  # OpenAI's


# ---- the request ----------------------------------------------------------------------------------------------------

Prompt = str | tuple[int, ...]


def _prompts(value: object) -> tuple[Prompt, ...]:
    """One prompt or several, each a text or token ids."""
    if isinstance(value, str) or _are_tokens(value):
        return (_prompt(value),)
    if not isinstance(value, list) or not value:
        raise wrong("it must be a text, token ids, or a list of either")
    if len(value) > MAX_PROMPTS:
        raise out_of_range(f"prompt holds {len(value)} prompts; at most {MAX_PROMPTS} are allowed")
    return tuple(_prompt(each) for each in value)


def _prompt(value: object) -> Prompt:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and _are_tokens(value):
        return tuple(value)
    raise wrong("it must be a text, token ids, or a list of either, none of them empty")


def _are_tokens(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(type(each) is int for each in value)


_TEXT: dict[str, Any] = {"type": "string"}
_TOKENS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_SEVERAL = {"type": "array", "items": {"anyOf": [_TEXT, _TOKENS]}, "minItems": 1, "maxItems": MAX_PROMPTS}
Prompts = Annotated[tuple[Prompt, ...], PlainValidator(_prompts), WithJsonSchema({"anyOf": [_TEXT, _TOKENS, _SEVERAL]})]


class CompletionRequest(Sampling):
    """What may be asked. `logprobs` is a number here: of alternatives."""

    prompt: Prompts
    suffix: str | None = None
    max_tokens: Annotated[int, Within(0, 2**31 - 1)] = DEFAULT_MAX_TOKENS
    echo: bool = False
    logprobs: TopLogprobs | None = None

    def check(self) -> None:
        """Whether the fields fit together.

        Raises:
            InputError: they do not.
        """
        if self.suffix is not None and self.echo:
            raise FieldError("echo", "echo repeats the prompt, which does not end where a suffix follows; leave it out")
        if self.max_tokens == 0 and not self.echo:
            raise FieldError("max_tokens", "max_tokens 0 asks for nothing; send echo true, or 1 or more")
        if self.n * len(self.prompt) > MAX_SAMPLES:
            raise FieldError("n", f"{len(self.prompt)} prompts with n {self.n} are more than {MAX_SAMPLES} answers")


# ---- prompts --------------------------------------------------------------------------------------------------------


# A vocabulary's tokens for filling in the middle: before the prompt, before the suffix, and after it.
MIDDLES = (
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # DeepSeek-Coder-V2, V2.5, V3
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen2.5-Coder
)


@dataclass(frozen=True)
class Written:
    """A prompt as it is given to the model. `num_added`: we put a beginning-of-text token before it."""

    text: str
    tokens: list[int]
    num_added: int = 0


def written(prompt: Prompt, suffix: str | None, model: Model) -> Written:
    """What the model is to continue.

    Raises:
        FieldError: it cannot fill in, or a token is none of its vocabulary.
    """
    tokenizer = model.tokenizer
    if isinstance(prompt, str):
        tokens = tokenizer.encode(prompt, special=suffix is None)
    elif strange := [token for token in prompt if not 0 <= token < tokenizer.vocab_size]:
        raise FieldError("prompt", f"token {strange[0]} lies outside the vocabulary of {tokenizer.vocab_size}")
    else:
        tokens = list(prompt)
    if suffix is not None:
        before, between, after = middle_tokens(tokenizer, model.name)
        tokens = [before, *tokens, between, *tokenizer.encode(suffix), after]
    if not isinstance(prompt, str):
        return Written(tokenizer.decode(prompt), tokens)
    beginning = _beginning(model)
    if beginning is None or tokens[:1] == [beginning]:
        return Written(prompt, tokens)
    return Written(prompt, [beginning, *tokens], 1)


def middle_tokens(tokenizer: Tokenizer, name: str) -> list[int]:
    """The three tokens of a vocabulary for filling in the middle.

    Raises:
        FieldError: it has none.
    """
    for texts in MIDDLES:
        ids = [id for text in texts if (id := tokenizer.token_id(text)) is not None]
        if len(ids) == len(texts):
            return ids
    problem = f"{name} has no tokens for filling in the middle; leave suffix out, or ask a model that has them"
    raise FieldError("suffix", problem)


def _beginning(model: Model) -> int | None:
    text = BOS if model.format.form else model.format.bos
    return model.tokenizer.token_id(text) if text else None


# ---- the answer -----------------------------------------------------------------------------------------------------


class LegacyLogprobs(TypedDict):
    """Entry by entry the tokens of the text, and where each begins in it. A prompt's first token has no probability."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(TypedDict):
    index: int
    text: str
    logprobs: LegacyLogprobs | None
    finish_reason: str | None


class Completion(TypedDict):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: NotRequired[UsageBody | None]


Scored = tuple[int, float | None, Sequence[tuple[int, float]]]  # a token, its log-probability, and the best ones there


class Writer:
    """Writes one choice, piece by piece."""

    def __init__(self, index: int, tokenizer: Tokenizer) -> None:
        self._index = index
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0  # characters so far

    def echo(self, prompt: Written, started: Started, scored: bool) -> CompletionChoice:
        """The prompt, as if the model had said it."""
        scores: list[Scored] = [(prompt.tokens[0], None, ())]
        scores += [(token, *score) for token, score in zip(prompt.tokens[1:], started.prompt_logprobs, strict=False)]
        return self._choice(prompt.text, self._logprobs(scores[prompt.num_added :]) if scored else None)

    def piece(self, piece: Piece) -> CompletionChoice:
        text = "".join(part.text for part in piece.parts if isinstance(part, Content))
        tops = [[(token, value) for token, _, value in entry.top] for entry in piece.logprobs]
        scored = [(entry.token, entry.logprob, top) for entry, top in zip(piece.logprobs, tops, strict=True)]
        return self._choice(text, self._logprobs(scored) if scored else None)

    def end(self, reason: str) -> CompletionChoice:
        return self._choice("", None, reason)

    def _choice(self, text: str, logprobs: LegacyLogprobs | None, reason: str | None = None) -> CompletionChoice:
        return {"index": self._index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, scored: Sequence[Scored]) -> LegacyLogprobs:
        body: LegacyLogprobs = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token, logprob, top in scored:
            text = self._tokenizer.token_bytes(token)
            body["text_offset"].append(self._offset)
            body["tokens"].append(shown(text))
            body["token_logprobs"].append(None if logprob is None else max(logprob, LEAST_LOGPROB))
            body["top_logprobs"].append(None if logprob is None else self._best(shown(text), logprob, top))
            self._offset += len(self._decoder.decode(text))
        return body

    def _best(self, token: str, logprob: float, top: Sequence[tuple[int, float]]) -> dict[str, float]:
        """The best tokens and the one that was drawn. Of tokens that read the same, the better one counts."""
        best: dict[str, float] = {}
        for other, value in top:
            best.setdefault(shown(self._tokenizer.token_bytes(other)), max(value, LEAST_LOGPROB))
        best.setdefault(token, max(logprob, LEAST_LOGPROB))
        return best


Choices = AsyncGenerator[CompletionChoice | Usage, None]


async def choices_of(body: CompletionRequest, model: Model, caller: Caller) -> Choices:
    """The pieces of all choices as they come, each with its index, and the usage of all prompts at last.

    Raises:
        PorceletError: the request cannot be served, or the engine failed.
    """
    body.check()
    params = body.params(max(body.max_tokens, 1), body.logprobs, body.logprobs if body.echo else None)
    with model.place(caller, len(body.prompt)):
        prompts = await model.in_thread(lambda: [written(prompt, body.suffix, model) for prompt in body.prompt])
        async with aclosing(_continued(body, prompts, params, model, caller)) as choices:
            async for choice in choices:
                yield choice


async def _continued(
    body: CompletionRequest, prompts: Sequence[Written], params: SamplingParams, model: Model, caller: Caller
) -> Choices:
    writers = [Writer(index, model.tokenizer) for index in range(body.n * len(prompts))]
    usages = []
    async with aclosing(merged([model.complete(prompt.tokens, params, caller) for prompt in prompts])) as events:
        async for number, event in events:
            match event:
                case Started() if body.echo:
                    for writer in writers[number * body.n : (number + 1) * body.n]:
                        yield writer.echo(prompts[number], event, body.logprobs is not None)
                case Piece() if body.max_tokens:
                    yield writers[number * body.n + event.index].piece(event)
                case Ended():
                    yield writers[number * body.n + event.index].end(event.reason if body.max_tokens else "length")
                case Usage():
                    usages.append(event)
    yield Usage(*(sum(column) for column in zip(*map(astuple, usages), strict=True)))


async def merged(streams: Sequence[Events]) -> AsyncGenerator[tuple[int, Event], None]:
    """The events of several generations as they come, each with its generation's number; the first error ends all."""
    pending = {asyncio.ensure_future(anext(stream)): number for number, stream in enumerate(streams)}
    try:
        while pending:
            for task in (await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED))[0]:
                number = pending.pop(task)
                if isinstance(task.exception(), StopAsyncIteration):
                    continue
                pending[asyncio.ensure_future(anext(streams[number]))] = number
                yield number, task.result()
    finally:
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
        for stream in streams:
            await stream.aclose()


def _body(head: Head, choices: list[CompletionChoice]) -> Completion:
    return {
        "id": head.id,
        "object": "text_completion",
        "created": head.created,
        "model": head.model,
        "system_fingerprint": head.fingerprint,
        "choices": choices,
    }


async def whole_body(head: Head, pieces: Choices, num_choices: int) -> bytes:
    wholes = [_Whole(index) for index in range(num_choices)]
    usage: Usage | None = None
    async with aclosing(pieces):
        async for piece in pieces:
            if isinstance(piece, Usage):
                usage = piece
            else:
                wholes[piece["index"]].add(piece)
    assert usage, "a generation ends with its usage"
    return msgspec.json.encode(_body(head, [whole.choice for whole in wholes]) | {"usage": usage_body(usage)})


class _Whole:
    """A choice, put together from its pieces."""

    def __init__(self, index: int) -> None:
        self.choice: CompletionChoice = {"index": index, "text": "", "logprobs": None, "finish_reason": None}

    def add(self, piece: CompletionChoice) -> None:
        choice = self.choice
        choice["text"] += piece["text"]
        choice["finish_reason"] = piece["finish_reason"]
        more, logprobs = piece["logprobs"], choice["logprobs"]
        if more and logprobs:
            logprobs["tokens"] += more["tokens"]
            logprobs["token_logprobs"] += more["token_logprobs"]
            logprobs["top_logprobs"] += more["top_logprobs"]
            logprobs["text_offset"] += more["text_offset"]
        elif more:
            choice["logprobs"] = more


async def chunk_frames(head: Head, pieces: Choices, include_usage: bool) -> Frames:
    """The pieces as server-sent events. The last one has the usage, as in a chat; see replies.py."""
    last: Completion | None = None
    async with aclosing(pieces):
        async for piece in pieces:
            if isinstance(piece, Usage):
                assert last, "an answer has at least one choice"
                last = last | {"usage": usage_body(piece)}
            else:
                if last:
                    yield frame(last)
                last = _body(head, [piece]) | ({"usage": None} if include_usage else {})
    assert last
    yield frame(last)
    yield DONE


# ---- the route ------------------------------------------------------------------------------------------------------


def routes(models: Models) -> APIRouter:
    """The legacy route over the served models."""
    router = APIRouter()

    @router.post("/completions", response_model=Completion, responses={200: STREAMED})
    async def complete(body: CompletionRequest, request: Request) -> Response:
        model, _ = await models.find(body.model)
        pieces = choices_of(body, model, caller_of(request))
        head = Head.new("cmpl", body.model, model)
        if body.stream:
            frames = chunk_frames(head, pieces, body.stream_options.include_usage)
            return await stream(request, frames, failed(request), models.config.server.keep_alive)
        work = whole_body(head, pieces, body.n * len(body.prompt))
        return await whole(request, work, models.config.server.keep_alive)

    return router
