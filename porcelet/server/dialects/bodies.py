"""What the bodies of /v1/responses and /v1/messages share: fields that are ignored or refused with a reason, lists of
typed blocks, and the pieces that an `Ask` is made of.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any, ClassVar

from pydantic import model_validator

from porcelet.chat.messages import MAX_DEPTH, is_deep
from porcelet.chat.tools import ToolChoice
from porcelet.config.serving import Efforts
from porcelet.server.dialects.fields import MAX_ENTRIES, Fields, out_of_range, wrong
from porcelet.server.errors import FieldError
from porcelet.server.generation.ask import EFFORTS
from porcelet.types import Constraint


class Body(Fields):
    """One object of a request. `ignored` fields change nothing in the answer; `refused` ones say why they cannot be
    honoured."""

    ignored: ClassVar[Collection[str]] = ()
    refused: ClassVar[Mapping[str, str]] = {}

    @model_validator(mode="before")
    @classmethod
    def _tidy(cls, values: object) -> object:
        if not isinstance(values, dict):
            return values
        for name, reason in cls.refused.items():
            if values.get(name) not in (None, False):
                raise FieldError(name, f"{name} is not supported: {reason}")
        unread = {*cls.ignored, *cls.refused}
        return {name: value for name, value in values.items() if name not in unread}


def listed(content: object, kind: str) -> object:
    """A plain text as a list of one block of that type."""
    return [{"type": kind, "text": content}] if isinstance(content, str) else content


def of_types(blocks: object, known: Collection[str], remedy: str, default: str | None = None) -> object:
    """The list with every block's type filled in.

    Raises:
        PydanticCustomError: a type is not `known`, or there are too many.
    """
    if not isinstance(blocks, list):
        return blocks
    if len(blocks) > MAX_ENTRIES:
        raise out_of_range(f"a list has {len(blocks)} entries; at most {MAX_ENTRIES} are allowed")
    typed = [{"type": default} | block if isinstance(block, dict) and default else block for block in blocks]
    for index, block in enumerate(typed):
        kind = block.get("type") if isinstance(block, dict) else None
        if isinstance(kind, str) and kind not in known:
            supported = ", ".join(sorted(known))
            raise wrong(f"its item {index} has the type {kind[:80]!r}; supported: {supported}; {remedy}")
    return typed


def function_tool(name: str, description: str, parameters: Mapping[str, Any], strict: bool) -> dict[str, Any]:
    """A tool in the form of chat/messages.py."""
    function = {"name": name, "description": description, "parameters": parameters} | (
        {"strict": True} if strict else {}
    )
    return {"type": "function", "function": function}


def function_call(id: str, name: str, arguments: str) -> dict[str, Any]:
    """A call in the form of chat/messages.py."""
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def json_text(value: Mapping[str, Any], param: str) -> str:
    """An object as JSON text.

    Raises:
        FieldError: it is nested too deep.
    """
    if is_deep(value):
        raise FieldError(param, f"{param} is nested more than {MAX_DEPTH} deep; make it flatter")
    return json.dumps(value, ensure_ascii=False)


def json_answer(schema: Mapping[str, Any], param: str) -> Constraint:
    """An answer that fits a JSON schema.

    Raises:
        FieldError: it is nested too deep.
    """
    return Constraint("json_schema", json_text(schema, param))


def possible(choice: ToolChoice, tools: Collection[str]) -> ToolChoice:
    """The choice, if there is a tool for it.

    Raises:
        FieldError: there is none.
    """
    if choice.mode == "required" and not tools:
        raise FieldError("tool_choice", "tool_choice asks for a call, but there are no tools; send some")
    if choice.name is not None and choice.name not in tools:
        raise FieldError("tool_choice", f"tool_choice names {choice.name[:80]!r}, which is none of the tools")
    return choice


def effort_budget(effort: str, efforts: Efforts, param: str) -> int | None:
    """Tokens of reasoning that an effort allows; None sets no limit.

    Raises:
        FieldError: there is no such effort.
    """
    if effort not in EFFORTS:
        raise FieldError(param, f"{param} is {effort[:80]!r}; it must be one of {', '.join(EFFORTS)}")
    return efforts.budget(EFFORTS[effort])
