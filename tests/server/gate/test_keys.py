"""API keys: what is stored of them, and how fast the running server hears of a change."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from porcelet.errors import InputError
from porcelet.server.gate import keys
from porcelet.server.gate.keys import NO_LIMITS, KeyLimits
from porcelet.server.store import Database
from tests.server.doors import House, bearer, in_house


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    with closing(Database.open(f"sqlite:///{tmp_path / 'keys.db'}")) as opened:
        yield opened


def test_only_a_hash_is_stored(database: Database, tmp_path: Path) -> None:
    """A key is 32 random bytes; the database, its journal too, holds its SHA-256 and nothing of the key itself."""
    made = [database.run_now(lambda connection: keys.create(connection, "ada", NO_LIMITS)) for _ in range(20)]
    stored = b"".join(file.read_bytes() for file in tmp_path.iterdir())
    for key, secret in made:
        assert re.fullmatch(rf"sk-porcelet-{key.id}-[A-Za-z0-9_-]{{43}}", secret)
        assert secret.rpartition(f"{key.id}-")[2].encode() not in stored
        assert hashlib.sha256(secret.encode()).digest() in stored
        assert key.hash.hex() not in repr(key) and str(key.hash) not in repr(key)
    assert len({secret for _, secret in made}) == 20


def test_others_cannot_read_the_database(database: Database, tmp_path: Path) -> None:
    """Its files belong to this user alone, whatever the umask."""
    database.run_now(lambda connection: keys.create(connection, "ada", NO_LIMITS))
    assert {file.stat().st_mode & 0o077 for file in tmp_path.iterdir()} == {0}


def test_keys_come_back_as_they_were_made(database: Database) -> None:
    """Limits, expiry and state survive the database; several keys may have one name."""
    limits = KeyLimits(models=("a", "b"), requests_per_minute=1, tokens_per_minute=2, concurrency=3, token_budget=2**40)
    first, _ = database.run_now(lambda connection: keys.create(connection, "ada", limits, 5e9))
    second, _ = database.run_now(lambda connection: keys.create(connection, "ada", NO_LIMITS))
    assert database.run_now(keys.list_keys) == [first, second]
    assert first.caller.id == second.caller.id and first.caller.key != second.caller.key


@pytest.mark.parametrize("name", ["", " ada", "a\nb", "x" * 65, "\x00"])
def test_names_that_cannot_be_shown_are_refused(database: Database, name: str) -> None:
    """A name is something that a list can print on its line."""
    with pytest.raises(InputError, match="name is"):
        database.run_now(lambda connection: keys.create(connection, name, NO_LIMITS))


@pytest.mark.parametrize("value", [0, -1, 2**53 + 1])
def test_limits_are_positive(value: int) -> None:
    """A limit of nothing, or beyond what JSON can say, is a mistake."""
    with pytest.raises(InputError, match="concurrency is"):
        KeyLimits(concurrency=value)


def test_revoking_by_id_and_by_name(database: Database) -> None:
    """An id revokes its key, a name all of its keys that are left; nothing else is touched."""
    first, second, other = (
        database.run_now(lambda connection, name=name: keys.create(connection, name, NO_LIMITS))[0]
        for name in ("ada", "ada", "bob")
    )
    revoke = keys.revoke
    assert [key.id for key in database.run_now(lambda connection: revoke(connection, first.id))] == [first.id]
    assert [key.id for key in database.run_now(lambda connection: revoke(connection, "ada"))] == [second.id]
    assert database.run_now(lambda connection: revoke(connection, "ada")) == []
    assert [key.revoked is None for key in database.run_now(keys.list_keys)] == [False, False, True]
    assert other.name == "bob"
    with pytest.raises(InputError, match="'nobody'"):
        database.run_now(lambda connection: revoke(connection, "nobody"))


def test_a_key_opens_and_a_broken_one_does_not(tmp_path: Path) -> None:
    """The whole key gets in, in either header; one with any character changed, cut or added does not."""

    async def visit(house: House) -> None:
        key, secret = house.key()
        ask = house.client.get
        assert (await ask("/v1/usage", headers=bearer(secret))).status_code == 200
        assert (await ask("/v1/usage", headers={"x-api-key": secret})).status_code == 200
        assert (await ask("/v1/usage", headers={"Authorization": f"bearer  {secret}"})).status_code == 200
        changed = [
            secret[:place] + ("A" if secret[place] != "A" else "B") + secret[place + 1 :]
            for place in range(len(secret))
        ]
        unknown = f"sk-porcelet-{'0' * 10}-{secret[-43:]}"
        for wrong in [
            *changed,
            secret[:-1],
            secret + "A",
            secret.upper(),
            unknown,
            key.id,
            "x",
            "sk-porcelet-",
            "é" * 50,
        ]:
            response = await ask(
                "/v1/usage", headers=bearer(wrong) if wrong.isascii() else {b"x-api-key": wrong.encode()}
            )
            assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key"), wrong
            assert response.headers["WWW-Authenticate"] == "Bearer"

    in_house(tmp_path, visit)


def test_expired_keys_are_refused(tmp_path: Path) -> None:
    """A key is good until its expiry."""

    async def visit(house: House) -> None:
        _, late = house.key(expires=time.time() + 60)
        _, early = house.key(expires=time.time() - 1)
        assert (await house.client.get("/v1/usage", headers=bearer(late))).status_code == 200
        assert (await house.client.get("/v1/usage", headers=bearer(early))).status_code == 401

    in_house(tmp_path, visit)


def test_a_running_server_hears_of_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process revokes a key, or makes one: the server, which had read its keys, knows it after NEWS seconds."""
    monkeypatch.setattr(keys, "NEWS", 0.3)

    async def visit(house: House) -> None:
        key, secret = house.key()
        assert await house.gate.keys.find(secret)
        with closing(Database.open(f"sqlite:///{tmp_path / 'porcelet.db'}")) as other:
            other.run_now(lambda connection: keys.revoke(connection, key.id))
            _, fresh = other.run_now(lambda connection: keys.create(connection, "bob", NO_LIMITS))
        time.sleep(0.31)
        assert await house.gate.keys.find(secret) is None
        assert await house.gate.keys.find(fresh)

    in_house(tmp_path, visit)


def test_a_flood_of_wrong_keys_asks_the_database_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Known and unknown keys are looked up in the same memory; the database is read now and then, however many ask."""
    monkeypatch.setattr(keys, "NEWS", 60.0)

    async def visit(house: House) -> None:
        reads = []
        read = house.database.read
        monkeypatch.setattr(house.database, "read", lambda work: reads.append(work) or read(work))
        for number in range(1000):
            assert await house.gate.keys.find(f"sk-porcelet-{number:010}-{'x' * 43}") is None
        assert reads == [keys.list_keys]

    in_house(tmp_path, visit)


def test_unknown_database_and_other_schema_are_named(tmp_path: Path) -> None:
    """A URL that is none, a folder that does not exist and a database of another version end in one line, without the
    URL's password."""
    from sqlalchemy import text

    from porcelet.errors import CapacityError

    with pytest.raises(InputError, match="give an SQLAlchemy URL"):
        Database.open("nonsense")
    with pytest.raises(InputError) as unusable:
        Database.open("nosuchdatabase://me:secret@host/db")
    assert "secret" not in str(unusable.value)
    with pytest.raises(CapacityError, match="cannot be made"):
        Database.open(f"sqlite:///{tmp_path}/nowhere/porcelet.db")
    url = f"sqlite:///{tmp_path / 'porcelet.db'}"
    with closing(Database.open(url)) as database:
        database.run_now(lambda connection: connection.execute(text("UPDATE schema SET number = 99")))
    with pytest.raises(InputError, match="schema 99"):
        Database.open(url)
