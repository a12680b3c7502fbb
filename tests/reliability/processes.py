"""Real servers with any configuration, and what a test does to them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

START_SECONDS = 60


@dataclass(frozen=True)
class Running:
    """A server that answers at `url` and writes to `log`."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def engines(self) -> list[int]:
        command = ["pgrep", "-P", str(self.process.pid), "-f", "porcelet.engine.worker"]
        return [int(line) for line in subprocess.run(command, capture_output=True, text=True).stdout.split()]

    def kill_engine(self, number: signal.Signals) -> None:
        (engine,) = self.engines()
        os.kill(engine, number)

    def counts(self) -> tuple[int, int]:
        """Sequences that run and that wait, after the engine's last step."""
        stats = httpx.get(f"{self.url}/healthz").json()["models"]["tiny"]
        return stats["num_running"], stats["num_waiting"]

    def metric(self, name: str) -> float:
        """The sum over a metric's labels."""
        found = re.findall(
            rf"^porcelet:{name}(?:\{{.*\}})? (\S+)$", httpx.get(f"{self.url}/metrics").text, re.MULTILINE
        )
        return sum(map(float, found))

    def wait_for(self, condition: Callable[[], bool], seconds: float = 10) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.log.read_text()[-2000:]
            time.sleep(0.01)


def resident_bytes(process: int) -> int:
    status = Path(f"/proc/{process}/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmRSS"))


@contextmanager
def start(folder: Path, place: Path, *options: str, config: str = "", engine: str = "") -> Iterator[Running]:
    """A server of the model at `folder`, called tiny. `config` and `engine` are lines of the tables [server] and
    [models.tiny]. Afterwards it is told to end, and must do so with exit code 0."""
    file, log = place / "serve.toml", place / "stderr"
    file.write_text(f'[server]\n{config}\n[models.tiny]\nsource = "{folder}"\nthreads = 1\n{engine}\n')
    command = [sys.executable, "-m", "porcelet", "serve", "--config", str(file), "--port", "0", *options]
    with log.open("wb") as stderr:
        process = subprocess.Popen(command, stderr=stderr, env=os.environ | {"PORCELET_HOME": str(place)})
    try:
        yield Running(_url(process, log), process, log)
        if process.poll() is None:
            process.terminate()
        assert process.wait(30) == 0, log.read_text()[-2000:]
    finally:
        process.kill()
        process.wait()


def _url(process: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        if found := re.search(r"serving tiny on (http://127\.0\.0\.1:\d+) \(", log.read_text()):
            return found[1]
        time.sleep(0.02)
    raise AssertionError(f"the server did not start: {log.read_text()[-2000:]}")
