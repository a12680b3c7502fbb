"""The files of a sampling run (collect.py): a state like a checkpoint's, and what each step kept.

output/samples/state.json      `checkpoint.Header`: recipe, threads, torch
output/samples/step-12.jsonl   what one step kept, written when the step is done
output/samples.jsonl           all of it, once the run is at its end
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from porcelet.train import checkpoint
from porcelet.train.files import write_durably

FOLDER, RESULT = "samples", "samples.jsonl"


def holds_samples(output: Path) -> bool:
    """Whether a sampling run has been at work in a folder."""
    return (output / FOLDER / "state.json").exists()


def read_state(output: Path, recipe: Mapping[str, Any]) -> checkpoint.Header | None:
    """The state of a sampling run, if there is one.

    Raises:
        InputError: it belongs to another recipe.
        ModelError: it is damaged.
    """
    return checkpoint.read_header(output / FOLDER, recipe, output) if holds_samples(output) else None


def write_state(output: Path, header: checkpoint.Header) -> None:
    write_durably(output / FOLDER / "state.json", json.dumps(dataclasses.asdict(header), indent=2))


def num_done(output: Path, num_steps: int) -> int:
    """How many steps are done: those before the first without a file."""
    return next(step for step in range(num_steps + 1) if not path_of(output, step).exists())


def path_of(output: Path, step: int) -> Path:
    """The file of a step counted from 0; its name counts from 1, as the metrics do."""
    return output / FOLDER / f"step-{step + 1}.jsonl"


def join(output: Path, num_steps: int) -> Path | None:
    """All steps' lines as one file, each once; None where there is no line."""
    lines = [
        line
        for step in range(num_steps)
        for line in path_of(output, step).read_text(encoding="utf-8").splitlines(keepends=True)
    ]
    if not lines:
        return None
    write_durably(output / RESULT, "".join(dict.fromkeys(lines)))
    return output / RESULT
