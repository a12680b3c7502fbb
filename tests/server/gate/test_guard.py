"""Who gets in: every route, every odd spelling of one, every limit on what may be sent."""

from __future__ import annotations

import asyncio
import json
import random
import ssl
import string
import subprocess
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import text
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from porcelet.errors import InputError
from porcelet.server.gate import body, connection
from porcelet.server.gate.access import Access
from porcelet.server.gate.body import Refused, check_json
from porcelet.server.gate.guard import SECURITY_HEADERS
from porcelet.server.gate.keys import KeyLimits
from porcelet.server.generation.queue import Queue
from porcelet.server.generation.watch import LOCAL
from tests.server.conftest import Server
from tests.server.doors import HOST, OTHERS, House, bearer, in_house, listening, routes

LOOPBACK = Access()
STRICT_LOOPBACK = Access(require_key=True)
LOCALHOST = "127.0.0.1:8000"


@pytest.mark.parametrize("access", [OTHERS, STRICT_LOOPBACK], ids=["others", "loopback"])
def test_every_route_needs_a_key(tmp_path: Path, access: Access) -> None:
    """Of all routes of the application, and of paths that it does not have, those open without credentials are health,
    readiness, login and the page's files; a wrong key opens no more, and a browser that asks for the page logs in."""

    async def visit(house: House) -> None:
        opened = set()
        asked = [*routes(house), ("GET", "/readyz"), ("GET", "/metrics"), ("GET", "/nowhere"), ("TRACE", "/v1/models")]
        assert ("POST", "/v1/chat/completions") in asked and ("GET", "/openapi.json") in asked
        for method, path in asked:
            for headers in ({}, bearer("sk-porcelet-0123456789-" + "x" * 43), {"Cookie": "porcelet_login=guessed"}):
                response = await house.client.request(method, path, headers=headers)
                if response.status_code != 401:
                    opened.add(path)
        assert opened == {"/healthz", "/readyz", "/login", "/static/x"}
        page = await house.client.get("/", headers={"Accept": "text/html,*/*"})
        assert (page.status_code, page.headers["location"]) == (303, "/login")
        assert (await house.client.get("/v1/models", headers={"Accept": "text/html"})).status_code == 401

    in_house(tmp_path, visit, access, HOST if access is OTHERS else LOCALHOST)


ODD_PATHS = [
    *("//v1/models", "/v1//models", "/%76%31/models", "/v1/models/", "/V1/MODELS", "/healthz/../v1/models", "*"),
    *("/healthz%2f..%2fv1%2fmodels", "/static", "/healthz/", "/HEALTHZ", "/healthz;x", "/healthz%00", "/healthz%3f"),
    *("/login/../v1/models", "/static\\..\\v1", "http://127.0.0.1/healthz", "http://127.0.0.1/v1/models?/healthz"),
    *("/v1/models?path=/healthz", "/v1/models#/healthz", "/%2e/healthz", "/./healthz", "/login%20", "/x/../static/x"),
]
IN_THE_OPEN_FOLDER = [
    "/static/../v1/models",
    "/static/%2e%2e/v1/models",
    "/static//v1/models",
    "/static%2f..%2fv1/models",
]


@pytest.mark.parametrize("host", ["x", "127.0.0.1/healthz?", "x/static/", "x:80@healthz", "healthz", "/healthz"])
def test_odd_paths_and_hosts_open_nothing(tmp_path: Path, host: str) -> None:
    """No spelling of an address, and no Host header, reaches anything without a key: over a raw socket, where no client
    tidies the path. What begins with the open folder stays in it."""

    async def visit(house: House) -> None:
        async with listening(house.app) as address:
            for path in [*ODD_PATHS, *IN_THE_OPEN_FOLDER]:
                ask = f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
                answer = await exchange(address, ask.encode())
                expected = (b"HTTP/1.1 404",) if path in IN_THE_OPEN_FOLDER else (b"HTTP/1.1 401", b"HTTP/1.1 400")
                assert answer.startswith(expected), (path, answer[:80])

    in_house(tmp_path, visit)


async def exchange(address: tuple[str, int], *pieces: bytes, pause: float = 0.0) -> bytes:
    """What a server answers to bytes sent one after the other, until it closes the connection."""
    reader, writer = await asyncio.open_connection(*address)
    try:
        for piece in pieces:
            writer.write(piece)
            await asyncio.sleep(pause)
        return await asyncio.wait_for(reader.read(), 20)
    except ConnectionError:
        return b""
    finally:
        writer.close()


# ---- hosts and origins ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("access", "host", "allowed"),
    [
        (LOOPBACK, "127.0.0.1:8000", True),
        (LOOPBACK, "LocalHost:8000", True),
        (LOOPBACK, "[::1]:8000", True),
        (LOOPBACK, "evil.example", False),
        (LOOPBACK, "localhost.evil.example", False),
        (LOOPBACK, "127.0.0.1.evil.example", False),
        (LOOPBACK, "evil.example:127", False),
        (LOOPBACK, "", False),
        (replace(LOOPBACK, allowed_hosts=("chat.example",)), "chat.example", True),
        (OTHERS, "any.example", True),
        (replace(OTHERS, allowed_hosts=("chat.example",)), "Chat.Example:8000", True),
        (replace(OTHERS, allowed_hosts=("chat.example",)), "evil.example", False),
        (replace(OTHERS, allowed_hosts=("chat.example",)), "localhost", True),
    ],
)
def test_hosts(tmp_path: Path, access: Access, host: str, allowed: bool) -> None:
    """On loopback a foreign Host is refused, elsewhere any is allowed unless names were given; before any key."""

    async def visit(house: House) -> None:
        for path in ("/static/x", "/v1/models"):
            response = await house.client.get(path, headers={"Host": host})
            assert (response.status_code != 403) == allowed

    in_house(tmp_path, visit, access)


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://chat.example:81", "http://CHAT.evil"])
def test_foreign_origins_need_the_key_itself(tmp_path: Path, origin: str) -> None:
    """A page of another site cannot use a browser's login, nor log in; a program that knows the key may say what it
    likes. On loopback, where no key is asked for, a foreign origin is always refused."""

    async def visit(house: House) -> None:
        key, secret = house.key()
        cookie, _ = await house.gate.logins.open(key)
        login = {"Cookie": f"porcelet_login={cookie}"}
        foreign, own = {"Origin": origin}, {"Origin": f"http://{HOST}"}
        get = house.client.get
        assert (await get("/v1/usage", headers=login)).status_code == 200
        assert (await get("/v1/usage", headers=login | own)).status_code == 200
        assert (await get("/v1/usage", headers=login | foreign)).status_code == 403
        assert (await get("/v1/usage", headers=bearer(secret) | foreign)).status_code == 200
        assert (await house.client.post("/login", json={"key": secret}, headers=foreign)).status_code == 403
        local = await get("/v1/usage", headers=foreign | {"Host": LOCALHOST})
        assert local.status_code == 401

    in_house(tmp_path, visit)

    async def local(house: House) -> None:
        _, secret = house.key()
        for headers in ({}, bearer("any"), bearer(secret)):
            assert (await house.client.get("/v1/usage", headers=headers | {"Origin": origin})).status_code == 403

    in_house(tmp_path, local, LOOPBACK, LOCALHOST)


def test_an_allowed_name_may_be_behind_tls(tmp_path: Path) -> None:
    """A proxy that speaks TLS makes our page's origin an https one; that is ours for an allowed name alone."""

    async def visit(house: House) -> list[int]:
        origin = {"Origin": f"https://{HOST}"}
        return [(await house.client.post("/login", json={"key": "x"}, headers=origin)).status_code]

    assert in_house(tmp_path, visit, replace(OTHERS, allowed_hosts=(HOST,))) == [401]
    assert in_house(tmp_path, visit, OTHERS) == [403]


def test_behind_a_proxy_a_key_is_needed(tmp_path: Path) -> None:
    """A name that is not loopback's says that others come, so everybody needs a key."""
    named = replace(LOOPBACK, allowed_hosts=("localhost", HOST))
    assert named.needs_key and not replace(LOOPBACK, allowed_hosts=("localhost", "127.0.0.1")).needs_key

    async def visit(house: House) -> None:
        _, secret = house.key()
        passed_on = {"X-Forwarded-For": "192.0.2.1", "Via": "1.1 proxy"}
        for host in (HOST, LOCALHOST):
            for headers, status in ((passed_on, 401), (passed_on | bearer(secret), 200), ({}, 401)):
                answer = await house.client.get("/v1/usage", headers=headers | {"Host": host})
                assert answer.status_code == status

    in_house(tmp_path, visit, named)


@pytest.mark.parametrize(
    "name", ["Forwarded", "X-Forwarded-For", "X-Forwarded-Proto", "x-forwarded-host", "Via", "X-Real-IP"]
)
def test_where_no_key_is_needed_no_proxy_may_pass_on(tmp_path: Path, name: str) -> None:
    """A request that came through a proxy is somebody else's: it is refused with the remedy, whatever it asks for."""

    async def visit(house: House) -> None:
        for path in ("/v1/usage", "/", "/login"):
            answer = await house.client.get(path, headers={name: "x"})
            assert answer.status_code == 403 and "--require-key" in answer.json()["error"]["message"]
        assert (await house.client.get("/v1/usage", headers={"X-Forward": "x"})).status_code == 200

    in_house(tmp_path, visit, LOOPBACK, LOCALHOST)


def test_a_broken_database_is_told_in_our_form(tmp_path: Path) -> None:
    """Where keys and logins cannot be read, nobody gets in, and the answer is a 503 with our body and headers."""

    async def visit(house: House) -> None:
        key, secret = house.key()
        cookie, _ = await house.gate.logins.open(key)
        assert (await house.client.get("/v1/usage", headers=bearer(secret))).status_code == 200
        house.database.run_now(lambda connection: connection.execute(text("DROP TABLE logins")))
        seen = [await house.client.get("/v1/usage", headers={"Cookie": f"porcelet_login={cookie}"})]
        await house.database.run(lambda connection: None)
        house.database._engine.dispose()
        for file in tmp_path.iterdir():
            file.write_bytes(b"no database at all, " * 1000)
        house.forget()
        seen.append(await house.client.get("/v1/usage", headers=bearer(secret)))
        for answer in seen:
            assert (answer.status_code, answer.json()["error"]["type"]) == (503, "capacity_error")
            assert int(answer.headers["Retry-After"]) > 0
            assert SECURITY_HEADERS.items() <= {name: answer.headers[name] for name in SECURITY_HEADERS}.items()
            assert "sqlite" not in answer.text

    in_house(tmp_path, visit)


def test_loopback_takes_any_key_but_a_bad_one_of_ours(tmp_path: Path) -> None:
    """Clients that must send some key get in as the local caller; one of our form has to be good, and counts."""

    async def visit(house: House) -> None:
        house.database.run_now(lambda c: None)
        _, secret = house.key(limits=KeyLimits(concurrency=3))

        async def concurrency(headers: dict[str, str]) -> object:
            response = await house.client.get("/v1/usage", headers=headers)
            return response.json()["limits"]["concurrency"] if response.status_code == 200 else response.status_code

        assert await concurrency({}) is None
        assert await concurrency(bearer("sk-any")) is None
        assert await concurrency({"x-api-key": "any"}) is None
        assert await concurrency(bearer(secret)) == 3
        assert await concurrency(bearer(secret[:-1])) == 401
        assert await concurrency({"Cookie": "porcelet_login=stale"}) is None

    in_house(tmp_path, visit, LOOPBACK, LOCALHOST)


@pytest.mark.parametrize("name", ["Authorization", "x-api-key", "Origin"])
def test_headers_that_decide_come_once(tmp_path: Path, name: str) -> None:
    """Two values for one of them are refused: a proxy might believe the other one."""

    async def visit(house: House) -> None:
        _, secret = house.key()
        headers = [*bearer(secret).items(), (name, "one"), (name, "two")]
        assert (await house.client.get("/v1/usage", headers=headers)).status_code == 400

    in_house(tmp_path, visit)


def test_every_answer_carries_the_security_headers(tmp_path: Path) -> None:
    """Answers, refusals and what is no HTTP at all: each forbids foreign content and framing; HSTS comes with TLS
    alone."""

    async def visit(house: House) -> None:
        answers = [await house.client.get(path) for path in ("/static/x", "/v1/models", "/nowhere", "/")]
        answers.append(await house.client.get("/v1/models", headers={"x": "y" * 40_000}))
        assert [answer.status_code for answer in answers] == [404, 401, 401, 401, 431]
        for answer in answers:
            assert SECURITY_HEADERS.items() <= {name: answer.headers[name] for name in SECURITY_HEADERS}.items()
            assert "strict-transport-security" not in answer.headers
        async with listening(house.app) as address:
            for sent, status in ((b"nonsense\r\n\r\n", b"400"), (b"GET / HTTP/1.1\r\nx: " + b"y" * 70_000, b"431")):
                raw = await exchange(address, sent)
                assert raw.startswith(b"HTTP/1.1 " + status)
                assert b"default-src 'none'" in raw and b'{"error": {' in raw
        over_tls = await house.client.get("https://chat.example/v1/models")
        assert over_tls.headers["strict-transport-security"].startswith("max-age=")

    in_house(tmp_path, visit)


# ---- how much may be sent -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "headers", "content", "status"),
    [
        ("GET", "/v1/usage?" + "x" * 9000, {}, b"", 414),
        ("GET", "/v1/usage", {f"x-{i}": "y" for i in range(101)}, b"", 431),
        ("GET", "/v1/usage", {"x": "y" * 33_000}, b"", 431),
        ("POST", "/v1/chat/completions", {}, b" " * ((4 << 20) + 1), 413),
        ("POST", "/v1/chat/completions", {"Content-Length": "1" * 5000}, b"", 413),
        ("POST", "/login", {}, b" " * 5000, 413),
        ("POST", "/api/files", {"Content-Length": str((32 << 20) + 1)}, b"", 413),
        ("POST", "/v1/chat/completions", {"Content-Encoding": "gzip"}, b"x", 415),
        ("POST", "/v1/chat/completions", {}, b"[" * 65 + b"]" * 65, 400),
        ("POST", "/v1/chat/completions", {}, b"[" + b"[]," * 100_000 + b"[]]", 400),
        ("POST", "/v1/chat/completions", {}, b"[" + b"1," * 300_001 + b"1]", 400),
        ("POST", "/v1/chat/completions", {}, "[[]]".encode("utf-16"), 400),
    ],
)
def test_requests_have_limits(
    tmp_path: Path, method: str, path: str, headers: dict[str, str], content: bytes, status: int
) -> None:
    """What is too long, too large, compressed or too deep is refused by its own status, with a valid key too."""

    async def visit(house: House) -> None:
        _, secret = house.key()
        response = await house.client.request(method, path, headers=headers | bearer(secret), content=content)
        assert response.status_code == status
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}

    in_house(tmp_path, visit)


def test_a_body_without_a_length_is_counted(tmp_path: Path) -> None:
    """A chunked body ends at the limit, however much more would come."""

    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield b" " * 65536

    async def visit(house: House) -> None:
        _, secret = house.key()
        for path in ("/v1/chat/completions", "/login"):
            response = await house.client.post(path, headers=bearer(secret), content=endless())
            assert response.status_code == 413

    in_house(tmp_path, visit)


def depth(value: object) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + max(map(depth, inner), default=0)


def test_json_depth_is_counted_as_parsers_see_it() -> None:
    """Random JSON whose strings are full of brackets, quotes and backslashes passes exactly when its depth allows."""
    chance = random.Random(0)

    def text() -> str:
        return "".join(chance.choices('[]{}"\\,:\n é' + string.ascii_letters, k=chance.randrange(12)))

    def value(levels: int) -> object:
        if levels == 0:
            return chance.choice([text(), 1, None, True])
        inner = [value(levels - 1), *(value(chance.randrange(min(levels, 3))) for _ in range(chance.randrange(3)))]
        chance.shuffle(inner)
        return inner if chance.random() < 0.5 else {f"{number}{text()}": item for number, item in enumerate(inner)}

    refused = 0
    for levels in [*range(55, 75)] * 5:
        found = value(levels)
        encoded = json.dumps(found, ensure_ascii=chance.random() < 0.5).encode()
        try:
            check_json(encoded)
        except Refused:
            refused += 1
            assert depth(found) > body.MAX_JSON_DEPTH
        else:
            assert depth(found) <= body.MAX_JSON_DEPTH
    assert 0 < refused < 100


def test_the_longest_prompts_of_token_ids_pass() -> None:
    """A list of numbers may have as many as a context of DeepSeek's has tokens, and commas in strings are no values."""
    ids = list(range(100_000, 100_000 + 163_840))
    check_json(json.dumps({"prompt": ids}).encode())
    check_json(json.dumps({"prompt": "," * 3_000_000 + '"\\,' * 100}).encode())
    with pytest.raises(Refused, match="too many values"):
        check_json(json.dumps({"messages": [1] * 300_002}).encode())


@pytest.mark.parametrize("piece", [b'"', b'\\"', b"\\", b"[", b"[]", b'"",', b'"\\', b"{", b"x", b"1,"])
def test_the_json_check_is_quick(piece: bytes) -> None:
    """No body of the largest size holds the server up, whatever it repeats."""
    content = piece * (body.MAX_BODY_BYTES // len(piece))
    start = time.process_time()
    try:
        check_json(content)
    except Refused:
        assert piece[:1] in b'[{"1'
    assert time.process_time() - start < 0.5


def test_slow_senders_are_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A head that trickles in, silence, a body that trickles in, and one that goes on after its answer: each ends,
    while a slow body that keeps the pace arrives."""
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.4)
    monkeypatch.setattr(body, "PATIENCE", 0.4)

    async def visit(house: House) -> None:
        _, secret = house.key()
        head = f"POST /v1/nowhere HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {secret}\r\nContent-Length: 30\r\n\r\n"
        refused = b"POST /v1/nowhere HTTP/1.1\r\nHost: x\r\nContent-Length: 30\r\n\r\n"

        async def timed(*pieces: bytes, pause: float = 0.1) -> tuple[bytes, float]:
            start = time.monotonic()
            return await exchange(address, *pieces, pause=pause), time.monotonic() - start

        async with listening(house.app) as address:
            silent, trickled, slow, late, steady = await asyncio.gather(
                timed(),
                timed(b"GET / HTTP/1.1\r\n", *[b"x: y\r\n"] * 10),
                timed(head.encode(), *[b" "] * 30),
                timed(refused, *[b" "] * 30),
                timed(head.encode() + b" " * 10, b" " * 20 + b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"),
            )
        assert silent[0] == b"" and silent[1] < 2
        assert not trickled[0]
        assert slow[0].startswith(b"HTTP/1.1 408") or slow[0] == b""  # a sender that goes on may miss the answer
        assert late[0] == b"" or late[0].startswith(b"HTTP/1.1 401")
        assert steady[0].startswith(b"HTTP/1.1 404")

    in_house(tmp_path, visit)


def test_a_slow_body_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who sends half a body and waits gets a 408, and the connection ends."""
    monkeypatch.setattr(body, "PATIENCE", 0.2)

    async def visit(house: House) -> None:
        async with listening(house.app) as address:
            answer = await exchange(address, b"POST /login HTTP/1.1\r\nHost: x\r\nContent-Length: 30\r\n\r\n{")
            assert answer.startswith(b"HTTP/1.1 408")

    in_house(tmp_path, visit)


def test_too_many_connections_are_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One connection too many is a 503 in our form; the others live on, and a place that is left is free again."""
    monkeypatch.setattr(connection, "MAX_CONNECTIONS", 2)
    ask = b"GET /static/x HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"

    async def visit(house: House) -> None:
        async with listening(house.app) as address:
            held = [await asyncio.open_connection(*address) for _ in range(2)]
            for _, writer in held:
                writer.write(b"POST /login HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 2\r\n\r\n")
            await asyncio.sleep(0.1)
            assert (await exchange(address, ask)).startswith(b"HTTP/1.1 503")
            reader, writer = held[0]
            writer.write(b"{}")
            assert (await reader.read()).startswith(b"HTTP/1.1 400")
            for _, writer in held:
                writer.close()
            await asyncio.sleep(0.1)
            assert (await exchange(address, ask)).startswith(b"HTTP/1.1 404")

    in_house(tmp_path, visit)


def test_idle_connections_make_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all places are taken, the oldest connection that waits for its next request ends, and not the newest."""
    monkeypatch.setattr(connection, "MAX_CONNECTIONS", 3)
    ask = b"GET /static/x HTTP/1.1\r\nHost: x\r\n\r\n"

    async def visit(house: House) -> None:
        async with listening(house.app) as address:
            kept = [await asyncio.open_connection(*address) for _ in range(3)]
            for reader, writer in (kept[1], kept[0], kept[2]):
                writer.write(ask)
                assert (await reader.readuntil(b"}}")).startswith(b"HTTP/1.1 404")
            newest = await asyncio.open_connection(*address)
            for reader, writer in (newest, kept[0], kept[2]):
                writer.write(ask)
                assert (await reader.readuntil(b"}}")).startswith(b"HTTP/1.1 404")
            with suppress(ConnectionError):
                assert await kept[1][0].read() == b""
            for _, writer in (*kept, newest):
                writer.close()

    in_house(tmp_path, visit)


def test_one_address_has_a_share_of_the_connections(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections of another machine that are all in use are at most its share: one more is a 503. This machine, where
    a proxy may be, has no share."""
    monkeypatch.setattr(connection, "MAX_PER_ADDRESS", 2)
    half = b"POST /login HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n"
    ask = b"GET /static/x HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"

    async def visit(house: House) -> None:
        async with listening(house.app) as address:
            for local, status in ((True, b"404"), (False, b"503")):
                monkeypatch.setattr(connection, "is_loopback", lambda host, local=local: local)
                held = [await asyncio.open_connection(*address) for _ in range(2)]
                for _, writer in held:
                    writer.write(half)
                await asyncio.sleep(0.1)
                assert (await exchange(address, ask)).startswith(b"HTTP/1.1 " + status)
                for _, writer in held:
                    writer.close()
                await asyncio.sleep(0.1)
            assert (await exchange(address, ask)).startswith(b"HTTP/1.1 404")

    in_house(tmp_path, visit)


def test_a_reader_that_stalls_loses_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream whose client does not read ends after a while, and its place in the queue is free again; one that is
    read goes on."""
    monkeypatch.setattr(connection, "STALL_SECONDS", 0.5)
    queue = Queue("tiny", 2, 1.0)

    async def endless() -> AsyncIterator[bytes]:
        with queue.place(LOCAL):
            while True:
                yield b"x" * 65536
                await asyncio.sleep(0)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await StreamingResponse(endless())(scope, receive, send)

    async def visit() -> None:
        async with listening(app) as address:
            opened = [await asyncio.open_connection(*address) for _ in range(2)]
            for _, writer in opened:
                writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            start = time.monotonic()
            while time.monotonic() < start + 2 or queue.num_running == 2:
                assert await opened[0][0].read(1 << 20) and time.monotonic() < start + 10
            assert queue.num_running == 1
            for _, writer in opened:
                writer.close()
            while queue.num_running:
                await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(visit(), 20))


def test_pipelined_and_kept_connections_work(tmp_path: Path) -> None:
    """Several requests on one connection, sent at once, are each answered in order."""
    ask = b"GET /static/x HTTP/1.1\r\nHost: x\r\n\r\n"

    async def visit(house: House) -> None:
        async with listening(house.app) as address:
            answer = await exchange(
                address, ask * 3, ask.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"), pause=0.1
            )
            assert answer.count(b"HTTP/1.1 404") == 4

    in_house(tmp_path, visit)


# ---- TLS ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Access:
    folder = tmp_path_factory.mktemp("tls")
    chain, key = folder / "chain.pem", folder / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
        + ["-subj", "/CN=chat.example", "-addext", "subjectAltName=DNS:chat.example", "-out", chain, "-keyout", key],
        check=True,
        capture_output=True,
    )
    return Access(local=False, certificate=chain, private_key=key)


def test_tls(tmp_path: Path, certificate: Access) -> None:
    """With a certificate the server speaks TLS that clients can verify, and nothing else; its logins are for TLS
    alone."""
    certificate.check()

    async def visit(house: House) -> None:
        _, secret = house.key()
        trust = ssl.create_default_context(cafile=certificate.certificate)
        async with listening(house.app, certificate) as (host, port):
            extensions = {"sni_hostname": "chat.example"}
            async with httpx.AsyncClient(verify=trust, base_url=f"https://{host}:{port}") as client:
                body = {"key": secret}
                answer = await client.post("/login", json=body, headers={"Host": "chat.example"}, extensions=extensions)
                assert answer.status_code == 204
                assert "; Secure" in answer.headers["set-cookie"]
                assert "strict-transport-security" in answer.headers
            assert await exchange((host, port), b"GET / HTTP/1.1\r\nHost: x\r\n\r\n") == b""

    in_house(tmp_path, visit, certificate)


def test_certificates_that_cannot_be_used_are_named(tmp_path: Path, certificate: Access) -> None:
    """A missing file, half a pair, something else, and the wrong key: one line each, before anything is loaded."""
    wrong = tmp_path / "wrong.pem"
    wrong.write_text("no certificate")
    for access, message in (
        (replace(certificate, private_key=None), "give both"),
        (replace(certificate, certificate=tmp_path / "nowhere.pem"), "nowhere.pem does not exist"),
        (replace(certificate, certificate=wrong), "wrong.pem and .* cannot be used"),
        (replace(certificate, private_key=certificate.certificate), "cannot be used"),
    ):
        with pytest.raises(InputError, match=message):
            access.check()


# ---- a real server --------------------------------------------------------------------------------------------------


ASK: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "temperature": 0}


def test_an_open_server_warns_without_tls(guarded: tuple[Server, dict[str, str]]) -> None:
    """Who lets others in without TLS is told once what that means."""
    server, _ = guarded
    assert server.log.read_text().count("others on the network can read along") == 1


def test_a_burst_of_200_over_http(guarded: tuple[Server, dict[str, str]]) -> None:
    """Of 200 calls at once exactly the limit pass; the others are told when to come back."""
    server, made = guarded

    async def burst() -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=200)
        async with httpx.AsyncClient(limits=limits, timeout=60, headers=bearer(made["thirty"])) as client:
            asks = (client.post(f"{server.url}/v1/chat/completions", json=ASK | {"max_tokens": 1}) for _ in range(200))
            return await asyncio.gather(*asks)

    answers = asyncio.run(burst())
    assert sum(answer.status_code == 200 for answer in answers) == 30
    for answer in answers:
        assert answer.headers["x-ratelimit-limit-requests"] == "30"
        if answer.status_code != 200:
            # By the key's limit, or before it by the key's share of the queue.
            told = (answer.status_code, answer.json()["error"]["code"])
            assert told in ((429, "rate_limit_exceeded"), (503, "overloaded"))
            assert int(answer.headers["Retry-After"]) >= 1


def test_several_prompts_are_one_request_over_http(guarded: tuple[Server, dict[str, str]]) -> None:
    """Under a limit of one at a time a call with several prompts is served, and counts once a minute; other calls
    count apart, though they claim the same id. A prompt too long for the model costs nothing."""
    server, made = guarded
    headers = bearer(made["single"]) | {"X-Request-Id": "mine"}

    def ask(prompts: list[str]) -> httpx.Response:
        body = {"model": "tiny", "prompt": prompts, "max_tokens": 2}
        return httpx.post(f"{server.url}/v1/completions", json=body, headers=headers, timeout=30)

    for prompts, status, remaining in (
        (["x"] * 5, 200, "2"),
        (["x" * 100_000], 400, "1"),
        (["x"], 200, "1"),
        (["x"], 429, "0"),
    ):
        answer = ask(prompts)
        told = answer.headers["x-ratelimit-remaining-requests"]
        assert (answer.status_code, told) == (status, remaining), answer.text[:300]  # as it was when the call came
        assert status != 200 or len(answer.json()["choices"]) == len(prompts)


def test_budget_and_models_over_http(guarded: tuple[Server, dict[str, str]]) -> None:
    """A spent budget is a 402 and a forbidden model a 403, before a stream begins; what was used is told."""
    server, made = guarded
    url = f"{server.url}/v1/chat/completions"
    first = httpx.post(url, json=ASK | {"max_tokens": 38}, headers=bearer(made["poor"]), timeout=20)
    assert first.status_code == 200
    for stream in (False, True):
        spent = httpx.post(url, json=ASK | {"stream": stream}, headers=bearer(made["poor"]))
        assert (spent.status_code, spent.json()["error"]["code"]) == (402, "insufficient_balance")
        other = httpx.post(url, json=ASK | {"stream": stream}, headers=bearer(made["other"]))
        assert (other.status_code, other.json()["error"]["code"]) == (403, "model_not_allowed")
    told = httpx.get(f"{server.url}/v1/usage", headers=bearer(made["poor"])).json()
    used = first.json()["usage"]
    (day,) = told["data"]
    assert (day["requests"], day["prompt_tokens"], day["generated_tokens"]) == (1, used["prompt_tokens"], 38)
    assert told["tokens_left"] == 0


def test_an_aborted_stream_is_counted(guarded: tuple[Server, dict[str, str]]) -> None:
    """A client that leaves in the middle of a stream has used its prompt and what had been generated."""
    server, made = guarded
    ask = ASK | {"max_tokens": 16_000, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=ask, headers=bearer(made["free"])) as stream:
        next(stream.iter_bytes())
    deadline = time.monotonic() + 5
    while not (days := httpx.get(f"{server.url}/v1/usage", headers=bearer(made["free"])).json()["data"]):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert days[0]["requests"] == 1 and days[0]["prompt_tokens"] > 0
    assert 0 < days[0]["generated_tokens"] < 16_000
