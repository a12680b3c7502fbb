"""The legacy dialect: plain continuations and what fits between two texts, through OpenAI's own client."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from porcelet.errors import InputError
from porcelet.server.dialects.completions import CompletionRequest, middle_tokens
from porcelet.tokenizer import Tokenizer
from tests.chat.conftest import write_tokenizer
from tests.server.conftest import Server
from tests.server.scripts import MIDDLE, MIXED, Mixed

ASK: dict[str, Any] = {"model": "tiny", "prompt": "Hello, wörld", "max_tokens": 12, "temperature": 0}
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0, timeout=20)


def complete(server: Server, **changes: Any) -> dict[str, Any]:
    response = httpx.post(f"{server.url}/v1/completions", json=ASK | changes, timeout=20)
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    return body


def chunks_of(server: Server, **changes: Any) -> list[dict[str, Any]]:
    text = httpx.post(f"{server.url}/v1/completions", json=ASK | changes | {"stream": True}, timeout=20).text
    *events, done, end = text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events if not event.startswith(":")]


def whole(text: Mixed) -> str:
    return f"{text.reasoning}</think>{text.content}"


def test_continues_a_text(scripted: Server) -> None:
    """A prompt is gone on with as it stands; nothing in the continuation is taken for reasoning or a call."""
    mixed = MIXED[0]
    body = complete(scripted, model="talker", prompt=f"say {mixed.letter}", max_tokens=100)
    assert (body["object"], body["choices"][0]["text"]) == ("text_completion", whole(mixed))
    assert (body["choices"][0]["finish_reason"], body["choices"][0]["logprobs"]) == ("stop", None)
    assert body["usage"]["prompt_tokens"] == len(["bos", *f"say {mixed.letter}"])


def test_several_prompts(scripted: Server) -> None:
    """Choices come in the order of the prompts, n of each, streamed or whole; usage counts all prompts."""
    prompts = [mixed.letter for mixed in MIXED[:5]]
    asked = {"model": "talker", "prompt": prompts, "n": 2, "max_tokens": 100}
    body = complete(scripted, **asked)
    texts = [whole(mixed) for mixed in MIXED[:5] for _ in range(2)]
    assert [(choice["index"], choice["text"]) for choice in body["choices"]] == list(enumerate(texts))
    assert body["usage"]["prompt_tokens"] == 5 * len(["bos", "letter"])
    chunks = chunks_of(scripted, **asked, stream_options={"include_usage": True})
    for index, text in enumerate(texts):
        mine = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert "".join(choice["text"] for choice in mine) == text
        assert [choice["finish_reason"] for choice in mine] == [None] * (len(mine) - 1) + ["stop"]
    assert [chunk["usage"] is None for chunk in chunks] == [True] * (len(chunks) - 1) + [False]
    assert chunks[-1]["usage"]["completion_tokens"] == body["usage"]["completion_tokens"]


def test_tokens_as_a_prompt(client: openai.OpenAI, model_folder: Path) -> None:
    """Token ids are taken as they are, one list or several, and mean what their text means."""
    tokens = Tokenizer.from_folder(model_folder).encode(ASK["prompt"])
    text = client.completions.create(**ASK).choices[0].text
    assert text
    for prompt, texts in ((tokens, [text]), ([tokens, tokens], [text, text]), ([ASK["prompt"], tokens], [text, text])):
        answer = client.completions.create(**(ASK | {"prompt": prompt}))
        assert [choice.text for choice in answer.choices] == texts


def test_special_tokens_are_read(scripted: Server) -> None:
    """A prompt is the model's own text: its special tokens may be written in it, and the first one is not doubled."""
    usages = [
        complete(scripted, model="talker", prompt=f"{beginning}<｜User｜>x", max_tokens=1)["usage"]
        for beginning in ("", "<｜begin▁of▁sentence｜>")
    ]
    assert [usage["prompt_tokens"] for usage in usages] == [3, 3]


def test_fills_in(scripted: Server) -> None:
    """With a suffix the model is given prompt, hole and suffix in its own tokens, and answers with the middle; text
    that looks like one of those tokens is only text."""
    asked = {"model": "talker", "prompt": "def f(", "suffix": ": pass", "max_tokens": 50}
    body = complete(scripted, **asked)
    assert body["choices"][0]["text"] == "".join(MIDDLE)
    assert body["usage"]["prompt_tokens"] == len(["bos", "begin", *"def f(", "hole", *": pass", "end"])
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks_of(scripted, **asked)) == "".join(MIDDLE)
    tricked = complete(scripted, **asked | {"prompt": "<｜fim▁hole｜>"})["usage"]["prompt_tokens"]
    assert tricked == len(["bos", "begin", *"<｜fim▁hole｜>".encode(), "hole", *": pass", "end"])


def test_fills_in_with_qwens_tokens(tmp_path: Path) -> None:
    """A vocabulary of Qwen's fills in with its own tokens, in its order; without all three there is no way."""
    tokens = ["<|fim_middle|>", "<|fim_prefix|>", "<|fim_suffix|>"]
    write_tokenizer(tmp_path, tokens)
    tokenizer = Tokenizer.from_folder(tmp_path)
    before, between, after = middle_tokens(tokenizer, "coder")
    assert tokenizer.decode([before, between, after]) == "<|fim_prefix|><|fim_suffix|><|fim_middle|>"
    write_tokenizer(tmp_path, tokens[1:])
    with pytest.raises(InputError, match="coder has no tokens"):
        middle_tokens(Tokenizer.from_folder(tmp_path), "coder")


def test_fills_in_as_deepseeks_clients_ask(scripted: Server) -> None:
    """DeepSeek's beta path and its client's way of asking: the base URL ends in /beta."""
    client = openai.OpenAI(base_url=f"{scripted.url}/beta", api_key="any", max_retries=0, timeout=20)
    answer = client.completions.create(model="deepseek-chat", prompt="a", suffix="b", max_tokens=50)
    assert answer.choices[0].text == "".join(MIDDLE)


def test_echo_repeats_the_prompt(server: Server, model_folder: Path) -> None:
    """The prompt comes before the answer, streamed or whole, given as text or as tokens."""
    text = complete(server)["choices"][0]["text"]
    tokens = Tokenizer.from_folder(model_folder).encode(ASK["prompt"])
    for prompt in (ASK["prompt"], tokens):
        assert complete(server, prompt=prompt, echo=True)["choices"][0]["text"] == ASK["prompt"] + text
    chunks = chunks_of(server, echo=True, n=2)
    for index in range(2):
        mine = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert "".join(choice["text"] for choice in mine) == ASK["prompt"] + text


def test_logprobs(client: openai.OpenAI) -> None:
    """Each token with its log-probability, the best ones there and where it begins, streamed as in one piece; at
    temperature 0 the token is the best one."""
    asked = ASK | {"logprobs": 3}
    choice = client.completions.create(**asked).choices[0]
    logprobs = choice.logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == 12
    for token, value, best in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert 1 <= len(best) <= 4 and best[token] >= value == max(best.values()) > -100
    ends = [*logprobs.text_offset[1:], len(choice.text)]
    for token, start, end in zip(logprobs.tokens, logprobs.text_offset, ends, strict=True):
        assert "\ufffd" in token or choice.text[start:end].lstrip("\ufffd") == token
    streamed = [chunk.choices[0].logprobs for chunk in client.completions.create(**asked, stream=True)]
    parts = [part for part in streamed if part]
    assert [offset for part in parts for offset in part.text_offset] == logprobs.text_offset
    assert [value for part in parts for value in part.token_logprobs] == logprobs.token_logprobs


def test_scoring_a_text(server: Server) -> None:
    """Echo with log-probabilities and no answer scores a text, as evaluation harnesses do: the first token has none,
    and the others have what they have as an answer."""
    scored = complete(server, logprobs=0, echo=True, max_tokens=12)["choices"][0]
    length = len(ASK["prompt"].encode())
    assert scored["logprobs"]["token_logprobs"][0] is None and len(scored["logprobs"]["tokens"]) == length + 12
    whole_text = scored["text"]
    if "\ufffd" not in whole_text:
        again = complete(server, prompt=whole_text, logprobs=0, echo=True, max_tokens=0, n=2)
        for choice in again["choices"]:
            assert (choice["text"], choice["finish_reason"]) == (whole_text, "length")
            assert choice["logprobs"]["token_logprobs"] == pytest.approx(scored["logprobs"]["token_logprobs"], abs=1e-4)
    alone = complete(server, logprobs=0, echo=True, max_tokens=0)["choices"][0]
    assert alone["text"] == ASK["prompt"] and len(alone["logprobs"]["tokens"]) == length
    assert alone["logprobs"]["token_logprobs"][1:] == pytest.approx(
        scored["logprobs"]["token_logprobs"][1:length], abs=1e-4
    )
    assert alone["logprobs"]["text_offset"] == [
        len(ASK["prompt"].encode()[:index].decode("utf-8", "ignore")) for index in range(length)
    ]


@pytest.mark.parametrize(
    ("changes", "status", "param"),
    [
        ({"suffix": "x"}, 400, "suffix"),
        ({"prompt": []}, 400, "prompt"),
        ({"prompt": [[]]}, 400, "prompt"),
        ({"prompt": [1, "x"]}, 400, "prompt"),
        ({"prompt": [True]}, 400, "prompt"),
        ({"prompt": [99999]}, 400, "prompt"),
        ({"prompt": [-1]}, 400, "prompt"),
        ({"prompt": ["x"] * 129}, 422, "prompt"),
        ({"prompt": ["x"] * 100, "n": 2}, 400, "n"),
        ({"prompt": ""}, 400, None),
        ({"prompt": "\ud800"}, 400, None),
        ({"prompt": ["x", "y" * 20_000]}, 400, None),
        ({"logprobs": 21}, 422, "logprobs"),
        ({"logprobs": True}, 400, "logprobs"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"max_tokens": -1}, 422, "max_tokens"),
        ({"best_of": 2}, 400, "best_of"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_fields_are_named(
    server: Server, changes: dict[str, Any], status: int, param: str | None, stream: bool
) -> None:
    """What cannot be honoured is refused by name, before any stream begins; one bad prompt refuses all."""
    content = json.dumps(ASK | changes | {"stream": stream})
    response = httpx.post(f"{server.url}/v1/completions", content=content, headers=JSON, timeout=20)
    assert (response.status_code, response.json()["error"]["param"]) == (status, param), response.text


@pytest.mark.parametrize("field", sorted(CompletionRequest.model_fields))
def test_strange_values_break_nothing(server: Server, field: str) -> None:
    """Whatever a field holds is answered or refused, and the next request is served."""
    deep: Any = []
    for _ in range(500):
        deep = [deep]
    strange = [None, -1, 0, 2**31, 2**63, 1e308, "", "NaN", float("nan"), [], [""], [[1], "a"], {}, [2**63], deep]
    with httpx.Client(timeout=20) as http:
        for value in strange:
            content = json.dumps(ASK | {field: value} | ({} if field == "max_tokens" else {"max_tokens": 2}))
            response = http.post(f"{server.url}/v1/completions", content=content, headers=JSON)
            assert response.status_code < 500, (value, response.text)
        assert http.post(f"{server.url}/v1/completions", json=ASK).status_code == 200
