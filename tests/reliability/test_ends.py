"""How it ends: an engine that is killed, a server that is told to stop, once or twice."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.reliability.processes import Running, start
from tests.reliability.test_load import ASK, CHAT, ENDLESS


def test_killed_engine(folder: Path, tmp_path: Path) -> None:
    """Within a second of its engine's death the server is unhealthy, the stream has ended with the reason, a whole
    answer too; the next engine gives what the first one gave."""
    with start(folder, tmp_path) as running, httpx.Client(timeout=30) as client:
        before = client.post(running.url + CHAT, json=ASK).json()["choices"]
        with client.stream("POST", running.url + CHAT, json=ENDLESS) as stream:
            lines = stream.iter_lines()
            next(lines)
            killed = time.monotonic()
            running.kill_engine(signal.SIGKILL)
            *_, last = (line for line in lines if line)
            running.wait_for(lambda: client.get(f"{running.url}/healthz").status_code == 503, 1)
            assert time.monotonic() - killed < 1
        assert "signal 9" in json.loads(last.removeprefix("data: "))["error"]["message"]
        assert client.get(f"{running.url}/readyz").json()["models"]["tiny"] == {"status": "restarting"}
        refused = client.post(running.url + CHAT, json=ASK)
        assert refused.status_code == 503 and int(refused.headers["retry-after"]) >= 1
        running.wait_for(lambda: client.get(f"{running.url}/readyz").status_code == 200, 60)
        assert client.post(running.url + CHAT, json=ASK).json()["choices"] == before
        assert running.metric("engine_restarts_total") == 1 and running.metric("requests_in_flight") == 0


def test_drain(folder: Path, tmp_path: Path) -> None:
    """Told to stop, the server refuses new work and says so; what ends in time is whole, what does not is told; it
    takes no longer than it may, and exits with 0."""
    with start(folder, tmp_path, config="drain = 2") as running, httpx.Client(timeout=30) as client:
        short = ASK | {"max_tokens": 300, "stream": True}
        with (
            client.stream("POST", running.url + CHAT, json=ENDLESS) as endless,
            client.stream("POST", running.url + CHAT, json=short) as ending,
        ):
            first, second = endless.iter_lines(), ending.iter_lines()
            assert next(first) and next(second)
            told = time.monotonic()
            running.process.terminate()
            running.wait_for(lambda: client.get(f"{running.url}/readyz").status_code == 503, 2)
            assert client.get(f"{running.url}/readyz").json()["status"] == "draining"
            assert client.get(f"{running.url}/healthz").status_code == 200
            refused = client.post(running.url + CHAT, json=ASK)
            assert refused.status_code == 503 and refused.json()["error"]["code"] == "overloaded"
            assert [line for line in second if line][-1] == "data: [DONE]"
            last = [line for line in first if line][-1]
        assert "shut down" in json.loads(last.removeprefix("data: "))["error"]["message"]
        assert running.process.wait(20) == 0
        assert 2 <= time.monotonic() - told < 8


def test_second_signal(folder: Path, tmp_path: Path) -> None:
    """Who asks twice does not wait for the answers under way."""
    with (
        start(folder, tmp_path, config="drain = 600") as running,
        httpx.Client(timeout=30) as client,
        client.stream("POST", running.url + CHAT, json=ENDLESS) as stream,
    ):
        pieces = stream.iter_raw()
        next(pieces)
        running.process.terminate()
        running.wait_for(lambda: httpx.get(f"{running.url}/readyz").status_code == 503, 2)
        told = time.monotonic()
        running.process.send_signal(signal.SIGINT)
        assert running.process.wait(20) == 0
        assert time.monotonic() - told < 5


# ---- starts that fail -----------------------------------------------------------------------------------------------


def environment(home: Path) -> dict[str, str]:
    return os.environ | {"PORCELET_HOME": str(home)}


def serve(home: Path, *arguments: str) -> tuple[int, str]:
    """Exit code, and the one line on standard error."""
    command = [sys.executable, "-m", "porcelet", "serve", "--port", "0", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment(home))
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("porcelet: ") and not done.stdout, done.stderr
    return done.returncode, lines[0]


def damaged(folder: Path, place: Path, name: str, change: Any) -> Path:
    """A copy of a model folder, one file of which is changed."""
    copy = place / "tiny"
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(change(file.read_bytes()) if file.name == name else file.read_bytes())
    return copy


def flipped(content: bytes) -> bytes:
    """The safetensors header's first byte after its length, another one."""
    return content[:8] + bytes([content[8] ^ 0x40]) + content[9:]


def test_databases_that_cannot_be_used(folder: Path, tmp_path: Path) -> None:
    """A file that is no database, a folder that nobody may make, and a file that another program holds."""
    broken = tmp_path / "broken.db"
    broken.write_bytes(b"no database at all" * 1000)
    config = tmp_path / "serve.toml"
    for url, reason in ((f"sqlite:///{broken}", "not a database"), ("sqlite:////dev/null/x.db", "cannot be")):
        config.write_text(f'[server]\ndatabase = "{url}"\n[models.tiny]\nsource = "{folder}"\nthreads = 1\n')
        code, line = serve(tmp_path, "--config", str(config))
        assert code == 4 and reason in line
    holder = sqlite3.connect(tmp_path / "locked.db")
    holder.execute("BEGIN EXCLUSIVE")
    config.write_text(
        f'[server]\ndatabase = "sqlite:///{tmp_path}/locked.db"\n[models.tiny]\nsource = "{folder}"\nthreads = 1\n'
    )
    code, line = serve(tmp_path, "--config", str(config))
    holder.close()
    assert code == 4 and "locked" in line


@pytest.mark.parametrize(
    ("name", "change", "part"),
    [
        ("model.safetensors", lambda content: content[:-100], "model.safetensors"),
        ("model.safetensors", lambda content: content[:5], "model.safetensors"),
        ("model.safetensors", flipped, "model.safetensors"),
        ("config.json", lambda content: content[: len(content) // 2], "config.json"),
        ("tokenizer.json", lambda content: content[: len(content) // 2], "tokenizer.json"),
        ("tokenizer.json", lambda content: b"", "tokenizer.json"),
    ],
)
def test_damaged_files(folder: Path, tmp_path: Path, name: str, change: Any, part: str) -> None:
    """A file that is cut or flipped is refused at the start, in one line that names it."""
    code, line = serve(tmp_path, "--model", str(damaged(folder, tmp_path, name, change)))
    assert code == 3 and part in line


def test_too_large_and_absent(folder: Path, tmp_path: Path) -> None:
    """What does not fit or is not there is told with its remedy, each with its exit code."""
    code, line = serve(tmp_path, "--model", str(folder), "--set", "cache_tokens=1000000000000")
    assert code == 4 and "what fits: cache_tokens=" in line
    code, line = serve(tmp_path, "--model", str(tmp_path / "nowhere"))
    assert code == 3 and "nowhere" in line
    code, line = serve(tmp_path, "--config", str(tmp_path / "none.toml"))
    assert code == 2 and "none.toml" in line


def test_engine_killed_while_it_loads(folder: Path, tmp_path: Path) -> None:
    """The server ends with one line that says by what, and the engine's exit code."""
    log = tmp_path / "stderr"
    command = [sys.executable, "-m", "porcelet", "serve", "--port", "0", "--model", str(folder)]
    with log.open("wb") as stderr:
        process = subprocess.Popen(command, stderr=stderr, env=environment(tmp_path))
    running = Running("", process, log)
    running.wait_for(lambda: len(running.engines()) == 1, 30)
    os.kill(running.engines()[0], signal.SIGKILL)
    assert process.wait(20) == 5
    assert log.read_text() == (
        "porcelet: the engine process was killed by signal 9; often the machine is out of memory\n"
    )
