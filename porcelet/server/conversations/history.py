"""Conversations in the database: trees of messages, each its owner's alone.

A message's parent is the one before it, so an edited question or another answer is a sibling, and nothing said is ever
overwritten. `leaf` is the end of the path that was last looked at. Every function is to be run in a transaction
(`Database.run`) and sees only what belongs to `owner`; whatever is another's is not there.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from sqlalchemy import (
    JSON,
    Boolean,
    Column,
    ColumnElement,
    Connection,
    Double,
    ForeignKey,
    Index,
    Integer,
    Select,
    String,
    Table,
    Text,
    delete,
    insert,
    literal,
    or_,
    select,
    tuple_,
    update,
)

from porcelet.server.conversations.attachments import (
    Attachment,
    attach,
    attached_to,
    attachments_of,
    attachments_to,
    drop_files,
)
from porcelet.server.conversations.search import excerpt, fold, like, words_of
from porcelet.server.errors import FieldError, NotFoundError
from porcelet.server.store import metadata

UNUSED_SECONDS = 86_400.0  # after which a conversation that nobody said anything in goes
RUNNING, INTERRUPTED = "running", "interrupted"
MAX_TITLE = 60  # characters of a title that is made from a message

_conversations = Table(
    "conversations",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("owner", String(200), nullable=False),
    Column("title", Text, nullable=False),
    Column("created", Double, nullable=False),
    Column("updated", Double, nullable=False),
    Column("pinned", Boolean, nullable=False),
    Column("leaf", String(64)),
    Column("folded", Text, nullable=False),
    Index("conversations_of_owner", "owner", "pinned", "updated"),
)
_messages = Table(
    "messages",
    metadata,
    Column("number", Integer, primary_key=True),  # the order in which they were written
    Column("id", String(64), nullable=False, unique=True),
    Column("conversation", ForeignKey("conversations.id", ondelete="CASCADE"), nullable=False, index=True),
    Column("parent", String(64)),
    Column("role", String(16), nullable=False),
    Column("created", Double, nullable=False),
    Column("status", String(16), nullable=False, index=True),
    Column("model", Text),
    Column("error", JSON),
    Column("usage", JSON),
    Column("seconds", JSON),
    # SQLite reads through a long text to what stands behind it. A search needs the folded one alone.
    Column("folded", Text, nullable=False),
    Column("content", Text, nullable=False),
    Column("reasoning", Text, nullable=False),
)


@dataclass(frozen=True)
class Conversation:
    """What is known of a conversation without its messages; times in Unix seconds."""

    id: str
    title: str
    created: float
    updated: float
    pinned: bool
    leaf: str | None


@dataclass(frozen=True)
class Message:
    """A question or an answer. `stream` is the id under which a running answer can be followed."""

    id: str
    parent: str | None
    role: str
    content: str
    reasoning: str
    model: str | None
    created: float
    status: str
    error: Mapping[str, Any] | None = None
    stream: str | None = None
    usage: Mapping[str, int] | None = None
    seconds: Mapping[str, float] | None = None
    attachments: tuple[Attachment, ...] = ()


class TakenError(FieldError):
    """A new message's id that another message has."""

    status = 409
    code = "id_taken"

    def __init__(self, id: str) -> None:
        super().__init__("id", f"id is {id!r}, which is another message's; choose a new one")


# ---- conversations --------------------------------------------------------------------------------------------------


def add_conversation(connection: Connection, owner: str, title: str) -> Conversation:
    """A new one; "" is a title yet to be made. Those that were left without one, and empty, for a day go."""
    now = time.time()
    unused = _conversations.c.leaf.is_(None), _conversations.c.title == "", ~_conversations.c.pinned
    old = _conversations.c.created < now - UNUSED_SECONDS
    connection.execute(delete(_conversations).where(_conversations.c.owner == owner, *unused, old))
    new = Conversation(uuid4().hex, title, now, now, False, None)
    connection.execute(insert(_conversations).values(owner=owner, folded=fold(title), **vars(new)))
    return new


def find_conversation(connection: Connection, owner: str, id: str) -> Conversation:
    """One conversation.

    Raises:
        NotFoundError: this owner has none of that id.
    """
    query = select(*_CONVERSATION).where(_conversations.c.owner == owner, _conversations.c.id == id)
    row = connection.execute(query).mappings().one_or_none()
    if row is None:
        raise NotFoundError("conversation", id)
    return Conversation(**row)


def change_conversation(connection: Connection, owner: str, id: str, changes: Mapping[str, Any]) -> Conversation:
    """Set some of title, pinned and leaf.

    Raises:
        NotFoundError: this owner has none of that id.
        FieldError: the leaf is no message of it.
    """
    find_conversation(connection, owner, id)
    if "leaf" in changes and not _has_message(connection, id, changes["leaf"]):
        raise FieldError("leaf", f"leaf is {changes['leaf'][:80]!r}, which is no message of this conversation")
    values = dict(changes) | ({"folded": fold(changes["title"])} if "title" in changes else {})
    if values:
        connection.execute(update(_conversations).where(_conversations.c.id == id).values(values))
    return find_conversation(connection, owner, id)


def drop_conversation(connection: Connection, owner: str, id: str) -> None:
    """Delete one with its messages, and the files that only they had.

    Raises:
        NotFoundError: this owner has none of that id.
    """
    find_conversation(connection, owner, id)
    files = attached_to(connection, _ids_of(id))
    connection.execute(delete(_conversations).where(_conversations.c.id == id))
    drop_files(connection, owner, files)


def drop_conversations(connection: Connection, owner: str) -> None:
    """Delete all that an owner has, files too."""
    connection.execute(delete(_conversations).where(_conversations.c.owner == owner))
    drop_files(connection, owner)


def list_conversations(
    connection: Connection, owner: str, query: str = "", cursor: str | None = None, limit: int = 50
) -> tuple[list[tuple[Conversation, str | None]], str | None]:
    """A page of an owner's conversations, pinned ones first, then by their last message, with what was found in them;
    and the cursor of the next page.

    Raises:
        FieldError: the cursor is none of ours.
    """
    words = words_of(query)
    chosen = select(*_CONVERSATION).where(_conversations.c.owner == owner, *map(_contains, words))
    if cursor is not None:
        chosen = chosen.where(_order < _position(cursor))
    order = (column.desc() for column in _order_columns)
    rows = connection.execute(chosen.order_by(*order).limit(limit + 1)).mappings().all()
    page = [Conversation(**row) for row in rows[:limit]]
    found = [(entry, _excerpt(connection, entry, words) if words else None) for entry in page]
    last = page[-1] if len(rows) > limit else None
    return found, f"{int(last.pinned)}:{last.updated!r}:{last.id}" if last else None


def every_conversation(connection: Connection, owner: str) -> list[Conversation]:
    """All that an owner has, oldest first."""
    query = select(*_CONVERSATION).where(_conversations.c.owner == owner).order_by(_conversations.c.created)
    return [Conversation(**row) for row in connection.execute(query).mappings()]


def _contains(word: str) -> ColumnElement[bool]:
    pattern = like(word)
    said = select(_messages.c.id).where(
        _messages.c.conversation == _conversations.c.id, _messages.c.folded.like(pattern, escape="\\")
    )
    return or_(_conversations.c.folded.like(pattern, escape="\\"), said.correlate(_conversations).exists())


def _excerpt(connection: Connection, conversation: Conversation, words: Sequence[str]) -> str | None:
    """Around the first word that a message has; None if the title has them all."""
    for word in words:
        hit = select(_messages.c.content).where(
            _messages.c.conversation == conversation.id, _messages.c.folded.like(like(word), escape="\\")
        )
        content = connection.execute(hit.order_by(_messages.c.number).limit(1)).scalar()
        if content is not None:
            return excerpt(content, word)
    return None


def _position(cursor: str) -> Any:
    pinned, _, rest = cursor.partition(":")
    updated, _, id = rest.partition(":")
    try:
        return tuple_(literal(bool(int(pinned))), literal(float(updated)), literal(id))
    except ValueError:
        raise FieldError("cursor", f"cursor is {cursor[:80]!r}; send the `next` of the page before") from None


# ---- messages -------------------------------------------------------------------------------------------------------


def messages_of(connection: Connection, owner: str, id: str) -> list[Message]:
    """The whole tree of a conversation, oldest first.

    Raises:
        NotFoundError: this owner has none of that id.
    """
    find_conversation(connection, owner, id)
    query = select(*_MESSAGE).where(_messages.c.conversation == id).order_by(_messages.c.number)
    attachments = attachments_of(connection, _ids_of(id))
    return [_message(row, attachments) for row in connection.execute(query).mappings()]


def path_to(messages: Sequence[Message], id: str | None) -> list[Message]:
    """From the root of a tree to one of its messages; None is before the root.

    Raises:
        FieldError: it is no message of the tree.
    """
    known = {message.id: message for message in messages}
    path: list[Message] = []
    while id is not None:
        if id not in known:
            raise FieldError("parent", f"parent is {id[:80]!r}, which is no message of this conversation")
        path.append(known[id])
        id = known[id].parent
    return path[::-1]


def find_answer(connection: Connection, owner: str, id: str) -> tuple[str, Message]:
    """An assistant's message, and the conversation that it is in.

    Raises:
        NotFoundError: this owner has none of that id.
    """
    query = select(_messages.c.conversation, *_MESSAGE).join(_conversations)
    query = query.where(_conversations.c.owner == owner, _messages.c.id == id, _messages.c.role == "assistant")
    row = connection.execute(query).mappings().one_or_none()
    if row is None:
        raise NotFoundError("answer", id)
    values = dict(row)
    return values.pop("conversation"), _message(values, {})


def find_exchange(
    connection: Connection,
    owner: str,
    id: str,
    parent: str | None,
    content: str,
    files: Sequence[str],
    question: str | None,
) -> tuple[Message, Message] | None:
    """The question that was stored with the id `question` and its first answer; None if there is none yet.

    Raises:
        NotFoundError: this owner has no such conversation.
        TakenError: that id is another question's, or something else's.
    """
    if question is None or not _is_taken(connection, question):
        return None
    tree = messages_of(connection, owner, id)
    for asked in tree:
        said = (asked.role, asked.parent, asked.content, [attachment.id for attachment in asked.attachments])
        if asked.id == question and said == ("user", parent, content, list(files)):
            return asked, next(message for message in tree if message.parent == question)
    raise TakenError(question)


def add_exchange(
    connection: Connection,
    owner: str,
    id: str,
    parent: str | None,
    content: str,
    files: Sequence[str],
    model: str,
    question: str | None = None,
) -> tuple[Message, Message]:
    """A question with its files, and the answer that begins to run, which becomes the conversation's leaf. `question`
    is the question's id, which `find_exchange` did not find.

    Raises:
        NotFoundError: this owner has no such conversation.
        FieldError: the parent is no answer of it, or a file is not there.
    """
    conversation = find_conversation(connection, owner, id)
    if parent is not None:
        _require_answer(connection, id, parent)
    attachments = attachments_to(connection, owner, files)
    asked = _new(question, parent, "user", content, None, "done", attachments)
    _insert(connection, id, asked)
    attach(connection, asked.id, files)
    if not conversation.title:
        title = title_of(content) or (attachments[0].name if attachments else "")
        change_conversation(connection, owner, id, {"title": title})
    return asked, _add_answer(connection, id, asked.id, model, None)


def find_regenerated(connection: Connection, owner: str, id: str, answer: str | None) -> Message | None:
    """The answer that was stored with the id `answer` beside the answer `id`; None if there is none yet.

    Raises:
        NotFoundError: this owner has no answer `id`.
        TakenError: that id is something else's.
    """
    if answer is None or not _is_taken(connection, answer):
        return None
    conversation, sibling = find_answer(connection, owner, id)
    for message in messages_of(connection, owner, conversation):
        if message.id == answer != id and message.parent == sibling.parent:
            return message
    raise TakenError(answer)


def add_answer(connection: Connection, owner: str, id: str, model: str, answer: str | None = None) -> Message:
    """Another answer, which begins to run, to the question that the answer `id` has. `answer` is its own id, which
    `find_regenerated` did not find.

    Raises:
        NotFoundError: this owner has no such answer.
    """
    conversation, sibling = find_answer(connection, owner, id)
    return _add_answer(connection, conversation, sibling.parent, model, answer)


def save_text(connection: Connection, message: Message) -> None:
    """Write how far an answer has come. Searches find it from its end on."""
    change = update(_messages).where(_messages.c.id == message.id)
    connection.execute(change.values(content=message.content, reasoning=message.reasoning))


def save_answer(connection: Connection, message: Message) -> None:
    """Write an answer as it ended. One that was deleted meanwhile stays deleted."""
    values = {name: getattr(message, name) for name in ("content", "reasoning", "status", "error", "usage", "seconds")}
    change = update(_messages).where(_messages.c.id == message.id)
    connection.execute(change.values(values | {"folded": fold(message.content)}))


def interrupt_running(connection: Connection) -> int:
    """At start-up: what still runs by the database was cut off by the server's end; how many those are."""
    return _interrupt(connection)


def interrupt(connection: Connection, owner: str, id: str) -> None:
    """Mark an answer that nobody writes any more, if it is this owner's and still runs by the database."""
    own = select(_conversations.c.id).where(_conversations.c.owner == owner)
    _interrupt(connection, _messages.c.id == id, _messages.c.conversation.in_(own))


def title_of(content: str) -> str:
    """A title made from a message: its first line, cut at a word."""
    line = next((line for line in map(str.strip, content.splitlines()) if line), "")
    if len(line) <= MAX_TITLE:
        return line
    start = line[:MAX_TITLE]
    return (start.rpartition(" ")[0].rstrip() or start) + "…"


def _interrupt(connection: Connection, *conditions: ColumnElement[bool]) -> int:
    query = select(_messages.c.id, _messages.c.content).where(_messages.c.status == RUNNING, *conditions)
    found = connection.execute(query).all()
    for id, content in found:
        change = update(_messages).where(_messages.c.id == id)
        connection.execute(change.values(status=INTERRUPTED, folded=fold(content)))
    return len(found)


def _add_answer(connection: Connection, conversation: str, parent: str | None, model: str, id: str | None) -> Message:
    answer = _new(id, parent, "assistant", "", model, RUNNING)
    _insert(connection, conversation, answer)
    change = update(_conversations).where(_conversations.c.id == conversation)
    connection.execute(change.values(leaf=answer.id, updated=answer.created))
    return answer


def _new(
    id: str | None,
    parent: str | None,
    role: str,
    content: str,
    model: str | None,
    status: str,
    attachments: tuple[Attachment, ...] = (),
) -> Message:
    id = id or uuid4().hex
    stream = id if status == RUNNING else None
    return Message(id, parent, role, content, "", model, time.time(), status, stream=stream, attachments=attachments)


def _insert(connection: Connection, conversation: str, message: Message) -> None:
    values = {column.name: getattr(message, column.name) for column in _MESSAGE}
    values |= {"conversation": conversation, "folded": fold(message.content)}
    connection.execute(insert(_messages).values(values))


def _message(row: Mapping[Any, Any], attachments: Mapping[str, tuple[Attachment, ...]]) -> Message:
    # A stream has its answer's id.
    stream = row["id"] if row["status"] == RUNNING else None
    return Message(**row, stream=stream, attachments=attachments.get(row["id"], ()))


def _require_answer(connection: Connection, conversation: str, id: str) -> None:
    query = select(_messages.c.role, _messages.c.status).where(
        _messages.c.conversation == conversation, _messages.c.id == id
    )
    found = connection.execute(query).one_or_none()
    if found is None or found.role != "assistant":
        raise FieldError("parent", f"parent is {id[:80]!r}, which is no answer of this conversation")
    if found.status == RUNNING:
        raise FieldError("parent", "parent is still being written; wait for its end, or stop it")


def _has_message(connection: Connection, conversation: str, id: str) -> bool:
    query = select(_messages.c.id).where(_messages.c.conversation == conversation, _messages.c.id == id)
    return connection.execute(query).scalar() is not None


def _is_taken(connection: Connection, id: str) -> bool:
    return connection.execute(select(_messages.c.id).where(_messages.c.id == id)).scalar() is not None


def _ids_of(conversation: str) -> Select[tuple[str]]:
    return select(_messages.c.id).where(_messages.c.conversation == conversation)


_CONVERSATION = [column for column in _conversations.c if column.name not in ("owner", "folded")]
_MESSAGE = [column for column in _messages.c if column.name not in ("number", "conversation", "folded")]
_order_columns = (_conversations.c.pinned, _conversations.c.updated, _conversations.c.id)
_order = tuple_(*_order_columns)
