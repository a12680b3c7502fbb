"""How strictly a body is read: what is too much, or wrong a million times, is refused at the first place."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from porcelet.server.dialects.anthropic import MessagesRequest
from porcelet.server.dialects.fields import MAX_ENTRIES, MAX_FIELDS
from porcelet.server.dialects.openai import ChatRequest
from porcelet.server.dialects.responses import ResponsesRequest
from porcelet.server.dialects.tokenize import DetokenizeRequest, TokenizeRequest

TURN = {"role": "user", "content": "x"}
LISTS: list[tuple[type[BaseModel], dict[str, Any], Any]] = [
    (ChatRequest, {"messages": None}, TURN),
    (ChatRequest, {"messages": [TURN | {"content": None}]}, {"type": "text", "text": "x"}),
    (ChatRequest, {"messages": [TURN | {"tool_calls": None}]}, {"function": {"name": "f", "arguments": ""}}),
    (ChatRequest, {"messages": [TURN], "structured_outputs": {"choice": None}}, "x"),
    (ChatRequest, {"messages": [TURN], "stop_token_ids": None}, 1),
    (ChatRequest, {"messages": [TURN], "tools": None}, {"function": {"name": "f"}}),
    (MessagesRequest, {"max_tokens": 1, "messages": None}, TURN),
    (MessagesRequest, {"max_tokens": 1, "messages": [TURN | {"content": None}]}, {"type": "text", "text": "x"}),
    (MessagesRequest, {"max_tokens": 1, "messages": [TURN], "system": None}, {"type": "text", "text": "x"}),
    (MessagesRequest, {"max_tokens": 1, "messages": [TURN], "tools": None}, {"name": "f", "input_schema": {}}),
    (MessagesRequest, {"max_tokens": 1, "messages": [TURN], "stop_sequences": None}, "x"),
    (ResponsesRequest, {"input": None}, TURN),
    (ResponsesRequest, {"input": [TURN | {"content": None}]}, {"type": "input_text", "text": "x"}),
    (ResponsesRequest, {"input": "x", "tools": None}, {"type": "function", "name": "f"}),
    (TokenizeRequest, {"messages": None}, TURN),
    (TokenizeRequest, {"messages": [TURN], "tools": None}, {"function": {"name": "f"}}),
    (DetokenizeRequest, {"tokens": None}, 1),
]


def filled(value: Any, entries: list[Any]) -> Any:
    """The body with `entries` where it has None."""
    if isinstance(value, dict):
        return {key: filled(each, entries) for key, each in value.items()}
    return [filled(each, entries) for each in value] if isinstance(value, list) else entries if value is None else value


@pytest.mark.parametrize(("form", "body", "entry"), LISTS)
def test_lists_end_at_their_first_error(form: type[BaseModel], body: dict[str, Any], entry: Any) -> None:
    """A list of bad entries gives one error, not one for each; a list that is too long is refused as that."""
    form.model_validate({"model": "m"} | filled(body, [entry]))
    with pytest.raises(ValidationError) as caught:
        form.model_validate({"model": "m"} | filled(body, [{"no": "such"}] * 100))
    assert caught.value.error_count() < 5
    with pytest.raises(ValidationError) as caught:
        form.model_validate({"model": "m"} | filled(body, [entry] * 300_000))
    assert [error["type"] in ("too_long", "out_of_range") for error in caught.value.errors()] == [True]


def test_objects_are_bounded() -> None:
    """Fields that nobody knows, biases and metadata are counted before they are looked at one by one."""
    many = {str(number): "x" for number in range(MAX_ENTRIES)}
    for form, body in (
        (ChatRequest, {"messages": [TURN], **many}),
        (ChatRequest, {"messages": [TURN], "logit_bias": many}),
        (ResponsesRequest, {"input": "x", "metadata": many}),
    ):
        with pytest.raises(ValidationError, match="at most") as caught:
            form.model_validate({"model": "m"} | body)
        assert caught.value.error_count() == 1 and len(many) > MAX_FIELDS
