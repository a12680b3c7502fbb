"""The Responses dialect through OpenAI's own client, against a real server."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, Literal

import httpx
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from porcelet.errors import CapacityError
from porcelet.server.dialects.responses_reply import Reply
from tests.server.conftest import Server
from tests.server.dialects.test_anthropic import PARTS, pieces
from tests.server.dialects.test_openai import JSON, running, wait_for

WEATHER: Any = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather of a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    "strict": False,
}
ASK: Any = {"model": "agent", "input": "Hello", "tools": [WEATHER]}
THINK: Any = {"effort": "high"}
SEALED: Any = ["reasoning.encrypted_content"]


@pytest.fixture(scope="module")
def client(scripted: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{scripted.url}/v1", api_key="any", max_retries=0, timeout=20)


def post(server: Server, path: str = "/v1/responses", **changes: Any) -> httpx.Response:
    return httpx.post(server.url + path, json=ASK | changes, timeout=20)


def plain(response: Any) -> dict[str, Any]:
    """A response without what is new each time."""
    values: dict[str, Any] = response.model_dump(exclude={"id", "created_at", "completed_at"}, warnings=False)
    for item in values["output"]:
        item.pop("id"), item.pop("call_id", None), item.pop("parsed_arguments", None)
        for part in item.get("content") or []:
            part.pop("parsed", None)
    if values["usage"]:
        values["usage"].pop("input_tokens_details")
    return values


# ---- answers --------------------------------------------------------------------------------------------------------


def test_an_answer_with_all_kinds_of_items(client: openai.OpenAI) -> None:
    """Reasoning, message and call are items; all of it is counted; nothing is stored."""
    response = client.responses.create(**ASK, reasoning=THINK)
    reasoning, message, call = response.output
    assert (reasoning.type, reasoning.content[0].text, reasoning.summary) == ("reasoning", "Let me think.", [])
    assert (message.type, message.role, response.output_text) == ("message", "assistant", "Hi there!")
    assert (call.type, call.name, json.loads(call.arguments)) == ("function_call", "get_weather", {"city": "Paris"})
    assert [item.status for item in response.output] == ["completed"] * 3
    assert (response.status, response.error, response.incomplete_details) == ("completed", None, None)
    usage = response.usage
    assert (usage.output_tokens, usage.output_tokens_details.reasoning_tokens) == (16, 4)
    assert usage.total_tokens == usage.input_tokens + 16
    again = client.responses.create(**ASK, reasoning=THINK)
    assert again.usage.input_tokens == usage.input_tokens >= again.usage.input_tokens_details.cached_tokens
    assert (response.store, response.tools[0].name) == (False, "get_weather")


@pytest.mark.parametrize("effort", ["high", "none"])
def test_streamed_equals_whole_wherever_it_is_cut(client: openai.OpenAI, effort: Any) -> None:
    """OpenAI's client puts the stream together to what it gets whole, wherever max_output_tokens cuts it."""
    ends = set()
    for max_tokens in range(1, 19):
        ask = ASK | {"max_output_tokens": max_tokens, "reasoning": {"effort": effort}}
        whole = client.responses.create(**ask)
        with client.responses.stream(**ask) as stream:
            *_, last = stream
        assert plain(last.response) == plain(whole)
        assert last.type == f"response.{whole.status}"
        ends.add((whole.status, whole.incomplete_details and whole.incomplete_details.reason))
        assert whole.output[-1].status == whole.status if whole.output else True
    assert ends == {("incomplete", "max_output_tokens"), ("completed", None)}


def test_the_stream_has_deepseeks_order(scripted: Server) -> None:
    """The events of DeepSeek's own dialect, in its order and with its fields, each with a line that names it."""
    response = post(scripted, stream=True, reasoning=THINK, include=SEALED)
    frames = [frame.split("\n") for frame in response.text.strip().split("\n\n")]
    events = [json.loads(data.removeprefix("data: ")) for _, data in frames]
    assert [name for name, _ in frames] == [f"event: {event['type']}" for event in events]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    steps = [(event["type"].removeprefix("response."), event.get("output_index")) for event in events]
    assert list(dict.fromkeys(steps)) == [
        ("created", None),
        ("in_progress", None),
        ("output_item.added", 0),
        ("content_part.added", 0),
        ("reasoning_text.delta", 0),
        ("reasoning_text.done", 0),
        ("content_part.done", 0),
        ("output_item.done", 0),
        ("output_item.added", 1),
        ("content_part.added", 1),
        ("output_text.delta", 1),
        ("output_text.done", 1),
        ("content_part.done", 1),
        ("output_item.done", 1),
        ("output_item.added", 2),
        ("function_call_arguments.delta", 2),
        ("function_call_arguments.done", 2),
        ("output_item.done", 2),
        ("completed", None),
    ]
    fields = {event["type"].removeprefix("response."): set(event) - {"type", "sequence_number"} for event in events}
    where = {"item_id", "output_index"}
    assert fields["reasoning_text.delta"] == {*where, "content_index", "delta"}
    assert fields["reasoning_text.done"] == {*where, "content_index", "text"}
    assert fields["content_part.added"] == fields["content_part.done"] == {*where, "content_index", "part"}
    assert fields["output_text.delta"] == {*where, "content_index", "delta", "logprobs"}
    assert fields["output_text.done"] == {*where, "content_index", "text", "logprobs"}
    assert fields["output_item.added"] == fields["output_item.done"] == {"item", "output_index"}
    items = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert items == events[-1]["response"]["output"]
    assert set(items[0]) == {"type", "id", "status", "content", "summary", "encrypted_content"}
    assert set(items[1]) == {"type", "id", "status", "role", "phase", "content"}
    assert set(items[1]["content"][0]) == {"type", "annotations", "logprobs", "text"}


def test_efforts(client: openai.OpenAI) -> None:
    """An effort makes a model think, "none" does not; without one an alias decides, then the model's habit."""

    def first(**changes: Any) -> str:
        return client.responses.create(**(ASK | changes)).output[0].type

    assert first() == first(reasoning={"effort": "none"}) == "message"
    for effort in ("minimal", "low", "medium", "high", "xhigh", "max"):
        assert first(reasoning={"effort": effort, "summary": "auto"}) == "reasoning"
    assert first(model="deepseek-reasoner") == "reasoning"
    assert first(model="deepseek-reasoner", reasoning={"effort": "none"}) == "message"


def test_logprobs(client: openai.OpenAI) -> None:
    """Asked for by name or by number, the answer's tokens have their log-probabilities; streamed they are the same."""
    include: Any = ["message.output_text.logprobs"]
    ask = ASK | {"reasoning": THINK, "top_logprobs": 2, "include": include}
    entries = client.responses.create(**ask).output[1].content[0].logprobs
    assert [entry.token for entry in entries] == ["Hi", " there", "!"]
    assert all(len(entry.top_logprobs) == 2 and entry.logprob <= 0 for entry in entries)
    with client.responses.stream(**ask) as stream:
        deltas = [event for event in stream if event.type == "response.output_text.delta"]
    assert [entry.token for event in deltas for entry in event.logprobs] == ["Hi", " there", "!"]
    assert client.responses.create(**ASK, include=include).output[0].content[0].logprobs[0].top_logprobs == []
    assert client.responses.create(**ASK).output[0].content[0].logprobs == []


class Verdict(BaseModel):
    verdict: Literal["yes", "no"]


def test_an_answer_in_a_schema_is_parsed(server: Server) -> None:
    """`responses.parse` gets its type, and json_object an object."""
    tiny = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0, timeout=20)
    parsed = tiny.responses.parse(model="tiny", input="Hello", text_format=Verdict, temperature=1.5)
    assert parsed.output_parsed.verdict in ("yes", "no")
    form: Any = {"format": {"type": "json_object"}}
    text = tiny.responses.create(model="tiny", input="json", text=form, max_output_tokens=20).output_text
    assert text.startswith("{")


# ---- conversations --------------------------------------------------------------------------------------------------


def test_a_conversation_with_tools_goes_on(client: openai.OpenAI) -> None:
    """An answer's items come back with the next request; reasoning comes back as its text, or sealed: both are the
    same prompt, and what another server sealed is left out of it."""
    first = client.responses.create(**ASK, reasoning=THINK, include=SEALED)
    reasoning, *rest = [item.model_dump(exclude_none=True) for item in first.output]
    result = {"type": "function_call_output", "call_id": first.output[2].call_id, "output": "sunny"}

    def size(*items: Any) -> int:
        talk: Any = [{"role": "user", "content": "Hello"}, *items]
        return client.responses.create(**(ASK | {"input": talk, "reasoning": THINK})).usage.input_tokens

    full = size(reasoning, *rest, result)
    sealed = {"type": "reasoning", "summary": [], "encrypted_content": reasoning["encrypted_content"]}
    foreign = sealed | {"encrypted_content": "gAAAAAB"}
    parts = result | {"output": [{"type": "input_text", "text": "sunny"}]}
    assert size(sealed, *rest, result) == size(sealed, *rest, parts) == full
    assert size(foreign, *rest, result) == size(*rest, result) == full - len("Let me think.") - 1


def test_what_codex_sends(client: openai.OpenAI) -> None:
    """Its fields, its developer messages and its functions are taken."""
    response = client.responses.create(
        **(ASK | {"tools": [WEATHER | {"name": name} for name in ("shell", "update_plan", "view_image")]}),
        instructions="You are a coding agent.",
        tool_choice="auto",
        parallel_tool_calls=False,
        reasoning={"effort": "medium", "summary": "auto"},
        store=False,
        include=SEALED,
        prompt_cache_key="0199",
        service_tier="auto",
        extra_body={
            "client_metadata": {"x-codex-installation-id": "1"},
            "input": [
                {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "Sandbox: on"}]},
                {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "<cwd>/</cwd>"}]},
                {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hello"}]},
            ],
        },
    )
    assert [item.type for item in response.output] == ["reasoning", "message", "function_call"]


def test_instructions_are_a_system_message(client: openai.OpenAI) -> None:
    """Instructions, system and developer messages, as texts or as parts, are the same prompt."""

    def size(*items: Any, **changes: Any) -> int:
        talk: Any = [*items, {"role": "user", "content": "Hello"}]
        return client.responses.create(**(ASK | {"input": talk, "tools": []} | changes)).usage.input_tokens

    spoken = [{"type": "input_text", "text": "Be "}, {"type": "input_text", "text": "brief."}]
    assert size(instructions="Be brief.") == size({"role": "system", "content": "Be brief."})
    assert size(instructions="Be brief.") == size({"role": "developer", "content": spoken}) == size() + len("Be brief.")


# ---- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "param", "named"),
    [
        ({"store": True}, "store", "keeps no answers"),
        ({"previous_response_id": "resp_1"}, "previous_response_id", "keeps no answers"),
        ({"conversation": "conv_1"}, "conversation", "keeps no conversations"),
        ({"background": True}, "background", "stream instead"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt", "keeps no prompts"),
        ({"truncation": "auto"}, "truncation", "disabled"),
        ({"answer_me": 1}, "answer_me", "answer_me"),
        ({"tools": [WEATHER, {"type": "web_search"}]}, "tools", "'web_search'"),
        ({"tools": [{"type": "custom", "name": "apply_patch"}]}, "tools", "'custom'"),
        ({"tools": [{"type": "local_shell"}, {"type": "web_search"}]}, "tools", "'local_shell' and its item 1 has"),
        ({"tools": [{"type": "web_search"}]}, "tools", "config.toml"),
        ({"metadata": {"a": "\ud800"}}, "metadata", "no character"),
        ({"instructions": "\ud800"}, "instructions", "no character"),
        ({"text": {"format": {"type": "text", "name": "\ud800"}}}, "text", "no character"),
        ({"tools": [WEATHER | {"parameters": {"\ud800": {}}}]}, "tools", "no character"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice", "no tools"),
        ({"tool_choice": {"type": "function", "name": "other"}}, "tool_choice", "'other'"),
        ({"include": ["file_search_call.results"]}, "include[0]", "include"),
        ({"reasoning": {"effort": "lazy"}}, "reasoning.effort", "minimal, low"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema", "json_schema"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input", "'item_reference'"),
        ({"input": [{"type": "custom_tool_call", "input": "x"}]}, "input", "'custom_tool_call'"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, None, "'input_image'"),
        ({"input": [{"role": "king", "content": "x"}]}, None, "role"),
        ({"input": []}, None, "messages"),
        ({"input": None}, "input", "missing"),
        ({"temperature": "hot"}, "temperature", "temperature"),
        ({"max_output_tokens": 0}, "max_output_tokens", "max_output_tokens"),
        ({"temperature": 2.5}, "temperature", "temperature"),
    ],
)
def test_bad_fields_are_named(scripted: Server, changes: dict[str, Any], param: str | None, named: str) -> None:
    """What cannot be honoured is refused by name before any stream begins, in OpenAI's form."""
    body = json.dumps(ASK | {"stream": True} | changes)
    response = httpx.post(f"{scripted.url}/v1/responses", content=body, headers=JSON, timeout=20)
    error = response.json()["error"]
    assert response.status_code in (400, 422)
    assert error["type"] == "invalid_request_error"
    assert named in error["message"]
    assert param is None or error["param"] == param


def test_unknown_models_are_not_found(client: openai.OpenAI) -> None:
    """As in the other dialects."""
    with pytest.raises(openai.NotFoundError, match="'gpt-5' is not served here"):
        client.responses.create(**(ASK | {"model": "gpt-5"}))


def test_the_short_path(scripted: Server) -> None:
    """Clients whose address has no /v1 find it, too."""
    assert post(scripted, path="/responses").json()["object"] == "response"


def test_client_that_leaves_frees_the_engine(server: Server) -> None:
    """Hanging up aborts the request."""
    ask = {"model": "tiny", "max_output_tokens": 16_000, "input": "Hello", "temperature": 0, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/responses", json=ask, timeout=20) as response:
        body = response.iter_bytes()  # dropped, it would close the response
        next(body)
        assert running(server) == 1
    wait_for(lambda: running(server) == 0, 1)


# ---- the encoder ----------------------------------------------------------------------------------------------------


def glued(events: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """What a client makes of a stream's items before it sees them done, which then must be the same."""
    output: list[dict[str, Any]] = []
    for number, event in enumerate(events):
        assert event["sequence_number"] == number
        match event:
            case {"type": "response.output_item.added", "item": item, "output_index": index}:
                assert index == len(output)
                output.append(item)
            case {"type": "response.content_part.added", "part": part}:
                output[-1]["content"].append(part)
            case {"type": "response.function_call_arguments.delta", "delta": text, "item_id": id}:
                assert id == output[-1]["id"]
                output[-1]["arguments"] += text
            case {"type": "response.reasoning_text.delta" | "response.output_text.delta", "delta": text}:
                output[-1]["content"][0]["text"] += text
            case {"type": "response.output_item.done", "item": item}:
                assert output[-1] | {"status": "completed"} == item
                output[-1] = item
    return output


@given(st.lists(PARTS, max_size=8))
def test_any_stream_glued_is_the_whole(parts: list[Any]) -> None:
    """Whatever a model says in whatever order, items open and close one after the other and make up the answer."""
    reply = Reply("resp_1", 0, {}, False)
    events = [json.loads(json.dumps(body)) for event in pieces(parts) for body in reply.encode(event)]
    assert glued(events) == reply.whole()["output"]
    assert events[-1]["response"] == reply.whole() | {"completed_at": events[-1]["response"]["completed_at"]}


def test_a_stream_that_fails_says_so() -> None:
    """A failed response is the last event, and the first ones come before it even where nothing else did."""
    events = list(Reply("resp_1", 0, {}, False).fail(CapacityError("the engine is busy")))
    assert [event["type"] for event in events] == ["response.created", "response.in_progress", "response.failed"]
    assert events[-1]["response"]["error"]["message"] == "the engine is busy"
    assert events[-1]["response"]["status"] == "failed"
