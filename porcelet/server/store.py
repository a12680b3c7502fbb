"""The server's database: SQLite in this user's folder, or any other by URL, through SQLAlchemy Core.

Whoever keeps something defines its tables on `metadata` and is imported before `open`. What writes runs in one thread
of the database's own, a transaction each, so the event loop never waits for a disk and SQLite never for itself. What
only reads has threads beside it, so a login does not wait for a search; it sees every write awaited before it began.

Left out: migrations. `SCHEMA` is written into each database, and one with another number is refused; the first change
of a table brings them.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import Column, Connection, Engine, Integer, MetaData, Table, create_engine, event, insert, select
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, OperationalError, SQLAlchemyError
from sqlalchemy.pool import SingletonThreadPool, StaticPool

from porcelet.errors import CapacityError, InputError

log = logging.getLogger(__name__)
Result = TypeVar("Result")
SCHEMA = 1
NUM_READERS = 3
metadata = MetaData()
_schema = Table("schema", metadata, Column("number", Integer, nullable=False))


class Database:
    """An open database. Close it at the end: what was given to it before is then written."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._thread = ThreadPoolExecutor(1, "database")
        in_memory = isinstance(engine.pool, StaticPool)  # has one connection, so nothing can go on beside it
        self._readers = self._thread if in_memory else ThreadPoolExecutor(NUM_READERS, "database-reader")

    @classmethod
    def open(cls, url: str) -> Database:
        """Open or create.

        Raises:
            InputError: the URL is none, its driver is not installed, or the database is another version's.
            CapacityError: it cannot be reached or written.
        """
        try:
            engine = _engine(url)
            if engine.dialect.name == "sqlite":
                _keep_private(engine.url.database)
                event.listen(engine, "connect", _tune_sqlite)
            metadata.create_all(engine)
            with engine.begin() as connection:
                _check_schema(connection, _shown(url))
        except (ArgumentError, ImportError) as problem:
            raise InputError(f"database {_shown(url)} cannot be used: {problem}; give an SQLAlchemy URL") from problem
        except SQLAlchemyError as problem:
            raise CapacityError(f"database {_shown(url)} cannot be opened: {_reason(problem)}") from problem
        except OSError as problem:
            raise CapacityError(f"database {_shown(url)} cannot be made: {problem.strerror}") from problem
        return cls(engine)

    async def run(self, work: Callable[[Connection], Result]) -> Result:
        """The result of `work`, a transaction of its own: it is written whole or not at all.

        Raises:
            CapacityError: the database does not answer, or its disk is full.
        """
        return await asyncio.get_running_loop().run_in_executor(self._thread, self.run_now, work)

    async def read(self, work: Callable[[Connection], Result]) -> Result:
        """The result of `work`, which only reads: nothing that it writes is kept. In SQLite it sees one state of the
        database from its first query to its last, elsewhere what that database's own transactions see.

        Raises:
            CapacityError: the database does not answer.
        """
        return await asyncio.get_running_loop().run_in_executor(self._readers, self._read_now, work)

    def run_now(self, work: Callable[[Connection], Result]) -> Result:
        """As `run`, in the caller's thread: for the command line."""
        with _reported(), self._engine.begin() as connection:
            return work(connection)

    def _read_now(self, work: Callable[[Connection], Result]) -> Result:
        with _reported(), self._engine.connect() as connection:
            if connection.dialect.name == "sqlite":  # Python's driver begins a transaction with the first write only
                connection.exec_driver_sql("BEGIN")
            return work(connection)

    def defer(self, work: Callable[[Connection], object]) -> None:
        """Do `work` soon, after all that was given before, without anybody waiting for it."""
        self._thread.submit(self.run_now, work).add_done_callback(_log_failure)

    def close(self) -> None:
        """Finish what is under way."""
        self._thread.shutdown()
        self._readers.shutdown()
        self._engine.dispose()


def _engine(url: str) -> Engine:
    options: dict[str, Any] = {"hide_parameters": True}  # what is stored appears in no log and no message
    engine = create_engine(url, **options)
    if isinstance(engine.pool, SingletonThreadPool):  # SQLite in memory, which would be another one in each thread
        engine = create_engine(url, poolclass=StaticPool, connect_args={"check_same_thread": False}, **options)
    return engine


@contextmanager
def _reported() -> Iterator[None]:
    """What keeps a database from working, in the log and as an error of ours."""
    try:
        yield
    except OperationalError as problem:
        log.error("the database cannot be used: %s", _reason(problem))
        raise CapacityError("the database cannot be used at the moment; the server's log says why", 5) from problem


def default_url() -> str:
    """SQLite's URL of this user's database, whose folder is made: in $PORCELET_HOME, else in $XDG_DATA_HOME/porcelet,
    else in ~/.local/share/porcelet.

    Raises:
        CapacityError: it cannot be made.
    """
    file = default_file()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise CapacityError(f"database {file} cannot be made: {problem.strerror}; set PORCELET_HOME") from problem
    return f"sqlite:///{file}"


def default_file() -> Path:
    """Where that database is, whether it is there yet or not."""
    chosen, data = os.environ.get("PORCELET_HOME"), os.environ.get("XDG_DATA_HOME")
    home = Path(chosen) if chosen else Path(data or Path.home() / ".local" / "share") / "porcelet"
    return home.absolute() / "porcelet.db"


def sqlite_file(url: str) -> Path | None:
    """The file of a database's URL; None if it is not SQLite's, or in memory.

    Raises:
        InputError: it is no URL.
    """
    try:
        parts = make_url(url)
    except ArgumentError as problem:
        raise InputError(f"database {_shown(url)} cannot be used: {problem}; give an SQLAlchemy URL") from problem
    is_file = parts.get_backend_name() == "sqlite" and parts.database not in (None, "", ":memory:")
    return Path(parts.database or "").absolute() if is_file else None


def _keep_private(file: str | None) -> None:
    """Make SQLite's file so that nobody else may read it; SQLite gives its journals the same rights."""
    if file and file != ":memory:":
        os.close(os.open(file, os.O_CREAT | os.O_RDWR, 0o600))


def _log_failure(work: Future[Any]) -> None:
    if (problem := work.exception()) and not isinstance(problem, CapacityError):  # that one is in the log already
        log.error("the database could not be written", exc_info=problem)


def _tune_sqlite(connection: Any, record: object) -> None:
    """Readers do not wait for writers, keys refer to what exists, and another process may hold the file for a while."""
    for setting in ("journal_mode = WAL", "synchronous = NORMAL", "foreign_keys = ON", "busy_timeout = 10000"):
        connection.execute(f"PRAGMA {setting}")


def _check_schema(connection: Connection, url: str) -> None:
    number = connection.execute(select(_schema.c.number)).scalar()
    if number is None:
        connection.execute(insert(_schema).values(number=SCHEMA))
    elif number != SCHEMA:
        raise InputError(f"database {url} has schema {number}; this porcelet knows {SCHEMA}: use the one that made it")


def _reason(problem: SQLAlchemyError) -> str:
    return str(problem.__cause__ or problem).partition("\n")[0]


def _shown(url: str) -> str:
    """A URL without its password."""
    try:
        return make_url(url).render_as_string(hide_password=True)
    except ArgumentError:
        return "(no URL)"
