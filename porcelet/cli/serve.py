"""`porcelet serve`: the chat page and the API on this machine."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from porcelet.cli.models import DEFAULT, fetch
from porcelet.cli.progress import progress_bar

if TYPE_CHECKING:
    from porcelet.config import ServeConfig

log = logging.getLogger(__name__)


def serve(
    models: Annotated[
        list[str] | None,
        typer.Option("--model", "-m", help="A name in the store, a GGUF file or a model folder; several are served."),
    ] = None,
    config_file: Annotated[
        Path | None, typer.Option("--config", help="A TOML file with models, aliases, efforts and limits.")
    ] = None,
    host: Annotated[
        str, typer.Option(help="The address to listen on; one that others can reach needs an API key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    require_key: Annotated[
        bool,
        typer.Option(
            "--require-key", help="Ask for a key on loopback too: behind a proxy, or where a machine has several users."
        ),
    ] = False,
    allowed_hosts: Annotated[
        list[str] | None,
        typer.Option("--allowed-host", help="A name under which browsers may use the server; keys are needed then."),
    ] = None,
    certificate: Annotated[Path | None, typer.Option(help="TLS: the certificate chain, a PEM file.")] = None,
    private_key: Annotated[Path | None, typer.Option(help="TLS: its private key, a PEM file.")] = None,
    log_format: Annotated[str, typer.Option(help="What is written on standard error: plain lines, or json.")] = "plain",
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Engine settings, such as weights=float32 or threads=2.")
    ] = None,
) -> None:
    """Serve the chat page and the API on this machine until Ctrl-C.

    The page is at http://127.0.0.1:8000, the API at http://127.0.0.1:8000/v1, where any key will do. For others, give
    --host and an API key: porcelet keys create NAME.

    Without --model and --config these are the default model, which is fetched first if it is not in the store and
    which --set is for, and porcelet-r1-mini, which comes with the package.
    """
    from porcelet.errors import PorceletError
    from porcelet.server.gate.access import Access
    from porcelet.server.gate.loopback import bind, is_loopback
    from porcelet.server.operations.logs import configure
    from porcelet.server.run import check, run

    configure(log_format, log_level)
    try:
        config = _config(models or [], config_file, settings or [])
        with bind(host, port) as listener:
            access = Access(
                local=is_loopback(listener.getsockname()[0]),
                require_key=require_key,
                allowed_hosts=tuple(name.lower() for name in allowed_hosts or []),
                certificate=certificate,
                private_key=private_key,
            )
            check(config, access)
            paths = [_path(entry.source) for entry in config.models.values()]
            config = _with_examples(config, paths)
            with progress_bar(f"loading {', '.join(config.models)}") as progress:
                run(config, paths, listener, progress, access)
    except PorceletError as problem:
        if log_format != "json":
            raise
        log.error("%s", problem, extra={"fields": {"kind": problem.kind}})
        raise typer.Exit(problem.exit_code) from problem


def _config(models: list[str], file: Path | None, settings: list[str]) -> ServeConfig:
    from porcelet import hub
    from porcelet.config import (
        EngineConfig,
        ModelEntry,
        ServeConfig,
        override,
        parse_settings,
        preset_aliases,
        read_serve_config,
    )
    from porcelet.errors import InputError

    values = parse_settings(settings)
    engine = override(EngineConfig(), values, "--set")
    if file is not None:
        if models:
            raise InputError(f"--model and --config were given; name the models in {file} alone")
        return read_serve_config(file, values)
    entries: dict[str, ModelEntry] = {}
    if not models:
        # Settings are meant for the default model: half of the memory for its cache is not also the little one's.
        entries = {DEFAULT: ModelEntry(DEFAULT, engine), hub.R1_MINI: ModelEntry(hub.R1_MINI, EngineConfig(threads=1))}
    for source in models:
        if _name(source) in entries:
            raise InputError(f"two models would be called {_name(source)!r}; name them in a file, see --config")
        entries[_name(source)] = ModelEntry(source, engine)
    return ServeConfig(models=entries, aliases=preset_aliases(next(iter(entries)), entries))


def _with_examples(config: ServeConfig, paths: Sequence[Path]) -> ServeConfig:
    """With what models of the package say they can be asked; the server itself never touches the store."""
    from porcelet import hub

    found = zip(config.models.items(), paths, strict=True)
    models = {name: dataclasses.replace(entry, examples=hub.examples_of(path)) for (name, entry), path in found}
    return dataclasses.replace(config, models=models)


def _path(source: str) -> Path:
    from porcelet import hub

    return fetch(source) if source == DEFAULT and not _is_stored(source) else hub.resolve(source)


def _name(source: str) -> str:
    """What a model is called: by its name in the store, or by its file's name without the ending, or its folder's."""
    path = Path(source)
    if source == DEFAULT or _is_stored(source):
        return source
    return path.stem if path.is_file() else path.resolve().name


def _is_stored(source: str) -> bool:
    from porcelet import hub

    return source in {entry.name for entry in hub.list_models()}
