"""One real server process with a tiny model, shared by the tests that only talk to it."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import httpx
import pytest

from porcelet.chat import builtin
from porcelet.server.gate import keys
from porcelet.server.gate.keys import KeyLimits
from porcelet.server.store import Database
from tests.scripted_model import save_scripted_model
from tests.server.scripts import AGENT, CALLER, TALKER, V3_1_TEMPLATE
from tests.tiny_model import save_tiny_model

START_SECONDS = 60
CONTEXT = 32768  # tokens of the chat models: more than a fast machine writes during a test
ROOM = ("--set", f"cache_tokens={CONTEXT}")


@dataclass(frozen=True)
class Server:
    """A running `porcelet serve`: its address, its process and what it has written to standard error."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def workers(self) -> list[int]:
        """Engine processes; a model's own chat template may have a process of its own."""
        found = subprocess.run(
            ["pgrep", "-P", str(self.process.pid), "-f", "porcelet.engine.worker"], capture_output=True, text=True
        )
        return [int(line) for line in found.stdout.split()]


def start_server(
    folder: Path, log: Path, *python_options: str, options: Sequence[str] = (), others: Sequence[Path] = ()
) -> Server:
    """Start a server on a free port, its database beside its log, and wait for its first line; `others` are served
    beside the first model."""
    runs = [] if "-c" in python_options else ["-m", "porcelet"]
    command = [sys.executable, *python_options, *runs, "serve", "--port", "0", *options]
    command += [word for each in (folder, *others) for word in ("--model", str(each))]
    with log.open("wb") as stderr:
        home = os.environ | {"PORCELET_HOME": str(log.parent)}
        process = subprocess.Popen([*command, "--set", "threads=1"], stderr=stderr, env=home)
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        line = rf"^serving {folder.name} on (https?://[\d.]+:\d+) \("
        if ready := re.search(line, log.read_text(), re.MULTILINE):
            return Server(ready[1], process, log)
        time.sleep(0.02)
    process.kill()
    raise AssertionError(f"the server did not start: {log.read_text()[-2000:]}")


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def server(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    # -X importtime writes one line for every module that this process, and not its worker, imports.
    running = start_server(model_folder, tmp_path_factory.mktemp("logs") / "stderr", "-X", "importtime")
    yield running
    running.process.terminate()
    assert running.process.wait(20) == 0


@pytest.fixture(scope="session")
def guarded(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, dict[str, str]]]:
    """A server that others could reach, and its keys."""
    home = tmp_path_factory.mktemp("guarded")
    wanted = {
        "free": KeyLimits(),
        "neighbour": KeyLimits(),
        "thirty": KeyLimits(requests_per_minute=30),
        "poor": KeyLimits(token_budget=40),
        "other": KeyLimits(models=("large",)),
        "single": KeyLimits(concurrency=1, requests_per_minute=2),
    }
    with closing(Database.open(f"sqlite:///{home / 'porcelet.db'}")) as database:
        made = {name: database.run_now(partial(keys.create, name=name, limits=wanted[name]))[1] for name in wanted}
    running = start_server(model_folder, home / "stderr", options=["--host", "0.0.0.0"])
    yield replace(running, url=running.url.replace("0.0.0.0", "127.0.0.1")), made
    running.process.terminate()
    assert running.process.wait(20) == 0


# Asked without thinking, the chat model answers THE_ANSWER; left to its habit, it thinks until it is stopped.
THE_ANSWER = "Hello there, this is 你好."
CHAT_SCRIPTS = [["\n", "hm ", "so ", "hm "], [builtin.END_THINK, "Hello ", "there", ", this ", "is ", "你好", "."]]


@dataclass(frozen=True)
class Interrupted:
    """What a server left behind that was killed in the middle of an answer."""

    conversation: str
    answer: str


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_scripted_model(tmp_path_factory.mktemp("models") / "tiny", CHAT_SCRIPTS)


@pytest.fixture(scope="session")
def chat_home(chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Interrupted]:
    """A server's folder after it was killed."""
    folder = tmp_path_factory.mktemp("chat")
    killed = start_server(chat_model, folder / "stderr", options=ROOM)
    with httpx.Client(base_url=f"{killed.url}/api", timeout=20) as client:
        conversation = client.post("/conversations", json={}).json()["id"]
        ask = {"parent": None, "content": "Think!", "model": "tiny", "effort": None}
        answer = client.post(f"/conversations/{conversation}/messages", json=ask).json()["assistant"]["id"]
        deadline = time.monotonic() + 20
        while not client.get(f"/conversations/{conversation}").json()["messages"][1]["reasoning"]:
            assert time.monotonic() < deadline
            time.sleep(0.1)
    killed.process.kill()
    killed.process.wait(20)
    return folder, Interrupted(conversation, answer)


@pytest.fixture(scope="session")
def chat_server(chat_model: Path, chat_home: tuple[Path, Interrupted]) -> Iterator[Server]:
    """A server that found a killed one's database."""
    running = start_server(chat_model, chat_home[0] / "stderr", options=ROOM)
    yield running
    running.process.terminate()
    assert running.process.wait(20) == 0


@pytest.fixture(scope="session")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of the models in scripts.py; DeepSeek's names stand for the talker."""
    folder = tmp_path_factory.mktemp("models")
    talker = save_scripted_model(folder / "talker", TALKER, V3_1_TEMPLATE)
    caller = save_scripted_model(folder / "caller", CALLER)
    agent = save_scripted_model(folder / "agent", AGENT, V3_1_TEMPLATE)
    running = start_server(talker, folder / "stderr", others=[caller, agent])
    yield running
    running.process.terminate()
    assert running.process.wait(20) == 0


@pytest.fixture
def event_loop_of_its_own() -> Iterator[None]:
    """litellm asks for the thread's event loop, and would leave the one it gets open."""
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    yield
    asyncio.set_event_loop(None)
    loop.close()
