"""llama.cpp's server, built for this machine, over its own streaming HTTP API on the loopback address.

Options: format (the GGUF file's, such as q8_0); speculation ("lookup": its drafts from the prompt's n-grams). The
memory told is the server's and this small client's together.
"""

from __future__ import annotations

import atexit
import http.client
import json
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.rivals.protocol import CACHE_TOKENS, MAX_BATCH_TOKENS, MAX_SEQUENCES, Asked, Came, main

HOST = "127.0.0.1"
START_SECONDS = 60.0
WAIT_SECONDS = 0.05
WITHHELD = -1  # a token the server counts and does not show, as its bytes are not a whole character


class LlamaServer:
    def __init__(self, options: Mapping[str, Any]) -> None:
        self.versions = {"llama.cpp": options["version"]}
        self.port = _free_port()
        command = [options["program"], "--model", options["model"], "--host", HOST, "--port", str(self.port)]
        command += ["--threads", str(options["threads"]), "--parallel", str(MAX_SEQUENCES), "--kv-unified"]
        command += ["--ctx-size", str(CACHE_TOKENS), "--batch-size", str(MAX_BATCH_TOKENS), "--no-webui"]
        if options.get("speculation") == "lookup":
            command += ["--spec-type", "ngram-simple"]
        self.server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sys.stderr)
        atexit.register(self.server.terminate)
        self._wait_until_ready()
        self.came: queue.SimpleQueue[Came | Exception] = queue.SimpleQueue()
        self.connections: dict[str, http.client.HTTPConnection] = {}

    def submit(self, request: Asked) -> None:
        connection = http.client.HTTPConnection(HOST, self.port)
        self.connections[request.id] = connection
        threading.Thread(target=self._follow, args=(connection, request), daemon=True).start()

    def step(self, deadline: float) -> Iterable[Came]:
        try:
            came = [self.came.get(timeout=WAIT_SECONDS)]
        except queue.Empty:
            return []
        while not self.came.empty():
            came.append(self.came.get())
        for one in came:
            if isinstance(one, Exception):
                raise one
        return [one for one in came if isinstance(one, Came)]

    def cancel(self, ids: Sequence[str]) -> None:
        """A closed connection cancels its request."""
        for id in ids:
            stream = self.connections[id].sock
            if stream:
                stream.shutdown(socket.SHUT_RDWR)
        self._wait_until_idle()
        self.connections.clear()
        self.came = queue.SimpleQueue()

    def _follow(self, connection: http.client.HTTPConnection, request: Asked) -> None:
        came = self.came
        body = {
            "prompt": list(request.prompt),
            "n_predict": request.max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "return_tokens": True,
            "cache_prompt": True,
        }
        try:
            connection.request("POST", "/completion", json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            if response.status != http.client.OK:
                raise RuntimeError(f"llama-server answered {response.status}: {response.read()!r}")
            num_known = 0
            for line in response:
                if line.startswith(b"data: {"):
                    message = json.loads(line[6:])
                    tokens = message.get("tokens", [])
                    tokens = [WITHHELD] * (message["tokens_predicted"] - num_known - len(tokens)) + tokens
                    num_known += len(tokens)
                    if tokens:
                        came.put(Came(request.id, tokens, time.perf_counter()))
        except (RuntimeError, OSError, http.client.HTTPException) as problem:
            came.put(problem)  # of a cancelled request nobody looks here any more

    def _wait_until_ready(self) -> None:
        end = time.monotonic() + START_SECONDS
        while self.server.poll() is None and time.monotonic() < end:
            try:
                if self._get("/health")[0] == http.client.OK:
                    return
            except ConnectionRefusedError:
                pass
            time.sleep(WAIT_SECONDS)
        raise RuntimeError(f"llama-server did not start (exit code {self.server.poll()})")

    def _wait_until_idle(self) -> None:
        while any(slot["is_processing"] for slot in json.loads(self._get("/slots")[1])):
            time.sleep(WAIT_SECONDS)

    def _get(self, path: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(HOST, self.port)
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    main(LlamaServer)
