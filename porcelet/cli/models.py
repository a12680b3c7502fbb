"""`porcelet pull`, `list`, `rm`, `verify`: the model store."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

DEFAULT = "smollm2-135m-instruct"
Name = Annotated[str, typer.Argument(help="A model's name in the store.")]


def pull(name: Name = DEFAULT) -> None:
    """Fetch a model into the store and check its SHA-256."""
    print(f"{name} is at {fetch(name)}")


def list_() -> None:
    """List the models in the store."""
    from porcelet import hub

    for model in hub.list_models():
        print(f"{model.name}  {model.size / 1e6:.1f} MB  {model.path}")


def rm(name: Name) -> None:
    """Remove a model from the store."""
    from porcelet import hub

    hub.remove(name)
    print(f"{name} removed")


def verify(name: Name = DEFAULT) -> None:
    """Compare a stored model with its SHA-256."""
    from porcelet import hub

    print(f"{name} is intact, SHA-256 {hub.verify(name).sha256}")


def fetch(name: str) -> Path:
    """Pull a model with a progress bar on standard error; nothing is shown where it is there already."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

    from porcelet import hub

    columns = (f"fetching {name}", BarColumn(), DownloadColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        return hub.pull(name, lambda done, total: bar.update(task, completed=done, total=total))
