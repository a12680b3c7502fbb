"""Files in the database: what was uploaded, and which message it is attached to.

A file's text is kept, not the file. It goes with the last message that it is attached to; one that no message ever
took goes a day after it came.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Column, Connection, Double, ForeignKey, Integer, String, Table, Text, delete, insert, select

from porcelet.server.errors import FieldError, NotFoundError
from porcelet.server.store import metadata

UNUSED_SECONDS = 86_400.0

_files = Table(
    "files",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("owner", String(200), nullable=False, index=True),
    Column("name", Text, nullable=False),
    Column("kind", String(8), nullable=False),
    Column("tokens", Integer, nullable=False),
    Column("pages", Integer),
    Column("created", Double, nullable=False, index=True),
    Column("text", Text, nullable=False),  # the last: SQLite reads through a long text to what stands behind it
)
_attachments = Table(
    "attachments",
    metadata,
    Column("message", ForeignKey("messages.id", ondelete="CASCADE"), primary_key=True),
    Column("place", Integer, primary_key=True),
    Column("file", ForeignKey("files.id"), nullable=False, index=True),
)


@dataclass(frozen=True)
class File:
    """An uploaded file as text; `pages` only of a PDF. `created` in Unix seconds."""

    id: str
    name: str
    kind: str
    text: str
    tokens: int
    pages: int | None
    created: float


@dataclass(frozen=True)
class Attachment:
    """What a message tells of its file."""

    id: str
    name: str
    tokens: int


def add_file(connection: Connection, owner: str, file: File) -> None:
    """Drop what nobody used in a day, and keep a new file."""
    old = _files.c.created < time.time() - UNUSED_SECONDS
    connection.execute(delete(_files).where(old, ~_is_attached()))
    connection.execute(insert(_files).values(owner=owner, **vars(file)))


def find_file(connection: Connection, owner: str, id: str) -> File:
    """One file.

    Raises:
        NotFoundError: this owner has none of that id.
    """
    files = _select(connection, _files.c.owner == owner, _files.c.id == id)
    if not files:
        raise NotFoundError("file", id)
    return files[0]


def files_of(connection: Connection, owner: str) -> list[File]:
    """All of an owner's files, oldest first."""
    return _select(connection, _files.c.owner == owner)


def files_by_id(connection: Connection, owner: str, ids: Sequence[str]) -> dict[str, File]:
    """The files of these ids.

    Raises:
        FieldError: this owner does not have one of them.
    """
    files = {file.id: file for file in _select(connection, _files.c.owner == owner, _files.c.id.in_(ids))}
    _require(files, ids)
    return files


def attachments_to(connection: Connection, owner: str, ids: Sequence[str]) -> tuple[Attachment, ...]:
    """The files of these ids as a message tells of them, without their texts.

    Raises:
        FieldError: this owner does not have one of them.
    """
    query = select(_files.c.id, _files.c.name, _files.c.tokens)
    rows = connection.execute(query.where(_files.c.owner == owner, _files.c.id.in_(ids)))
    known = {id: Attachment(id, name, tokens) for id, name, tokens in rows}
    _require(known, ids)
    return tuple(known[id] for id in ids)


def attach(connection: Connection, message: str, files: Sequence[str]) -> None:
    """Say which files a new message brings, in order."""
    if files:
        rows = [{"message": message, "place": place, "file": file} for place, file in enumerate(files)]
        connection.execute(insert(_attachments), rows)


def attachments_of(connection: Connection, messages: Any) -> dict[str, tuple[Attachment, ...]]:
    """Each message's attachments; `messages` is a query of message ids."""
    columns = (_attachments.c.message, _files.c.id, _files.c.name, _files.c.tokens)
    query = select(*columns).join(_files, _files.c.id == _attachments.c.file)
    query = query.where(_attachments.c.message.in_(messages)).order_by(_attachments.c.message, _attachments.c.place)
    found: dict[str, tuple[Attachment, ...]] = {}
    for message, *values in connection.execute(query):
        found[message] = (*found.get(message, ()), Attachment(*values))
    return found


def attached_to(connection: Connection, messages: Any) -> list[str]:
    """Ids of the files of these messages; `messages` is a query of message ids."""
    query = select(_attachments.c.file).where(_attachments.c.message.in_(messages)).distinct()
    return list(connection.execute(query).scalars())


def drop_files(connection: Connection, owner: str, ids: Sequence[str] | None = None) -> None:
    """Delete those of an owner's files that no message has; None: of all."""
    chosen = [] if ids is None else [_files.c.id.in_(ids)]
    connection.execute(delete(_files).where(_files.c.owner == owner, ~_is_attached(), *chosen))


def _require(known: Collection[str], ids: Sequence[str]) -> None:
    for id in ids:
        if id not in known:
            raise FieldError("attachments", f"attachments names the file {id[:80]!r}, which is not there; upload it")


def _is_attached() -> Any:
    return select(_attachments.c.file).where(_attachments.c.file == _files.c.id).correlate(_files).exists()


def _select(connection: Connection, *conditions: Any) -> list[File]:
    columns = [column for column in _files.c if column.name != "owner"]
    rows = connection.execute(select(*columns).where(*conditions).order_by(_files.c.created, _files.c.id))
    return [File(**row) for row in rows.mappings()]
