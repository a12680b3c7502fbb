"""Anthropic's dialect: /v1/messages, streamed or whole, and /v1/messages/count_tokens.

A conversation's thinking comes back as text; its signature is our message's id, and nobody checks it. What another
server redacted cannot be read and is left out of the prompt. Marks for caching are ignored, for every prefix is cached,
and so are the versions and betas that headers name. Left out: images, documents, tools that run in the server, and
editing of the context on its way.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Annotated, Any, ClassVar, Literal, Self
from uuid import uuid4

from fastapi import APIRouter, Request
from pydantic import Field, field_validator, model_validator
from starlette.responses import Response

from porcelet.chat import Message
from porcelet.chat.tools import AUTO, NONE, REQUIRED, ToolChoice
from porcelet.config.serving import Efforts
from porcelet.server.dialects.anthropic_reply import Reply
from porcelet.server.dialects.bodies import (
    Body,
    effort_budget,
    function_call,
    function_tool,
    json_answer,
    json_text,
    listed,
    of_types,
    possible,
)
from porcelet.server.dialects.encoder import send
from porcelet.server.dialects.fields import Entries, TokenCount, Within
from porcelet.server.dialects.replies import STREAMED
from porcelet.server.errors import ANTHROPIC_ERRORS, FieldError
from porcelet.server.generation.ask import Ask
from porcelet.server.generation.models import Model, Models
from porcelet.server.generation.watch import caller_of
from porcelet.types import SamplingParams

# ---- the request ----------------------------------------------------------------------------------------------------


class TextBlock(Body):
    ignored = ("cache_control", "citations")

    type: Literal["text"]
    text: str


class ThinkingBlock(Body):
    ignored = ("cache_control", "signature")

    type: Literal["thinking"]
    thinking: str


class RedactedBlock(Body):
    ignored = ("cache_control", "data")

    type: Literal["redacted_thinking"]


class ToolUseBlock(Body):
    ignored = ("cache_control", "caller")

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]

    def call(self) -> dict[str, Any]:
        return function_call(self.id, self.name, json_text(self.input, "input"))


class ToolResultBlock(Body):
    ignored = ("cache_control",)

    type: Literal["tool_result"]
    tool_use_id: str
    content: Entries[TextBlock] = []
    is_error: bool = False

    @field_validator("content", mode="before")
    @classmethod
    def _blocks(cls, content: object) -> object:
        return _text_blocks(content)

    def message(self) -> Message:
        text = ("Error: " if self.is_error else "") + _paragraphs(self.content)
        return {"role": "tool", "content": text, "tool_call_id": self.tool_use_id}


Block = Annotated[
    TextBlock | ThinkingBlock | RedactedBlock | ToolUseBlock | ToolResultBlock, Field(discriminator="type")
]
_SPOKEN = ("text", "thinking", "redacted_thinking", "tool_use")
_HEARD = ("text", "tool_result")


class Turn(Body):
    """One message: several of ours if it holds tool results."""

    role: Literal["user", "assistant", "system"]
    content: Entries[Block]

    @field_validator("content", mode="before")
    @classmethod
    def _blocks(cls, content: object) -> object:
        remedy = "give what other blocks say as text"
        return of_types(listed(content, "text"), (*_SPOKEN, "tool_result"), remedy)

    def messages(self, place: str) -> Iterator[Message]:
        allowed = _SPOKEN if self.role == "assistant" else _HEARD
        for block in self.content:
            if block.type not in allowed:
                raise FieldError(place, f"{place} holds a {block.type} block, which no {self.role} says")
        if self.role == "assistant":
            yield self._answer()
            return
        texts: Entries[TextBlock] = []
        for block in self.content:
            if isinstance(block, TextBlock):
                texts.append(block)
            elif isinstance(block, ToolResultBlock):
                yield from self._said(texts)
                texts = []
                yield block.message()
        yield from self._said(texts)

    def _said(self, texts: list[TextBlock]) -> Iterator[Message]:
        if texts:
            yield {"role": self.role, "content": _paragraphs(texts)}

    def _answer(self) -> Message:
        reasoning = "".join(block.thinking for block in self.content if isinstance(block, ThinkingBlock))
        calls = [block.call() for block in self.content if isinstance(block, ToolUseBlock)]
        content = "".join(block.text for block in self.content if isinstance(block, TextBlock))
        return {"role": "assistant", "content": content, "reasoning_content": reasoning, "tool_calls": calls}


class Tool(Body):
    """A tool of the client's."""

    ignored = ("cache_control", "eager_input_streaming", "input_examples", "allowed_callers")
    refused = {"defer_loading": "there is no search for tools; give those that are needed"}

    type: Literal["custom"] = "custom"
    name: str
    description: str = ""
    input_schema: dict[str, Any]
    strict: bool = False


class Choice(Body):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False

    def choice(self) -> ToolChoice:
        if self.type == "tool":
            if self.name is None:
                raise FieldError("tool_choice.name", "tool_choice.name is missing; it names the tool to call")
            return ToolChoice("required", self.name)
        return {"auto": AUTO, "any": REQUIRED, "none": NONE}[self.type]


class Thinking(Body):
    ignored = ("display",)  # thinking is always shown: it is what comes back with the next request

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = None

    def asked(self, model: Model) -> bool | None:
        if self.type == "adaptive":  # if the model can
            return model.format.thinking(model.tokenizer) != "never" or None
        return self.type == "enabled"


class AnswerFormat(Body):
    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Body):
    effort: str | None = None
    format: AnswerFormat | None = None


class Edit(Body):
    ignored = ("keep", "trigger")

    type: Literal["clear_thinking_20251015"]  # which the chat formats do anyway


class Edits(Body):
    edits: Entries[Edit] = []


class CountRequest(Body):
    """The conversation, without how to answer it."""

    ignored: ClassVar[Collection[str]] = ("cache_control", "metadata", "speed", "user_profile_id", "workspace_id")

    model: str
    messages: Entries[Turn]
    system: Entries[TextBlock] = []
    tools: Entries[Tool] = []
    tool_choice: Choice = Choice(type="auto")
    thinking: Thinking | None = None
    output_config: OutputConfig = OutputConfig()
    context_management: Edits = Edits()

    @field_validator("system", mode="before")
    @classmethod
    def _system_blocks(cls, system: object) -> object:
        return _text_blocks(system)

    @field_validator("tools", mode="before")
    @classmethod
    def _client_tools(cls, tools: object) -> object:
        return of_types(tools, ("custom",), "no tool runs in this server; give those of your own", "custom")

    def conversation(self) -> Iterator[Message]:
        if self.system:
            yield {"role": "system", "content": _paragraphs(self.system)}
        for index, turn in enumerate(self.messages):
            yield from turn.messages(f"messages[{index}].content")

    def messages_for_model(self) -> list[Message]:
        """The conversation in the form of chat/messages.py; an answer that it ends with is to be continued."""
        messages = list(self.conversation())
        if messages and messages[-1]["role"] == "assistant":
            if messages[-1]["tool_calls"]:
                raise FieldError("messages", "messages end with a tool_use; its tool_result must follow")
            messages[-1] = {**messages[-1], "prefix": True}
        return messages

    def ask(self, model: Model, aliased: bool | None, efforts: Efforts, params: SamplingParams) -> Ask:
        """What it comes down to; `aliased` is whether the model's alias thinks.

        Raises:
            InputError: fields that contradict each other.
        """
        config = self.output_config
        return Ask(
            messages=self.messages_for_model(),
            params=params,
            tools=[function_tool(tool.name, tool.description, tool.input_schema, tool.strict) for tool in self.tools],
            tool_choice=possible(self.tool_choice.choice(), [tool.name for tool in self.tools]),
            parallel_calls=not self.tool_choice.disable_parallel_tool_use,
            thinking=aliased if self.thinking is None else self.thinking.asked(model),
            budget=self._budget(efforts),
            answer=json_answer(config.format.schema_, "output_config.format.schema") if config.format else None,
        )

    def _budget(self, efforts: Efforts) -> int | None:
        if self.thinking and self.thinking.budget_tokens is not None:
            return self.thinking.budget_tokens
        effort = self.output_config.effort
        return effort_budget(effort, efforts, "output_config.effort") if effort else None


class MessagesRequest(CountRequest):
    """All of it."""

    ignored = (*CountRequest.ignored, "service_tier", "inference_geo", "diagnostics")
    refused = {
        "container": "no tool runs in this server",
        "mcp_servers": "no tool runs in this server; connect to them yourself",
        "fallbacks": "name one model",
    }

    max_tokens: TokenCount
    stop_sequences: Entries[str] = []
    temperature: Annotated[float, Within(0, 2)] = 1.0
    top_p: Annotated[float, Within(0, 1, above=True)] = 1.0
    top_k: Annotated[int, Within(0, 2**31 - 1)] = 0
    stream: bool = False

    def params(self) -> SamplingParams:
        return SamplingParams(
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            stop=tuple(self.stop_sequences),
        )

    @model_validator(mode="after")
    def _leaves_room(self) -> Self:
        budget = self.thinking.budget_tokens if self.thinking else None
        if budget is not None and not 1 <= budget < self.max_tokens:
            name = "thinking.budget_tokens"
            raise FieldError(name, f"{name} is {budget}; it must be at least 1 and less than max_tokens")
        return self


def _text_blocks(content: object) -> object:
    return of_types(listed(content, "text"), ("text",), "give what other blocks say as text")


def _paragraphs(blocks: list[TextBlock]) -> str:
    return "\n\n".join(block.text for block in blocks)


# ---- the routes -----------------------------------------------------------------------------------------------------


def routes(models: Models) -> APIRouter:
    """The dialect over the served models."""
    router = APIRouter(responses=ANTHROPIC_ERRORS, tags=["Anthropic"])
    config = models.config

    @router.post("/anthropic/v1/messages", include_in_schema=False)
    @router.post("/v1/messages", responses={200: STREAMED})
    async def messages(body: MessagesRequest, request: Request) -> Response:
        model, thinking = await models.find(body.model)
        ask = body.ask(model, thinking, config.efforts, body.params())
        events = model.answer(ask, caller_of(request))
        reply = Reply(f"msg_{uuid4().hex}", body.model)
        return await send(request, reply, events, body.stream, config.server.keep_alive)

    @router.post("/anthropic/v1/messages/count_tokens", include_in_schema=False)
    @router.post("/v1/messages/count_tokens")
    async def count_tokens(body: CountRequest) -> dict[str, int]:
        model, thinking = await models.find(body.model)
        return {"input_tokens": await model.count(body.ask(model, thinking, config.efforts, SamplingParams()))}

    return router
