"""What a text or a conversation is in a model's tokens, and back: /v1/tokenize and /v1/detokenize, with vLLM's fields.

A conversation gives exactly the prompt that /v1/chat/completions would answer, a text the one that /v1/completions
would continue: special tokens are read from it, and the model's first one is put before it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from fastapi import APIRouter
from pydantic import Field, model_validator

from porcelet.server.dialects.completions import written
from porcelet.server.dialects.fields import Entries, Fields
from porcelet.server.dialects.openai import ChatMessage, Tool
from porcelet.server.errors import ERRORS, FieldError
from porcelet.server.generation.ask import Ask
from porcelet.server.generation.models import Model, Models
from porcelet.types import SamplingParams

MAX_CHARACTERS = 1 << 20  # of a text
MAX_TOKENS = 1 << 18  # of a list


class TokenizeRequest(Fields):
    """Either a prompt, or messages as /v1/chat/completions takes them."""

    model: str
    prompt: Annotated[str, Field(max_length=MAX_CHARACTERS)] | None = None
    messages: Entries[ChatMessage] | None = None
    tools: Entries[Tool] = []
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


class DetokenizeRequest(Fields):
    model: str
    tokens: Annotated[list[int], Field(max_length=MAX_TOKENS, fail_fast=True)]


async def _tokens(body: TokenizeRequest, model: Model, thinking: bool | None) -> list[int]:
    if body.messages is not None:
        tools = [tool.model_dump(exclude_unset=True) for tool in body.tools]
        messages = [message.plain() for message in body.messages]
        ask = Ask(messages=messages, params=SamplingParams(), tools=tools, thinking=thinking)
        return list(await model.tokens(ask))
    prompt = body.prompt
    assert prompt is not None, "one of the two is there"
    if body.add_special_tokens:
        return (await model.beside(lambda: written(prompt, None, model))).tokens
    return await model.beside(lambda: model.tokenizer.encode(prompt, special=True))


def _texts(tokens: list[int], model: Model) -> list[str]:
    return [model.tokenizer.token_bytes(token).decode("utf-8", "replace") for token in tokens]


def _text(tokens: list[int], model: Model) -> str:
    for token in tokens:
        if not 0 <= token < model.tokenizer.vocab_size:
            size = model.tokenizer.vocab_size
            raise FieldError("tokens", f"token {token} lies outside the vocabulary of {size}")
    return model.tokenizer.decode(tokens)


def routes(models: Models) -> APIRouter:
    """Both ways, for every served model."""
    router = APIRouter(responses=ERRORS)

    @router.post("/tokenize", include_in_schema=False)
    @router.post("/v1/tokenize")
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        model, thinking = await models.find(body.model)
        tokens = await _tokens(body, model, thinking)
        answer = {"tokens": tokens, "count": len(tokens), "max_model_len": model.max_length}
        if body.return_token_strs:
            answer["token_strs"] = await model.beside(lambda: _texts(tokens, model))
        return answer

    @router.post("/detokenize", include_in_schema=False)
    @router.post("/v1/detokenize")
    async def detokenize(body: DetokenizeRequest) -> dict[str, str]:
        model, _ = await models.find(body.model)
        return {"prompt": await model.beside(lambda: _text(body.tokens, model))}

    return router
