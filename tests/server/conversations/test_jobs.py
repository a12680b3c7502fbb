"""Answers that belong to the server: who reads along changes nothing, and whatever ends them is kept and bounded."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from porcelet.config import EngineConfig, ModelEntry, ServeConfig
from porcelet.engine.supervisor import Supervisor
from porcelet.errors import CapacityError
from porcelet.server.conversations import history, jobs
from porcelet.server.conversations import job as job_module
from porcelet.server.conversations.buffer import Buffer
from porcelet.server.conversations.job import Job
from porcelet.server.conversations.jobs import Jobs, TooManyAnswersError
from porcelet.server.conversations.question import ask_of
from porcelet.server.errors import FieldError, NotFoundError
from porcelet.server.generation.ask import Ask
from porcelet.server.generation.models import Model
from porcelet.server.generation.watch import Caller
from porcelet.server.store import Database
from tests.server.conftest import THE_ANSWER

ME, YOU = Caller("me", "Me"), Caller("you", "You")


# ---- buffers --------------------------------------------------------------------------------------------------------


def test_every_reader_sees_the_same() -> None:
    """Early, late, slow, from the middle: all readers see the same numbered events, and end when it is closed."""

    async def read(buffer: Buffer, after: int, pause: float) -> bytes:
        read = b""
        async for frames in buffer.read(after):
            read += frames
            await asyncio.sleep(pause)
        return read

    async def main() -> None:
        buffer = Buffer()
        early = [asyncio.create_task(read(buffer, 0, pause)) for pause in (0, 0.001, 0.05)]
        middle = asyncio.create_task(read(buffer, 300, 0))
        for number in range(1, 601):
            buffer.add({"number": number})
            if number % 50 == 0:
                await asyncio.sleep(0.002)
        buffer.close()
        whole = await read(buffer, 0, 0)
        events = [b'id: %d\ndata: {"number":%d}\n\n' % (number, number) for number in range(1, 601)]
        assert whole == b": stream\n\n" + b"".join(events)
        assert await asyncio.gather(*early) == [whole] * 3
        assert await middle == b": stream\n\n" + b"".join(events[300:])
        assert await read(buffer, 600, 0) == b": stream\n\n"

    asyncio.run(main())


# ---- jobs -----------------------------------------------------------------------------------------------------------


class Bench:
    """A loaded model and a database in one event loop, and answers to begin."""

    def __init__(self, runner: asyncio.Runner, model: Model, database: Database) -> None:
        self.runner = runner
        self.model = model
        self.database = database
        self.jobs = Jobs(database)

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.runner.run(work)

    def begin(self, caller: Caller = ME, effort: str | None = None) -> Job:
        """An answer under way, endless without an effort."""
        conversation, message = self.database.run_now(lambda connection: _exchange(connection, caller))
        ask: Ask = ask_of([{"role": "user", "content": "x"}], self.model, effort, None)
        self.jobs.start(message, conversation, self.model, ask, caller)
        return self.jobs.find(caller, message.id)

    def kept(self, job: Job) -> history.Message:
        return self.database.run_now(lambda c: history.find_answer(c, job.caller.id, job.id))[1]


def _exchange(connection: Any, caller: Caller) -> tuple[str, history.Message]:
    id = history.add_conversation(connection, caller.id, "").id
    return id, history.add_exchange(connection, caller.id, id, None, "x", [], "tiny")[1]


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def model(runner: asyncio.Runner, chat_model: Path) -> Iterator[Model]:
    with closing(Supervisor(chat_model, EngineConfig(threads=1))) as engine:
        model = Model("tiny", chat_model, engine, ServeConfig(models={"tiny": ModelEntry("tiny")}))
        runner.run(model.load(lambda done, total: None))
        yield model


@pytest.fixture
def bench(runner: asyncio.Runner, model: Model, tmp_path: Path) -> Iterator[Bench]:
    with closing(Database.open(f"sqlite:///{tmp_path / 'chat.db'}")) as database:
        bench = Bench(runner, model, database)
        yield bench
        runner.run(bench.jobs.close())


async def begun(job: Job) -> None:
    """Wait for the first event of an answer."""
    async with asyncio.timeout(20):
        async for frames in job.buffer.read():
            if b"data:" in frames:
                return


async def end_of(job: Job) -> None:
    async with asyncio.timeout(20):
        async for _ in job.buffer.read():
            pass


def test_an_answer_needs_no_reader(bench: Bench) -> None:
    """It goes to its end by itself and is kept whole."""

    async def main() -> Job:
        job = bench.begin(effort="off")
        while job.ended is None:
            await asyncio.sleep(0.01)
        return job

    kept = bench.kept(bench.run(main()))
    assert (kept.content, kept.status) == (THE_ANSWER, "done")


def test_a_stop_at_any_moment_is_kept(bench: Bench) -> None:
    """Before its first step too, a stopped answer is written as one, and the first reason for its end stays."""

    async def main() -> list[Job]:
        early, late = bench.begin(), bench.begin()
        await early.stop("stopped")
        await begun(late)
        await late.stop("stopped")
        await bench.jobs.close()
        return [early, late]

    early, late = map(bench.kept, bench.run(main()))
    assert (early.status, early.reasoning, early.usage) == ("stopped", "", None)
    assert late.status == "stopped" and late.reasoning and late.usage


def test_close_interrupts_all(bench: Bench) -> None:
    """When the server ends, every answer under way is written as interrupted, with what came."""

    async def main() -> list[Job]:
        running = [bench.begin() for _ in range(3)]
        for job in running:
            await begun(job)
        await bench.jobs.close()
        return running

    for kept in map(bench.kept, bench.run(main())):
        assert kept.status == "interrupted" and kept.reasoning


def test_ended_answers_are_forgotten(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ended answers can be read again for a while, at most so many of them; those under way always."""

    async def main() -> None:
        running = bench.begin()
        ended = [bench.begin(effort="off") for _ in range(3)]
        for job in ended:
            await end_of(job)
        assert [bench.jobs.find(ME, job.id) for job in ended] == ended
        monkeypatch.setattr(jobs, "MAX_FINISHED", 1)
        last = max(ended, key=lambda job: job.ended or 0)
        for job in ended:
            if job is last:
                assert bench.jobs.find(ME, job.id) is job
            else:
                with pytest.raises(NotFoundError):
                    bench.jobs.find(ME, job.id)
        monkeypatch.setattr(jobs, "KEPT_SECONDS", 0.0)
        await asyncio.sleep(0.01)
        with pytest.raises(NotFoundError):
            bench.jobs.find(ME, last.id)
        assert bench.jobs.find(ME, running.id) is running

    bench.run(main())


def test_answers_are_their_callers(bench: Bench) -> None:
    """Another caller's answer is not there, does not count as one's own, and is not ended with one's own."""

    async def main() -> None:
        theirs = [bench.begin(YOU) for _ in range(4)]
        with pytest.raises(NotFoundError):
            bench.jobs.find(ME, theirs[0].id)
        with pytest.raises(TooManyAnswersError), bench.jobs.place(YOU):
            pass
        with bench.jobs.place(ME):
            mine = bench.begin(ME)
        await bench.jobs.drop(ME)
        assert mine.ended is not None and [job.ended for job in theirs] == [None] * 4
        with pytest.raises(NotFoundError):
            bench.jobs.find(ME, mine.id)

    bench.run(main())


def test_places_are_held_while_an_answer_is_prepared(bench: Bench) -> None:
    """Requests at the same moment cannot take more places than there are."""

    async def prepare() -> bool:
        try:
            with bench.jobs.place(ME):
                await asyncio.sleep(0.01)
        except TooManyAnswersError:
            return False
        return True

    async def main() -> list[bool]:
        return await asyncio.gather(*(prepare() for _ in range(6)))

    assert bench.run(main()) == [True] * 4 + [False] * 2


def test_an_answer_that_cannot_be_kept_says_so(bench: Bench) -> None:
    """Without a database, a reader still gets the text, and hears that it will not be there tomorrow."""

    async def main() -> bytes:
        job = bench.begin(effort="off")
        for table in ("attachments", "messages"):
            await bench.database.run(lambda connection, table=table: connection.execute(text(f"DROP TABLE {table}")))
        async with asyncio.timeout(20):
            return b"".join([frames async for frames in job.buffer.read()])

    frames = bench.run(main()).decode()
    assert THE_ANSWER in frames and '"status":"error"' in frames and "could not be kept" in frames


def test_an_end_is_written_as_soon_as_it_can_be(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the disk is full, an ended answer is seen as one that was not kept, and it is not forgotten; the next look
    after there is room again, or the server's end, writes it."""
    save, monkey = bench.database.run, monkeypatch.setattr

    async def full(work: Any) -> None:
        raise CapacityError("disk full")

    async def main() -> list[Job]:
        ended = [bench.begin(effort="off") for _ in range(2)]
        monkey(bench.database, "run", full)
        for job in ended:
            await end_of(job)
        monkey(jobs, "KEPT_SECONDS", 0.0)
        await bench.jobs.catch_up(ME)
        seen = bench.jobs.seen(ME, bench.kept(ended[0]))
        assert (seen.status, seen.content) == ("error", THE_ANSWER) and seen.error
        monkey(bench.database, "run", save)
        await bench.jobs.catch_up(YOU)
        assert bench.kept(ended[0]).status == "running"
        await bench.jobs.catch_up(ME)
        assert bench.jobs.seen(ME, bench.kept(ended[0])) == bench.kept(ended[0])
        return ended

    for kept in map(bench.kept, bench.run(main())):
        assert (kept.content, kept.status) == (THE_ANSWER, "done")


def test_an_answer_that_nobody_writes_is_interrupted(bench: Bench) -> None:
    """A row that says "running" without anybody at it is seen as interrupted, but not while its start is under way; the
    mark is its owner's to set."""
    conversation, message = bench.database.run_now(lambda connection: _exchange(connection, ME))
    with bench.jobs.place(ME):
        assert not bench.jobs.is_lost(ME, message.id) and bench.jobs.seen(ME, message) == message
    assert bench.jobs.is_lost(ME, message.id)
    assert bench.jobs.seen(ME, message) == replace(message, status="interrupted", stream=None)
    add = partial(
        history.add_exchange, owner=ME.id, id=conversation, parent=message.id, content="?", files=[], model=""
    )
    bench.database.run_now(lambda c: history.interrupt(c, YOU.id, message.id))
    with pytest.raises(FieldError, match="still being written"):
        bench.database.run_now(add)
    bench.database.run_now(lambda c: history.interrupt(c, ME.id, message.id))
    assert bench.database.run_now(add)[0].parent == message.id


def test_saves_become_rarer(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long answer is saved when it has grown by a tenth, so all saves together write some ten times its length; the
    end alone makes it ready for searches."""
    saved: list[str] = []
    monkeypatch.setattr(job_module, "SAVE_SECONDS", 0.0)
    save_text = history.save_text
    monkeypatch.setattr(
        job_module, "save_text", lambda c, message: saved.append(message.reasoning) or save_text(c, message)
    )

    async def main() -> Job:
        job = bench.begin()
        async with asyncio.timeout(20):
            while len(saved) < 20:
                await asyncio.sleep(0.01)
        await job.stop("stopped")
        return job

    kept = bench.kept(bench.run(main()))
    assert kept.reasoning.startswith(saved[-1]) and kept.status == "stopped"
    lengths = [len(text) for text in saved]
    assert all(after > 1.1 * before for before, after in zip(lengths, lengths[1:], strict=False))


def test_start_up_marks_what_was_cut_off(bench: Bench) -> None:
    """What still runs by the database was cut off; what has ended stays as it is."""
    ended, cut = (bench.database.run_now(lambda connection: _exchange(connection, ME))[1] for _ in range(2))
    bench.database.run_now(lambda c: history.save_answer(c, replace(ended, status="done", content="x")))
    bench.run(bench.jobs.open())
    found = [bench.database.run_now(lambda c, id=id: history.find_answer(c, "me", id))[1] for id in (ended.id, cut.id)]
    assert [message.status for message in found] == ["done", "interrupted"]
