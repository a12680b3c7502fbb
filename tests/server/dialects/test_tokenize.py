"""Tokens over HTTP."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from porcelet.chat import builtin
from porcelet.server.dialects.tokenize import MAX_CHARACTERS
from tests.server.conftest import Server

TALK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello, wörld"}]

TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": {}}}


def post(server: Server, path: str, **body: Any) -> Any:
    return httpx.post(f"{server.url}{path}", json={"model": "agent"} | body, timeout=20).json()


@pytest.mark.parametrize("text", ["Hello, wörld 你好", "", f"{builtin.USER}x"])
def test_there_and_back(scripted: Server, text: str) -> None:
    """A text's tokens are its text again; the model's first token comes before them unless it is not wanted."""
    plain = post(scripted, "/v1/tokenize", prompt=text, add_special_tokens=False)
    whole = post(scripted, "/v1/tokenize", prompt=text)
    assert post(scripted, "/v1/detokenize", tokens=plain["tokens"]) == {"prompt": text}
    assert post(scripted, "/v1/detokenize", tokens=whole["tokens"]) == {"prompt": builtin.BOS + text}
    assert (whole["count"], plain["count"]) == (len(whole["tokens"]), len(whole["tokens"]) - 1)
    assert whole["max_model_len"] > 1000
    assert "token_strs" not in whole


def test_the_texts_of_tokens(scripted: Server) -> None:
    """Each token's own text, on demand."""
    answer = post(scripted, "/tokenize", prompt="Hi!", return_token_strs=True)
    assert answer["token_strs"] == [builtin.BOS, "H", "i", "!"]
    assert post(scripted, "/detokenize", tokens=answer["tokens"][1:]) == {"prompt": "Hi!"}


def test_a_conversation_is_what_would_be_answered(scripted: Server) -> None:
    """A conversation's tokens are its prompt's, tools and the alias's thinking included."""
    tokens = post(scripted, "/v1/tokenize", messages=TALK)
    prompt = f"{builtin.BOS}Be brief.{builtin.USER}Hello, wörld{builtin.ASSISTANT}{builtin.END_THINK}"
    assert post(scripted, "/v1/detokenize", tokens=tokens["tokens"])["prompt"] == prompt
    answer = post(scripted, "/v1/chat/completions", messages=TALK, max_tokens=1)
    assert answer["usage"]["prompt_tokens"] == tokens["count"]
    thinking = post(scripted, "/v1/tokenize", model="deepseek-reasoner", messages=TALK)["tokens"]
    last = post(scripted, "/v1/detokenize", model="deepseek-reasoner", tokens=thinking[-1:])
    assert last == {"prompt": builtin.THINK}
    assert post(scripted, "/v1/tokenize", messages=TALK, tools=[TOOL])["count"] > tokens["count"]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("tokenize", {}, "prompt"),
        ("tokenize", {"prompt": "x", "messages": TALK}, "prompt"),
        ("tokenize", {"prompt": "x", "tools": [TOOL]}, "tools"),
        ("tokenize", {"prompt": 5}, "prompt"),
        ("tokenize", {"prompt": "x", "chat_template": "y"}, "chat_template"),
        ("tokenize", {"messages": TALK, "add_generation_prompt": False}, "add_generation_prompt"),
        ("tokenize", {"messages": [{"role": "king", "content": "x"}]}, "messages[0].role"),
        ("tokenize", {"model": "other", "prompt": "x"}, "model"),
        ("detokenize", {}, "tokens"),
        ("detokenize", {"tokens": "x"}, "tokens"),
        ("detokenize", {"tokens": [1.5]}, "tokens[0]"),
        ("detokenize", {"tokens": [-1]}, "tokens"),
        ("detokenize", {"tokens": [10**6]}, "tokens"),
    ],
)
def test_bad_fields_are_named(scripted: Server, path: str, body: dict[str, Any], param: str | None) -> None:
    """What cannot be used is refused by name."""
    error = post(scripted, f"/v1/{path}", **body)["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)


def test_a_text_too_long_is_refused(scripted: Server) -> None:
    """A text has a limit of its own."""
    error = post(scripted, "/v1/tokenize", prompt="x" * (MAX_CHARACTERS + 1))["error"]
    assert error["param"] == "prompt"
    assert len(error["message"]) < 300
