"""The serving process: start the engines' processes, listen while they load, serve until told to stop.

The heavy imports are inside the function so that they happen while the models load in the other processes.

The first SIGINT or SIGTERM drains: /readyz says so, new work is refused, and what is under way may end within the
configured time; what has not is told that it is over. A second one ends all of that at once.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from porcelet.config import ServeConfig
from porcelet.engine.supervisor import Supervisor
from porcelet.memory.fit import Wanted, check_engines
from porcelet.memory.tensors import read_inventory
from porcelet.server.gate.access import Access
from porcelet.server.gate.loopback import url
from porcelet.types import Progress

if TYPE_CHECKING:
    import uvicorn

    from porcelet.server.conversations.jobs import Jobs
    from porcelet.server.generation.models import Models

log = logging.getLogger(__name__)

LAST_WORDS_SECONDS = 5  # to send what is left, once the engines are gone
POLL_SECONDS = 0.05


def check(config: ServeConfig, access: Access) -> None:
    """See, before anything heavy begins, that those who need a key to get in have one.

    Raises:
        InputError: there is no key, or the certificate cannot be used.
        CapacityError: the database cannot be opened.
    """
    access.check()
    if access.needs_key:
        from porcelet.server.gate.keys import check_any
        from porcelet.server.store import Database, default_url

        with closing(Database.open(config.server.database or default_url())) as database:
            check_any(database)
    if not access.local and not access.certificate:
        log.warning(
            "warning: others on the network can read along, keys included: give --certificate and --private-key, or "
            "listen on 127.0.0.1 with --require-key, behind a proxy that speaks TLS"
        )


def run(
    config: ServeConfig,
    paths: Sequence[Path],
    listener: socket.socket,
    progress: Progress,
    access: Access,
) -> None:
    """Serve the models at `paths` until SIGINT or SIGTERM; who connects to the `listener` earlier waits. `progress`
    hears of the models' load, `access` says who gets in.

    Raises:
        InputError, ModelError, CapacityError, EngineError: an engine's reason for not starting.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # both end it the same way, while it starts too
    with suppress(KeyboardInterrupt):
        asyncio.run(_serve(config, paths, listener, progress, access))


async def _serve(
    config: ServeConfig, paths: Sequence[Path], listener: socket.socket, progress: Progress, access: Access
) -> None:
    on_cpu = {
        name: Wanted(read_inventory(path), entry.engine)
        for (name, entry), path in zip(config.models.items(), paths, strict=True)
        if entry.engine.device == "cpu"
    }
    check_engines(on_cpu)
    with ExitStack() as opened:
        started = [
            opened.enter_context(closing(Supervisor(path, entry.engine)))
            for entry, path in zip(config.models.values(), paths, strict=True)
        ]
        import uvicorn

        from porcelet.server.app import create_app
        from porcelet.server.conversations.jobs import Jobs
        from porcelet.server.gate.connection import Connection
        from porcelet.server.gate.guard import open_gate
        from porcelet.server.generation.models import Model, Models
        from porcelet.server.store import Database, default_url

        database = opened.enter_context(closing(Database.open(config.server.database or default_url())))
        gate = open_gate(database, access, config.aliases)
        jobs = Jobs(database)
        await jobs.open()
        named = zip(config.models, paths, started, strict=True)
        models = Models(config, [Model(name, path, engine, config) for name, path, engine in named])
        options = uvicorn.Config(
            create_app(models, database, gate, jobs),
            http=Connection,
            ssl_certfile=access.certificate,
            ssl_keyfile=access.private_key,
            ws="none",
            lifespan="off",  # the application has none, and a second signal would end it with a traceback
            log_config=None,
            log_level="warning",
            access_log=False,  # ours knows more
            proxy_headers=False,
            server_header=False,
            timeout_graceful_shutdown=LAST_WORDS_SECONDS,
        )
        server = uvicorn.Server(options)
        stop = Stop()
        server.handle_exit = stop.told  # type: ignore[method-assign]  # its own would close the listener at once
        draining = asyncio.create_task(_drain(server, models, jobs, stop))
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            await _load(models, serving, url(listener, access.scheme), progress)
        finally:
            server.should_exit = server.should_exit or not all(model.loaded for model in models.all.values())
            await serving
            draining.cancel()


async def _load(models: Models, serving: asyncio.Task[None], address: str, progress: Progress) -> None:
    """Wait until all is loaded, or the server was told to stop."""
    loading = asyncio.create_task(models.load(progress))
    await asyncio.wait({loading, serving}, return_when=asyncio.FIRST_COMPLETED)
    if not loading.done():
        loading.cancel()
        return
    loading.result()
    for name, model in models.all.items():
        weights, length = model.facts.weights, model.max_length
        log.info("serving %s on %s (weights %s, context %d)", name, address, weights, length)


class Stop:
    """How often the server was told to stop."""

    def __init__(self) -> None:
        self.count = 0

    def told(self, sig: int, frame: FrameType | None) -> None:
        """A signal's handler."""
        self.count += 1


async def _drain(server: uvicorn.Server, models: Models, jobs: Jobs, stop: Stop) -> None:
    """Once told to stop, wait for what is under way, end the rest with an error, and let the server go."""
    while not stop.count:
        await asyncio.sleep(POLL_SECONDS)
    models.draining = True
    end = time.monotonic() + models.config.server.drain
    if models.num_running:
        log.info(
            "ending: %d answers have %g s left; a second signal ends them",
            models.num_running,
            models.config.server.drain,
        )
    while models.num_running and stop.count == 1 and time.monotonic() < end:
        await asyncio.sleep(POLL_SECONDS)
    await jobs.close()  # before the loop may end: the chat's answers are kept as far as they came
    server.should_exit = True
    if models.num_running:
        models.close()
    while stop.count == 1:
        await asyncio.sleep(POLL_SECONDS)
    server.force_exit = True
