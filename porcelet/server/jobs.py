"""Answers that belong to the server and not to a connection: they go on without readers, and are kept as they come.

An answer's events go into a buffer that can be followed from anywhere, and its text into the database about once a
second; at the end it is written with its status, its usage and its times. Whatever ends it, what came so far is kept.
A stop closes the engine's request, which ends within a step.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from porcelet.chat import Content, Reasoning, ToolCallArguments, ToolCallStart
from porcelet.chat import Event as Part
from porcelet.errors import CapacityError, EngineError, PorceletError
from porcelet.server.ask import Ask
from porcelet.server.buffer import Buffer
from porcelet.server.errors import NotFoundError
from porcelet.server.events import Ended, Event, Piece, Started, Usage
from porcelet.server.history import INTERRUPTED, Message, interrupt_running, save_answer
from porcelet.server.models import Model
from porcelet.server.store import Database
from porcelet.server.watch import Caller

log = logging.getLogger(__name__)
MAX_RUNNING = 4  # answers under way for one caller
MAX_FINISHED = 100  # ended answers that can still be read
KEPT_SECONDS = 300.0  # after an answer's end
SAVE_SECONDS = 1.0
STOPPED = "stopped"
_MISTAKE = {"message": "the server made a mistake; its log says more", "code": None}
_NOT_KEPT = {"message": "the answer could not be kept; the server's log says more", "code": None}
_STATUS = {"stop": "done", "length": "length", "tool_calls": "done"}


class TooManyAnswersError(CapacityError):
    """One caller has as many answers under way as one may have."""

    status = 429
    code = "rate_limit_exceeded"


@dataclass
class Progress:
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
        self._message = message
        self._reasoning: list[str] = []
        self._content: list[str] = []
        self._progress = Progress(time.monotonic())
        self._saved = time.monotonic()
        self._end = INTERRUPTED  # the status that it gets when it is cancelled

    def start(self, model: Model, ask: Ask, database: Database) -> None:
        # Two tasks: one that can be cancelled at any moment, and one that writes down how it ended.
        self._writing = asyncio.create_task(self._write(model, ask, database))
        self._watching = asyncio.create_task(self._watch(database))

    async def stop(self, status: str) -> None:
        """End it with this status, and wait until that is written; one that has ended stays as it is."""
        if not self._writing.done():
            self._end = status
            self._writing.cancel()
        await asyncio.wait({self._watching})

    async def _write(self, model: Model, ask: Ask, database: Database) -> str:
        status = ""
        async with aclosing(model.answer(ask, self.caller)) as events:
            async for event in events:
                status = self._take(event) or status
                self._save_now_and_then(database)
        return status

    async def _watch(self, database: Database) -> None:
        await asyncio.wait({self._writing})
        status, error = self._outcome()
        message = replace(
            self._so_far(),
            status=status,
            error=error,
            stream=None,
            usage=self._progress.usage(),
            seconds=self._progress.seconds(),
        )
        try:
            await database.run(partial(save_answer, message=message))
        except SQLAlchemyError as problem:
            log.error("an answer could not be written: %s", problem)
            message = replace(message, status="error", error=_NOT_KEPT)
        self.buffer.add({"type": "ended", "message": message})
        self.buffer.close()
        self.ended = time.monotonic()

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
        progress = self._progress
        match event:
            case Started(num_prompt, num_cached):
                progress.started = time.monotonic()
                progress.num_prompt_tokens, progress.num_cached_tokens = num_prompt, num_cached
                self.buffer.add({"type": "started", "prompt_tokens": num_prompt, "cached_tokens": num_cached})
            case Piece(parts=parts, num_generated=num_generated):
                progress.num_generated = num_generated
                for part in parts:
                    self._take_part(part)
            case Ended(reason=reason):
                return _STATUS[reason]
            case Usage():
                progress.num_generated, progress.num_reasoning = event.num_generated, event.num_reasoning
        return None

    def _take_part(self, part: Part) -> None:
        kind, text = _text(part)
        if kind == "reasoning":
            self._reasoning.append(text)
            self._progress.num_reasoning = self._progress.num_generated
        else:
            self._content.append(text)
            self._progress.answering = self._progress.answering or time.monotonic()
        self.buffer.add({"type": kind, "text": text, "tokens": self._progress.num_generated})

    def _save_now_and_then(self, database: Database) -> None:
        if time.monotonic() - self._saved > SAVE_SECONDS:
            self._saved = time.monotonic()
            database.defer(partial(save_answer, message=self._so_far()))

    def _so_far(self) -> Message:
        return replace(self._message, reasoning="".join(self._reasoning), content="".join(self._content))


class Jobs:
    """All answers under way, and those that ended a little while ago."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._jobs: dict[str, Job] = {}
        self._starting: Counter[str] = Counter()

    async def open(self) -> None:
        """At start-up: what a server before this one left unfinished is marked so."""
        if count := await self._database.run(interrupt_running):
            log.warning("%d answers were cut off when the server ended", count)

    @contextmanager
    def place(self, caller: Caller) -> Iterator[None]:
        """Hold a place for an answer that is to be started inside.

        Raises:
            TooManyAnswersError: this caller has no place left.
        """
        running = sum(job.ended is None and job.caller.id == caller.id for job in self._jobs.values())
        if running + self._starting[caller.id] >= MAX_RUNNING:
            raise TooManyAnswersError(f"{MAX_RUNNING} answers are being written for you; wait for one, or stop it", 5)
        self._starting[caller.id] += 1
        try:
            yield
        finally:
            self._starting[caller.id] -= 1

    def start(self, message: Message, conversation: str, model: Model, ask: Ask, caller: Caller) -> None:
        """Begin to write the answer `message`, which is in the database already."""
        self._forget()
        job = self._jobs[message.id] = Job(message, conversation, caller)
        job.start(model, ask, self._database)

    def find(self, caller: Caller, id: str) -> Job:
        """The answer of that stream.

        Raises:
            NotFoundError: this caller has none, or it ended too long ago.
        """
        self._forget()
        job = self._jobs.get(id)
        if job is None or job.caller.id != caller.id:
            raise NotFoundError("stream", id)
        return job

    async def drop(self, caller: Caller, conversation: str | None = None) -> None:
        """End the answers of a conversation that is deleted, or of all of them, and forget their texts."""
        dropped = [
            job
            for job in self._jobs.values()
            if job.caller.id == caller.id and conversation in (None, job.conversation)
        ]
        await asyncio.gather(*(job.stop(STOPPED) for job in dropped))
        for job in dropped:
            self._jobs.pop(job.id, None)

    async def close(self) -> None:
        """Interrupt what is under way, and wait until it is written."""
        await asyncio.gather(*(job.stop(INTERRUPTED) for job in self._jobs.values()))

    def _forget(self) -> None:
        """Drop what nobody may read any more; the oldest first."""
        ended = [job for job in self._jobs.values() if job.ended is not None]
        old = time.monotonic() - KEPT_SECONDS
        for place, job in enumerate(sorted(ended, key=lambda job: job.ended or 0.0, reverse=True)):
            if place >= MAX_FINISHED or (job.ended or 0.0) < old:
                del self._jobs[job.id]


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
    code = problem.code or ("engine_unavailable" if isinstance(problem, EngineError) else None)
    return {"message": str(problem), "code": code}
