"""OpenAI's dialect through OpenAI's own client, against a real server."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from tests.server.conftest import Server

ASK: dict[str, Any] = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "Hello, wörld"}],
    "max_tokens": 60,
    "temperature": 0,
}


JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0, timeout=20)


def post(server: Server, **changes: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/chat/completions", json=ASK | changes, timeout=20)


def test_models(client: openai.OpenAI) -> None:
    """The one served model is listed under the name that requests use."""
    (model,) = client.models.list().data
    assert (model.id, model.object) == ("tiny", "model")


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
    pieces = [chunk.choices[0].delta.content or "" for chunk in body]
    assert "".join(pieces) == whole.choices[0].message.content
    assert whole.choices[0].message.content
    assert body[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in body[:-1]] == [None] * (len(body) - 1)
    assert body[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert last.choices == []
    assert last.usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].id.startswith("chatcmpl-")


def test_usage_and_ends(client: openai.OpenAI) -> None:
    """Usage counts the prompt with its template and every drawn token; an answer ends as "length" or as "stop"."""
    answer = client.chat.completions.create(**(ASK | {"max_tokens": 5}))
    prompt = len("<|user|>"[:1]) + len("Hello, wörld".encode()) + len(["<|end|>", "<|assistant|>"])
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (prompt, 5)
    assert answer.usage.total_tokens == prompt + 5
    assert answer.choices[0].finish_reason == "length"

    drawn = client.chat.completions.create(**(ASK | {"max_tokens": 10_000, "temperature": 50, "seed": 1}))
    assert drawn.choices[0].finish_reason == "stop"
    assert 1 < drawn.usage.completion_tokens < 10_000
    assert "<|end|>" not in drawn.choices[0].message.content


def test_seed_repeats(client: openai.OpenAI) -> None:
    """The same seed gives the same answer, another one a different answer."""

    def answer(seed: int) -> Any:
        return client.chat.completions.create(**(ASK | {"temperature": 1.5, "seed": seed})).choices[0].message.content

    assert answer(1) == answer(1) != answer(2)


def test_raw_stream_is_openais(server: Server) -> None:
    """On the wire: `data:` events, [DONE] at the end, no caching, no usage unless it was asked for."""
    response = post(server, stream=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache"
    events = response.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(event.startswith('data: {"id":"chatcmpl-') for event in events[:-2])
    assert '"usage"' not in response.text


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"temperature": "hot"}, "temperature"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
        ({"messages": "hello"}, "messages"),
        ({"stop": ["\n"]}, "stop"),
        ({"n": 2}, "n"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"max_new_tokens": 5}, "max_new_tokens"),
        ({"\ud800": 1}, "\ud800"),
        ({"temperature": -1}, None),
        ({"max_tokens": 0}, None),
        ({"messages": []}, None),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, None),
        ({"messages": [{"role": "user", "content": "x" * 20_000}]}, None),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_fields_are_named(server: Server, changes: dict[str, Any], param: str | None, stream: bool) -> None:
    """A field that cannot be honoured is a 400 in OpenAI's form that names it, before any stream begins."""
    body = ASK | changes | {"stream": stream}
    text = json.dumps(body)  # in ASCII: the only way to send half of a surrogate pair
    response = httpx.post(f"{server.url}/v1/chat/completions", content=text, headers=JSON, timeout=20)
    error = response.json()["error"]
    assert (response.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert error["message"]
    assert set(error) == {"message", "type", "param", "code"}


def test_harmless_fields_and_parts_are_accepted(server: Server) -> None:
    """Fields that ask for nothing change nothing; text parts are joined; nulls are absent."""
    parts = [{"type": "text", "text": "Hello, "}, {"type": "text", "text": "wörld"}]
    extra = {"user": "me", "metadata": {"a": "b"}, "n": 1, "stop": None, "frequency_penalty": 0, "top_p": 1}
    plain = post(server).json()["choices"]
    assert post(server, **extra, messages=[{"role": "user", "content": parts, "name": None}]).json()["choices"] == plain


def test_errors_reach_the_sdk_as_its_classes(client: openai.OpenAI) -> None:
    """A bad request and an unknown model are the classes that programs catch."""
    with pytest.raises(openai.BadRequestError, match="stop is not supported yet") as bad:
        client.chat.completions.create(**(ASK | {"stop": "x"}))
    assert bad.value.param == "stop"
    with pytest.raises(openai.NotFoundError, match="'gpt-4' is not served here; served: tiny") as missing:
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
    stats = httpx.get(f"{server.url}/healthz").json()["engine"]
    return int(stats["num_running"] + stats["num_waiting"])


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
