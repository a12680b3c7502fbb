"""How long it takes from `porcelet serve` to the first streamed token, with the model's file in the file cache.

    python -m benchmarks.start [--model smollm2-135m-instruct] [--rounds 5] [--append]

Each run is a server of its own, asked from its first moment on. `listening_ms` is when it accepts a connection,
`first_token_seconds` when the first piece of the answer's text came, `ready_seconds` when /readyz said so; then
`http_megabytes` is the resident memory of the process that speaks HTTP, `engine_megabytes` that of its engine.
`import_ms` is what the HTTP process spends on imports, measured apart, with the `--top` costliest ones in the note.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from benchmarks.harness import interleave, report
from porcelet import hub

HOST = "127.0.0.1"
LIMIT_SECONDS = 120.0
POLL_SECONDS = 0.005
MAX_STOLEN = 0.1
APPLICATION = "import uvicorn, porcelet.server.app, porcelet.server.run, porcelet.server.generation.models"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=hub.DEFAULT_MODEL, help="as `porcelet serve --model`")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--top", type=int, default=8, help="imports to name")
    parser.add_argument("--append", action="store_true", help="add the line to results.jsonl")
    options = parser.parse_args()
    results, note = interleave({"serve": lambda: start(options.model)}, options.rounds, max_stolen=MAX_STOLEN)
    note["imports_ms"] = dict(imports()[: options.top])
    report("start", vars(options), results, note, append=options.append)


def start(model: str) -> Mapping[str, float]:
    """One server, from its start to its first token and its end."""
    with tempfile.TemporaryDirectory() as home, tempfile.TemporaryFile("w+") as log:
        port = _free_port()
        command = [sys.executable, "-m", "porcelet", "serve", "--model", model, "--port", str(port)]
        begun = time.perf_counter()
        server = subprocess.Popen(command, env=os.environ | {"XDG_DATA_HOME": home}, stderr=log)
        try:
            return _measure(server, port, begun)
        except OSError as problem:
            log.seek(0)
            sys.exit(f"the server did not answer: {problem}; it said: {log.read()[-1000:]}")
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait()


def _measure(server: subprocess.Popen[bytes], port: int, begun: float) -> dict[str, float]:
    _wait_for_port(server, port, begun + LIMIT_SECONDS)
    listening = time.perf_counter()
    _ask(port)
    answered = time.perf_counter()
    with closing(http.client.HTTPConnection(HOST, port, timeout=LIMIT_SECONDS)) as connection:
        while True:
            connection.request("GET", "/readyz")
            response = connection.getresponse()
            response.read()
            if response.status == http.client.OK:
                break
            time.sleep(POLL_SECONDS)
    ready = time.perf_counter()
    (engine,) = _children(server.pid)
    return {
        "listening_ms": 1e3 * (listening - begun),
        "first_token_seconds": answered - begun,
        "ready_seconds": ready - begun,
        "http_megabytes": resident_bytes(server.pid) / 1e6,
        "engine_megabytes": resident_bytes(engine) / 1e6,
    }


def _wait_for_port(server: subprocess.Popen[bytes], port: int, deadline: float) -> None:
    while server.poll() is None and time.perf_counter() < deadline:
        try:
            socket.create_connection((HOST, port)).close()
            return
        except ConnectionRefusedError:
            time.sleep(POLL_SECONDS)
    raise ConnectionError(f"exit code {server.poll()}")


def _ask(port: int) -> None:
    """Wait for the first text of a streamed answer."""
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "Say hello."}], "stream": True, "max_tokens": 8}
    with closing(http.client.HTTPConnection(HOST, port, timeout=LIMIT_SECONDS)) as connection:
        connection.request("GET", "/v1/models")
        listed = json.loads(connection.getresponse().read())
        body["model"] = listed["data"][0]["id"]
        status = http.client.SERVICE_UNAVAILABLE
        while status == http.client.SERVICE_UNAVAILABLE:  # a model that loads for longer than a request waits for it
            connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            status = response.status
            if status != http.client.OK:
                response.read()
        for line in response:
            if line.startswith(b"data: {") and _has_text(json.loads(line[6:])):
                return
    raise ConnectionError(f"the answer ended without a token, with status {response.status}")


def _has_text(chunk: dict[str, Any]) -> bool:
    delta = (chunk.get("choices") or [{}])[0].get("delta", {})
    return bool(delta.get("content") or delta.get("reasoning_content"))


def imports() -> list[tuple[str, float]]:
    """What the HTTP process imports, each with the milliseconds that it and what only it imports take; all first."""
    done = subprocess.run([sys.executable, "-X", "importtime", "-c", APPLICATION], capture_output=True, text=True)
    found = re.findall(r"^import time:\s+\d+ \|\s+(\d+) \|( +)(\S+)$", done.stderr, re.MULTILINE)
    tops = [(name, int(microseconds) / 1e3) for microseconds, _, name in found]
    total = sum(int(microseconds) / 1e3 for microseconds, indent, _ in found if len(indent) == 1)
    return [("all", round(total, 1)), *sorted(tops, key=lambda each: -each[1])]


def resident_bytes(process: int) -> int:
    status = Path(f"/proc/{process}/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmRSS"))


def _children(process: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    main()
