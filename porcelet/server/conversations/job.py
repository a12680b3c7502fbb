"""One answer that belongs to the server and not to a connection: it goes on without readers, and is kept as it comes.

Its events go into a buffer that can be followed from anywhere, and its text into the database now and then; at the end
it is written with its status, its usage and its times, and again later if that fails. Whatever ends it, what came so
far is kept. A stop closes the engine's request, which ends within a step.
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from porcelet.chat import Content, Reasoning, ToolCallArguments, ToolCallStart
from porcelet.chat import Event as Part
from porcelet.errors import CapacityError, EngineError, PorceletError
from porcelet.server.conversations.buffer import Buffer
from porcelet.server.conversations.history import INTERRUPTED, Message, save_answer, save_text
from porcelet.server.generation.ask import Ask
from porcelet.server.generation.events import Ended, Event, Piece, Started, Usage
from porcelet.server.generation.models import Model
from porcelet.server.generation.watch import Caller
from porcelet.server.store import Database

log = logging.getLogger(__name__)
# Each save writes the whole text: at most so often, and when it has grown by so much, which makes them few.
SAVE_SECONDS, SAVE_GROWTH = 1.0, 0.1
STOPPED = "stopped"
_MISTAKE = {"message": "the server made a mistake; its log says more", "code": PorceletError.kind}
_NOT_KEPT = {"message": "the answer could not be kept; the server's log says more", "code": PorceletError.kind}
_STATUS = {"stop": "done", "length": "length", "tool_calls": "done"}


@dataclass
class Tally:
    """Counts and times of an answer as far as it has come; times are `time.monotonic`'s."""

    asked: float
    started: float | None = None
    answering: float | None = None
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_generated: int = 0
    num_reasoning: int = 0

    def usage(self) -> dict[str, int] | None:
        """None where the engine never began."""
        if self.started is None:
            return None
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "cached_tokens": self.num_cached_tokens,
            "completion_tokens": self.num_generated,
            "reasoning_tokens": self.num_reasoning,
        }

    def seconds(self) -> dict[str, float]:
        now = time.monotonic()
        started = self.started or now
        answering = self.answering or (now if self.num_reasoning else started)
        times = {"waiting": started - self.asked, "thinking": answering - started, "answering": now - answering}
        return {name: round(seconds, 3) for name, seconds in times.items()}


class Job:
    """One answer on its way."""

    def __init__(self, message: Message, conversation: str, caller: Caller) -> None:
        self.id = message.id
        self.conversation = conversation
        self.caller = caller
        self.buffer = Buffer()
        self.ended: float | None = None
        self.unkept: Message | None = None  # how it ended, until that is written
        self._message = message
        self._reasoning: list[str] = []
        self._content: list[str] = []
        self._tally = Tally(time.monotonic())
        self._length = 0  # characters so far
        self._saved, self._saved_length = time.monotonic(), 0
        self._end = INTERRUPTED  # the status that it gets when it is cancelled

    def start(self, model: Model, ask: Ask, database: Database) -> None:
        # Two tasks: one that can be cancelled at any moment, and one that writes down how it ended.
        self._writing = asyncio.create_task(self._write(model, ask, database))
        self._watching = asyncio.create_task(self._watch(database))

    async def stop(self, status: str) -> None:
        """End it with this status, and wait until that is written; one that has ended stays as it is."""
        if not self._writing.done() and not self._writing.cancelling():
            self._end = status
            self._writing.cancel()
        await asyncio.wait({self._watching})

    async def keep(self, database: Database) -> None:
        """Write how it ended, if that is still to be done; where that fails, it stays to be done."""
        if (message := self.unkept) is None:
            return
        try:
            await database.run(partial(save_answer, message=message))
        except (CapacityError, SQLAlchemyError) as problem:
            log.error("an answer could not be written: %s", problem)
        else:
            self.unkept = None

    async def _write(self, model: Model, ask: Ask, database: Database) -> str:
        status = ""
        async with aclosing(model.answer(ask, self.caller)) as events:
            async for event in events:
                status = self._take(event) or status
                self._save_now_and_then(database)
        return status

    async def _watch(self, database: Database) -> None:
        await asyncio.wait({self._writing})
        try:
            self.unkept = message = self._at_end()
            await self.keep(database)
            self.buffer.add({"type": "ended", "message": not_kept(message) if self.unkept else message})
        finally:
            self.buffer.close()
            self.ended = time.monotonic()

    def _at_end(self) -> Message:
        status, error = self._outcome()
        usage, seconds = self._tally.usage(), self._tally.seconds()
        return replace(self._so_far(), status=status, error=error, stream=None, usage=usage, seconds=seconds)

    def _outcome(self) -> tuple[str, dict[str, Any] | None]:
        if self._writing.cancelled():
            return self._end, None
        match self._writing.exception():
            case None:
                return self._writing.result(), None
            case PorceletError() as problem:
                return "error", _error(problem)
            case problem:
                log.error("an answer failed by a mistake of ours", exc_info=problem)
                return "error", _MISTAKE

    def _take(self, event: Event) -> str | None:
        """Add one event to the buffer and to the text; an answer's end gives its status."""
        tally = self._tally
        match event:
            case Started(num_prompt, num_cached):
                tally.started = time.monotonic()
                tally.num_prompt_tokens, tally.num_cached_tokens = num_prompt, num_cached
                self.buffer.add({"type": "started", "prompt_tokens": num_prompt, "cached_tokens": num_cached})
            case Piece(parts=parts, num_generated=num_generated):
                tally.num_generated = num_generated
                for part in parts:
                    self._take_part(part)
            case Ended(reason=reason):
                return _STATUS[reason]
            case Usage():
                tally.num_generated, tally.num_reasoning = event.num_generated, event.num_reasoning
        return None

    def _take_part(self, part: Part) -> None:
        kind, text = _text(part)
        self._length += len(text)
        if kind == "reasoning":
            self._reasoning.append(text)
            self._tally.num_reasoning = self._tally.num_generated
        else:
            self._content.append(text)
            self._tally.answering = self._tally.answering or time.monotonic()
        self.buffer.add({"type": kind, "text": text, "tokens": self._tally.num_generated})

    def _save_now_and_then(self, database: Database) -> None:
        has_grown = self._length > self._saved_length * (1 + SAVE_GROWTH)
        if has_grown and time.monotonic() - self._saved > SAVE_SECONDS:
            self._saved, self._saved_length = time.monotonic(), self._length
            database.defer(partial(save_text, message=self._so_far()))

    def _so_far(self) -> Message:
        return replace(self._message, reasoning="".join(self._reasoning), content="".join(self._content))


def not_kept(message: Message) -> Message:
    """An ended answer that is not in the database, as readers see it."""
    return replace(message, status="error", error=_NOT_KEPT)


def _text(part: Part) -> tuple[str, str]:
    """What a part shows. A tool call, for which no tool was offered here, is text."""
    match part:
        case Reasoning(text):
            return "reasoning", text
        case Content(text) | ToolCallArguments(text=text):
            return "content", text
        case ToolCallStart(name=name):
            return "content", f"\n\n{name} "


def _error(problem: PorceletError) -> dict[str, Any]:
    code = problem.code or ("engine_unavailable" if isinstance(problem, EngineError) else problem.kind)
    return {"message": str(problem), "code": code}
