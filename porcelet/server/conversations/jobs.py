"""All answers under way, and those that ended a little while ago: who may have how many, and what is forgotten when."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from porcelet.errors import CapacityError
from porcelet.server.conversations.history import INTERRUPTED, RUNNING, Message, interrupt_running
from porcelet.server.conversations.job import STOPPED, Job, not_kept
from porcelet.server.errors import NotFoundError
from porcelet.server.generation.ask import Ask
from porcelet.server.generation.models import Model
from porcelet.server.generation.watch import Caller
from porcelet.server.store import Database

log = logging.getLogger(__name__)
MAX_RUNNING = 4  # answers under way for one caller
MAX_FINISHED = 100  # ended answers that can still be read
KEPT_SECONDS = 300.0  # after an answer's end


class TooManyAnswersError(CapacityError):
    """One caller has as many answers under way as one may have."""

    status = 429
    code = "rate_limit_exceeded"


class Jobs:
    """The answers of one server."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._jobs: dict[str, Job] = {}
        self._starting: Counter[str] = Counter()

    async def open(self) -> None:
        """At start-up: what a server before this one left unfinished is marked so. No two may share a database."""
        if count := await self._database.run(interrupt_running):
            log.warning("%d answers were cut off when the server ended", count)

    @contextmanager
    def place(self, caller: Caller) -> Iterator[None]:
        """Hold a place for an answer that is to be started inside.

        Raises:
            TooManyAnswersError: this caller has no place left.
        """
        running = sum(job.ended is None for job in self._of(caller))
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

    async def catch_up(self, caller: Caller) -> None:
        """Try again to write how a caller's answers ended, where that failed."""
        await asyncio.gather(*(job.keep(self._database) for job in self._of(caller) if job.ended is not None))

    def is_lost(self, caller: Caller, id: str) -> bool:
        """Whether nobody writes that answer of this caller, or will."""
        return id not in self._jobs and not self._starting[caller.id]

    def seen(self, caller: Caller, message: Message) -> Message:
        """A message from the database as its readers see it: what runs there may have ended without being written."""
        if message.status != RUNNING:
            return message
        job = self._jobs.get(message.id)
        if job and job.ended is not None and job.unkept:
            return not_kept(job.unkept)
        return replace(message, status=INTERRUPTED, stream=None) if self.is_lost(caller, message.id) else message

    async def drop(self, caller: Caller, conversation: str | None = None) -> None:
        """End the answers of a conversation that was deleted, or of all of them, and forget their texts. Those whose
        beginning was stored before the deletion have started by now: the database answers in order."""
        dropped = [job for job in self._of(caller) if conversation in (None, job.conversation)]
        for job in dropped:
            del self._jobs[job.id]
        await asyncio.gather(*(job.stop(STOPPED) for job in dropped))

    async def close(self) -> None:
        """Interrupt what is under way, and wait until it is written."""
        await asyncio.gather(*(job.stop(INTERRUPTED) for job in self._jobs.values()))
        await asyncio.gather(*(job.keep(self._database) for job in self._jobs.values()))

    def _of(self, caller: Caller) -> list[Job]:
        return [job for job in self._jobs.values() if job.caller.id == caller.id]

    def _forget(self) -> None:
        """Drop what nobody may read any more; the oldest first."""
        ended = [job for job in self._jobs.values() if job.ended is not None and job.unkept is None]
        old = time.monotonic() - KEPT_SECONDS
        for place, job in enumerate(sorted(ended, key=lambda job: job.ended or 0.0, reverse=True)):
            if place >= MAX_FINISHED or (job.ended or 0.0) < old:
                del self._jobs[job.id]
