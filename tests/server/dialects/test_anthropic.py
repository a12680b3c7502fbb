"""Anthropic's dialect through Anthropic's own client and LiteLLM, against a real server."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import anthropic
import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from porcelet.chat import Content, Reasoning, ToolCallArguments, ToolCallStart
from porcelet.errors import CapacityError
from porcelet.server.dialects.anthropic import Reply
from porcelet.server.gate.keys import PREFIX
from porcelet.server.generation.events import Ended, Event, Piece, Started, Usage
from tests.server.conftest import Server
from tests.server.dialects.test_openai import JSON, running, wait_for

WEATHER: Any = {
    "name": "get_weather",
    "description": "The weather of a city.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
}
ASK: Any = {
    "model": "agent",
    "max_tokens": 100,
    "messages": [{"role": "user", "content": "Hello"}],
    "tools": [WEATHER],
}
THINK: Any = {"type": "enabled", "budget_tokens": 50}


@pytest.fixture(scope="module")
def client(scripted: Server) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=scripted.url, api_key="any", max_retries=0, timeout=20)


def post(server: Server, path: str = "/v1/messages", **changes: Any) -> httpx.Response:
    return httpx.post(server.url + path, json=ASK | changes, timeout=20)


def plain(message: Any) -> dict[str, Any]:
    """A message without what is new each time."""
    values: dict[str, Any] = message.model_dump(exclude={"id"})
    for block in values["content"]:
        block.pop("id", None), block.pop("signature", None), block.pop("parsed_output", None)
    # The second time a prompt is asked, its beginning is in the cache.
    usage = values["usage"]
    usage["input_tokens"] += usage.pop("cache_read_input_tokens")
    return values


# ---- answers --------------------------------------------------------------------------------------------------------


def test_an_answer_with_all_kinds_of_blocks(client: anthropic.Anthropic) -> None:
    """Reasoning is a signed thinking block, the answer text, the call a tool_use; all of it is counted."""
    message = client.messages.create(**ASK, thinking=THINK)
    thinking, text, call = message.content
    assert (thinking.type, thinking.thinking, thinking.signature) == ("thinking", "Let me think.", message.id)
    assert (text.type, text.text) == ("text", "Hi there!")
    assert (call.type, call.name, call.input) == ("tool_use", "get_weather", {"city": "Paris"})
    assert (message.stop_reason, message.stop_sequence, message.model) == ("tool_use", None, "agent")
    assert message.usage.output_tokens == 16  # the end of the calls ends the answer
    assert message.usage.output_tokens_details.thinking_tokens == 4


@pytest.mark.parametrize("thinking", ["enabled", "disabled"])
def test_streamed_equals_whole_wherever_it_is_cut(client: anthropic.Anthropic, thinking: str) -> None:
    """Anthropic's client puts the stream together to what it gets whole, wherever max_tokens cuts it."""
    reasons = set()
    for max_tokens in range(1, 19):
        ask = ASK | {"max_tokens": max_tokens, "thinking": {"type": thinking}}
        whole = client.messages.create(**ask)
        with client.messages.stream(**ask) as stream:
            assert plain(stream.get_final_message()) == plain(whole)
        reasons.add(whole.stop_reason)
    assert reasons == {"max_tokens", "tool_use"}


def test_the_stream_has_deepseeks_order(scripted: Server) -> None:
    """The events of DeepSeek's own dialect, in its order, each with a line that names it."""
    response = post(scripted, stream=True, thinking=THINK)
    frames = [frame.split("\n") for frame in response.text.strip().split("\n\n")]
    events = [json.loads(data.removeprefix("data: ")) for _, data in frames]
    assert [name for name, _ in frames] == [f"event: {event['type']}" for event in events]
    steps = [(event["type"], event.get("index"), event.get("delta", {}).get("type")) for event in events]
    assert list(dict.fromkeys(steps)) == [
        ("message_start", None, None),
        ("content_block_start", 0, None),
        ("ping", None, None),
        ("content_block_delta", 0, "thinking_delta"),
        ("content_block_delta", 0, "signature_delta"),
        ("content_block_stop", 0, None),
        ("content_block_start", 1, None),
        ("content_block_delta", 1, "text_delta"),
        ("content_block_stop", 1, None),
        ("content_block_start", 2, None),
        ("content_block_delta", 2, "input_json_delta"),
        ("content_block_stop", 2, None),
        ("message_delta", None, None),
        ("message_stop", None, None),
    ]
    start, *_, delta, _ = events
    assert set(start["message"]) == {
        *("id", "type", "role", "model", "content", "stop_reason", "stop_sequence", "usage")
    }
    assert {"input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens", "output_tokens"} < set(
        start["message"]["usage"]
    )
    assert delta["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    blocks = [event["content_block"] for event in events if event["type"] == "content_block_start"]
    assert [set(block) for block in blocks] == [
        {"type", "thinking", "signature"},
        {"type", "text"},
        {"type", "id", "name", "input"},
    ]


def test_how_answers_end(client: anthropic.Anthropic) -> None:
    """A stop sequence is named, and a limit is told from an end."""
    stopped = client.messages.create(**ASK, stop_sequences=["nothing", " there"])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", " there")
    assert stopped.content[0].text == "Hi"
    assert client.messages.create(**(ASK | {"max_tokens": 2})).stop_reason == "max_tokens"


def test_end_turn_is_a_plain_end(scripted: Server) -> None:
    """An answer that ends by itself."""
    answer = post(scripted, model="talker", tools=[]).json()
    assert (answer["stop_reason"], answer["content"]) == ("end_turn", [{"type": "text", "text": "Hi there"}])


def test_thinking_is_left_to_the_alias_and_the_model(client: anthropic.Anthropic) -> None:
    """Without a word in the request an alias decides, then the model's habit; adaptive is if the model can."""

    def blocks(**changes: Any) -> list[str]:
        return [block.type for block in client.messages.create(**(ASK | changes)).content]

    assert blocks()[0] == blocks(model="deepseek-chat")[0] == "text"
    assert blocks(model="deepseek-reasoner")[0] == blocks(thinking={"type": "adaptive"})[0] == "thinking"
    assert blocks(model="deepseek-reasoner", thinking={"type": "disabled"})[0] == "text"


def test_a_budget_ends_the_thinking(client: anthropic.Anthropic) -> None:
    """`budget_tokens` bounds the reasoning, and an effort does where no budget is given."""
    message = client.messages.create(**ASK, thinking={"type": "enabled", "budget_tokens": 2})
    assert message.content[0].thinking.startswith("Let me think\n\nThat is as long as")
    relaxed = client.messages.create(**ASK, thinking={"type": "adaptive"}, output_config={"effort": "low"})
    assert relaxed.content[0].thinking == "Let me think."


def test_an_answer_in_a_schema(server: Server) -> None:
    """`output_config.format` binds the answer."""
    schema = {"type": "object", "properties": {"yes": {"type": "boolean"}}, "required": ["yes"]}
    schema |= {"additionalProperties": False}
    ask = {"model": "tiny", "max_tokens": 500, "messages": ASK["messages"], "temperature": 1.5}
    ask |= {"output_config": {"format": {"type": "json_schema", "schema": schema}}}
    answer = httpx.post(f"{server.url}/v1/messages", json=ask, timeout=20).json()
    assert set(json.loads(answer["content"][0]["text"])) == {"yes"}


# ---- conversations --------------------------------------------------------------------------------------------------


def test_a_conversation_with_tools_goes_on(client: anthropic.Anthropic) -> None:
    """An answer is handed back as it came, with results as text or blocks; counting tells what an answer takes."""
    asked = ASK | {"system": [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]}
    first = client.messages.create(**asked, thinking=THINK)
    for content in ("sunny", [{"type": "text", "text": "sunny"}]):
        result = {"type": "tool_result", "tool_use_id": first.content[2].id, "content": content}
        talk = [
            *ASK["messages"],
            {"role": "assistant", "content": first.content},
            {"role": "user", "content": [result, {"type": "text", "text": "Go on."}]},
        ]
        second = client.messages.create(**(asked | {"messages": talk}))
        counted = client.messages.count_tokens(
            **{name: value for name, value in asked.items() if name != "max_tokens"} | {"messages": talk}
        )
        usage = second.usage
        assert counted.input_tokens == usage.input_tokens + usage.cache_read_input_tokens > first.usage.input_tokens
    failed = count(client, talk, is_error=True)
    assert failed > counted.input_tokens


def count(client: anthropic.Anthropic, talk: list[Any], is_error: bool) -> int:
    last = talk[-1]["content"][0] | {"is_error": is_error}
    talk = [*talk[:-1], {"role": "user", "content": [last, *talk[-1]["content"][1:]]}]
    system = [{"type": "text", "text": "Be brief."}]
    return client.messages.count_tokens(model="agent", system=system, tools=[WEATHER], messages=talk).input_tokens


def test_an_answer_can_be_begun(scripted: Server) -> None:
    """A conversation that ends with an answer has it continued."""
    begun = [*ASK["messages"], {"role": "assistant", "content": "Well, hello!"}]
    answer = post(scripted, messages=begun, thinking={"type": "disabled"}).json()
    assert [block["type"] for block in answer["content"]] == ["tool_use"]  # which the script says after "!"


def test_what_coding_agents_send(client: anthropic.Anthropic) -> None:
    """Many tools, system blocks, marks for caching, beta headers and fields, redacted thinking: all of it is taken."""
    tools = [WEATHER | {"name": f"tool_{index}", "eager_input_streaming": True} for index in range(80)]
    tools[-1]["cache_control"] = {"type": "ephemeral", "ttl": "1h"}
    talk = [
        {"role": "user", "content": [{"type": "text", "text": "<system-reminder>x</system-reminder>"}, *text("Hello")]},
        {"role": "assistant", "content": [{"type": "redacted_thinking", "data": "?"}, *text("Yes?")]},
        {"role": "user", "content": text("Go on.", cache_control={"type": "ephemeral"})},
    ]
    message = client.beta.messages.create(
        **(ASK | {"messages": talk, "tools": tools}),
        betas=["claude-code-20250219", "context-management-2025-06-27"],
        system=[*text("You are an agent."), *text("Environment: x", cache_control={"type": "ephemeral"})],
        context_management={"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        metadata={"user_id": "user_1"},
        output_config={"effort": "medium"},
        thinking={"type": "adaptive"},
    )
    assert [block.type for block in message.content] == ["thinking", "text", "tool_use"]


def text(words: str, **fields: Any) -> list[dict[str, Any]]:
    return [{"type": "text", "text": words} | fields]


@pytest.mark.usefixtures("event_loop_of_its_own")
def test_litellm_speaks_it(scripted: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """LiteLLM's anthropic provider gets reasoning, answer and call."""
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # it would fetch prices
    import litellm

    ask: Any = {
        "model": "anthropic/agent",
        "thinking": THINK,
        "allowed_openai_params": ["thinking"],
        "api_base": scripted.url,
        "api_key": "any",
        "messages": ASK["messages"],
        "tools": [{"type": "function", "function": {"name": "get_weather", "parameters": WEATHER["input_schema"]}}],
        "max_tokens": 100,
    }
    message = litellm.completion(**ask).choices[0].message
    streamed = litellm.stream_chunk_builder(list(litellm.completion(**ask, stream=True))).choices[0].message
    for answer in (message, streamed):
        assert (answer.reasoning_content, answer.content) == ("Let me think.", "Hi there!")
        assert json.loads(answer.tool_calls[0].function.arguments) == {"city": "Paris"}


# ---- errors ---------------------------------------------------------------------------------------------------------


def test_errors_reach_the_sdk_as_its_classes(client: anthropic.Anthropic) -> None:
    """Anthropic's form, with a request's id; the alias table covers its model names, and no other name is served."""
    with pytest.raises(anthropic.NotFoundError, match="'claude-x' is not served here") as missing:
        client.messages.create(**(ASK | {"model": "claude-x"}))
    body: Any = missing.value.body
    assert (body["type"], body["error"]["type"]) == ("error", "not_found_error")
    assert body["request_id"].startswith("req_")
    with pytest.raises(anthropic.UnprocessableEntityError, match="max_tokens"):
        client.messages.create(**(ASK | {"max_tokens": 0}))
    with pytest.raises(anthropic.AuthenticationError) as refused:
        client.with_options(api_key=f"{PREFIX}unknown").messages.create(**ASK)
    body = refused.value.body
    assert body["error"]["type"] == "authentication_error"
    assert body["request_id"] == refused.value.request_id


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"max_tokens": None}, "max_tokens is missing"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"answer_me": 1}, "answer_me"),
        ({"mcp_servers": [{"url": "x"}]}, "mcp_servers"),
        ({"container": "x"}, "container"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "'image'"),
        ({"messages": [{"role": "user", "content": [{"type": "document", "source": {}}]}]}, "'document'"),
        ({"messages": [{"role": "user", "content": [{"type": "thinking", "thinking": "x"}]}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"text": "x"}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": text("x", color="red")}]}, "color"),
        ({"system": [{"type": "image"}]}, "system"),
        ({"tools": [WEATHER, {"type": "web_search_20250305", "name": "web_search"}]}, "'web_search_20250305'"),
        ({"tools": [{"name": "x"}]}, "input_schema"),
        ({"tools": [{"name": "x", "input_schema": {}, "defer_loading": True}]}, "defer_loading"),
        ({"tools": [], "tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"tool_choice": {"type": "tool", "name": "other"}}, "'other'"),
        ({"thinking": {"type": "enabled", "budget_tokens": 100}}, "thinking.budget_tokens"),
        ({"output_config": {"effort": "lazy"}}, "output_config.effort"),
        ({"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}}, "context_management.edits[0].type"),
        ({"stop_sequences": "x"}, "stop_sequences"),
        ({"top_p": 0}, "top_p"),
    ],
)
def test_bad_fields_are_named(scripted: Server, changes: dict[str, Any], named: str) -> None:
    """What cannot be honoured is refused by name before any stream begins, in Anthropic's form."""
    body = ASK | {"thinking": {"type": "enabled"}, "stream": True} | changes
    response = httpx.post(f"{scripted.url}/v1/messages", content=json.dumps(body), headers=JSON, timeout=20)
    error = response.json()
    assert response.status_code in (400, 422)
    assert (error["type"], error["error"]["type"]) == ("error", "invalid_request_error")
    assert named in error["error"]["message"]


def test_a_call_without_its_result_is_refused(scripted: Server) -> None:
    """A conversation cannot end with a call: nobody could answer it."""
    call = {"type": "tool_use", "id": "1", "name": "get_weather", "input": {}}
    response = post(scripted, messages=[*ASK["messages"], {"role": "assistant", "content": [call]}])
    assert response.status_code == 400 and "tool_result" in response.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/messages", "/anthropic/v1/messages", "/v1/messages/count_tokens"])
def test_every_path_has_anthropics_errors(scripted: Server, path: str) -> None:
    """Both addresses of the dialect, whatever goes wrong."""
    for response in (httpx.get(scripted.url + path), httpx.post(scripted.url + path, content="{", headers=JSON)):
        assert response.json()["type"] == "error"
    assert post(scripted, path="/anthropic/v1/messages").status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_client_that_leaves_frees_the_engine(server: Server, stream: bool) -> None:
    """Hanging up aborts the request."""
    ask = {"model": "tiny", "max_tokens": 16_000, "messages": ASK["messages"], "temperature": 0, "stream": stream}
    with httpx.Client(timeout=httpx.Timeout(5, read=5 if stream else 0.3)) as http:
        if stream:
            with http.stream("POST", f"{server.url}/v1/messages", json=ask) as response:
                body = response.iter_bytes()  # dropped, it would close the response
                next(body)
                assert running(server) == 1
        else:
            with pytest.raises(httpx.ReadTimeout):
                http.post(f"{server.url}/v1/messages", json=ask)
    wait_for(lambda: running(server) == 0, 1)


# ---- the encoder ----------------------------------------------------------------------------------------------------

WORDS = st.text(min_size=1, max_size=5)
PARTS = st.one_of(st.builds(Reasoning, WORDS), st.builds(Content, WORDS), st.just(ToolCallStart(0, "f")))


def pieces(parts: Iterable[Any]) -> list[Event]:
    """An answer of these parts, a piece each; a call's arguments come in three."""
    events: list[Event] = [Started(3, 1)]
    num_calls = 0
    for part in parts:
        if isinstance(part, ToolCallStart):
            arguments = [ToolCallArguments(num_calls, text) for text in ("{", '"a": 1', "}")]
            events += [Piece(0, (each,), 1) for each in (ToolCallStart(num_calls, "f"), *arguments)]
            num_calls += 1
        else:
            events.append(Piece(0, (part,), 1))
    return [*events, Ended(0, "tool_calls" if num_calls else "stop"), Usage(3, 1, 9, 2)]


def glued(events: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """What a client makes of a stream."""
    message: dict[str, Any] = {}
    open_block, arguments = None, ""
    for event in events:
        match event:
            case {"type": "message_start", "message": started}:
                message = started
            case {"type": "content_block_start", "index": index, "content_block": block}:
                assert open_block is None and index == len(message["content"])
                message["content"].append(block)
                open_block, arguments = index, ""
            case {"type": "content_block_delta", "index": index, "delta": {"type": kind, **delta}}:
                assert index == open_block
                block, (name, value) = message["content"][index], *delta.items()
                if kind == "input_json_delta":
                    arguments += value
                else:
                    block[name] += value
            case {"type": "content_block_stop", "index": index}:
                assert index == open_block
                if arguments:
                    message["content"][index]["input"] = json.loads(arguments)
                open_block = None
            case {"type": "message_delta", "delta": delta, "usage": usage}:
                message |= delta | {"usage": usage}
    return message


@given(st.lists(PARTS, max_size=8))
def test_any_stream_glued_is_the_whole(parts: list[Any]) -> None:
    """Whatever a model says in whatever order, blocks open and close one after the other and make up the answer."""
    reply = Reply("msg_1", "m")
    events = [json.loads(json.dumps(body)) for event in pieces(parts) for body in reply.encode(event)]
    assert glued(events) == reply.whole()
    assert events[-1] == {"type": "message_stop"}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [("", {}), ('{"a": [1, "x', {"a": [1]}), ("[1]", {"malformed": "[1]"}), ("{a}", {"malformed": "{a}"})],
)
def test_arguments_that_are_no_object_are_kept(arguments: str, expected: dict[str, Any]) -> None:
    """Arguments that were cut give what is whole of them; what is no object is kept as text."""
    reply = Reply("msg_1", "m")
    for event in (
        Started(1, 0),
        Piece(0, (ToolCallStart(0, "f"), ToolCallArguments(0, arguments)), 1),
        Ended(0, "stop"),
    ):
        list(reply.encode(event))
    assert reply.whole()["content"][0]["input"] == expected


def test_a_stream_that_fails_says_so() -> None:
    """An error that comes too late for a status is an event of its own."""
    (event,) = Reply("msg_1", "m").fail(CapacityError("the engine is busy"))
    assert (event["type"], event["error"]) == ("error", {"type": "overloaded_error", "message": "the engine is busy"})
