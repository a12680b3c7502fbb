"""`porcelet merge`: a model with an adapter in it, as a model of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def merge(
    base: Annotated[Path, typer.Argument(help="The model's folder, in Hugging Face form.")],
    adapter: Annotated[Path, typer.Argument(help="The adapter's folder, in PEFT's format.")],
    output: Annotated[Path, typer.Argument(help="The folder that will hold the merged model.")],
) -> None:
    """Write a model with a LoRA adapter in it, for chat, serve and every other program."""
    from porcelet.weights.adapters import merge as run

    run(base, adapter, output)
    print(f"talk to it: porcelet chat --model {output}")
