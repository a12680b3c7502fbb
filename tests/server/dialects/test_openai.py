"""OpenAI's dialect through OpenAI's own client, against a real server."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import httpx
import jsonschema
import openai
import pydantic
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from porcelet.server.dialects.openai import NO_JSON, ChatRequest
from porcelet.server.generation.ask import EFFORTS
from tests.server.conftest import Server
from tests.server.scripts import ANSWER, MIXED, THOUGHT, Mixed
from tests.tiny_model import SPECIAL

ASK: dict[str, Any] = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "Hello, wörld"}],
    "max_tokens": 60,
    "temperature": 0,
}
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]

FORM = {"type": "json_schema", "json_schema": {"name": "any", "schema": {}}}
PREFIX = {"role": "assistant", "content": "{", "prefix": True}
USER, END = (256 + SPECIAL.index(token) for token in ("<|user|>", "<|end|>"))
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0, timeout=20)


def post(server: Server, **changes: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/chat/completions", json=ASK | changes, timeout=20)


def test_models(client: openai.OpenAI) -> None:
    """The served model is listed under the name that requests use, and its aliases after it; each can be asked for."""
    model, *aliases = client.models.list().data
    assert [alias.id for alias in aliases] == ["deepseek-chat", "deepseek-flash"]
    assert (model.id, model.object) == ("tiny", "model")
    assert model.model_dump()["thinking"] == "never" and model.model_dump()["context_length"] > 1000
    assert client.models.retrieve("deepseek-chat").model_dump()["root"] == "tiny"
    with pytest.raises(openai.NotFoundError, match="not served here"):
        client.models.retrieve("gpt-4")


@pytest.mark.parametrize("prefix", ["", "/v1", "/beta"])
def test_deepseeks_paths(server: Server, prefix: str) -> None:
    """DeepSeek's base URL has no version, and its beta features a path of their own; OpenAPI shows one of the three."""
    assert httpx.get(f"{server.url}{prefix}/models").json()["data"][0]["id"] == "tiny"
    assert httpx.post(f"{server.url}{prefix}/chat/completions", json=ASK, timeout=20).status_code == 200
    body = {"model": "tiny", "prompt": "x", "max_tokens": 2}
    assert httpx.post(f"{server.url}{prefix}/completions", json=body, timeout=20).status_code == 200
    paths = httpx.get(f"{server.url}/openapi.json").json()["paths"]
    assert (f"{prefix}/chat/completions" in paths) == (prefix == "/v1")


@pytest.mark.parametrize("text", ["Hello", "wörld 你好", "", "<|end|> is text"])
def test_stream_equals_whole(client: openai.OpenAI, text: str) -> None:
    """At temperature 0 the streamed pieces, joined, are the whole answer; the frames are OpenAI's."""
    messages: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": text}]
    ask: Any = {"model": "tiny", "messages": messages, "max_tokens": 60, "temperature": 0}
    whole = client.chat.completions.create(**ask)
    chunks = list(client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    assert isinstance(whole, ChatCompletion)
    assert all(isinstance(chunk, ChatCompletionChunk) for chunk in chunks)

    *body, last = chunks
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(pieces) == whole.choices[0].message.content
    assert whole.choices[0].message.content
    assert body[0].choices[0].delta.role == "assistant"
    assert [(chunk.choices[0].finish_reason, chunk.usage) for chunk in body] == [(None, None)] * len(body)
    assert last.choices[0].finish_reason == whole.choices[0].finish_reason
    assert last.usage and whole.usage and last.usage.total_tokens == whole.usage.total_tokens
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].id.startswith("chatcmpl-")


def test_usage_and_ends(client: openai.OpenAI) -> None:
    """Usage counts the prompt with its template and every drawn token; an answer ends as "length" or as "stop"."""
    answer = client.chat.completions.create(**(ASK | {"max_tokens": 5}))
    prompt = len("<|user|>"[:1]) + len("Hello, wörld".encode()) + len(["<|end|>", "<|assistant|>"])
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (prompt, 5)
    assert answer.usage.total_tokens == prompt + 5
    assert answer.choices[0].finish_reason == "length"

    likelier = {"temperature": 2, "seed": 1, "logit_bias": {str(END): 1.5}}
    drawn = client.chat.completions.create(**(ASK | {"max_tokens": 10_000} | likelier))
    assert drawn.choices[0].finish_reason == "stop"
    assert 1 < drawn.usage.completion_tokens < 10_000
    assert "<|end|>" not in drawn.choices[0].message.content


def test_seed_repeats(client: openai.OpenAI) -> None:
    """The same seed gives the same answer, another one a different answer."""

    def answer(seed: int) -> Any:
        return client.chat.completions.create(**(ASK | {"temperature": 1.5, "seed": seed})).choices[0].message.content

    assert answer(1) == answer(1) != answer(2)


def test_stop_strings(client: openai.OpenAI) -> None:
    """An answer ends before its first stop string, one or several given, streamed or whole, and nothing beyond is
    ever sent; what was drawn of the stop is paid for."""
    ask = ASK | {"temperature": 1.5, "seed": 3, "logprobs": True}
    text = client.chat.completions.create(**ask).choices[0].message.content
    stop = next(text[i : i + 3] for i in range(8, len(text)) if "\ufffd" not in text[i : i + 3])
    for stops in (stop, ["not in the text", stop]):
        whole = client.chat.completions.create(**ask, stop=stops)
        chunks = list(client.chat.completions.create(**ask, stop=stops, stream=True))
        assert whole.choices[0].message.content == text.split(stop)[0]
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text.split(stop)[0]
        assert whole.choices[0].finish_reason == chunks[-1].choices[0].finish_reason == "stop"
        # A token is a byte here, so those of the stop are whole tokens.
        assert whole.usage.completion_tokens == len(whole.choices[0].logprobs.content) + len(stop.encode())


def test_a_stop_that_begins_within_a_token(client: openai.OpenAI) -> None:
    """The part of a token that lies before the stop is text, streamed or whole, and has no log-probability."""
    ask = ASK | {"logit_bias": {str(USER): 100}, "stop": "><|us", "logprobs": True}
    whole = client.chat.completions.create(**ask)
    chunks = list(client.chat.completions.create(**ask, stream=True))
    assert whole.choices[0].message.content == "<|user|"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "<|user|"
    assert (whole.choices[0].logprobs, whole.usage.completion_tokens) == (None, 2)


def test_logprobs(client: openai.OpenAI) -> None:
    """Every token of the answer comes with its log-probability, its bytes and the best alternatives, as OpenAI's client
    reads them; streamed and whole they are the same, and at temperature 0 the token is the best one."""
    ask = ASK | {"logprobs": True, "top_logprobs": 3}
    whole = client.chat.completions.create(**ask)
    chunks = list(client.chat.completions.create(**ask, stream=True))
    content = whole.choices[0].logprobs.content
    streamed = [entry for chunk in chunks if chunk.choices[0].logprobs for entry in chunk.choices[0].logprobs.content]
    assert [entry.model_dump() for entry in streamed] == [entry.model_dump() for entry in content]
    assert len(content) == whole.usage.completion_tokens == 60
    text = bytes(byte for entry in content for byte in entry.bytes).decode("utf-8", "replace")
    assert text == whole.choices[0].message.content
    for entry in content:
        assert entry.token == bytes(entry.bytes).decode("utf-8", "replace")
        assert [len(entry.top_logprobs), entry.top_logprobs[0].bytes] == [3, entry.bytes]
        ranked = [other.logprob for other in entry.top_logprobs]
        assert ranked == sorted(ranked, reverse=True) and entry.logprob == pytest.approx(ranked[0])
        assert -100 < ranked[-1] <= 0
    plain = client.chat.completions.create(**(ASK | {"logprobs": True}))
    assert [entry.top_logprobs for entry in plain.choices[0].logprobs.content] == [[]] * 60
    assert client.chat.completions.create(**ASK).choices[0].logprobs is None


def test_penalties_and_bias_shape_the_answer(client: openai.OpenAI) -> None:
    """A bias forces a token, penalties make the answer more varied, min-p and top-k cut it to the greedy one."""

    def tokens(**changes: Any) -> list[int]:
        answer = client.chat.completions.create(**(ASK | {"logprobs": True, "max_tokens": 30} | changes))
        return [entry.bytes[0] for entry in answer.choices[0].logprobs.content]

    first, *_ = plain = tokens()
    forced = tokens(logit_bias={"5": 100})
    assert len(set(forced)) == 1 and forced != plain
    assert len(set(plain)) < 30
    for penalty in ({"presence_penalty": 2}, {"frequency_penalty": 2}):
        assert len(set(tokens(**penalty))) > len(set(plain))
    assert len(set(tokens(extra_body={"repetition_penalty": 100}))) == 30
    assert tokens(temperature=1.5, extra_body={"min_p": 1.0}) == plain
    assert tokens(temperature=1.5, extra_body={"top_k": 1})[0] == first


def test_ends_can_be_chosen(client: openai.OpenAI) -> None:
    """A token of the client's choice ends an answer and is no part of it; the model's own end can be ignored."""
    likely = ASK | {"logit_bias": {str(END): 100}, "max_tokens": 5}
    assert client.chat.completions.create(**likely).usage.completion_tokens == 1
    assert client.chat.completions.create(**likely, extra_body={"ignore_eos": True}).usage.completion_tokens == 5
    likely = ASK | {"logit_bias": {str(USER): 100}, "max_tokens": 5}
    ended = client.chat.completions.create(**likely, extra_body={"stop_token_ids": [USER]})
    assert (ended.choices[0].message.content, ended.choices[0].finish_reason) == ("", "stop")


def test_raw_stream_is_openais(server: Server) -> None:
    """On the wire: `data:` events, [DONE] at the end, no caching, usage on the last chunk alone."""
    response = post(server, stream=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache"
    events = response.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(event.startswith('data: {"id":"chatcmpl-') for event in events[:-2])
    assert [index for index, event in enumerate(events) if '"usage"' in event] == [len(events) - 3]


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"temperature": "hot"}, "temperature"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": "x", "colour": "red"}]}, "messages[0].colour"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
        ({"messages": "hello"}, "messages"),
        ({"stop": 5}, "stop"),
        ({"stop": [1]}, "stop[0]"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tool_choice": "required"}, None),
        ({"tool_choice": "perhaps"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "other"}}}, None),
        ({"response_format": {"type": "yaml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "("}}, None),
        ({"structured_outputs": {"regex": "a"}, "response_format": FORM}, "structured_outputs"),
        ({"response_format": FORM, "messages": [PREFIX]}, "response_format"),
        ({"frequency_penalty": "much"}, "frequency_penalty"),
        ({"logit_bias": {"the": 5}}, "logit_bias"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"logprobs": 3}, "logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"thinking": {"type": "sometimes"}}, "thinking.type"),
        ({"thinking": {"type": "enabled"}, "reasoning_effort": "none"}, "reasoning_effort"),
        ({"reasoning_effort": "herculean"}, "reasoning_effort"),
        ({"max_new_tokens": 5}, "max_new_tokens"),
        ({"\ud800": 1}, None),
        ({"thinking": {"type": "enabled"}}, None),
        ({"stop": ""}, None),
        ({"stop": "\ud800"}, None),
        ({"logit_bias": {"99999": 1}}, None),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, None),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_fields_are_named(server: Server, changes: dict[str, Any], param: str | None, stream: bool) -> None:
    """A field that cannot be honoured is a 400 in OpenAI's form that names it, before any stream begins."""
    error = refused(server, changes | {"stream": stream}, 400)
    assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_request_error")
    assert error["param"] == param


def refused(server: Server, changes: dict[str, Any], status: int) -> dict[str, Any]:
    """The error of a request."""
    text = json.dumps(ASK | changes)  # in ASCII: the only way to send half of a surrogate pair
    response = httpx.post(f"{server.url}/v1/chat/completions", content=text, headers=JSON, timeout=20)
    error: dict[str, Any] = response.json()["error"]
    assert response.status_code == status, error
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    return error


@pytest.mark.parametrize(
    ("changes", "param", "message"),
    [
        ({"temperature": -1}, "temperature", "Invalid temperature value, the valid range of temperature is [0, 2]"),
        ({"temperature": 2.1}, "temperature", "Invalid temperature value, the valid range of temperature is [0, 2]"),
        ({"temperature": float("nan")}, "temperature", "Invalid temperature value, the valid range"),
        ({"top_p": 0}, "top_p", "Invalid top_p value, the valid range of top_p is (0, 1.0]"),
        ({"max_tokens": 0}, "max_tokens", "Invalid max_tokens value, the valid range of max_tokens is [1, 2147483647]"),
        ({"n": 0}, "n", "Invalid n value, the valid range of n is [1, 128]"),
        ({"frequency_penalty": 2.5}, "frequency_penalty", "Invalid frequency_penalty value"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5", "Invalid logit_bias value"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "Invalid top_logprobs value"),
        ({"stop": ["x"] * 17}, "stop", "Stop string array too long: 17"),
        ({"messages": []}, "messages", "Empty input messages"),
        ({"tools": [{"function": {"name": "f"}}] * 129}, "tools", "tools has 129 entries; at most 128 are allowed"),
    ],
)
def test_values_out_of_range(server: Server, changes: dict[str, Any], param: str, message: str) -> None:
    """What lies out of its range is a 422 in DeepSeek's words."""
    error = refused(server, changes, 422)
    assert error["message"].startswith(message)
    assert error["param"] == param


def test_long_prompt_has_its_code(server: Server) -> None:
    """Programs that shorten a conversation which no longer fits go by the error's code."""
    error = refused(server, {"messages": [{"role": "user", "content": "x" * 20_000}]}, 400)
    assert error["code"] == "context_length_exceeded"


FIELDS = ["model", *sorted(ChatRequest.model_fields.keys() - {"model"})]
DEEP: Any = []
for _ in range(500):
    DEEP = [DEEP]


@pytest.mark.parametrize("field", FIELDS)
def test_strange_values_break_nothing(server: Server, field: str) -> None:
    """Whatever a field holds is answered or refused, and the next request is served."""
    strange = [
        None,
        -1,
        0,
        2**31,
        2**63,
        1e308,
        "",
        "NaN",
        float("nan"),
        float("inf"),
        [],
        {},
        [None],
        {"": DEEP},
        DEEP,
    ]
    with httpx.Client(timeout=20) as http:
        for value in strange:
            content = json.dumps(ASK | {"max_tokens": 2, "max_completion_tokens": 2} | {field: value})
            response = http.post(f"{server.url}/v1/chat/completions", content=content, headers=JSON)
            assert response.status_code < 500, (value, response.text)
        assert http.post(f"{server.url}/v1/chat/completions", json=ASK | {"max_tokens": 2}).status_code == 200


def test_harmless_fields_and_parts_are_accepted(server: Server) -> None:
    """Fields that ask for nothing change nothing; text parts are joined; nulls are absent."""
    parts = [{"type": "text", "text": "Hello, "}, {"type": "text", "text": "wörld"}]
    extra = {"user": "me", "metadata": {"a": "b"}, "n": 1, "stop": None, "frequency_penalty": 0, "top_p": 1}
    plain = post(server).json()["choices"]
    message = {"role": "user", "content": parts, "name": "Ann", "audio": None}
    assert post(server, **extra, messages=[message]).json()["choices"] == plain
    cached = [part | {"cache_control": {"type": "ephemeral"}} for part in parts]
    assert post(server, messages=[{"role": "user", "content": cached}]).json()["choices"] == plain
    back = {"role": "assistant", "content": "Hi"}
    notes = {"annotations": [], "audio": None, "refusal": None, "provider_specific_fields": {"a": 1}, "name": "bot"}
    answers = [post(server, messages=[message, turn, message]).json()["choices"] for turn in (back, back | notes)]
    assert answers[0] == answers[1]


def test_usage_so_far(server: Server) -> None:
    """vLLM's option: every chunk tells the counts so far, and they grow to the last one's, in both dialects."""
    options = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    ask = {"model": "tiny", "prompt": "Hello", "max_tokens": 400, "temperature": 0, **options}
    legacy = httpx.post(f"{server.url}/v1/completions", json=ask, timeout=20)
    for response in (post(server, max_tokens=400, **options), legacy):
        assert response.status_code == 200, response.text
        usages = [json.loads(event.removeprefix("data: "))["usage"] for event in response.text.split("\n\n")[:-2]]
        counts = [usage["completion_tokens"] for usage in usages]
        assert counts == sorted(counts) and counts[-1] == 400 and len(set(counts)) > 2
        assert {usage["prompt_tokens"] for usage in usages} == {usages[-1]["prompt_tokens"]}


def test_an_alias_that_asks_for_too_much(server: Server) -> None:
    """A name that asks a model for thinking that it cannot do is not listed, and refused by name with those that
    are."""
    listed = httpx.get(f"{server.url}/v1/models").json()["data"]
    assert [model["id"] for model in listed] == ["tiny", "deepseek-chat", "deepseek-flash"]
    response = post(server, model="deepseek-reasoner")
    assert response.status_code == 400 and response.json()["error"]["param"] == "model"
    assert "'deepseek-reasoner' is tiny thinking" in response.json()["error"]["message"]
    assert "deepseek-chat" in response.json()["error"]["message"]


def test_errors_reach_the_sdk_as_its_classes(client: openai.OpenAI) -> None:
    """A bad request, a value out of range and an unknown model are the classes that programs catch."""
    with pytest.raises(openai.BadRequestError, match="'colour' is not supported") as bad:
        client.chat.completions.create(**ASK, extra_body={"colour": "red"})
    assert bad.value.param == "colour"
    with pytest.raises(openai.UnprocessableEntityError, match="Invalid n value") as out:
        client.chat.completions.create(**(ASK | {"n": 1000}))
    assert out.value.param == "n"
    with pytest.raises(
        openai.NotFoundError, match="'gpt-4' is not served here; served: tiny, deepseek-chat"
    ) as missing:
        client.chat.completions.create(**(ASK | {"model": "gpt-4"}))
    assert missing.value.code == "model_not_found"


@pytest.mark.parametrize("stream", [True, False])
def test_client_that_leaves_frees_the_engine(server: Server, stream: bool) -> None:
    """Hanging up, in a stream or while waiting for a whole answer, aborts the request."""
    ask = ASK | {"max_tokens": 16_000, "stream": stream}  # seconds of work
    with httpx.Client(timeout=httpx.Timeout(5, read=5 if stream else 0.3)) as http:
        if stream:
            with http.stream("POST", f"{server.url}/v1/chat/completions", json=ask) as response:
                body = response.iter_bytes()  # dropped, it would close the response
                next(body)
                assert running(server) == 1
        else:
            with pytest.raises(httpx.ReadTimeout):
                http.post(f"{server.url}/v1/chat/completions", json=ask)
    wait_for(lambda: running(server) == 0, 1)


def test_many_at_once(client: openai.OpenAI, server: Server) -> None:
    """Streams that share steps each give what they give alone."""
    messages = [[{"role": "user", "content": f"number {i}"}] for i in range(8)]
    asks = [ASK | {"messages": message, "stream": True} for message in messages]

    def text(stream: Any) -> str:
        return "".join(chunk.choices[0].delta.content or "" for chunk in stream)

    alone = [text(client.chat.completions.create(**ask)) for ask in asks]
    streams = [client.chat.completions.create(**ask) for ask in asks]
    assert [text(stream) for stream in streams] == alone
    assert running(server) == 0


def running(server: Server) -> int:
    stats = httpx.get(f"{server.url}/healthz").json()["models"]["tiny"]
    return int(stats["num_running"] + stats["num_waiting"])


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# ---- what scripted models say ---------------------------------------------------------------------------------------


QUESTION: dict[str, Any] = {"model": "talker", "messages": [{"role": "user", "content": "Hello?"}], "temperature": 0}
THINK = {"thinking": {"type": "enabled"}}


def talk(server: Server, **changes: Any) -> dict[str, Any]:
    """A whole answer's body."""
    response = httpx.post(f"{server.url}/chat/completions", json=QUESTION | changes, timeout=20)
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    return body


def chunks_of(server: Server, **changes: Any) -> list[dict[str, Any]]:
    """A streamed answer's chunks."""
    ask = QUESTION | changes | {"stream": True}
    text = httpx.post(f"{server.url}/chat/completions", json=ask, timeout=20).text
    *events, done, end = text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events if not event.startswith(":")]


# DeepSeek's own chunks, as their server code of 2026 writes them: a letter stands for any text, a number for any count.
USAGE = {
    "prompt_tokens": 1,
    "completion_tokens": 1,
    "total_tokens": 1,
    "prompt_tokens_details": {"cached_tokens": 1},
    "prompt_cache_hit_tokens": 1,
    "prompt_cache_miss_tokens": 1,
}
NONE_YET = {"usage": None}


def sample(delta: dict[str, Any], finish_reason: str | None = None, **last: Any) -> dict[str, Any]:
    choice = {"index": 1, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
    head = {"id": "x", "object": "x", "created": 1, "model": "x", "system_fingerprint": "x"}
    return head | {"choices": [choice]} | last


OPENING = sample({"role": "x", "content": None, "reasoning_content": "x"})
THINKING = sample({"content": None, "reasoning_content": "x"})
ANSWERING = sample({"content": "x", "reasoning_content": None})
CALLING = sample({"tool_calls": [{"index": 1, "function": {"arguments": "x"}}]})
CALL_OPENING = {"index": 1, "id": "x", "type": "x", "function": {"name": "x", "arguments": "x"}}
SAMPLES: dict[str, list[dict[str, Any]]] = {
    "thinking": [
        *[OPENING, THINKING, THINKING, ANSWERING, ANSWERING],
        sample({"content": "x", "reasoning_content": None}, "x", usage=USAGE),
    ],
    "usage": [
        sample({"role": "x", "content": "x"}, **NONE_YET),
        *[sample({"content": "x"}, **NONE_YET)] * 2,
        sample({"content": "x"}, "x", usage=USAGE),
    ],
    "tools": [
        *[OPENING, THINKING],
        sample({"tool_calls": [CALL_OPENING]}),
        *[CALLING] * 3,
        sample({"content": "x", "reasoning_content": None}, "x", usage=USAGE),
    ],
}


def shape(value: Any) -> Any:
    """Its keys in their order, with what is null; texts and numbers are all alike."""
    if isinstance(value, dict):
        return [(key, shape(part)) for key, part in value.items() if key != "completion_tokens_details"]
    if isinstance(value, list):
        return [shape(part) for part in value]
    return None if value is None else type(value)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("thinking", THINK),
        ("usage", {"stream_options": {"include_usage": True}}),
        ("tools", {"model": "caller", "tools": TOOLS}),
    ],
)
def test_chunks_have_deepseeks_shape(scripted: Server, name: str, changes: dict[str, Any]) -> None:
    """Key by key and null by null the chunks are those that DeepSeek's own code writes for such an answer; what it
    documents beyond its code, the reasoning's tokens, is ours as well."""
    chunks = chunks_of(scripted, **changes)
    once: list[Any] = []
    for chunk in map(shape, chunks):
        once += [] if chunk in once[-1:] else [chunk]  # how many pieces there are is the model's affair
    expected: list[Any] = []
    for chunk in map(shape, SAMPLES[name]):
        expected += [] if chunk in expected[-1:] else [chunk]
    assert once == expected
    assert chunks[-1]["usage"]["completion_tokens_details"].keys() == {"reasoning_tokens"}


def test_reasoning_is_apart_and_counted(scripted: Server) -> None:
    """Reasoning and answer come in fields of their own, streamed and whole; usage tells how much was reasoning, and
    what the prefix cache had."""
    body = talk(scripted, **THINK)
    message = body["choices"][0]["message"]
    assert message == {"role": "assistant", "content": "".join(ANSWER), "reasoning_content": "".join(THOUGHT)}
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks_of(scripted, **THINK)]
    assert "".join(delta["reasoning_content"] or "" for delta in deltas) == message["reasoning_content"]
    assert "".join(delta["content"] or "" for delta in deltas) == message["content"]
    usage = body["usage"]
    assert usage["completion_tokens_details"]["reasoning_tokens"] == len([*THOUGHT, "</think>"])
    assert usage["completion_tokens"] == len([*THOUGHT, "</think>", *ANSWER, "end"])
    assert usage["prompt_cache_hit_tokens"] + usage["prompt_cache_miss_tokens"] == usage["prompt_tokens"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == usage["prompt_cache_hit_tokens"]
    assert body["system_fingerprint"].startswith("fp_")


def test_prefix_cache_shows_in_usage(scripted: Server) -> None:
    """A prompt that was seen before is found in the cache, and usage says so."""
    messages = [{"role": "user", "content": "the same words again and again " * 20}]
    first, second = (talk(scripted, messages=messages)["usage"] for _ in range(2))
    assert second["prompt_cache_hit_tokens"] > first["prompt_cache_hit_tokens"] == 0
    assert second["prompt_tokens"] == first["prompt_tokens"]


@pytest.mark.parametrize(
    ("changes", "thinks"),
    [
        ({"model": "talker"}, False),
        ({"model": "deepseek-chat"}, False),
        ({"model": "deepseek-flash"}, False),
        ({"model": "deepseek-reasoner"}, True),
        ({"model": "deepseek-chat", **THINK}, True),
        ({"model": "deepseek-reasoner", "thinking": {"type": "disabled"}}, False),
        ({"model": "deepseek-reasoner", "reasoning_effort": "none"}, False),
        ({"model": "talker", "reasoning_effort": "high"}, True),
        ({"model": "deepseek-chat", "reasoning_effort": "low"}, True),
        ({"model": "talker", "reasoning_effort": "max", "thinking": {"type": "disabled"}}, False),
        ({"model": "caller"}, True),
        ({"model": "caller", "thinking": {"type": "disabled"}}, False),
    ],
)
def test_who_decides_on_thinking(scripted: Server, changes: dict[str, Any], thinks: bool) -> None:
    """The request wins over its model's alias, and that over the model's habit."""
    message = talk(scripted, **changes, max_tokens=4)["choices"][0]["message"]
    assert ("reasoning_content" in message) == thinks


def test_every_effort_can_be_asked_for() -> None:
    """The schema names the efforts that mean something, and none."""
    field = ChatRequest.model_json_schema()["properties"]["reasoning_effort"]
    assert set(field["anyOf"][0]["enum"]) == {"none", *EFFORTS}


def test_tool_calls(scripted: Server) -> None:
    """A call has DeepSeek's form, whole and in pieces, and its arguments are JSON; the model may go on from it."""
    asked = {"model": "caller", "tools": TOOLS}
    (choice,) = talk(scripted, **asked)["choices"]
    (call,) = choice["message"]["tool_calls"]
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
    assert call["id"].startswith("call_00_") and call["type"] == "function"
    assert call["function"]["name"] == "get_weather"
    assert json.loads(call["function"]["arguments"]) == {"city": "Paris"}
    pieces = [
        piece for chunk in chunks_of(scripted, **asked) for piece in chunk["choices"][0]["delta"].get("tool_calls", [])
    ]
    assert "".join(piece["function"]["arguments"] for piece in pieces) == call["function"]["arguments"]
    turns = [choice["message"], {"role": "tool", "tool_call_id": call["id"], "name": "get_weather", "content": "Rain"}]
    messages = [*QUESTION["messages"], *turns]
    assert talk(scripted, model="caller", tools=TOOLS, messages=messages, max_tokens=4)["choices"][0]["index"] == 0


def test_json_mode_wants_the_word(scripted: Server) -> None:
    """JSON mode without the word in the prompt is refused in DeepSeek's words; with it, the answer is an object."""
    refusal = refused(scripted, QUESTION | {"response_format": {"type": "json_object"}}, 400)
    assert (refusal["message"], refusal["param"]) == (NO_JSON, "response_format")
    messages = [{"role": "user", "content": "Some JSON, please."}]
    answer = talk(scripted, messages=messages, response_format={"type": "json_object"}, max_tokens=200)
    assert answer["choices"][0]["message"]["content"].startswith("{")


def test_prefix_is_continued(scripted: Server) -> None:
    """A last message with `prefix` is gone on with, and not repeated."""
    mixed = MIXED[0]
    messages = [*QUESTION["messages"], {"role": "assistant", "content": mixed.letter, "prefix": True}]
    content = talk(scripted, messages=messages)["choices"][0]["message"]["content"]
    assert content == f"{mixed.reasoning}</think>{mixed.content}"  # it does not think, so this is mere text


@pytest.mark.parametrize("mixed", MIXED, ids=lambda mixed: mixed.letter)
def test_reasoning_and_answer_never_mix(scripted: Server, mixed: Mixed) -> None:
    """Wherever tokens cut the mark between them, no letter of it is seen, and each side is whole, streamed or not."""
    messages = [*QUESTION["messages"], {"role": "assistant", "content": mixed.letter, "prefix": True}]
    asked = {"messages": messages, **THINK, "logprobs": True}
    (choice,) = talk(scripted, **asked)["choices"]
    chunks = [chunk["choices"][0] for chunk in chunks_of(scripted, **asked)]
    deltas = [chunk["delta"] for chunk in chunks]
    assert all(delta["content"] is None or delta["reasoning_content"] is None for delta in deltas)
    assert "".join(delta["reasoning_content"] or "" for delta in deltas) == mixed.reasoning
    assert "".join(delta["content"] or "" for delta in deltas) == mixed.content
    assert choice["message"]["reasoning_content"] == mixed.reasoning
    assert choice["message"]["content"] == mixed.content
    for name in ("content", "reasoning_content"):
        lists = [chunk["logprobs"].get(name, []) for chunk in chunks if chunk["logprobs"]]
        assert [entry for entries in lists for entry in entries] == choice["logprobs"][name]
    tokens = [entry["token"] for name in ("reasoning_content", "content") for entry in choice["logprobs"][name]]
    assert tuple(tokens) == mixed.pieces


def test_several_samples(scripted: Server, server: Server) -> None:
    """`n` answers come with their index, each complete, streamed or whole; usage counts them all, on the last chunk."""
    asked = QUESTION | {"model": "tiny", "n": 3, "temperature": 1, "seed": 7, "max_tokens": 20}
    body = talk(server, **asked)
    texts = [choice["message"]["content"] for choice in body["choices"]]
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2] and len(set(texts)) == 3
    chunks = chunks_of(server, **asked)
    for index, text in enumerate(texts):
        mine = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert "".join(choice["delta"]["content"] for choice in mine) == text
        assert mine[0]["delta"]["role"] == "assistant" and mine[-1]["finish_reason"] == "length"
    assert [chunk for chunk in chunks if "usage" in chunk] == chunks[-1:]
    assert body["usage"]["completion_tokens"] == chunks[-1]["usage"]["completion_tokens"] == 60


# ---- real clients ---------------------------------------------------------------------------------------------------


class City(pydantic.BaseModel):
    name: Literal["Paris", "Rome"]
    sunny: bool


def test_sdk_parses_a_schema(client: openai.OpenAI) -> None:
    """`parse` gets an object of the class whose schema it sent, for the schema is kept to whatever the model says."""
    answer = client.chat.completions.parse(**(ASK | {"max_tokens": 400}), response_format=City)
    assert answer.choices[0].message.parsed in [
        City(name=name, sunny=sunny) for name in ("Paris", "Rome") for sunny in (True, False)
    ]


def test_constrained_answers_are_valid(server: Server) -> None:
    """What a json_schema format gives is valid to the letter by `jsonschema`, whole or streamed, in every sample."""
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer", "minimum": 3, "maximum": 20}, "b": {"enum": ["x", None]}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "pair", "schema": schema}}
    asked = {"model": "tiny", "response_format": form, "n": 4, "temperature": 1, "seed": 3, "max_tokens": 500}
    for choice in talk(server, **asked)["choices"]:
        assert choice["finish_reason"] == "stop"
        jsonschema.validate(json.loads(choice["message"]["content"]), schema)


def test_structured_outputs(server: Server) -> None:
    """vLLM's names for a regular expression and a choice, and ours for a grammar, hold for the answer."""
    for given, pattern in (
        ({"regex": "a[0-9]{2}b"}, "a[0-9]{2}b"),
        ({"choice": ["yes", "no"]}, "yes|no"),
        ({"lark": 'start: "x" /[yz]/'}, "x[yz]"),
    ):
        asked = {"model": "tiny", "structured_outputs": given, "n": 4, "temperature": 1, "seed": 3}
        for choice in talk(server, **asked)["choices"]:
            assert re.fullmatch(pattern, choice["message"]["content"])


def test_sdk_streams_tools(scripted: Server) -> None:
    """OpenAI's helper puts a streamed call together, and DeepSeek's reasoning is an attribute of the delta."""
    client = openai.OpenAI(base_url=scripted.url, api_key="any", max_retries=0, timeout=20)
    with client.chat.completions.stream(**QUESTION | {"model": "caller"}, tools=TOOLS) as stream:
        reasoning = [
            getattr(event.chunk.choices[0].delta, "reasoning_content", None) or ""
            for event in stream
            if event.type == "chunk"
        ]
        (call,) = stream.get_final_completion().choices[0].message.tool_calls or []
    assert "".join(reasoning) == "need"
    assert json.loads(call.function.arguments) == {"city": "Paris"}


@pytest.mark.parametrize("provider", ["openai", "deepseek"])
@pytest.mark.usefixtures("event_loop_of_its_own")
def test_litellm(scripted: Server, monkeypatch: pytest.MonkeyPatch, provider: str) -> None:
    """LiteLLM takes the server for OpenAI's and for DeepSeek's, whole and streamed, with reasoning and tools."""
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    import litellm

    common: Any = {"api_base": scripted.url, "api_key": "any", "timeout": 20, "messages": QUESTION["messages"]}
    name = f"{provider}/deepseek-reasoner"
    message = litellm.completion(model=name, **common).choices[0].message
    assert (message.reasoning_content, message.content) == ("".join(THOUGHT), "".join(ANSWER))
    chunks = list(litellm.completion(model=name, stream=True, stream_options={"include_usage": True}, **common))
    built: Any = litellm.stream_chunk_builder(chunks)
    assert built.choices[0].message.content == "".join(ANSWER)
    assert built.choices[0].message.reasoning_content == "".join(THOUGHT)
    assert built.usage.completion_tokens == len([*THOUGHT, "</think>", *ANSWER, "end"])
    calls = litellm.completion(model=f"{provider}/caller", tools=TOOLS, **common).choices[0].message.tool_calls
    assert json.loads(calls[0].function.arguments) == {"city": "Paris"}


def test_llm(scripted: Server, tmp_path: Path) -> None:
    """Simon Willison's `llm` talks to it as to any model of OpenAI's kind."""
    model = f"- model_id: mine\n  model_name: talker\n  api_base: {scripted.url}/v1\n  api_key_name: mine\n"
    (tmp_path / "extra-openai-models.yaml").write_text(model)
    command = [sys.executable, "-m", "llm", "-m", "mine", "--key", "any", "Hello?"]
    environment = os.environ | {"LLM_USER_PATH": str(tmp_path)}
    for options in ([], ["--no-stream"]):
        ran = subprocess.run([*command, *options], capture_output=True, text=True, env=environment, timeout=60)
        assert ran.stdout.strip() == "".join(ANSWER), ran.stderr
