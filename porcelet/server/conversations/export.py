"""Conversations to take away: Markdown to read, JSON with everything."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection

from porcelet.server.conversations.attachments import files_by_id, files_of
from porcelet.server.conversations.history import (
    Conversation,
    Message,
    every_conversation,
    find_conversation,
    messages_of,
    path_to,
)


def markdown(conversation: Conversation, messages: Sequence[Message]) -> str:
    """The path to the conversation's leaf; reasoning is folded away."""
    path = path_to(messages, conversation.leaf)
    title = " ".join(conversation.title.split()) or "Conversation"
    return "\n\n".join([f"# {title}", *map(_section, path)]) + "\n"


def whole(connection: Connection, owner: str, id: str) -> dict[str, Any]:
    """One conversation with all its branches and its files' texts.

    Raises:
        NotFoundError: this owner has none of that id.
    """
    conversation, messages = find_conversation(connection, owner, id), messages_of(connection, owner, id)
    attached = [attachment.id for message in messages for attachment in message.attachments]
    files = list(files_by_id(connection, owner, attached).values())
    return {"exported": time.time(), "conversation": conversation, "messages": messages, "files": files}


def everything(connection: Connection, owner: str) -> dict[str, Any]:
    """All that an owner has here."""
    conversations = [
        {"conversation": conversation, "messages": messages_of(connection, owner, conversation.id)}
        for conversation in every_conversation(connection, owner)
    ]
    return {"exported": time.time(), "conversations": conversations, "files": files_of(connection, owner)}


def _section(message: Message) -> str:
    parts = ["## " + ("You" if message.role == "user" else message.model or "Assistant")]
    parts += [f"*{attachment.name}*" for attachment in message.attachments]
    if message.reasoning:
        parts.append(f"<details>\n<summary>Reasoning</summary>\n\n{message.reasoning.strip()}\n\n</details>")
    if message.content:
        parts.append(message.content.strip())
    if message.status not in ("done", "running"):
        parts.append(f"*({message.status})*")
    return "\n\n".join(parts)
