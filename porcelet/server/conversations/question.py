"""A place in a conversation as what the model is asked there: the path to it, with the files' texts in front of their
questions and without the reasoning of earlier answers.
"""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Connection

from porcelet.chat import Message as Turn
from porcelet.errors import InputError
from porcelet.server.conversations.attachments import File, files_by_id
from porcelet.server.conversations.history import messages_of, path_to
from porcelet.server.generation.ask import Ask
from porcelet.server.generation.models import Model
from porcelet.types import SamplingParams

# What DeepSeek recommends for R1 and its distilled models (the README of DeepSeek-R1, "Usage Recommendations").
TEMPERATURE, TOP_P = 0.6, 0.95
# The same README's template for files, "Official Prompts".
FILE_TEMPLATE = "[file name]: {name}\n[file content begin]\n{text}\n[file content end]\n"


class TooLongError(InputError):
    """A conversation that leaves no room for an answer."""

    code = "context_length_exceeded"


def turns_to(connection: Connection, owner: str, conversation: str, end: str | None) -> list[Turn]:
    """The path from a conversation's root to the message `end`, as the chat format takes it; None is before the root.

    Raises:
        NotFoundError: this owner has no such conversation.
        FieldError: `end` is no message of it.
    """
    path = path_to(messages_of(connection, owner, conversation), end)
    ids = [attachment.id for message in path for attachment in message.attachments]
    files = files_by_id(connection, owner, ids)
    return [
        {"role": message.role, "content": _content(message.content, [files[a.id] for a in message.attachments])}
        for message in path
    ]


def question_turn(connection: Connection, owner: str, content: str, files: Sequence[str]) -> Turn:
    """A new question with its files.

    Raises:
        FieldError: this owner does not have one of them.
    """
    known = files_by_id(connection, owner, files)
    return {"role": "user", "content": _content(content, [known[id] for id in files])}


def ask_of(turns: Sequence[Turn], model: Model, effort: str | None, habit: bool | None) -> Ask:
    """What the model is asked. `effort` "off" is without thinking, None leaves it to `habit`, which an alias may set,
    and a model that cannot think is asked without."""
    params = SamplingParams(max_tokens=model.max_length, temperature=TEMPERATURE, top_p=TOP_P)
    thinking, budget = habit, None
    if effort is not None:
        thinking = effort != "off"
        budget = model.config.efforts.budget(effort) if thinking else None
    if model.format.thinking(model.tokenizer) == "never":
        thinking, budget = None, None
    return Ask(messages=turns, params=params, thinking=thinking, budget=budget)


async def require_room(ask: Ask, model: Model) -> None:
    """Refuse a conversation that the model's context does not hold.

    Raises:
        TooLongError: it leaves no room for an answer.
    """
    num_tokens = await model.count(ask)
    if num_tokens >= model.max_length:
        raise TooLongError(
            f"the conversation has {num_tokens} tokens; {model.name} holds {model.max_length} with the answer: "
            "shorten the message, leave out a file, or begin a new conversation"
        )


def _content(content: str, files: Sequence[File]) -> str:
    return "".join(FILE_TEMPLATE.format(name=file.name, text=file.text) for file in files) + content
