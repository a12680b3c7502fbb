"""The database's threads: who reads waits for nobody, and sees what was written."""

from __future__ import annotations

import asyncio
import threading
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import Column, Connection, Integer, Table, insert, select
from sqlalchemy.exc import SQLAlchemyError

from porcelet.errors import CapacityError
from porcelet.server.store import NUM_READERS, Database, metadata

_numbers = Table("tests_numbers", metadata, Column("number", Integer, primary_key=True))


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'some.db'}"


def add(connection: Connection) -> None:
    connection.execute(insert(_numbers).values())


def numbers(connection: Connection) -> list[int]:
    return list(connection.execute(select(_numbers.c.number)).scalars())


def test_reads_do_not_wait_for_writes(url: str) -> None:
    """While a write holds its thread, and reads hold all but one of theirs, a read is answered; it sees what was
    written before it, and nothing that is half done."""

    async def main(database: Database) -> None:
        go = threading.Event()

        def hold(connection: Connection) -> None:
            add(connection)
            assert go.wait(10)

        await database.run(add)
        held = [database.run(hold), *(database.read(lambda c: go.wait(10)) for _ in range(NUM_READERS - 1))]
        waiting = [asyncio.ensure_future(work) for work in held]
        await asyncio.sleep(0)
        async with asyncio.timeout(5):
            assert await database.read(numbers) == [1]
        go.set()
        await asyncio.gather(*waiting)
        assert await database.read(numbers) == [1, 2]

    with closing(Database.open(url)) as database:
        asyncio.run(main(database))


def test_a_read_sees_one_state(url: str) -> None:
    """What is written while a read goes on is not there for its later queries."""

    async def main(database: Database) -> None:
        loop = asyncio.get_running_loop()

        def twice(connection: Connection) -> tuple[list[int], list[int]]:
            before = numbers(connection)
            asyncio.run_coroutine_threadsafe(database.run(add), loop).result(10)
            return before, numbers(connection)

        assert await database.read(twice) == ([], [])
        assert await database.read(numbers) == [1]

    with closing(Database.open(url)) as database:
        asyncio.run(main(database))


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:"])
def test_in_memory(url: str) -> None:
    """A database in memory is one for all threads."""

    async def main(database: Database) -> None:
        await database.run(add)
        database.run_now(add)
        assert await database.read(numbers) == [1, 2]

    with closing(Database.open(url)) as database:
        asyncio.run(main(database))


def test_reads_write_nothing(url: str) -> None:
    """What is written where only reading is meant is not kept, and a query that fails is an error of ours."""

    async def main(database: Database) -> None:
        await database.read(add)
        assert await database.read(numbers) == []
        await database.run(lambda connection: _numbers.drop(connection))
        with pytest.raises(CapacityError, match="log says why") as failed:
            await database.read(numbers)
        assert isinstance(failed.value.__cause__, SQLAlchemyError)

    with closing(Database.open(url)) as database:
        asyncio.run(main(database))
