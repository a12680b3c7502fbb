"""How much a request may hold: its address, headers and body; how deep its JSON; and how long it may take to arrive.

A body is read before the application sees any of the request, but for uploads, which are counted as they pass. So a
slow or endless sender costs a timer and a bounded buffer, and what parses JSON meets only what it can bear.
"""

from __future__ import annotations

import asyncio

from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope

from porcelet.errors import InputError

MAX_ADDRESS_BYTES = 8 << 10
MAX_HEADERS = 100
MAX_HEADER_BYTES = 32 << 10
MAX_BODY_BYTES = 4 << 20
MAX_LOGIN_BYTES = 4 << 10  # the one body that is read from anybody
MAX_UPLOAD_BYTES = 32 << 20
UPLOADS = "/api/files"
MAX_JSON_DEPTH = 64
MAX_JSON_CONTAINERS = 100_000
MAX_JSON_STRINGS = 200_000
MAX_JSON_COMMAS = 300_000  # the longest context's token ids, with room for a few such prompts
PATIENCE = 30.0  # seconds that a body may take
BYTES_PER_SECOND = 16 << 10  # and as many more as it takes at this rate
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


class Refused(InputError):
    """A request that goes no further, with the status that says why."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def check_head(scope: Scope) -> None:
    """
    Raises:
        Refused: the address or the headers are too long, or the body would be too large or is compressed.
    """
    if len(scope.get("raw_path") or b"") + len(scope["query_string"]) > MAX_ADDRESS_BYTES:
        raise Refused(414, f"the address is too long; at most {MAX_ADDRESS_BYTES} bytes are accepted")
    headers = scope["headers"]
    if len(headers) > MAX_HEADERS or sum(len(name) + len(value) for name, value in headers) > MAX_HEADER_BYTES:
        limits = f"{MAX_HEADERS} headers of {MAX_HEADER_BYTES} bytes together"
        raise Refused(431, f"there are too many headers, or too long ones; at most {limits} are accepted")
    known = Headers(scope=scope)
    if known.get("content-encoding", "identity") != "identity":
        raise Refused(415, "compressed bodies are not accepted; send the body as it is, without Content-Encoding")
    length, limit = known.get("content-length", "0"), _max_bytes(scope["path"])
    if not (length.isascii() and length.isdigit()) or int(length[:20]) > limit:
        raise _too_large(limit)


async def limited(scope: Scope, receive: Receive) -> Receive:
    """What the application may `receive`: the whole body at once, or an upload that is counted as it passes.

    Raises:
        Refused: the body is too large, arrives too slowly, or is nested too deeply.
    """
    paced = _paced(receive, _max_bytes(scope["path"]))
    if scope["path"] == UPLOADS:
        return paced
    body, more = bytearray(), True
    while more:
        message = await paced()
        if message["type"] == "http.disconnect":
            return _replayed(message, receive)
        body += message.get("body", b"")
        more = message.get("more_body", False)
    check_json(bytes(body))
    return _replayed({"type": "http.request", "body": bytes(body), "more_body": False}, receive)


def check_json(body: bytes) -> None:
    """See that a body, if it is JSON, is one that parsers and validators can bear. In linear time, without parsing.

    Raises:
        Refused: it is nested too deeply, has too many parts, or is in no encoding of JSON's.
    """
    if b"\0" in body:  # UTF-16 and UTF-32, in which the brackets could hide
        raise Refused(400, "the body is not valid JSON: it holds a zero byte; JSON is UTF-8")
    unescaped = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    if unescaped.count(b'"') > 2 * MAX_JSON_STRINGS:
        raise Refused(400, f"the body's JSON has too many strings; at most {MAX_JSON_STRINGS} are accepted")
    outside = b"".join(unescaped.split(b'"')[::2])
    if outside.count(b",") > MAX_JSON_COMMAS:
        raise Refused(400, f"the body's JSON has too many values; at most {MAX_JSON_COMMAS} are accepted")
    brackets = outside.translate(None, _NO_BRACKETS)
    depth = 0
    for bracket in brackets[: 2 * MAX_JSON_CONTAINERS]:
        depth += 1 if bracket in b"[{" else -1
        if depth > MAX_JSON_DEPTH:
            raise Refused(400, f"the body's JSON is nested too deeply; at most {MAX_JSON_DEPTH} levels are accepted")
    if len(brackets) > 2 * MAX_JSON_CONTAINERS:
        raise Refused(400, f"the body's JSON has too many parts; at most {MAX_JSON_CONTAINERS} are accepted")


def _max_bytes(path: str) -> int:
    return {"/login": MAX_LOGIN_BYTES, UPLOADS: MAX_UPLOAD_BYTES}.get(path, MAX_BODY_BYTES)


def _too_large(limit: int) -> Refused:
    return Refused(413, f"the body is too large; at most {limit} bytes are accepted")


def _paced(receive: Receive, limit: int) -> Receive:
    """Count a body that may have come without a length, and end it where it comes too slowly."""
    loop = asyncio.get_running_loop()
    start, received, whole = loop.time(), 0, False

    async def paced() -> Message:
        nonlocal received, whole
        if whole:
            return await receive()  # nothing comes but the end of the connection, whenever that may be
        try:
            async with asyncio.timeout_at(start + PATIENCE + received / BYTES_PER_SECOND):
                message = await receive()
        except TimeoutError:
            raise Refused(408, "the body did not arrive in time") from None
        received += len(message.get("body", b""))
        whole = not message.get("more_body", False)
        if received > limit:
            raise _too_large(limit)
        return message

    return paced


def _replayed(message: Message, receive: Receive) -> Receive:
    pending = [message]

    async def replayed() -> Message:
        return pending.pop() if pending else await receive()

    return replayed
