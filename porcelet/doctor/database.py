"""The server's database, if it is SQLite's file: that it opens, is whole, and is nobody else's to read.

Only the layers above know where it is and which schema they write; they say so. The file is opened for reading, and
where nothing but the file is there, as one that does not change: not even SQLite's own files are made beside it.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

from porcelet.doctor.finding import Finding

CODE = "database"
AGAIN = "restore a copy from a backup, or move it away: the server then makes an empty one"


def database(file: Path, schema: int, deep: bool = False) -> Finding:
    """The state of a database file whose schema should have that number. `deep` also compares indexes with tables."""
    if not file.exists():
        return Finding(CODE, "ok", f"{file} is not there yet: the first `porcelet serve` makes it")
    has_journal = file.with_name(f"{file.name}-wal").exists()  # a server runs, or was killed
    url = f"{file.as_uri()}?mode=ro{'' if has_journal else '&immutable=1'}"
    try:
        with closing(sqlite3.connect(url, uri=True, timeout=1.0)) as connection:
            [[verdict]] = connection.execute(f"PRAGMA {'integrity_check' if deep else 'quick_check'}(1)")
            if verdict != "ok":
                return Finding(CODE, "problem", f"{file} is damaged: {verdict}", AGAIN)
            numbers = [number for (number,) in connection.execute("SELECT number FROM schema")]
    except sqlite3.OperationalError as problem:
        return _unusable(file, problem)
    except sqlite3.DatabaseError as problem:
        return Finding(CODE, "problem", f"{file} is damaged: {problem}", AGAIN)
    if numbers not in ([schema], []):
        cause = f"{file} has schema {numbers[0]}; this porcelet knows {schema}"
        return Finding(CODE, "problem", cause, "use the version that made it, or set PORCELET_HOME")
    if file.stat().st_mode & 0o077:
        cause = f"{file} can be read by other users of this machine, conversations and all"
        return Finding(CODE, "note", cause, f"chmod 600 {file}*")
    return Finding(CODE, "ok", f"{file} is whole, {file.stat().st_size / 1e6:,.1f} MB")


def _unusable(file: Path, problem: sqlite3.OperationalError) -> Finding:
    if "locked" in str(problem):
        cause = f"{file} is in use by a program that lets nobody else in: {problem}"
        return Finding(CODE, "note", cause, "end what has it open (fuser shows it), then look again")
    if "no such table" in str(problem):
        return Finding(CODE, "problem", f"{file} is a database of something else: {problem}", "move it away")
    cause = f"{file} cannot be opened: {problem}"
    return Finding(CODE, "problem", cause, "give this user the right to read and write it and its folder")
