"""The application without a server around it, for tests that look inside."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from starlette.types import ASGIApp

from porcelet.server.app import create_app
from porcelet.server.conversations.jobs import Jobs
from porcelet.server.gate.access import Access
from porcelet.server.gate.guard import open_gate
from porcelet.server.generation.models import Models
from porcelet.server.store import Database


@contextmanager
def local_app(models: Models, folder: Path) -> Iterator[ASGIApp]:
    """The application over `models`, its database in `folder`."""
    with closing(Database.open(f"sqlite:///{folder / 'test.db'}")) as database:
        yield create_app(models, database, open_gate(database, Access(), models.config.aliases), Jobs(database))
