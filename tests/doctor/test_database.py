"""The server's database: each finding with the fault it is there for."""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from porcelet.doctor.database import database
from porcelet.server.gate import keys
from porcelet.server.store import SCHEMA, Database, sqlite_file


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A database as the server makes it, with enough rows for several pages, closed."""
    path = tmp_path / "porcelet.db"
    with closing(Database.open(f"sqlite:///{path}")) as opened:
        opened.run_now(lambda connection: [keys.create(connection, "x" * 64, keys.KeyLimits()) for _ in range(200)])
    return path


def test_a_whole_one_is_left_as_it_is(file: Path) -> None:
    """It is well with and without a server that has it open, and no file is made beside it."""
    assert database(file, SCHEMA).state == "ok" and database(file, SCHEMA, deep=True).state == "ok"
    assert [path.name for path in file.parent.iterdir()] == ["porcelet.db"]
    with closing(Database.open(f"sqlite:///{file}")):
        assert database(file, SCHEMA).state == "ok"
    assert database(file.with_name("none.db"), SCHEMA).state == "ok" and not file.with_name("none.db").exists()


def test_a_page_that_was_overwritten(file: Path) -> None:
    """A disk that lost a page of a table."""
    content = bytearray(file.read_bytes())
    middle = len(content) // 2 // 4096 * 4096
    content[middle : middle + 4096] = b"\xff" * 4096
    file.write_bytes(content)
    found = database(file, SCHEMA)
    assert found.state == "problem" and "damaged" in found.cause and "backup" in found.remedy


def test_what_is_no_database(file: Path) -> None:
    """Another file, or another program's database, lies where ours should."""
    file.write_bytes(b"no database" * 1000)
    assert database(file, SCHEMA).state == "problem" and "not a database" in database(file, SCHEMA).cause
    file.unlink()
    with closing(sqlite3.connect(file)) as connection:
        connection.execute("CREATE TABLE other (x)")
    assert "something else" in database(file, SCHEMA).cause


def test_another_versions_schema(file: Path) -> None:
    """Both numbers are named."""
    found = database(file, SCHEMA + 1)
    assert found.state == "problem" and f"schema {SCHEMA}; this porcelet knows {SCHEMA + 1}" in found.cause


def test_a_database_that_others_may_read(file: Path) -> None:
    """Conversations are in it."""
    file.chmod(0o644)
    assert database(file, SCHEMA).state == "note" and "chmod 600" in database(file, SCHEMA).remedy


def test_a_database_that_is_locked(file: Path) -> None:
    """A program that keeps everybody else out is a note: it may end."""
    file.with_name("porcelet.db-wal").touch()
    with closing(sqlite3.connect(file)) as connection:
        connection.execute("PRAGMA locking_mode = EXCLUSIVE")
        connection.execute("BEGIN EXCLUSIVE")
        found = database(file, SCHEMA)
        connection.rollback()
    assert found.state == "note" and "locked" in found.cause


def test_a_database_that_cannot_be_opened(tmp_path: Path) -> None:
    """A folder where the file should be stands for all that SQLite cannot open."""
    os.mkdir(tmp_path / "porcelet.db")
    found = database(tmp_path / "porcelet.db", SCHEMA)
    assert found.state == "problem" and "cannot be opened" in found.cause and found.remedy


@pytest.mark.parametrize(
    ("url", "name"),
    [("sqlite:////a/b.db", "/a/b.db"), ("sqlite://", None), ("postgresql+psycopg://u:p@host/name", None)],
)
def test_the_file_of_a_url(url: str, name: str | None) -> None:
    """Only SQLite's files are looked at."""
    assert sqlite_file(url) == (Path(name) if name else None)
