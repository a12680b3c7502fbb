"""Conversations to take away: Markdown to read, JSON with everything."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

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

Language = Literal["en", "fr", "zh"]
WORDS: dict[Language, dict[str, str]] = {
    "en": {
        "conversation": "Conversation",
        "user": "You",
        "assistant": "Assistant",
        "reasoning": "Reasoning",
        "length": "cut off: no room was left",
        "stopped": "stopped",
        "error": "ended by an error",
        "interrupted": "interrupted",
    },
    "fr": {
        "conversation": "Conversation",
        "user": "Vous",
        "assistant": "Assistant",
        "reasoning": "Raisonnement",
        "length": "coupée : il ne restait plus de place",
        "stopped": "arrêtée",
        "error": "terminée par une erreur",
        "interrupted": "interrompue",
    },
    "zh": {
        "conversation": "对话",
        "user": "你",
        "assistant": "助手",
        "reasoning": "思考过程",
        "length": "已截断：空间不足",
        "stopped": "已停止",
        "error": "因错误而结束",
        "interrupted": "已中断",
    },
}


def markdown(conversation: Conversation, messages: Sequence[Message], language: Language = "en") -> str:
    """The path to the conversation's leaf; reasoning is folded away. `language` is that of the words around."""
    words = WORDS[language]
    title = " ".join(conversation.title.split()) or words["conversation"]
    sections = [_section(message, words) for message in path_to(messages, conversation.leaf)]
    return "\n\n".join([f"# {title}", *sections]) + "\n"


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


def _section(message: Message, words: Mapping[str, str]) -> str:
    parts = ["## " + (message.model or words[message.role])]
    parts += [f"*{attachment.name}*" for attachment in message.attachments]
    if message.reasoning:
        parts.append(f"<details>\n<summary>{words['reasoning']}</summary>\n\n{message.reasoning.strip()}\n\n</details>")
    if message.content:
        parts.append(message.content.strip())
    if message.status not in ("done", "running"):
        parts.append(f"*({words[message.status]})*")
    return "\n\n".join(parts)
