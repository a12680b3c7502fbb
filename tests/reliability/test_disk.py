"""A disk that is full: answers go on, what cannot be kept is said so, and all is well once there is room again."""

from __future__ import annotations

import resource
from pathlib import Path

import httpx

from tests.reliability.processes import Running, start
from tests.reliability.test_load import ASK, CHAT


def fill_disk(running: Running, full: bool) -> None:
    """No file of the server's may grow beyond a kilobyte, or all may again; its log is longer than that already."""
    size = 1024 if full else resource.RLIM_INFINITY
    resource.prlimit(running.process.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def test_full_disk(folder: Path, tmp_path: Path) -> None:
    """The API needs no disk; the chat tells its users that the database cannot be written."""
    with start(folder, tmp_path) as running, httpx.Client(base_url=running.url, timeout=30) as client:
        made = client.post("/api/conversations", json={"title": "before"})
        assert made.status_code == 201
        fill_disk(running, True)
        for _ in range(3):
            answer = client.post(CHAT, json=ASK)
            assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 5
        refused = client.post("/api/conversations", json={"title": "x" * 100})
        assert refused.status_code == 503 and "database" in refused.json()["error"]["message"]
        assert client.get("/healthz").status_code == 200
        fill_disk(running, False)
        assert client.post("/api/conversations", json={"title": "after"}).status_code == 201
        titles = [found["title"] for found in client.get("/api/conversations").json()["conversations"]]
        assert titles == ["after", "before"]
