"""What the chat page asks for: conversations, answers that can be followed and stopped, files, exports.

Everything belongs to the caller that the guard found; what is another's does not exist. A conversation that is too
long for the model is refused before anything of it is stored.
"""

from __future__ import annotations

import asyncio
import re
from typing import Annotated, Any, Literal
from unicodedata import bidirectional, category
from urllib.parse import quote

import msgspec
from fastapi import APIRouter, Header, Query, Request
from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from sqlalchemy import Connection
from starlette.responses import Response

from porcelet import __version__
from porcelet.chat import Message as Turn
from porcelet.errors import PorceletError
from porcelet.server.conversations import attachments, export, history
from porcelet.server.conversations.export import Language
from porcelet.server.conversations.history import Conversation, Message
from porcelet.server.conversations.job import STOPPED
from porcelet.server.conversations.jobs import Jobs
from porcelet.server.conversations.question import ask_of, question_turn, require_room, turns_to
from porcelet.server.conversations.uploads import AT_ONCE, read_file
from porcelet.server.errors import FieldError, error_body
from porcelet.server.generation.models import Model, Models
from porcelet.server.generation.watch import caller_of
from porcelet.server.sse import frame, stream
from porcelet.server.store import Database

MAX_CONTENT = 500_000  # characters of a message
MAX_FILES = 20  # of a message
MAX_NAME = 200  # characters of a file's name
# Control characters, halves of characters, and what makes a name be read in another order than it is written in.
_UNSEEN_CATEGORIES, _REORDERING = ("Cc", "Cs"), ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")

Effort = Literal["off", "low", "high", "max"]


def _storable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("it is not valid Unicode") from None
    if "\0" in text:
        raise ValueError("it holds a NUL character")
    return text


Text = Annotated[str, AfterValidator(_storable)]
Title = Annotated[Text, Field(max_length=200)]


class _Body(BaseModel):
    """Types are taken as they are; a field that is not known is refused."""

    model_config = ConfigDict(strict=True, extra="forbid")


class NewConversation(_Body):
    title: Title = ""


class Changes(_Body):
    """What is absent stays as it is."""

    title: Title = ""
    pinned: bool = False
    leaf: Text = ""


class Regenerate(_Body):
    """`id` is the new message's: who sends the same again, because no response came, gets what the first made."""

    id: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{8,64}$")] | None = None
    model: str
    effort: Effort | None = None


class NewMessage(Regenerate):
    parent: Text | None
    content: Annotated[Text, Field(max_length=MAX_CONTENT)]
    attachments: Annotated[list[Text], Field(max_length=MAX_FILES)] = []


def routes(models: Models, database: Database, jobs: Jobs) -> APIRouter:
    """Everything under /api."""
    router = APIRouter(prefix="/api", include_in_schema=False)  # it is the page's, and changes with it
    _add_session(router, models)
    _add_conversations(router, database, jobs)
    _add_exports(router, database)
    _add_messages(router, models, database, jobs)
    _add_streams(router, jobs, models.config.server.keep_alive)
    _add_files(router, models, database)
    return router


# ---- session --------------------------------------------------------------------------------------------------------


def _add_session(router: APIRouter, models: Models) -> None:
    @router.get("/session")
    async def session(request: Request) -> Response:
        return _json(
            {
                "user": {"name": caller_of(request).name},
                "login": request.scope["login"],
                "version": __version__,
                "default_model": models.default.name,
                "models": [_facts(model) for model in models.all.values()],
            }
        )


def _facts(model: Model) -> dict[str, Any]:
    loaded = model.loaded
    done, total = model.progress or (0, 0)
    return {
        "name": model.name,
        "context": model.max_length if loaded else None,
        "thinking": model.format.thinking(model.tokenizer) if loaded else None,
        "examples": model.examples,
        "loading": {"done": done, "total": total} if model.progress else None,
        "failure": str(model.engine.failure) if model.engine.failure else None,
    }


# ---- conversations --------------------------------------------------------------------------------------------------


def _add_conversations(router: APIRouter, database: Database, jobs: Jobs) -> None:
    @router.get("/conversations")
    async def list_conversations(
        request: Request,
        q: Annotated[Text, Query(max_length=200)] = "",
        cursor: Annotated[Text | None, Query(max_length=200)] = None,
        limit: Annotated[int, Query(ge=1, le=100)] = 50,
    ) -> Response:
        owner = caller_of(request).id
        found, following = await database.read(lambda c: history.list_conversations(c, owner, q, cursor, limit))
        entries = [msgspec.to_builtins(conversation) | {"excerpt": excerpt} for conversation, excerpt in found]
        return _json({"conversations": entries, "next": following})

    @router.post("/conversations", status_code=201)
    async def add_conversation(body: NewConversation, request: Request) -> Response:
        owner = caller_of(request).id
        return _json(await database.run(lambda c: history.add_conversation(c, owner, body.title)), 201)

    @router.delete("/conversations", status_code=204)
    async def drop_conversations(request: Request) -> Response:
        caller = caller_of(request)
        await database.run(lambda c: history.drop_conversations(c, caller.id))
        await jobs.drop(caller)
        return Response(status_code=204)

    @router.get("/conversations/{id}")
    async def find_conversation(id: str, request: Request) -> Response:
        caller = caller_of(request)
        await jobs.catch_up(caller)
        conversation, messages = await database.read(lambda c: _tree(c, caller.id, id))
        return _json({"conversation": conversation, "messages": [jobs.seen(caller, message) for message in messages]})

    @router.patch("/conversations/{id}")
    async def change_conversation(id: str, body: Changes, request: Request) -> Response:
        owner, changes = caller_of(request).id, body.model_dump(include=body.model_fields_set)
        return _json(await database.run(lambda c: history.change_conversation(c, owner, id, changes)))

    @router.delete("/conversations/{id}", status_code=204)
    async def drop_conversation(id: str, request: Request) -> Response:
        caller = caller_of(request)
        await database.run(lambda c: history.drop_conversation(c, caller.id, id))
        await jobs.drop(caller, id)
        return Response(status_code=204)


def _tree(connection: Connection, owner: str, id: str) -> tuple[Conversation, list[Message]]:
    return history.find_conversation(connection, owner, id), history.messages_of(connection, owner, id)


def _add_exports(router: APIRouter, database: Database) -> None:
    @router.get("/conversations/{id}/export")
    async def export_conversation(
        id: str, request: Request, format: Literal["markdown", "json"] = "markdown", language: Language = "en"
    ) -> Response:
        owner = caller_of(request).id
        conversation, messages = await database.read(lambda c: _tree(c, owner, id))
        name = conversation.title or export.WORDS[language]["conversation"]
        if format == "markdown":
            body = export.markdown(conversation, messages, language).encode()
            return _download(body, "text/markdown; charset=utf-8", f"{name}.md")
        whole = await database.read(lambda c: msgspec.json.encode(export.whole(c, owner, id)))
        return _download(whole, "application/json", f"{name}.json")

    @router.get("/export")
    async def export_everything(request: Request) -> Response:
        owner = caller_of(request).id
        everything = await database.read(lambda c: msgspec.json.encode(export.everything(c, owner)))
        return _download(everything, "application/json", "conversations.json")


# ---- messages and their streams -------------------------------------------------------------------------------------


def _add_messages(router: APIRouter, models: Models, database: Database, jobs: Jobs) -> None:
    @router.post("/conversations/{id}/messages", status_code=201)
    async def add_message(id: str, body: NewMessage, request: Request) -> Response:
        if not body.content.strip() and not body.attachments:
            raise FieldError("content", "content is empty, and nothing is attached; write a question")
        caller = caller_of(request)

        def turns(connection: Connection) -> list[Turn]:
            asked = question_turn(connection, caller.id, body.content, body.attachments)
            return [*turns_to(connection, caller.id, id, body.parent), asked]

        await jobs.catch_up(caller)
        is_lost = body.parent is not None and jobs.is_lost(caller, body.parent)
        if body.id and (known := await database.read(lambda c: _known_exchange(c, caller.id, id, body))):
            return _json({"user": known[0], "assistant": jobs.seen(caller, known[1])})
        model, habit = await models.find(body.model)
        with jobs.place(caller):
            ask = ask_of(await database.read(turns), model, body.effort, habit)
            await require_room(ask, model)
            question, answer, is_new = await database.run(lambda c: _add_exchange(c, caller.id, id, body, is_lost))
            if is_new:
                jobs.start(answer, id, model, ask, caller)
        return _json({"user": question, "assistant": answer}, 201 if is_new else 200)

    @router.post("/messages/{id}/regenerate", status_code=201)
    async def regenerate(id: str, body: Regenerate, request: Request) -> Response:
        caller = caller_of(request)

        def turns(connection: Connection) -> tuple[str, list[Turn]]:
            conversation, sibling = history.find_answer(connection, caller.id, id)
            return conversation, turns_to(connection, caller.id, conversation, sibling.parent)

        await jobs.catch_up(caller)
        if body.id and (known := await database.read(lambda c: history.find_regenerated(c, caller.id, id, body.id))):
            return _json({"assistant": jobs.seen(caller, known)})
        model, habit = await models.find(body.model)
        with jobs.place(caller):
            conversation, asked = await database.read(turns)
            ask = ask_of(asked, model, body.effort, habit)
            await require_room(ask, model)
            answer, is_new = await database.run(lambda c: _add_answer(c, caller.id, id, body))
            if is_new:
                jobs.start(answer, conversation, model, ask, caller)
        return _json({"assistant": answer}, 201 if is_new else 200)


def _known_exchange(connection: Connection, owner: str, id: str, body: NewMessage) -> tuple[Message, Message] | None:
    return history.find_exchange(connection, owner, id, body.parent, body.content, body.attachments, body.id)


def _add_exchange(
    connection: Connection, owner: str, id: str, body: NewMessage, is_lost: bool
) -> tuple[Message, Message, bool]:
    """A question and its answer, and whether they are new; `is_lost` of the answer before."""
    if known := _known_exchange(connection, owner, id, body):
        return *known, False
    if is_lost and body.parent:
        history.interrupt(connection, owner, body.parent)
    said = (body.parent, body.content, body.attachments)
    return *history.add_exchange(connection, owner, id, *said, body.model, body.id), True


def _add_answer(connection: Connection, owner: str, id: str, body: Regenerate) -> tuple[Message, bool]:
    """Another answer, and whether it is new."""
    if known := history.find_regenerated(connection, owner, id, body.id):
        return known, False
    return history.add_answer(connection, owner, id, body.model, body.id), True


def _add_streams(router: APIRouter, jobs: Jobs, keep_alive: float) -> None:
    @router.get("/streams/{id}")
    async def follow(
        id: str,
        request: Request,
        after: Annotated[int, Query(ge=0)] = 0,
        last_event_id: Annotated[int | None, Header(ge=0)] = None,  # what a reader that comes back has seen
    ) -> Response:
        job = jobs.find(caller_of(request), id)
        after = after if last_event_id is None else last_event_id
        job.buffer.require(after)
        return await stream(request, job.buffer.read(after), _failed, keep_alive)

    @router.post("/streams/{id}/stop", status_code=204)
    async def stop(id: str, request: Request) -> Response:
        await jobs.find(caller_of(request), id).stop(STOPPED)
        return Response(status_code=204)


def _failed(problem: PorceletError) -> bytes:
    return frame(error_body(str(problem), problem.kind, problem.param, problem.code))


# ---- files ----------------------------------------------------------------------------------------------------------


def _add_files(router: APIRouter, models: Models, database: Database) -> None:
    slots = asyncio.Semaphore(AT_ONCE)

    @router.post("/files", status_code=201)
    async def add_file(
        name: Annotated[str, Query(min_length=1)], request: Request, model: str | None = None
    ) -> Response:
        _require_name(name)
        chosen, _ = await models.find(model or models.default.name)
        file = await read_file(name, request.stream(), chosen, slots)
        await database.run(lambda c: attachments.add_file(c, caller_of(request).id, file))
        facts = {"id": file.id, "name": file.name, "kind": file.kind, "tokens": file.tokens, "pages": file.pages}
        return _json(facts | {"characters": len(file.text)}, 201)

    @router.get("/files/{id}")
    async def find_file(id: str, request: Request) -> Response:
        owner = caller_of(request).id
        return _json(await database.read(lambda c: attachments.find_file(c, owner, id)))


def _require_name(name: str) -> None:
    if len(name) > MAX_NAME:
        raise FieldError("name", f"name has {len(name)} characters; at most {MAX_NAME} are allowed: rename the file")
    if any(category(sign) in _UNSEEN_CATEGORIES or bidirectional(sign) in _REORDERING for sign in name):
        raise FieldError("name", f"name is {name!r}; control characters are not allowed in it: rename the file")


# ---- answers --------------------------------------------------------------------------------------------------------


def _json(body: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(body), status, media_type="application/json")


def _download(body: bytes, media_type: str, name: str) -> Response:
    """A body that browsers save under a name; its ASCII form is for old ones (RFC 6266)."""
    ascii_name = re.sub(r"[^A-Za-z0-9._ -]", "_", name)
    disposition = f"attachment; filename=\"{ascii_name}\"; filename*=UTF-8''{quote(name, safe='')}"
    return Response(body, media_type=media_type, headers={"Content-Disposition": disposition})
