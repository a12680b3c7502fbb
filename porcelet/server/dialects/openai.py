"""OpenAI's dialect with DeepSeek's extensions: /v1/chat/completions, /v1/completions, /v1/models.

DeepSeek's base URL has no /v1, and its beta features are below /beta: the same routes answer there.

Whether an answer begins with reasoning: what the request says, by `thinking` or `reasoning_effort`, wins over what its
model's alias says (deepseek-chat does not, deepseek-reasoner does), and that over the model's habit. `thinking` says
whether, `reasoning_effort` how long. What is constrained, is so after the reasoning.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import BeforeValidator, Field, PlainValidator, WithJsonSchema, model_validator
from starlette.responses import Response
from typing_extensions import TypedDict

from porcelet.chat.messages import MAX_DEPTH, Message, is_deep
from porcelet.chat.tools import AUTO, ToolChoice
from porcelet.config import Efforts
from porcelet.server.dialects import completions
from porcelet.server.dialects.fields import (
    Content,
    Entries,
    Fields,
    Sampling,
    TokenCount,
    TopLogprobs,
    out_of_range,
    wrong,
)
from porcelet.server.dialects.replies import STREAMED, ChatCompletion, Head, chunk_frames, failed, whole_body
from porcelet.server.errors import FieldError
from porcelet.server.generation.ask import EFFORTS, Ask
from porcelet.server.generation.models import Model, Models
from porcelet.server.generation.watch import caller_of
from porcelet.server.sse import stream, whole
from porcelet.types import Constraint

MAX_TOOLS = 128
# DeepSeek's words, which clients look for.
NO_JSON = "Prompt must contain the word 'json' in some form to use 'response_format' of type 'json_object'."


# ---- messages and tools ---------------------------------------------------------------------------------------------


class CalledFunction(Fields):
    name: str
    arguments: str


class Call(Fields):
    """`index` comes back from clients that glue a stream together."""

    index: int | None = None
    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(Fields):
    """One turn. Unknown fields are refused, since they would change the prompt; so is `name`, which no chat format
    writes, but on a tool's answer: its call says which tool that was."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: Entries[Call] = []
    tool_call_id: str | None = None
    prefix: bool = False

    @model_validator(mode="after")
    def _check(self) -> ChatMessage:
        if self.content is None and not self.tool_calls:
            raise wrong("content is missing")
        if self.name is not None and self.role != "tool":
            raise wrong("no chat format writes a name; say in the content who speaks")
        return self

    def plain(self) -> Message:
        """In the form of chat/messages.py."""
        values = self.model_dump(exclude_unset=True, exclude={"name"})
        return values | {"role": "system"} if self.role == "developer" else values


class Function(Fields):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Fields):
    type: Literal["function"] = "function"
    function: Function


def _tool_choice(value: object) -> ToolChoice:
    match value:
        case "none" | "auto" | "required":
            return ToolChoice(value)
        case {"type": "function", "function": {"name": str(name)}}:
            return ToolChoice("required", name)
    raise wrong("it must be 'none', 'auto', 'required' or {'type': 'function', 'function': {'name': '...'}}")


_NAMED_FUNCTION = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}
_NAMED = {
    "type": "object",
    "properties": {"type": {"const": "function"}, "function": _NAMED_FUNCTION},
    "required": ["type", "function"],
}
Choice = Annotated[
    ToolChoice,
    PlainValidator(_tool_choice),
    WithJsonSchema({"anyOf": [{"enum": ["none", "auto", "required"]}, _NAMED]}),
]


# ---- the request ----------------------------------------------------------------------------------------------------


class JSONSchema(Fields):
    """An answer's schema; it is kept to the letter, strict or not."""

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Fields):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JSONSchema | None = None


class StructuredOutputs(Fields):
    """vLLM's extension: the answer matches a regular expression, is one of several texts, or fits a Lark grammar."""

    regex: str | None = None
    choice: Entries[str] | None = None
    lark: str | None = None

    def constraint(self) -> Constraint:
        """The one that is given.

        Raises:
            InputError: none or several are, or it is empty.
        """
        given = self.model_dump(exclude_unset=True)
        if len(given) != 1:
            raise FieldError("structured_outputs", "structured_outputs must have one field: regex, choice or lark")
        ((kind, value),) = given.items()
        return Constraint(kind, tuple(value) if isinstance(value, list) else value)


class Thinking(Fields):
    type: Literal["enabled", "disabled"]


def _not_empty(messages: object) -> object:
    if messages == []:
        raise out_of_range("Empty input messages")
    return messages


class ChatRequest(Sampling):
    """What may be asked. Without a limit an answer may fill the model's context."""

    messages: Annotated[Entries[ChatMessage], BeforeValidator(_not_empty), Field(min_length=1)]
    max_tokens: TokenCount | None = None
    max_completion_tokens: TokenCount | None = None
    thinking: Thinking | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max", "ultra"] | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)] = []
    tool_choice: Choice | None = None
    parallel_tool_calls: bool = True
    logprobs: bool = False
    top_logprobs: TopLogprobs | None = None
    modalities: Entries[Literal["text"]] | None = None

    def ask(self, model: Model, alias_thinks: bool | None, efforts: Efforts) -> Ask:
        """What it comes down to.

        Raises:
            InputError: fields that contradict each other.
        """
        limits = (self.max_completion_tokens, self.max_tokens, model.max_length)
        effort = EFFORTS.get(self.reasoning_effort or "")
        return Ask(
            messages=[message.plain() for message in self.messages],
            params=self.params(next(limit for limit in limits if limit is not None), self._num_logprobs()),
            tools=[tool.model_dump(exclude_unset=True) for tool in self.tools],
            tool_choice=self.tool_choice or AUTO,
            parallel_calls=self.parallel_tool_calls,
            thinking=self._thinks(alias_thinks),
            budget=efforts.budget(effort) if effort else None,
            answer=self._answer(),
        )

    def _num_logprobs(self) -> int | None:
        if self.logprobs:
            return self.top_logprobs or 0
        if self.top_logprobs is not None:
            raise FieldError("top_logprobs", "top_logprobs needs logprobs; send logprobs true, too")
        return None

    def _thinks(self, alias_thinks: bool | None) -> bool | None:
        if self.thinking is None:
            return self.reasoning_effort != "none" if self.reasoning_effort else alias_thinks
        enabled = self.thinking.type == "enabled"
        if enabled and self.reasoning_effort == "none":
            raise FieldError("reasoning_effort", "reasoning_effort none contradicts thinking enabled; leave one out")
        return enabled

    def _answer(self) -> Constraint | None:
        form = self.response_format or ResponseFormat(type="text")
        if self.structured_outputs and form.type != "text":
            raise FieldError("structured_outputs", "structured_outputs and response_format exclude each other")
        if form.type != "text" and self.messages[-1].prefix:
            raise FieldError("response_format", "an answer with a prefix cannot have a response_format; leave one out")
        if self.structured_outputs:
            return self.structured_outputs.constraint()
        if form.type == "json_object":
            if not any("json" in (message.content or "").lower() for message in self.messages):
                raise FieldError("response_format", NO_JSON)
            return Constraint("json_schema", '{"type": "object"}')
        return Constraint("json_schema", _written_schema(form.json_schema)) if form.type == "json_schema" else None


def _written_schema(given: JSONSchema | None) -> str:
    if given is None:
        raise FieldError("response_format", "response_format of type json_schema needs the field json_schema")
    if is_deep(given.schema_):
        raise FieldError("response_format", f"the JSON schema is nested more than {MAX_DEPTH} deep; make it flatter")
    return json.dumps(given.schema_)


# ---- models ---------------------------------------------------------------------------------------------------------


class ModelBody(TypedDict):
    """`root` is the model that an alias stands for. The last two are null while it loads: the most tokens that prompt
    and answer may have together, and whether it thinks."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    context_length: int | None
    thinking: Literal["never", "always", "choice"] | None


class ModelList(TypedDict):
    object: Literal["list"]
    data: list[ModelBody]


def _model_body(name: str, model: Model) -> ModelBody:
    loaded = model.loaded
    return {
        "id": name,
        "object": "model",
        "created": model.created,
        "owned_by": "porcelet",
        "root": model.name,
        "context_length": model.max_length if loaded else None,
        "thinking": loaded.format.thinking(loaded.tokenizer) if loaded else None,
    }


# ---- the routes -----------------------------------------------------------------------------------------------------


def routes(models: Models) -> APIRouter:
    """The dialect over the served models."""
    router = APIRouter()
    inner = _routes(models)
    router.include_router(inner, prefix="/v1")
    for prefix in ("", "/beta"):
        router.include_router(inner, prefix=prefix, include_in_schema=False)
    return router


def _routes(models: Models) -> APIRouter:
    router = APIRouter(tags=["OpenAI"])
    router.include_router(completions.routes(models))
    server, efforts = models.config.server, models.config.efforts

    @router.get("/models")
    async def list_models() -> ModelList:
        return {"object": "list", "data": [_model_body(name, models.named(name)[0]) for name in models.names]}

    @router.get("/models/{name:path}")
    async def get_model(name: str) -> ModelBody:
        return _model_body(name, models.named(name)[0])

    @router.post("/chat/completions", response_model=ChatCompletion, responses={200: STREAMED})
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        model, alias_thinks = await models.find(body.model)
        events = model.answer(body.ask(model, alias_thinks, efforts), caller_of(request))
        head = Head.new("chatcmpl", body.model, model)
        if body.stream:
            frames = chunk_frames(head, events, body.stream_options.include_usage)
            return await stream(request, frames, failed(request), server.keep_alive)
        return await whole(request, whole_body(head, events, body.n), server.keep_alive)

    return router
