"""The messages that come in, checked field by field: OpenAI's form with DeepSeek's `reasoning_content` and `prefix`.

    {"role": "system" | "user", "content": text}
    {"role": "assistant", "content": text, "reasoning_content"?: text, "tool_calls"?: [...], "prefix"?: true}
    {"role": "tool", "content": text, "tool_call_id"?: text}

A tool call is {"id"?, "type": "function", "function": {"name", "arguments": a JSON text}}, and a tool
{"type": "function", "function": {"name", "description"?, "parameters"?: a JSON schema, "strict"?: true}}. A field that
is None counts as absent; `content` may be so beside tool calls. Left out: `name`, which no format here writes, and
parts of content.

No form of a conversation writes ids. So the results of several calls are put into the calls' order, and a result for a
call that is not there is refused. A result without an id stays where it is; a call without a result is let be.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence, ValuesView
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from porcelet.errors import InputError

Message = Mapping[str, Any]
MAX_TOOLS = 128
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
MAX_DEPTH = 64  # of a schema, or of a call's arguments
FIELDS = {
    "system": {"role", "content"},
    "user": {"role", "content"},
    "assistant": {"role", "content", "reasoning_content", "tool_calls", "prefix"},
    "tool": {"role", "content", "tool_call_id"},
}


@dataclass(frozen=True)
class Call:
    """One tool call; `arguments` is JSON text as the model wrote it."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class Tool:
    """A function the model may call; `parameters` is a JSON schema, which `strict` binds the model to."""

    name: str
    description: str
    parameters: Mapping[str, Any]
    strict: bool = False


@dataclass(frozen=True)
class Turn:
    """One message. `content` is None only beside calls; `prefix` marks an answer that is to be continued."""

    role: str
    content: str | None
    reasoning: str = ""
    calls: tuple[Call, ...] = ()
    call_id: str = ""
    prefix: bool = False


@dataclass(frozen=True)
class Conversation:
    """All that a format writes. `prompt`: the assistant is to begin an answer after the last turn."""

    turns: tuple[Turn, ...]
    tools: tuple[Tool, ...] = ()
    thinking: bool | None = None
    prompt: bool = True

    @property
    def continues(self) -> bool:
        """The last turn is an answer to go on with."""
        return self.turns[-1].prefix

    @property
    def uses_tools(self) -> bool:
        """Some are offered, were called or have answered."""
        return bool(self.tools) or any(turn.role == "tool" or turn.calls for turn in self.turns)


def check(
    messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None, thinking: bool | None, prompt: bool
) -> Conversation:
    """The conversation, once every field is known to be what it should be.

    Raises:
        InputError: names the message and the field.
    """
    if not messages:
        raise InputError("messages is empty; give at least one, such as {'role': 'user', 'content': '...'}")
    turns = [_turn(message, f"messages[{index}]") for index, message in enumerate(messages)]
    for index, turn in enumerate(turns[:-1]):
        if turn.prefix:
            raise InputError(f"messages[{index}].prefix is true; only the last message can be continued")
    return Conversation(tuple(_in_order(turns)), check_tools(tools or ()), thinking, prompt and not turns[-1].prefix)


def check_tools(tools: Sequence[Mapping[str, Any]]) -> tuple[Tool, ...]:
    """The tools, once every field is known to be what it should be.

    Raises:
        InputError: names the tool and the field.
    """
    if len(tools) > MAX_TOOLS:
        raise InputError(f"tools has {len(tools)} entries; at most {MAX_TOOLS} are allowed")
    checked = tuple(_tool(tool, f"tools[{index}]") for index, tool in enumerate(tools))
    names = Counter(tool.name for tool in checked)
    for index, tool in enumerate(checked):
        if names[tool.name] > 1:
            raise InputError(f"tools[{index}].function.name is {tool.name!r}, which another tool has; rename one")
    return checked


def _in_order(turns: list[Turn]) -> list[Turn]:
    """The turns, each run of results in the order of the calls that they answer."""
    places: dict[str, int] = {}
    for index, turn in enumerate(turns):
        places |= {call.id: len(places) + number for number, call in enumerate(turn.calls) if call.id}
        if turn.call_id and turn.call_id not in places:
            raise InputError(
                f"messages[{index}].tool_call_id is {turn.call_id[:80]!r}, the id of no call before it; "
                "send the assistant's message with its tool_calls, too"
            )
    ordered: list[Turn] = []
    for is_result, run in groupby(turns, key=lambda turn: turn.role == "tool"):
        results = list(run)
        if is_result and all(turn.call_id for turn in results):
            results.sort(key=lambda turn: places[turn.call_id])
        ordered += results
    return ordered


def _turn(message: Message, place: str) -> Turn:
    values = _object(message, place)
    role = values.get("role")
    if not isinstance(role, str) or role not in FIELDS:
        raise InputError(f"{place}.role is {role!r}; it must be one of {', '.join(FIELDS)}")
    _refuse_unknown(values, FIELDS[role], place)
    calls = tuple(
        _call(call, f"{place}.tool_calls[{index}]")
        for index, call in enumerate(_typed(values, "tool_calls", list, [], place))
    )
    if "content" not in values and not calls:
        raise InputError(f"{place} must have the fields role and content")
    if calls and values.get("prefix"):
        raise InputError(f"{place} has tool_calls and prefix; an answer with calls cannot be continued")
    return Turn(
        role=role,
        content=None if calls and values.get("content") is None else _text(values, "content", place),
        reasoning=_typed(values, "reasoning_content", str, "", place),
        calls=calls,
        call_id=_typed(values, "tool_call_id", str, "", place),
        prefix=_typed(values, "prefix", bool, False, place),
    )


def _call(call: Any, place: str) -> Call:
    values = _object(call, place)
    # `index` comes back from clients that glue a stream together.
    _refuse_unknown(values, {"id", "type", "function", "index"}, place)
    function = _function(values, place, {"name", "arguments"})
    name, arguments = (_text(function, field, f"{place}.function") for field in ("name", "arguments"))
    return Call(_typed(values, "id", str, "", place), name, arguments)


def _tool(tool: Any, place: str) -> Tool:
    values = _object(tool, place)
    _refuse_unknown(values, {"type", "function"}, place)
    function = _function(values, place, {"name", "description", "parameters", "strict"})
    place = f"{place}.function"
    _require_json(function.get("parameters"), f"{place}.parameters")
    name = _text(function, "name", place)
    if not _NAME.fullmatch(name):
        raise InputError(f"{place}.name is {name[:80]!r}; it must be 1 to 64 of the characters A-Z a-z 0-9 _ -")
    return Tool(
        name,
        _typed(function, "description", str, "", place),
        _typed(function, "parameters", Mapping, {}, place),
        _typed(function, "strict", bool, False, place),
    )


def is_deep(value: Any) -> bool:
    """Whether objects and lists lie in each other more than `MAX_DEPTH` times."""
    level = [value]
    for _ in range(MAX_DEPTH):
        inner = (item.values() if isinstance(item, Mapping) else item for item in level)
        level = [part for parts in inner if isinstance(parts, list | tuple | ValuesView) for part in parts]
    return bool(level)


def _require_json(value: Any, place: str) -> None:
    if is_deep(value):
        raise InputError(f"{place} is nested more than {MAX_DEPTH} deep; make it flatter")
    try:
        json.dumps(value)
    except (TypeError, ValueError) as problem:
        raise InputError(f"{place} is not JSON: {problem}; give a JSON schema") from problem


def _function(values: Mapping[str, Any], place: str, fields: set[str]) -> Mapping[str, Any]:
    if values.get("type", "function") != "function":
        raise InputError(f"{place}.type is {values['type']!r}; it must be 'function'")
    function = _object(values.get("function"), f"{place}.function")
    _refuse_unknown(function, fields, f"{place}.function")
    if not _text(function, "name", f"{place}.function"):
        raise InputError(f"{place}.function.name is empty; give the function's name")
    return function


def _object(value: Any, place: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise InputError(f"{place} is a {type(value).__name__}; it must be an object")
    return value


def _refuse_unknown(values: Mapping[str, Any], known: set[str], place: str) -> None:
    for name in values:
        if name not in known:
            raise InputError(f"{place} has the field {name!r}; it may have exactly {', '.join(sorted(known))}")


def _text(values: Mapping[str, Any], name: str, place: str) -> str:
    value = values.get(name)
    if not isinstance(value, str):
        raise InputError(f"{place}.{name} is a {type(value).__name__}; it must be a string")
    return value


def _typed(values: Mapping[str, Any], name: str, kind: type, default: Any, place: str) -> Any:
    value = values.get(name)
    if value is None:
        return default
    if not isinstance(value, kind):
        raise InputError(f"{place}.{name} is a {type(value).__name__}; it must be a {kind.__name__.lower()}")
    return value
