"""OpenAI's second dialect: /v1/responses, streamed as typed events or whole.

Nothing is kept: an answer's items come back with the next request, reasoning among them. `store` is false, whatever a
client's default is, and what would need a memory here is refused. Reasoning is given in full, never summarised. Some
clients hand back only its `encrypted_content`; for those who ask for that it holds the text in base64, which is no
secret. What another server encrypted cannot be read and is left out of the prompt. Left out: images, files, tools that
run in the server, and custom tools.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self
from uuid import uuid4

from fastapi import APIRouter, Request
from pydantic import Field, field_validator, model_validator
from starlette.responses import Response

from porcelet.chat import Message
from porcelet.chat.tools import AUTO, NONE, REQUIRED, ToolChoice
from porcelet.config.serving import Efforts
from porcelet.server.dialects.bodies import (
    Body,
    effort_budget,
    function_call,
    function_tool,
    json_answer,
    listed,
    of_types,
    possible,
)
from porcelet.server.dialects.encoder import send
from porcelet.server.dialects.fields import MAX_METADATA, Entries, TokenCount, TopLogprobs, Within, at_most
from porcelet.server.dialects.replies import STREAMED
from porcelet.server.dialects.responses_reply import Reply, unsealed
from porcelet.server.errors import ERRORS, FieldError
from porcelet.server.generation.ask import Ask
from porcelet.server.generation.models import Models
from porcelet.server.generation.watch import caller_of
from porcelet.types import Constraint, SamplingParams

# ---- the request ----------------------------------------------------------------------------------------------------


class TextPart(Body):
    ignored = ("annotations", "logprobs")

    type: Literal["input_text", "output_text"]
    text: str


class Said(Body):
    ignored = ("id", "status", "phase")

    type: Literal["message"]
    role: Literal["user", "assistant", "system", "developer"]
    content: Entries[TextPart]

    @field_validator("content", mode="before")
    @classmethod
    def _parts(cls, content: object) -> object:
        return _text_parts(content)


class Called(Body):
    ignored = ("id", "status")

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str


class Returned(Body):
    ignored = ("id", "status")

    type: Literal["function_call_output"]
    call_id: str
    output: Entries[TextPart]

    @field_validator("output", mode="before")
    @classmethod
    def _parts(cls, output: object) -> object:
        return _text_parts(output)


class Thought(Body):
    type: Literal["reasoning_text"]
    text: str


class Reasoned(Body):
    ignored = ("id", "status", "summary")

    type: Literal["reasoning"]
    content: Entries[Thought] = []
    encrypted_content: str = ""

    def text(self) -> str:
        return "".join(thought.text for thought in self.content) or unsealed(self.encrypted_content)


Item = Annotated[Said | Called | Returned | Reasoned, Field(discriminator="type")]


class Tool(Body):
    type: Literal["function"]
    name: str
    description: str = ""
    parameters: dict[str, Any] = {}
    strict: bool = False


class Chosen(Body):
    type: Literal["function"]
    name: str


class AnswerFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    name: str = ""
    description: str = ""
    strict: bool = False
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")

    @model_validator(mode="after")
    def _has_schema(self) -> Self:
        if (self.schema_ is not None) != (self.type == "json_schema"):
            name = "text.format.schema"
            raise FieldError(name, f"{name} belongs to the type 'json_schema', and the other way around")
        return self

    def constraint(self) -> Constraint | None:
        return None if self.type == "text" else json_answer(self.schema_ or {"type": "object"}, "text.format.schema")


class TextConfig(Body):
    format: AnswerFormat = AnswerFormat(type="text")
    verbosity: Literal["medium"] | None = None


class ReasoningConfig(Body):
    ignored = ("summary", "generate_summary")

    effort: str | None = None


class ResponsesRequest(Body):
    """The fields we honour."""

    ignored = (
        "user",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "stream_options",
        "client_metadata",  # Codex's
        "max_tool_calls",  # of tools that run in the server
    )
    refused = {
        "store": "this server keeps no answers; send the conversation's items with every request, and store false",
        "previous_response_id": "this server keeps no answers; send the conversation's items with every request",
        "conversation": "this server keeps no conversations; send their items with every request",
        "background": "this server keeps no answers; stream instead",
        "prompt": "this server keeps no prompts; send the text",
    }

    model: str
    input: Entries[Item]
    instructions: str = ""
    max_output_tokens: TokenCount | None = None
    temperature: Annotated[float, Within(0, 2)] = 1.0
    top_p: Annotated[float, Within(0, 1, above=True)] = 1.0
    top_logprobs: TopLogprobs | None = None
    include: Entries[Literal["reasoning.encrypted_content", "message.output_text.logprobs"]] = []
    tools: Entries[Tool] = []
    tool_choice: Literal["none", "auto", "required"] | Chosen = "auto"
    parallel_tool_calls: bool = True
    text: TextConfig = TextConfig()
    reasoning: ReasoningConfig = ReasoningConfig()
    metadata: Annotated[dict[str, str], at_most(MAX_METADATA)] = {}
    truncation: Literal["disabled"] = "disabled"
    stream: bool = False

    @field_validator("input", mode="before")
    @classmethod
    def _items(cls, items: object) -> object:
        items = [{"role": "user", "content": items}] if isinstance(items, str) else items
        known = ("message", "function_call", "function_call_output", "reasoning")
        return of_types(items, known, "nothing is kept here, and no tool runs here", "message")

    @field_validator("tools", mode="before")
    @classmethod
    def _functions(cls, tools: object) -> object:
        return of_types(tools, ("function",), "no tool runs in this server; leave it out, or give it as a function")

    def params(self, max_length: int) -> SamplingParams:
        """How to draw; without a limit of the client's, an answer may fill the context."""
        asked = self.top_logprobs is not None or "message.output_text.logprobs" in self.include
        return SamplingParams(
            max_tokens=max_length if self.max_output_tokens is None else self.max_output_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            logprobs=self.top_logprobs or 0 if asked else None,
        )

    def ask(self, aliased: bool | None, efforts: Efforts, max_length: int) -> Ask:
        """What it comes down to; `aliased` is whether the model's alias thinks.

        Raises:
            InputError: fields that contradict each other.
        """
        effort = self.reasoning.effort
        thinks = None if effort is None else effort != "none"
        return Ask(
            messages=self._messages(),
            params=self.params(max_length),
            tools=[function_tool(tool.name, tool.description, tool.parameters, tool.strict) for tool in self.tools],
            tool_choice=possible(self._choice(), [tool.name for tool in self.tools]),
            parallel_calls=self.parallel_tool_calls,
            thinking=aliased if thinks is None else thinks,
            budget=effort_budget(effort, efforts, "reasoning.effort") if effort and thinks else None,
            answer=self.text.format.constraint(),
        )

    def _choice(self) -> ToolChoice:
        if isinstance(self.tool_choice, Chosen):
            return ToolChoice("required", self.tool_choice.name)
        return {"none": NONE, "auto": AUTO, "required": REQUIRED}[self.tool_choice]

    def _messages(self) -> Sequence[Message]:
        """The conversation in the form of chat/messages.py, where one answer is one message."""
        messages: list[dict[str, Any]] = []
        if self.instructions:
            messages.append({"role": "system", "content": self.instructions})
        for item in self.input:
            match item:
                case Said(role="assistant"):
                    _answer(messages, after=())["content"] += _text(item.content)
                case Said():
                    role = "user" if item.role == "user" else "system"
                    messages.append({"role": role, "content": _text(item.content)})
                case Reasoned():
                    _answer(messages, after=("content", "tool_calls"))["reasoning_content"] += item.text()
                case Called():
                    call = function_call(item.call_id, item.name, item.arguments)
                    _answer(messages)["tool_calls"].append(call)
                case Returned():
                    messages.append({"role": "tool", "content": _text(item.output), "tool_call_id": item.call_id})
        return messages


def _answer(messages: list[dict[str, Any]], after: Sequence[str] = ()) -> dict[str, Any]:
    """The answer that the next item belongs to: the last message, unless it has one of these already, or a new one."""
    last = messages[-1] if messages else {"role": ""}
    if last["role"] != "assistant" or any(last[name] for name in after):
        last = {"role": "assistant", "content": "", "reasoning_content": "", "tool_calls": []}
        messages.append(last)
    return last


def _text_parts(content: object) -> object:
    known = ("input_text", "output_text")
    return of_types(listed(content, "input_text"), known, "give what other parts say as text")


def _text(parts: list[TextPart]) -> str:
    return "".join(part.text for part in parts)


def _asked(body: ResponsesRequest) -> dict[str, Any]:
    """What a response repeats of its request."""
    choice = body.tool_choice.model_dump() if isinstance(body.tool_choice, Chosen) else body.tool_choice
    return {
        "background": False,
        "instructions": body.instructions or None,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata,
        "model": body.model,
        "parallel_tool_calls": body.parallel_tool_calls,
        "previous_response_id": None,
        "reasoning": {"effort": body.reasoning.effort, "summary": None},
        "service_tier": "default",
        "store": False,
        "temperature": body.temperature,
        "text": {"format": body.text.format.model_dump(by_alias=True, exclude_unset=True)},
        "tool_choice": choice,
        "tools": [tool.model_dump() for tool in body.tools],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": body.top_p,
        "truncation": body.truncation,
    }


# ---- the routes -----------------------------------------------------------------------------------------------------


def routes(models: Models) -> APIRouter:
    """The dialect over the served models."""
    router = APIRouter(responses=ERRORS, tags=["OpenAI"])
    config = models.config

    @router.post("/responses", include_in_schema=False)
    @router.post("/v1/responses", responses={200: STREAMED})
    async def responses(body: ResponsesRequest, request: Request) -> Response:
        model, thinking = await models.find(body.model)
        events = model.answer(body.ask(thinking, config.efforts, model.max_length), caller_of(request))
        seals = "reasoning.encrypted_content" in body.include
        reply = Reply(f"resp_{uuid4().hex}", int(time.time()), _asked(body), seals)
        return await send(request, reply, events, body.stream, config.server.keep_alive)

    return router
