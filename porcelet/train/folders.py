"""The folders of a recipe's stages, which lie side by side in that of the run: 01-cold-start, 02-reason.

A checkpoint names what it has from another stage from the run's folder on, "@01-cold-start/...", as that may be moved.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

STAGE = re.compile(r"\d\d+-[a-z0-9][a-z0-9_-]*")
NAMING = ("model", "policy.teacher", "data.conversations")  # settings that may name a stage


def stage_folder(run: str, number: int, name: str) -> str:
    """The output of a run's stage, counted from 1."""
    return str(Path(run, f"{number:02}-{name}"))


def portable(recipe: Mapping[str, Any], output: Path) -> dict[str, Any]:
    """A stage's flat recipe with what lies in the folders beside its `output` as "@01-cold-start/...", all else as it
    is."""
    found: dict[str, Any] = {}
    for name, value in recipe.items():
        table, _, path = name.partition(".")
        if name in NAMING:
            value = [_short(text, output) for text in value] if isinstance(value, list) else _short(value, output)
        found[f"inputs.{_short(path, output)}" if table == "inputs" else name] = value
    return found


def _short(path: str, output: Path) -> str:
    run, own = os.path.split(os.path.abspath(output))
    relative = os.path.relpath(path, run) if path else ""
    beside = STAGE.fullmatch(own) and STAGE.fullmatch(relative.partition(os.sep)[0])
    return f"@{relative}" if beside else path
