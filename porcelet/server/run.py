"""The serving process: start the engines' processes, listen while they load, serve until told to stop.

The heavy imports are inside the function so that they happen while the models load in the other processes.
"""

from __future__ import annotations

import asyncio
import logging
import math
import signal
import socket
from collections.abc import Sequence
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from porcelet.config import ServeConfig
from porcelet.engine.supervisor import Supervisor
from porcelet.server.access import Access
from porcelet.server.loopback import url
from porcelet.types import Progress

if TYPE_CHECKING:
    import uvicorn

    from porcelet.server.models import Models

log = logging.getLogger(__name__)


def check(config: ServeConfig, access: Access) -> None:
    """See, before anything heavy begins, that those who need a key to get in have one.

    Raises:
        InputError: there is no key, or the certificate cannot be used.
        CapacityError: the database cannot be opened.
    """
    access.check()
    if access.needs_key:
        from porcelet.server.keys import check_any
        from porcelet.server.store import Database, default_url

        with closing(Database.open(config.server.database or default_url())) as database:
            check_any(database)
    if not access.local and not access.certificate:
        log.warning(
            "warning: others on the network can read along, keys included: give --certificate and --private-key, or "
            "listen on 127.0.0.1 behind a proxy that speaks TLS"
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
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # both end it the same way, while loading too
    with suppress(KeyboardInterrupt):
        asyncio.run(_serve(config, paths, listener, progress, access))


async def _serve(
    config: ServeConfig, paths: Sequence[Path], listener: socket.socket, progress: Progress, access: Access
) -> None:
    with ExitStack() as opened:
        started = [
            opened.enter_context(closing(Supervisor(path, entry.engine)))
            for entry, path in zip(config.models.values(), paths, strict=True)
        ]
        import uvicorn

        from porcelet.server.app import create_app
        from porcelet.server.connection import Connection
        from porcelet.server.guard import open_gate
        from porcelet.server.models import Model, Models
        from porcelet.server.store import Database, default_url

        database = opened.enter_context(closing(Database.open(config.server.database or default_url())))
        gate = open_gate(database, access, config.aliases)
        named = zip(config.models, paths, started, strict=True)
        models = Models(config, [Model(name, path, engine, config, [gate.limits]) for name, path, engine in named])
        options = uvicorn.Config(
            create_app(models, database, gate),
            http=Connection,
            ssl_certfile=access.certificate,
            ssl_keyfile=access.private_key,
            ws="none",
            log_config=None,
            log_level="warning",
            proxy_headers=False,
            server_header=False,
            timeout_graceful_shutdown=math.ceil(2 * config.server.drain),
        )
        server = uvicorn.Server(options)
        draining = asyncio.create_task(_drain(server, models))
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


async def _drain(server: uvicorn.Server, models: Models) -> None:
    """Once the server is told to stop, end the answers that go on for too long, each with an error."""
    while not server.should_exit:
        await asyncio.sleep(0.1)
    await asyncio.sleep(models.config.server.drain)
    models.close()
