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
from tests.tiny_model import SPECIAL

ASK: dict[str, Any] = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "Hello, wörld"}],
    "max_tokens": 60,
    "temperature": 0,
}


USER = 256 + SPECIAL.index("<|user|>")
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0, timeout=20)


def post(server: Server, **changes: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/chat/completions", json=ASK | changes, timeout=20)


def test_models(client: openai.OpenAI) -> None:
    """The served model is listed under the name that requests use, and its aliases after it."""
    model, *aliases = client.models.list().data
    assert [alias.id for alias in aliases] == ["deepseek-chat", "deepseek-reasoner", "deepseek-flash"]
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
        ({"stop": 5}, "stop"),
        ({"stop": [1]}, "stop[0]"),
        ({"n": 2}, "n"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"frequency_penalty": "much"}, "frequency_penalty"),
        ({"logit_bias": {"the": 5}}, "logit_bias"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"logprobs": 3}, "logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"max_new_tokens": 5}, "max_new_tokens"),
        ({"\ud800": 1}, "\ud800"),
        ({"temperature": -1}, None),
        ({"max_tokens": 0}, None),
        ({"stop": ""}, None),
        ({"stop": ["x"] * 17}, None),
        ({"stop": "\ud800"}, None),
        ({"frequency_penalty": 2.5}, None),
        ({"logit_bias": {"5": 101}}, None),
        ({"logit_bias": {"99999": 1}}, None),
        ({"logprobs": True, "top_logprobs": 21}, None),
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
    with pytest.raises(openai.BadRequestError, match="n is not supported yet") as bad:
        client.chat.completions.create(**(ASK | {"n": 2}))
    assert bad.value.param == "n"
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
