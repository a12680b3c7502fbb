"""A web server on this machine that speaks what the hub speaks, and serves plain files beside it.

    /api/models/<repo>/revision/<revision>, /api/models/<repo>/tree/<commit>, /<repo>/resolve/<revision>/<file>
    /files/<path>

It answers Range and If-Range, can break a file off, and keeps what it was asked.
"""

from __future__ import annotations

import hashlib
import json
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "a" * 40


@dataclass
class Server:
    """What is served, how it misbehaves, and what was asked: (method, path, Range header)."""

    url: str = ""
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    token: str = ""  # asked of everybody if set
    cuts: dict[str, list[int]] = field(default_factory=dict)  # by file name: after how many bytes answers break off
    stall: threading.Event = field(default_factory=threading.Event)  # a cut answer waits for it before it ends
    etags: bool = True
    moved: dict[str, str] = field(default_factory=dict)  # by file name: where a redirect leads
    tokens: set[str] = field(default_factory=set)  # Authorization headers that came
    requests: list[tuple[str, str, str]] = field(default_factory=list)

    def ranges(self, file: str) -> list[str]:
        """The Range headers of all GETs for a file."""
        return [asked for method, path, asked in self.requests if method == "GET" and path.endswith("/" + file)]


@contextmanager
def serve(tls: tuple[Path, Path] | None = None) -> Iterator[Server]:
    state = Server()
    state.stall.set()

    class Handler(Answer):
        server_state = state

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    if tls:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*tls)
        http.socket = context.wrap_socket(http.socket, server_side=True, do_handshake_on_connect=False)
    state.url = f"http{'s' if tls else ''}://127.0.0.1:{http.server_port}"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield state
    finally:
        state.stall.set()
        http.shutdown()
        http.server_close()
        thread.join()


class Answer(BaseHTTPRequestHandler):
    """One connection, one answer."""

    server_state: Server
    timeout = 20

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        state, path = self.server_state, unquote(urlsplit(self.path).path)
        state.requests.append((self.command, path, self.headers.get("Range", "")))
        state.tokens.add(self.headers.get("Authorization", ""))
        if state.token and self.headers.get("Authorization") != f"Bearer {state.token}":
            return self.plain(401, b"", {"X-Error-Code": "RepoNotFound"})
        if path.startswith("/files/"):
            content = state.files.get(path.removeprefix("/files/"))
            return self.plain(404, b"") if content is None else self.file(path, content, {})
        if path.startswith("/api/models/"):
            return self.api(*path.removeprefix("/api/models/").split("/", 3))
        owner, name, _, revision, file = path.removeprefix("/").split("/", 4)
        content = state.repositories.get(f"{owner}/{name}", {}).get(file)
        if content is None or revision not in ("main", COMMIT):
            return self.plain(404, b"", {"X-Error-Code": "EntryNotFound"})
        if file in state.moved:
            return self.plain(302, b"", {"Location": state.moved[file], "X-Repo-Commit": COMMIT})
        return self.file(path, content, {"X-Repo-Commit": COMMIT})

    def api(self, owner: str, name: str, kind: str = "", revision: str = "") -> None:
        files = self.server_state.repositories.get(f"{owner}/{name}")
        if files is None:
            return self.plain(404, b"", {"X-Error-Code": "RepoNotFound"})
        if revision not in ("main", COMMIT):
            return self.plain(404, b"", {"X-Error-Code": "RevisionNotFound"})
        if kind == "tree":
            tree = [{"type": "file", "path": path, **self.entry(path, files[path])} for path in files]
            return self.plain(200, json.dumps(tree).encode())
        siblings = [{"rfilename": path, **self.entry(path, files[path])} for path in files]
        return self.plain(200, json.dumps({"id": f"{owner}/{name}", "sha": COMMIT, "siblings": siblings}).encode())

    def entry(self, path: str, content: bytes) -> dict[str, Any]:
        blob = {"size": len(content), "oid": hashlib.sha1(content).hexdigest()}
        if path.endswith((".safetensors", ".gguf")):
            sha256 = hashlib.sha256(content).hexdigest()
            blob["lfs"] = {"sha256": sha256, "oid": sha256, "size": len(content), "pointerSize": 100}
        return blob

    def file(self, path: str, content: bytes, headers: dict[str, str]) -> None:
        state, whole = self.server_state, len(content)
        # As the hub does, large files are tagged by their SHA-256; the real library names its cached files so.
        digest = hashlib.sha256(content) if path.endswith((".safetensors", ".gguf")) else hashlib.sha1(content)
        etag = f'"{digest.hexdigest()}"'
        if state.etags:
            headers = headers | {"ETag": etag}
        start = 0
        if (asked := self.headers.get("Range")) and self.headers.get("If-Range", etag) == etag:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            headers = headers | {"Content-Range": f"bytes {start}-{whole - 1}/{whole}"}
        self.plain(206 if start else 200, content[start:], headers, path.rpartition("/")[2])

    def plain(self, status: int, body: bytes, headers: dict[str, str] | None = None, file: str = "") -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        cuts = self.server_state.cuts.get(file)
        self.wfile.write(body[: cuts.pop(0)] if cuts else body)
        if cuts is not None:
            self.wfile.flush()
            self.server_state.stall.wait(20)
