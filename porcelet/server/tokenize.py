"""What a text or a conversation is in a model's tokens, and back: /v1/tokenize and /v1/detokenize, with vLLM's fields.

A conversation gives exactly the prompt that /v1/chat/completions would answer, a text the one that /v1/completions
would continue: special tokens are read from it, and the model's first one is put before it.
"""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, Literal, Self

from fastapi import APIRouter
from pydantic import Field, model_validator

from porcelet.chat.builtin import BOS
from porcelet.server.ask import Ask
from porcelet.server.bodies import Body
from porcelet.server.errors import FieldError
from porcelet.server.models import Model, Models
from porcelet.types import SamplingParams

MAX_CHARACTERS = 1 << 20  # of a text
MAX_TOKENS = 1 << 18  # of a list


class TokenizeRequest(Body):
    """Either a prompt or messages, in the form of chat/messages.py."""

    model: str
    prompt: Annotated[str, Field(max_length=MAX_CHARACTERS)] | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] = []
    add_generation_prompt: Literal[True] = True
    add_special_tokens: bool = True  # of a prompt; a conversation has its own
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise FieldError("prompt", "give either prompt or messages")
        if self.tools and self.messages is None:
            raise FieldError("tools", "tools belong to messages; a prompt is taken as it is")
        return self


class DetokenizeRequest(Body):
    model: str
    tokens: Annotated[list[int], Field(max_length=MAX_TOKENS)]


async def _tokens(body: TokenizeRequest, model: Model, thinking: bool | None) -> list[int]:
    if body.prompt is not None:
        tokens = await asyncio.to_thread(model.tokenizer.encode, body.prompt, special=True)
        beginning = _beginning(model) if body.add_special_tokens else []
        return tokens if tokens[:1] == beginning else beginning + tokens
    ask = Ask(messages=body.messages or [], params=SamplingParams(), tools=body.tools, thinking=thinking)
    return list((await model.render(ask)).tokens)


def _beginning(model: Model) -> list[int]:
    text = BOS if model.format.form else model.format.bos
    token = model.tokenizer.token_id(text)
    return [] if token is None else [token]


def _texts(tokens: list[int], model: Model) -> list[str]:
    return [model.tokenizer.token_bytes(token).decode("utf-8", "replace") for token in tokens]


def _text(tokens: list[int], model: Model) -> str:
    for token in tokens:
        if not 0 <= token < model.facts.model.vocab_size:
            size = model.facts.model.vocab_size
            raise FieldError("tokens", f"tokens holds {token}; the model has the tokens 0..{size - 1}")
    return model.tokenizer.decode(tokens)


def routes(models: Models) -> APIRouter:
    """Both ways, for every served model."""
    router = APIRouter()

    @router.post("/tokenize", include_in_schema=False)
    @router.post("/v1/tokenize")
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        model, thinking = await models.find(body.model)
        tokens = await _tokens(body, model, thinking)
        answer = {"tokens": tokens, "count": len(tokens), "max_model_len": model.max_length}
        if body.return_token_strs:
            answer["token_strs"] = await asyncio.to_thread(_texts, tokens, model)
        return answer

    @router.post("/detokenize", include_in_schema=False)
    @router.post("/v1/detokenize")
    async def detokenize(body: DetokenizeRequest) -> dict[str, str]:
        model, _ = await models.find(body.model)
        return {"prompt": await asyncio.to_thread(_text, body.tokens, model)}

    return router
