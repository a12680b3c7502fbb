"""The serving process: start the engine's process, load the text side meanwhile, serve until told to stop.

The heavy imports are inside the function so that they happen while the model loads in the other process.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import time
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from porcelet.config import EngineConfig
from porcelet.engine.supervisor import Supervisor
from porcelet.server.loopback import url
from porcelet.types import Progress

if TYPE_CHECKING:
    import uvicorn

DRAIN_SECONDS = 5  # how long answers may go on after a signal
log = logging.getLogger(__name__)


def run(path: Path, name: str, listener: socket.socket, config: EngineConfig, progress: Progress) -> None:
    """Serve the model at `path` as `name` until SIGINT or SIGTERM; who connects to the `listener` earlier waits.
    `progress` hears of the model's load.

    Raises:
        InputError, ModelError, EngineError: the engine's reason for not starting.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # both end it the same way, while loading too
    with suppress(KeyboardInterrupt):
        asyncio.run(_serve(path, name, listener, config, progress))


async def _serve(path: Path, name: str, listener: socket.socket, config: EngineConfig, progress: Progress) -> None:
    with closing(Supervisor(path, config)) as engine:
        import uvicorn

        from porcelet.engine.codec import open_codec
        from porcelet.server.app import create_app
        from porcelet.server.service import Service

        tokenizer, chat_format = open_codec(path)
        facts = await engine.ready(progress)
        app = create_app(Service(name, int(time.time()), engine, facts, tokenizer, chat_format))
        options = uvicorn.Config(
            app,
            ws="none",
            log_config=None,
            log_level="warning",
            proxy_headers=False,
            server_header=False,
            timeout_graceful_shutdown=2 * DRAIN_SECONDS,
        )
        server = uvicorn.Server(options)
        draining = asyncio.create_task(_drain(server, engine))
        log.info("serving %s on %s (weights %s, context %d)", name, url(listener), facts.weights, facts.max_length)
        await server.serve(sockets=[listener])
        draining.cancel()


async def _drain(server: uvicorn.Server, engine: Supervisor) -> None:
    """Once the server is told to stop, end the answers that go on for too long, each with an error."""
    while not server.should_exit:
        await asyncio.sleep(0.1)
    await asyncio.sleep(DRAIN_SECONDS)
    engine.close()
