"""Request ids, and JSON lines that a program can read and that tell no secrets."""

from __future__ import annotations

import json
import logging
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from porcelet.server.operations.logs import JsonFormatter
from tests.reliability.processes import Running, start
from tests.server.conftest import Server

SECRET = "a secret of mine"
ASK = {"model": "tiny", "messages": [{"role": "user", "content": SECRET}], "temperature": 0, "max_tokens": 7}


@pytest.fixture(scope="module")
def logging_server(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with start(model_folder, tmp_path_factory.mktemp("json"), "--log-format", "json") as running:
        yield running


def lines(running: Running) -> list[dict[str, object]]:
    return [json.loads(line) for line in running.log.read_text().splitlines()]


def test_every_answer_has_an_id(server: Server) -> None:
    """A sane id of the client's comes back, another is replaced; errors and refusals have one, too."""
    for path, headers in (("/healthz", {}), ("/nowhere", {}), ("/healthz", {"Host": "evil.example"})):
        response = httpx.get(server.url + path, headers=headers)
        assert re.fullmatch(r"req_[0-9a-f]{32}", response.headers["x-request-id"])
        assert response.headers["request-id"] == response.headers["x-request-id"]
    mine = httpx.get(f"{server.url}/healthz", headers={"X-Request-Id": "Mine-1.2:3_4"})
    assert mine.headers["x-request-id"] == "Mine-1.2:3_4"
    for insane in ("", "a b", "x" * 65, '"}', "é".encode().decode("latin-1")):
        response = httpx.get(f"{server.url}/healthz", headers={"X-Request-Id": insane.encode("latin-1")})
        assert response.headers["x-request-id"].startswith("req_")


def test_access_lines(logging_server: Running) -> None:
    """One object a line, with route, status, seconds, caller and tokens; never a key, a prompt, or a query."""
    headers = {"X-Request-Id": "find-me", "Authorization": "Bearer sk-hidden"}
    url = f"{logging_server.url}/v1/chat/completions?secret=query"
    assert httpx.post(url, json=ASK, headers=headers, timeout=20).status_code == 200
    logging_server.wait_for(lambda: any(line.get("request_id") == "find-me" for line in lines(logging_server)))
    (line,) = [line for line in lines(logging_server) if line.get("request_id") == "find-me"]
    assert line["method"] == "POST" and line["route"] == "/v1/chat/completions" and line["status"] == 200
    assert line["caller"] == "local" and line["generated_tokens"] == 7 and isinstance(line["prompt_tokens"], int)
    assert isinstance(line["seconds"], float) and line["level"] == "info" and str(line["time"]).endswith("+00:00")
    text = logging_server.log.read_text()
    assert not any(secret in text for secret in (SECRET, "sk-hidden", "secret=query"))


def test_streams_count_their_tokens(logging_server: Running) -> None:
    """A stream's line comes when it is over, with its tokens; one that was left says what had come."""
    url = f"{logging_server.url}/v1/chat/completions"

    def line_of(id: str) -> dict[str, object]:
        logging_server.wait_for(lambda: any(line.get("request_id") == id for line in lines(logging_server)))
        (line,) = [line for line in lines(logging_server) if line.get("request_id") == id]
        return line

    headers = {"X-Request-Id": "streamed"}
    with httpx.stream("POST", url, json=ASK | {"stream": True}, headers=headers, timeout=20) as stream:
        stream.read()
    assert line_of("streamed")["generated_tokens"] == 7
    headers = {"X-Request-Id": "left"}
    slow = {
        "logprobs": True,
        "top_logprobs": 20,
    }  # lest it end while this process waits its turn
    endless = ASK | slow | {"stream": True, "max_tokens": 50_000, "ignore_eos": True}
    with httpx.stream("POST", url, json=endless, headers=headers, timeout=20) as stream:
        next(stream.iter_bytes())
        assert all(line.get("request_id") != "left" for line in lines(logging_server))
    left = line_of("left")["generated_tokens"]
    assert isinstance(left, int) and 0 < left < 50_000


def test_exceptions_are_a_field() -> None:
    """A traceback does not break the line."""
    try:
        raise ValueError("broken\nover lines")
    except ValueError:
        record = logging.LogRecord("x", logging.ERROR, "f", 1, "it %s", ("failed",), sys.exc_info())
    line = JsonFormatter().format(record)
    assert "\n" not in line
    assert json.loads(line)["message"] == "it failed" and "ValueError: broken" in json.loads(line)["exception"]


def test_a_start_that_fails_is_a_line_too(tmp_path: Path) -> None:
    """What would have been one line for a person is one object, with the same exit code; unknown formats are told."""
    command = [sys.executable, "-m", "porcelet", "serve", "--port", "0", "--model", str(tmp_path / "missing")]
    done = subprocess.run([*command, "--log-format", "json"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 3
    (line,) = map(json.loads, done.stderr.splitlines())
    assert line["kind"] == "model_error" and "missing" in line["message"]
    done = subprocess.run([*command, "--log-format", "xml"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "plain, json" in done.stderr


def test_every_line_of_a_life_is_json(model_folder: Path, tmp_path: Path) -> None:
    """From the start over the engine's death to the end there is no line that is no object."""
    with start(model_folder, tmp_path, "--log-format", "json", "--log-level", "debug") as running:
        running.kill_engine(signal.SIGKILL)
        running.wait_for(lambda: "the engine serves again" in running.log.read_text(), 60)
    messages = [str(line["message"]) for line in lines(running)]
    assert any("signal 9" in message for message in messages) and "the engine serves again" in messages
