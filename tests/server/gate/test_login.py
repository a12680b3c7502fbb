"""Logging in with a key: what the cookie is, what it opens, and what ends it."""

from __future__ import annotations

import asyncio
import hashlib
import time
from http.cookies import SimpleCookie
from pathlib import Path

import httpx
import pytest
from sqlalchemy import event, select

from porcelet.server.gate import keys, login
from porcelet.server.gate.limits import RateLimitError
from porcelet.server.gate.login import COOKIE, MAX_FAILURES, Failures
from tests.server.doors import House, in_house


def secret_part(secret: str) -> str:
    """What only its owner knows of a key: 32 bytes in base64url, in which a "-" may stand."""
    return secret[-43:]


async def log_in(house: House, secret: str) -> httpx.Response:
    return await house.client.post("/login", json={"key": secret})


def test_a_key_becomes_a_cookie_and_logout_ends_it(tmp_path: Path) -> None:
    """The cookie is random, for this site's requests alone, out of scripts' reach and stored as a hash; it opens what
    the key opens until its owner logs out, and not again."""

    async def visit(house: House) -> None:
        key, secret = house.key()
        answer = await log_in(house, f" {secret}\n")
        assert answer.status_code == 204 and answer.content == b""
        (cookie,) = SimpleCookie(answer.headers["set-cookie"]).values()
        assert (cookie.key, cookie["path"], cookie["samesite"], cookie["httponly"]) == (COOKIE, "/", "strict", True)
        assert not cookie["secure"] and not cookie["domain"] and 0 < int(cookie["max-age"]) <= 30 * 86400
        id, random = cookie.value.split("-", 1)
        assert id == key.id and len(random) == 43 and random not in secret
        stored = b"".join(file.read_bytes() for file in tmp_path.iterdir())
        assert random.encode() not in stored and secret_part(secret).encode() not in stored
        assert hashlib.sha256(cookie.value.encode()).digest() in stored
        assert (await house.client.get("/v1/usage")).status_code == 200
        ended = await house.client.post("/logout")
        assert ended.status_code == 204 and 'porcelet_login=""' in ended.headers["set-cookie"]
        again = await house.client.get("/v1/usage", headers={"Cookie": f"{COOKIE}={cookie.value}"})
        assert again.status_code == 401

    in_house(tmp_path, visit)


def test_revoking_the_key_ends_its_logins(tmp_path: Path) -> None:
    """Whoever logged in with a key is out when it is revoked; other keys' logins stay."""

    async def visit(house: House) -> None:
        cookies = {}
        for name in ("ada", "bob"):
            key, _ = house.key(name)
            cookies[name] = (await house.gate.logins.open(key))[0]
        house.database.run_now(lambda connection: keys.revoke(connection, "ada"))
        house.forget()
        for name, status in (("ada", 401), ("bob", 200)):
            headers = {"Cookie": f"{COOKIE}={cookies[name]}"}
            assert (await house.client.get("/v1/usage", headers=headers)).status_code == status

    in_house(tmp_path, visit)


def test_logins_end_with_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A login ends after its time, or with its key if that is sooner; what has ended is forgotten."""

    async def visit(house: House) -> None:
        key, _ = house.key(expires=time.time() + 100)
        value, seconds = await house.gate.logins.open(key)
        assert 99 < seconds <= 100 and await house.gate.logins.find(value)
        monkeypatch.setattr(login, "SECONDS", -1.0)
        ended, _ = await house.gate.logins.open(key)
        assert await house.gate.logins.find(ended) is None
        await house.gate.logins.open(key)
        count = house.database.run_now(lambda c: len(c.execute(select(login._logins)).all()))
        assert count == 2

    in_house(tmp_path, visit)


def test_one_key_has_a_limited_number_of_logins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest stay, so a valid key cannot fill the disk; another key's are not touched."""
    monkeypatch.setattr(login, "MAX_SESSIONS", 3)

    async def visit(house: House) -> None:
        (ada, _), (bob, _) = house.key("ada"), house.key("bob")
        other, _ = await house.gate.logins.open(bob)
        values = [(await house.gate.logins.open(ada))[0] for _ in range(5)]
        found = [bool(await house.gate.logins.find(value)) for value in values]
        assert found == [False, False, True, True, True]
        assert await house.gate.logins.find(other)

    in_house(tmp_path, visit)


@pytest.mark.parametrize(
    "body", [{}, {"key": 5}, {"key": None}, {"key": "x" * 201}, [], "x", {"key": "x", "user": "y"}]
)
def test_bodies_that_are_no_login(tmp_path: Path, body: object) -> None:
    """Anything but one key is a 400."""

    async def visit(house: House) -> None:
        answer = await house.client.post("/login", json=body)
        assert answer.status_code == 400 and answer.json()["error"]["message"]

    in_house(tmp_path, visit)


def test_wrong_keys_are_slowed_down(tmp_path: Path) -> None:
    """After ten wrong keys in a minute an address has to wait with another wrong one. A right key gets in: others may
    share the address, behind a proxy."""

    async def visit(house: House) -> None:
        _, secret = house.key()
        for _ in range(20):
            assert (await log_in(house, secret)).status_code == 204
        for _ in range(MAX_FAILURES):
            wrong = await log_in(house, "sk-porcelet-wrong")
            assert (wrong.status_code, wrong.json()["error"]["code"]) == (401, "invalid_api_key")
        waits = await log_in(house, "sk-porcelet-wrong")
        assert (waits.status_code, waits.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        assert 1 <= int(waits.headers["Retry-After"]) <= 61
        assert "set-cookie" not in waits.headers
        assert (await log_in(house, secret)).status_code == 204

    in_house(tmp_path, visit)


def test_invented_cookies_do_not_reach_the_database(tmp_path: Path) -> None:
    """However many requests come with cookies, right, wrong or of unknown keys: the logins of each key that exists are
    read once a second, and memory holds no more than those. A login and a logout count at once all the same."""

    async def visit(house: House) -> None:
        logins = house.gate.logins
        (ada, _), (bob, _) = house.key("ada"), house.key("bob")
        value, _ = await logins.open(ada)
        assert await logins.find(value)
        reads = []
        event.listen(house.database._engine, "before_cursor_execute", lambda *all: reads.append(all[2]))
        read = logins._known[ada.id].read
        for number in range(500):
            for cookie in (
                value,
                f"{ada.id}-{number}",
                f"{bob.id}-{number}",
                f"{number:010}-x",
                str(number),
                "é\ud800",
            ):
                assert bool(await logins.find(cookie)) == (cookie == value)
        most = (time.monotonic() - read) // login.NEWS + 2
        assert sum("FROM logins" in statement for statement in reads) <= 2 * most
        assert logins._known.keys() == {ada.id, bob.id}
        other, _ = await logins.open(ada)
        assert await logins.find(other)
        await logins.close(other)
        assert not await logins.find(other) and await logins.find(value)

    in_house(tmp_path, visit)


def test_another_process_logs_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What another server on the same database changes is known here after `NEWS` seconds."""
    monkeypatch.setattr(login, "NEWS", 0.2)

    async def visit(house: House) -> None:
        key, _ = house.key()
        value, _ = await house.gate.logins.open(key)
        assert await house.gate.logins.find(value)
        await login.Logins(house.database, house.gate.keys).close(value)
        await asyncio.sleep(0.3)
        assert not await house.gate.logins.find(value)

    in_house(tmp_path, visit)


def test_failures_are_counted_per_customer_in_bounded_memory() -> None:
    """IPv4 addresses and IPv6 networks count apart; the oldest are forgotten."""
    failures = Failures()
    for number in range(MAX_FAILURES):
        failures.add(f"2001:db8::{number:x}")
        failures.add("192.0.2.1")
    for address in ("2001:db8::ffff", "192.0.2.1"):
        with pytest.raises(RateLimitError):
            failures.check(address)
    for address in ("2001:db8:0:1::1", "192.0.2.2", "", "unix"):
        failures.check(address)
    for number in range(login.MAX_ADDRESSES + 10):
        failures.add(f"10.0.{number // 256}.{number % 256}")
    assert len(failures._windows) == login.MAX_ADDRESSES
