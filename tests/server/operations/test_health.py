"""Health and readiness of a real server while it loads, serves, loses its engine and ends."""

from __future__ import annotations

import asyncio
from contextlib import closing
from pathlib import Path

import httpx

from porcelet.config import EngineConfig, ModelEntry, ServeConfig
from porcelet.engine.supervisor import Supervisor
from porcelet.server.generation.models import Model, Models
from tests.server.apps import local_app
from tests.server.conftest import Server

ENGINE = EngineConfig(threads=1)


def test_a_server_that_serves(server: Server) -> None:
    """Both say 200 and name the model; neither tells of this machine."""
    health, ready = (httpx.get(f"{server.url}{path}") for path in ("/healthz", "/readyz"))
    assert health.status_code == ready.status_code == 200
    assert health.json() == {"status": "ok", "models": {"tiny": {"num_running": 0, "num_waiting": 0}}}
    assert ready.json() == {"status": "ready", "models": {"tiny": {"status": "ready"}}}


def test_loading_restarting_and_draining(model_folder: Path, tmp_path: Path) -> None:
    """A server that loads is healthy and not ready; after its engine's death it is neither; one that ends is healthy
    and not ready."""

    async def main() -> None:
        engine = Supervisor(model_folder, ENGINE)
        config = ServeConfig(models={"tiny": ModelEntry("tiny", ENGINE)})
        models = Models(config, [Model("tiny", model_folder, engine, config)])
        with local_app(models, tmp_path) as app, closing(models):
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:

                async def states() -> tuple[int, int, str]:
                    health, ready = await client.get("/healthz"), await client.get("/readyz")
                    assert str(model_folder.parent) not in health.text + ready.text
                    status = ready.json()["models"]["tiny"]["status"]
                    return health.status_code, ready.status_code, status

                assert await states() == (200, 503, "loading")
                await models.load(lambda done, total: None)
                assert await states() == (200, 200, "ready")
                engine.client.process.kill()
                while engine.alive:
                    await asyncio.sleep(0.005)
                assert await states() == (503, 503, "restarting")
                response = await client.get("/healthz")
                # The exit code is known a moment after the end of the socket.
                reasons = ("signal 9", "hung up")
                assert any(reason in response.json()["error"]["message"] for reason in reasons)
                assert int(response.headers["retry-after"]) > 0
                while not engine.alive:
                    await asyncio.sleep(0.01)
                assert await states() == (200, 200, "ready")
                models.draining = True
                assert await states() == (200, 503, "ready")
                refused = await client.post("/v1/chat/completions", json={"model": "tiny", "messages": [USER]})
                assert refused.status_code == 503 and "shutting down" in refused.json()["error"]["message"]

    asyncio.run(asyncio.wait_for(main(), 60))


USER = {"role": "user", "content": "x"}


def test_down_for_good_names_no_path(model_folder: Path, tmp_path: Path) -> None:
    """A model that vanished is why the engine stays down; health says which, not where it was."""
    moved = tmp_path / "secret" / "tiny"
    moved.parent.mkdir()
    moved.symlink_to(model_folder)

    async def main() -> None:
        engine = Supervisor(moved, ENGINE)
        config = ServeConfig(models={"tiny": ModelEntry("tiny", ENGINE)})
        models = Models(config, [Model("tiny", moved, engine, config)])
        with local_app(models, tmp_path) as app, closing(models):
            transport = httpx.ASGITransport(app)
            await models.load(lambda done, total: None)
            moved.unlink()
            engine.client.process.kill()
            async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
                while (await client.get("/readyz")).json()["models"]["tiny"]["status"] != "down":
                    await asyncio.sleep(0.01)
                response = await client.get("/healthz")
                assert response.status_code == 503 and response.headers["retry-after"]
                assert "tiny" in response.text and "secret" not in response.text

    asyncio.run(asyncio.wait_for(main(), 60))
