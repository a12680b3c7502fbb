"""API keys: what they look like, what of them is stored, and the running server's view of them.

    sk-porcelet-<id>-<secret>      id: 10 letters and digits, no secret; secret: 32 random bytes in base64url

Only the SHA-256 of a whole key is stored. A slow hash is for passwords, which can be guessed; nobody guesses 256 random
bits, so a fast one loses nothing and every request can afford it.

A key's name is its owner's: several keys may share one, to replace a key or for each of a person's machines. They share
history and cached prefixes; limits and usage are each key's own.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import secrets
import string
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    Float,
    LargeBinary,
    Row,
    String,
    Table,
    Text,
    insert,
    select,
    update,
)

from porcelet.errors import InputError
from porcelet.server.generation.watch import Caller
from porcelet.server.store import Database, metadata

PREFIX = "sk-porcelet-"
MAX_NAME = 64
MAX_LIMIT = 2**53  # beyond it JSON's readers lose digits
NEWS = 1.0  # seconds after which the running server knows of a key made or revoked
_ID_LETTERS = string.ascii_lowercase + string.digits
_NOBODY = hashlib.sha256(secrets.token_bytes()).digest()

_keys = Table(
    "api_keys",
    metadata,
    Column("id", String, primary_key=True),
    Column("name", String, nullable=False, index=True),
    Column("hash", LargeBinary, nullable=False),
    Column("created", Float, nullable=False),
    Column("expires", Float),
    Column("revoked", Float),
    Column("models", Text, nullable=False),
    Column("requests_per_minute", BigInteger),
    Column("tokens_per_minute", BigInteger),
    Column("concurrency", BigInteger),
    Column("token_budget", BigInteger),
)


@dataclass(frozen=True, kw_only=True)
class KeyLimits:
    """What a key may do; None sets no limit. `models` are names or aliases, empty for all. `token_budget` counts
    prompts and answers over the key's whole life."""

    models: tuple[str, ...] = ()
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrency: int | None = None
    token_budget: int | None = None

    def __post_init__(self) -> None:
        for name in ("requests_per_minute", "tokens_per_minute", "concurrency", "token_budget"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= MAX_LIMIT:
                raise InputError(f"{name} is {value}; it must lie in 1..2^53, or be absent for no limit")


@dataclass(frozen=True, kw_only=True)
class Key:
    """A key as it is stored; times in Unix seconds."""

    id: str
    name: str
    hash: bytes = field(repr=False)
    created: float
    expires: float | None
    revoked: float | None
    limits: KeyLimits

    def is_valid(self, now: float) -> bool:
        return self.revoked is None and (self.expires is None or now < self.expires)

    @property
    def caller(self) -> Caller:
        return Caller(f"user:{self.name}", self.name, self.id)


def create(
    connection: Connection, name: str, limits: KeyLimits, expires: float | None = None, *, now: float | None = None
) -> tuple[Key, str]:
    """Store a new key; the second value is the only copy of the key itself.

    Raises:
        InputError: the name is empty, too long, or holds what cannot be printed.
    """
    if not 1 <= len(name) <= MAX_NAME or not name.isprintable() or name != name.strip():
        raise InputError(f"name is {name[:80]!r}; it must have 1..{MAX_NAME} printable characters, no space around")
    id = "".join(secrets.choice(_ID_LETTERS) for _ in range(10))
    secret = f"{PREFIX}{id}-{secrets.token_urlsafe(32)}"
    created = time.time() if now is None else now
    key = Key(id=id, name=name, hash=_hash(secret), created=created, expires=expires, revoked=None, limits=limits)
    values = {**vars(limits), "models": json.dumps(limits.models)}
    connection.execute(
        insert(_keys).values(id=id, name=name, hash=key.hash, created=created, expires=expires, **values)
    )
    return key, secret


def revoke(connection: Connection, id_or_name: str) -> list[Key]:
    """Revoke the key of that id, or else every key of that name; the keys that were valid until now.

    Raises:
        InputError: there is no such key.
    """
    known = list_keys(connection)
    found = [key for key in known if key.id == id_or_name] or [key for key in known if key.name == id_or_name]
    if not found:
        raise InputError(f"no key has the id or the name {id_or_name[:80]!r}; see: porcelet keys list")
    live = [key for key in found if key.revoked is None]
    ids = [key.id for key in live]
    connection.execute(update(_keys).where(_keys.c.id.in_(ids)).values(revoked=time.time()))
    return live


def list_keys(connection: Connection) -> list[Key]:
    """Every key ever made, the oldest first."""
    return [_key(row) for row in connection.execute(select(_keys).order_by(_keys.c.created, _keys.c.id))]


class Keys:
    """The keys as the running server knows them: all of them, read again where that was `NEWS` seconds ago.

    So a key that exists and one that does not cost the same, and no flood of wrong keys reaches the database.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._known: dict[str, Key] = {}
        self._read = float("-inf")
        self._reading = asyncio.Lock()

    async def find(self, secret: str) -> Key | None:
        """The valid key that this is, if it is one."""
        await self._refresh()
        key = self._known.get(secret.removeprefix(PREFIX)[:10])
        same = hmac.compare_digest(_hash(secret), key.hash if key else _NOBODY)
        return key if same and key and key.is_valid(time.time()) else None

    async def valid(self, id: str) -> Key | None:
        """The key of that id, unless it is revoked or has expired."""
        await self._refresh()
        key = self._known.get(id)
        return key if key and key.is_valid(time.time()) else None

    def limits(self, id: str) -> KeyLimits:
        """Those of a key that was found; none for whoever came without a key."""
        return self._known[id].limits if id else NO_LIMITS

    async def _refresh(self) -> None:
        async with self._reading:
            if time.monotonic() >= self._read + NEWS:
                self._known = {key.id: key for key in await self._database.read(list_keys)}
                self._read = time.monotonic()


NO_LIMITS = KeyLimits()


def check_any(database: Database) -> None:
    """Raise where nobody could get in.

    Raises:
        InputError: the database holds no valid key.
    """
    if not any(key.is_valid(time.time()) for key in database.run_now(list_keys)):
        raise InputError("there is no API key yet, and nobody gets in without one; make one: porcelet keys create NAME")


def _hash(secret: str) -> bytes:
    return hashlib.sha256(secret.encode("utf-8", "replace")).digest()


def _key(row: Row[tuple[object, ...]]) -> Key:
    values = dict(row._mapping)
    models: Sequence[str] = json.loads(values.pop("models"))
    limits = {name: values.pop(name) for name in KeyLimits.__dataclass_fields__ if name != "models"}
    return Key(limits=KeyLimits(models=tuple(models), **limits), **values)
