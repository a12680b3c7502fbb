"""One real server process with a tiny model, shared by the tests that only talk to it."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.scripted_model import save_scripted_model
from tests.server.scripts import CALLER, TALKER, V3_1_TEMPLATE
from tests.tiny_model import save_tiny_model

START_SECONDS = 60


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


def start_server(folder: Path, log: Path, *python_options: str, others: Sequence[Path] = ()) -> Server:
    """Start a server on a free port and wait for its first line; `others` are served beside the first model."""
    command = [sys.executable, *python_options, "-m", "porcelet", "serve", "--port", "0"]
    command += [word for each in (folder, *others) for word in ("--model", str(each))]
    with log.open("wb") as stderr:
        process = subprocess.Popen([*command, "--set", "threads=1"], stderr=stderr)
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        if ready := re.search(
            rf"^serving {folder.name} on (http://127\.0\.0\.1:\d+) \(", log.read_text(), re.MULTILINE
        ):
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
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of the models in scripts.py; DeepSeek's names stand for the talker."""
    folder = tmp_path_factory.mktemp("models")
    talker = save_scripted_model(folder / "talker", TALKER, V3_1_TEMPLATE)
    caller = save_scripted_model(folder / "caller", CALLER)
    running = start_server(talker, folder / "stderr", others=[caller])
    yield running
    running.process.terminate()
    assert running.process.wait(20) == 0
