"""Tokens over HTTP."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from porcelet.chat import builtin
from porcelet.server.tokenize import MAX_CHARACTERS
from tests.server.conftest import Server

TALK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello, wörld"}]


def post(server: Server, path: str, **body: Any) -> Any:
    return httpx.post(f"{server.url}{path}", json={"model": "scripted"} | body, timeout=20).json()


@pytest.mark.parametrize("text", ["Hello, wörld 你好", "", f"{builtin.USER}x"])
def test_there_and_back(assistant: Server, text: str) -> None:
    """A text's tokens are its text again; the model's first token comes before them unless it is not wanted."""
    plain = post(assistant, "/v1/tokenize", prompt=text, add_special_tokens=False)
    whole = post(assistant, "/v1/tokenize", prompt=text)
    assert post(assistant, "/v1/detokenize", tokens=plain["tokens"]) == {"prompt": text}
    assert post(assistant, "/v1/detokenize", tokens=whole["tokens"]) == {"prompt": builtin.BOS + text}
    assert (whole["count"], plain["count"]) == (len(whole["tokens"]), len(whole["tokens"]) - 1)
    assert whole["max_model_len"] > 1000
    assert "token_strs" not in whole


def test_the_texts_of_tokens(assistant: Server) -> None:
    """Each token's own text, on demand."""
    answer = post(assistant, "/tokenize", prompt="Hi!", return_token_strs=True)
    assert answer["token_strs"] == [builtin.BOS, "H", "i", "!"]
    assert post(assistant, "/detokenize", tokens=answer["tokens"][1:]) == {"prompt": "Hi!"}


def test_a_conversation_is_what_would_be_answered(assistant: Server) -> None:
    """A conversation's tokens are its prompt's, tools and the alias's thinking included."""
    tokens = post(assistant, "/v1/tokenize", messages=TALK)
    prompt = f"{builtin.BOS}Be brief.{builtin.USER}Hello, wörld{builtin.ASSISTANT}{builtin.END_THINK}"
    assert post(assistant, "/v1/detokenize", tokens=tokens["tokens"])["prompt"] == prompt
    answer = post(assistant, "/v1/chat/completions", messages=TALK, max_tokens=1)
    assert answer["usage"]["prompt_tokens"] == tokens["count"]
    thinking = post(assistant, "/v1/tokenize", model="deepseek-reasoner", messages=TALK)
    assert post(assistant, "/v1/detokenize", tokens=thinking["tokens"][-1:])["prompt"] == builtin.THINK
    tool = {"type": "function", "function": {"name": "get_weather", "parameters": {}}}
    assert post(assistant, "/v1/tokenize", messages=TALK, tools=[tool])["count"] > tokens["count"]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("tokenize", {}, "prompt"),
        ("tokenize", {"prompt": "x", "messages": TALK}, "prompt"),
        ("tokenize", {"prompt": "x", "tools": [{}]}, "tools"),
        ("tokenize", {"prompt": 5}, "prompt"),
        ("tokenize", {"prompt": "x", "chat_template": "y"}, "chat_template"),
        ("tokenize", {"messages": TALK, "add_generation_prompt": False}, "add_generation_prompt"),
        ("tokenize", {"messages": [{"role": "king", "content": "x"}]}, None),
        ("tokenize", {"model": "other", "prompt": "x"}, "model"),
        ("detokenize", {}, "tokens"),
        ("detokenize", {"tokens": "x"}, "tokens"),
        ("detokenize", {"tokens": [1.5]}, "tokens[0]"),
        ("detokenize", {"tokens": [-1]}, "tokens"),
        ("detokenize", {"tokens": [10**6]}, "tokens"),
    ],
)
def test_bad_fields_are_named(assistant: Server, path: str, body: dict[str, Any], param: str | None) -> None:
    """What cannot be used is refused by name."""
    error = post(assistant, f"/v1/{path}", **body)["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)


def test_a_text_too_long_is_refused(assistant: Server) -> None:
    """A text has a limit of its own."""
    error = post(assistant, "/v1/tokenize", prompt="x" * (MAX_CHARACTERS + 1))["error"]
    assert error["param"] == "prompt"
    assert len(error["message"]) < 300
