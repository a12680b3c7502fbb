"""What a batch file asks for: one request a line, in our own form or in that of OpenAI's batch API.

    {"id"?: "a", "prompt": "..." | "messages": [...], "max_tokens"?: 100, "temperature"?: 0.5, "n"?: 2, ...}
    {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": [...], ...}}

A file is read twice: first every line is checked, so that a mistake in the last one is told before the first is run;
then the lines are run as they are read, so that of a file of a million requests only the ids are in memory. A line
without an id is called after its number: "line-17". Left out: constraints, log-probabilities, tools.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from porcelet.chat.messages import check
from porcelet.errors import InputError
from porcelet.types import SamplingParams

URL = "/v1/chat/completions"
MAX_SHOWN = 5  # mistakes told of at once


@dataclass(frozen=True)
class Job:
    """One request of a file, checked."""

    id: str
    messages: list[dict[str, Any]]
    params: SamplingParams


class _Body(msgspec.Struct, forbid_unknown_fields=True):
    """What is asked, in either form; None is what the command's options say. `model`, `user` and `metadata` change
    nothing: OpenAI's clients send them."""

    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    n: int | None = None
    model: str | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None


class _Own(_Body, forbid_unknown_fields=True):
    id: str | None = None


class _OpenAI(msgspec.Struct, forbid_unknown_fields=True):
    custom_id: str
    body: _Body
    url: str = URL
    method: str = "POST"


_SAME_NAMES = {field.name for field in dataclasses.fields(SamplingParams)} & set(_Body.__struct_fields__) - {"stop"}
_any_line = msgspec.json.Decoder(dict[str, msgspec.Raw])
_own_line = msgspec.json.Decoder(_Own)
_openai_line = msgspec.json.Decoder(_OpenAI)


def read_jobs(path: Path, defaults: SamplingParams) -> Iterator[Job]:
    """The requests of a file in its order, each parsed when it is asked for; empty lines are passed over.

    Raises:
        InputError: names the line.
    """
    for number, line in _lines(path):
        yield _job(line, number, defaults, f"{path}:{number}")


def check_jobs(path: Path, defaults: SamplingParams) -> set[str]:
    """The ids of a file's requests, once every line is known to be good.

    Raises:
        InputError: the file is not there, cannot be read twice, or holds mistakes; it names the first few with their
            lines.
    """
    if not path.exists():
        raise InputError(f"there is no file {path}; give one with one JSON request a line")
    if not path.is_file():
        raise InputError(f"{path} is no file that can be read twice; give a file with one JSON request a line")
    first_lines: dict[str, int] = {}
    mistakes: list[str] = []
    for number, line in _lines(path):
        try:
            job = _job(line, number, defaults, f"{path}:{number}")
        except InputError as problem:
            mistakes.append(str(problem))
            continue
        if first_lines.setdefault(job.id, number) != number:
            mistakes.append(f"{path}:{number}: id {job.id!r} is that of line {first_lines[job.id]}, too")
    if mistakes:
        more = f"; and {len(mistakes) - MAX_SHOWN} more" if len(mistakes) > MAX_SHOWN else ""
        raise InputError("; ".join(mistakes[:MAX_SHOWN]) + more)
    return set(first_lines)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        with path.open("rb") as file:
            yield from ((number, line) for number, line in enumerate(file, 1) if line.strip())
    except OSError as problem:
        raise InputError(f"{path} cannot be read: {problem.strerror}") from problem


def _job(line: bytes, number: int, defaults: SamplingParams, place: str) -> Job:
    try:
        if "custom_id" in _any_line.decode(line):
            outer = _openai_line.decode(line)
            if (outer.method, outer.url) != ("POST", URL):
                raise InputError(f"{outer.method} {outer.url} cannot be run; only POST {URL} can")
            id, body = outer.custom_id, outer.body
        else:
            own = _own_line.decode(line)
            id, body = f"line-{number}" if own.id is None else own.id, own
        messages = _messages(body)
        check(messages, None, None, True)
        return Job(id, messages, _params(body, defaults))
    except (msgspec.MsgspecError, InputError) as problem:
        raise InputError(f"{place}: {problem}") from problem


def _messages(body: _Body) -> list[dict[str, Any]]:
    if (body.prompt is None) == (body.messages is None):
        raise InputError("give either prompt or messages")
    if body.prompt is not None:
        return [{"role": "user", "content": body.prompt}]
    return [_plain(message) for message in body.messages or ()]


def _plain(message: dict[str, Any]) -> dict[str, Any]:
    """OpenAI's newer spellings in the older ones: a developer is a system, parts of text are one text."""
    role, content = message.get("role"), message.get("content")
    if isinstance(content, list) and all(isinstance(p, dict) and p.get("type") == "text" for p in content):
        content = "".join(str(part.get("text")) for part in content)
    return message | {"role": "system" if role == "developer" else role, "content": content}


def _params(body: _Body, defaults: SamplingParams) -> SamplingParams:
    given = {name: value for name in _SAME_NAMES if (value := getattr(body, name)) is not None}
    if body.max_completion_tokens is not None:
        given["max_tokens"] = body.max_completion_tokens
    if body.stop is not None:
        given["stop"] = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop)
    return dataclasses.replace(defaults, **given)
