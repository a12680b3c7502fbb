"""What stands around the dialects: who may ask, what a browser is told, how it starts and how it ends."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from starlette.types import ASGIApp

from porcelet.config import ModelEntry, ServeConfig
from porcelet.server.gate.body import MAX_BODY_BYTES
from porcelet.server.gate.guard import SECURITY_HEADERS
from porcelet.server.gate.loopback import is_loopback
from porcelet.server.generation.models import Models
from tests.server.apps import local_app
from tests.server.conftest import Server, start_server


def test_health(server: Server) -> None:
    """A healthy server names its model."""
    response = httpx.get(f"{server.url}/healthz")
    assert response.status_code == 200
    assert list(response.json()["models"]) == ["tiny"]


def test_dead_engine_is_a_503_until_it_serves_again(model_folder: Path, tmp_path: Path) -> None:
    """When the engine's process dies in the middle of a stream, that ends with an error within a second; health and
    new requests are told why and when to come back; then the next process serves them."""
    running = start_server(model_folder, tmp_path / "stderr")
    (worker,) = running.workers()
    ask = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "temperature": 0}
    url = f"{running.url}/v1/chat/completions"
    with httpx.stream("POST", url, json=ask | {"stream": True}, timeout=20) as stream:
        events = (line for line in stream.iter_lines() if line)
        assert "error" not in next(events)
        killed = time.monotonic()
        os.kill(worker, signal.SIGKILL)
        *_, last = events
        assert time.monotonic() - killed < 1
    assert "signal 9" in json.loads(last.removeprefix("data: "))["error"]["message"]
    for response in (httpx.get(f"{running.url}/healthz"), httpx.post(url, json=ask)):
        assert response.status_code == 503
        assert response.json()["error"]["type"] == "capacity_error"
        message = response.json()["error"]["message"]
        assert "signal 9" in message or "hung up" in message  # the exit code is known a moment later
        assert int(response.headers["Retry-After"]) >= 1
    while httpx.get(f"{running.url}/healthz").status_code == 503:
        time.sleep(0.05)
    assert httpx.post(url, json=ask | {"max_tokens": 3}, timeout=20).status_code == 200
    assert len(running.workers()) == 1 and running.workers() != [worker]
    running.process.terminate()
    assert running.process.wait(20) == 0


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nowhere", 404),
        ("GET", "/static/%2e%2e/app.py", 404),
        ("GET", "/v1/chat/completions", 405),
        ("POST", "/", 405),
    ],
)
def test_errors_have_one_form(server: Server, method: str, path: str, status: int) -> None:
    """Whatever was asked for in vain, the answer is OpenAI's error body."""
    response = httpx.request(method, server.url + path)
    assert response.status_code == status
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'{"model": }', b"[" * 50_000, b"\xff\xfe"])
def test_bodies_that_are_no_request(server: Server, body: bytes) -> None:
    """Bodies that are not JSON or not an object are a 400."""
    headers = {"Content-Type": "application/json"}
    response = httpx.post(f"{server.url}/v1/chat/completions", content=body, headers=headers)
    assert response.status_code == 400
    assert response.json()["error"]["message"]


@pytest.mark.parametrize("chunked", [False, True])
def test_large_body_is_a_413(server: Server, chunked: bool) -> None:
    """The limit holds with a declared length and without one."""
    body = b" " * (MAX_BODY_BYTES + 1)
    content = iter([body[:1000], body[1000:]]) if chunked else body
    headers = {"Content-Type": "application/json"}
    response = httpx.post(f"{server.url}/v1/chat/completions", content=content, headers=headers)
    assert response.status_code == 413
    assert response.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example:80", "10.0.0.1"])
def test_foreign_host_is_refused(server: Server, host: str) -> None:
    """A name that was rebound to this machine does not get in."""
    assert httpx.get(f"{server.url}/healthz", headers={"Host": host}).status_code == 403


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://localhost:3000", "https://{host}"])
def test_foreign_origin_is_refused(server: Server, origin: str) -> None:
    """Pages of other sites, those of other local servers too, may not use this one; its own page may."""
    host = server.url.removeprefix("http://")
    foreign = {"Origin": origin.format(host=host)}
    assert httpx.post(f"{server.url}/v1/chat/completions", headers=foreign).status_code == 403
    assert httpx.get(f"{server.url}/v1/models", headers={"Origin": server.url}).status_code == 200


@pytest.mark.parametrize("path", ["/", "/static/app/main.js", "/v1/models", "/nowhere"])
def test_security_headers(server: Server, path: str) -> None:
    """Every answer forbids foreign content, guessing of types and framing, and allows no foreign reader."""
    headers = httpx.get(server.url + path).headers
    assert "default-src 'none'" in headers["content-security-policy"]
    assert "http" not in headers["content-security-policy"]
    assert "unsafe" not in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"
    assert not [name for name in headers if name.startswith("access-control-")]


def test_our_own_mistakes_carry_the_headers(tmp_path: Path) -> None:
    """The answer to a fault in the server itself is guarded like every other."""

    class Broken(Models):
        @property
        def failure(self) -> None:
            raise RuntimeError("broken")

    async def main() -> httpx.Response:
        with local_app(Broken(ServeConfig(models={"tiny": ModelEntry("tiny")}), []), tmp_path) as app:
            return await get(app)

    async def get(app: ASGIApp) -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            return await client.get("/healthz")

    response = asyncio.run(main())
    assert response.status_code == 500 and "made a mistake" in response.json()["error"]["message"]
    assert SECURITY_HEADERS.items() <= {name: response.headers.get(name) for name in SECURITY_HEADERS}.items()


def test_loopback() -> None:
    """Loopback are its addresses and the one name for them; not the wildcards, and no other name."""
    assert all(is_loopback(host) for host in ("127.0.0.1", "127.8.8.8", "::1", "localhost"))
    assert not any(is_loopback(host) for host in ("0.0.0.0", "::", "10.0.0.1", "", socket.gethostname()))


def serve(*arguments: str, home: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "porcelet", "serve", *arguments]
    environment = os.environ | ({"PORCELET_HOME": str(home)} if home else {})
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)


def test_refuses_other_hosts_and_taken_ports(model_folder: Path, server: Server, tmp_path: Path) -> None:
    """An address that others can reach without any key, and a port that is taken, end in one line with the remedy and
    its exit code."""
    wide = serve("--model", str(model_folder), "--host", "0.0.0.0", "--port", "0", home=tmp_path)
    assert wide.returncode == 2
    assert "porcelet keys create" in wide.stderr and len(wide.stderr.splitlines()) == 1
    taken = serve("--model", str(model_folder), "--port", server.url.rpartition(":")[2])
    assert taken.returncode == 4
    assert "--port" in taken.stderr
    assert len(taken.stderr.splitlines()) == 1


def test_no_torch_in_the_http_process(server: Server) -> None:
    """The process that has answered requests never imported torch, and never started a second worker."""
    httpx.get(f"{server.url}/v1/models")
    imported = set(re.findall(r"^import time:.*\|\s*(\S+)$", server.log.read_text(), re.MULTILINE))
    assert "porcelet.server.app" in imported
    assert not [name for name in imported if name.partition(".")[0] in ("torch", "numpy", "transformers")]
    assert len(server.workers()) == 1


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_no_orphans(model_folder: Path, tmp_path: Path, stop: signal.Signals) -> None:
    """However the server ends, in the middle of an answer, its worker ends too; asked to end, it exits with 0."""
    running = start_server(model_folder, tmp_path / "stderr")
    (worker,) = running.workers()
    body = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "stream": True, "temperature": 0}
    with httpx.stream("POST", f"{running.url}/v1/chat/completions", json=body, timeout=20):
        running.process.send_signal(stop)
    assert running.process.wait(20) == (-9 if stop == signal.SIGKILL else 0)
    deadline = time.monotonic() + 5
    while is_running(worker):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_running(process: int) -> bool:
    """Whether it exists and is more than a zombie that waits for its new parent."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(process)], capture_output=True, text=True).stdout
    return bool(state) and not state.startswith("Z")
