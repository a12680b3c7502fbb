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
from porcelet.server.loopback import url
from porcelet.types import Progress

if TYPE_CHECKING:
    import uvicorn

    from porcelet.server.jobs import Jobs
    from porcelet.server.models import Models

log = logging.getLogger(__name__)


def run(config: ServeConfig, paths: Sequence[Path], listener: socket.socket, progress: Progress) -> None:
    """Serve the models at `paths` until SIGINT or SIGTERM; who connects to the `listener` earlier waits. `progress`
    hears of the models' load.

    Raises:
        InputError, ModelError, CapacityError, EngineError: an engine's reason for not starting.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # both end it the same way, while loading too
    with suppress(KeyboardInterrupt):
        asyncio.run(_serve(config, paths, listener, progress))


async def _serve(config: ServeConfig, paths: Sequence[Path], listener: socket.socket, progress: Progress) -> None:
    with ExitStack() as opened:
        started = [
            opened.enter_context(closing(Supervisor(path, entry.engine)))
            for entry, path in zip(config.models.values(), paths, strict=True)
        ]
        import uvicorn

        from porcelet.server.app import create_app
        from porcelet.server.jobs import Jobs
        from porcelet.server.models import Model, Models
        from porcelet.server.store import Database, default_url

        named = zip(config.models, paths, started, strict=True)
        models = Models(config, [Model(name, path, engine, config, []) for name, path, engine in named])
        database = opened.enter_context(closing(Database.open(config.server.database or default_url())))
        jobs = Jobs(database)
        await jobs.open()
        options = uvicorn.Config(
            create_app(models, database, jobs),
            ws="none",
            log_config=None,
            log_level="warning",
            proxy_headers=False,
            server_header=False,
            timeout_graceful_shutdown=math.ceil(2 * config.server.drain),
        )
        server = uvicorn.Server(options)
        draining = asyncio.create_task(_drain(server, models, jobs))
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            await _load(models, serving, listener, progress)
        finally:
            server.should_exit = server.should_exit or not all(model.loaded for model in models.all.values())
            await serving
            draining.cancel()


async def _load(models: Models, serving: asyncio.Task[None], listener: socket.socket, progress: Progress) -> None:
    """Wait until all is loaded, or the server was told to stop."""
    loading = asyncio.create_task(models.load(progress))
    await asyncio.wait({loading, serving}, return_when=asyncio.FIRST_COMPLETED)
    if not loading.done():
        loading.cancel()
        return
    loading.result()
    for name, model in models.all.items():
        weights, length = model.facts.weights, model.max_length
        log.info("serving %s on %s (weights %s, context %d)", name, url(listener), weights, length)


async def _drain(server: uvicorn.Server, models: Models, jobs: Jobs) -> None:
    """Once the server is told to stop, end the answers that go on for too long, each with an error."""
    while not server.should_exit:
        await asyncio.sleep(0.1)
    await asyncio.sleep(models.config.server.drain)
    await jobs.close()
    models.close()
