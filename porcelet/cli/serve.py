"""`porcelet serve`: the chat page and the API on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from porcelet.cli.models import DEFAULT, fetch
from porcelet.cli.progress import progress_bar

if TYPE_CHECKING:
    from porcelet.config import EngineConfig


def serve(
    model: Annotated[
        str, typer.Option("--model", "-m", help="A name in the store, a GGUF file or a model folder.")
    ] = DEFAULT,
    host: Annotated[str, typer.Option(help="A loopback address; others await API keys.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Engine settings, such as weights=float32 or threads=2.")
    ] = None,
) -> None:
    """Serve the chat page and OpenAI's API on this machine until Ctrl-C.

    The page is at http://127.0.0.1:8000, the API at http://127.0.0.1:8000/v1, where any key will do.

    The default model is fetched first if it is not in the store.
    """
    from porcelet import hub
    from porcelet.server.loopback import bind
    from porcelet.server.run import run

    config = _config(settings or [])
    with bind(host, port) as listener:
        stored = {entry.name for entry in hub.list_models()}
        path = fetch(model) if model == DEFAULT and model not in stored else hub.resolve(model)
        with progress_bar(f"loading {model}") as progress:
            run(path, model if model in {*stored, DEFAULT} else _name(path), listener, config, progress)


def _config(settings: list[str]) -> EngineConfig:
    from porcelet.config import EngineConfig, override, parse_settings

    return override(EngineConfig(), parse_settings(settings), "--set")


def _name(path: Path) -> str:
    """What a model from outside the store is called: its file's name without the ending, or its folder's."""
    return path.stem if path.is_file() else path.resolve().name
