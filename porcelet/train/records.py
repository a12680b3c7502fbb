"""What a stage left in its folder, as the report shows it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from porcelet.errors import InputError, ModelError
from porcelet.train import checkpoint
from porcelet.train.evaluate import Evaluation, read_evaluation
from porcelet.train.kept import FOLDER
from porcelet.train.rendering import Renderer


@dataclass(frozen=True)
class Record:
    """One stage, whatever its method."""

    name: str
    metrics: Sequence[Mapping[str, float]]
    sessions: Sequence[Mapping[str, Any]]
    recipe: Mapping[str, Any]  # flat; empty where none is kept
    evaluation: Evaluation | None
    opens_reasoning: bool  # every prompt ended with the beginning of the reasoning

    @property
    def num_steps(self) -> int:
        return len(self.metrics)

    @property
    def num_tokens(self) -> int:
        return int(self.total("tokens"))

    @property
    def minutes(self) -> float:
        return self.total("seconds") / 60

    @property
    def num_kept(self) -> int | None:
        """Answers that a stage of sampling wrote down; None of other stages."""
        return int(self.total("kept")) if any("kept" in line for line in self.metrics) else None

    def total(self, name: str) -> float:
        return sum(line.get(name, 0.0) for line in self.metrics)


def read_record(folder: Path) -> Record:
    """What the folder of a run says.

    Raises:
        InputError: it holds no run.
        ModelError: a file is damaged.
    """
    if not (folder / "metrics.jsonl").is_file():
        raise InputError(f"{folder} holds no metrics.jsonl; give the output folders of runs or stages")
    evaluated = folder / "evaluation.json"
    speaks = (folder / "tokenizer.json").is_file()
    return Record(
        folder.resolve().name,
        _lines(folder / "metrics.jsonl"),
        _lines(folder / "sessions.jsonl"),
        _recipe(folder),
        read_evaluation(evaluated) if evaluated.is_file() else None,
        speaks and Renderer(folder).opens_reasoning,
    )


def _lines(path: Path) -> list[dict[str, Any]]:
    """A file's JSON lines; one that is being written, at its end, is not there yet."""
    try:
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    except (OSError, ValueError) as problem:
        raise ModelError(f"{path} cannot be read: {problem}; resume the run, which mends it, or delete it") from problem


def _recipe(folder: Path) -> Mapping[str, Any]:
    """The recipe that a run's checkpoint, or its collection of samples, was made with."""
    path = (checkpoint.newest(folder) or folder / FOLDER) / "state.json"
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))["recipe"]) if path.exists() else {}
    except (OSError, ValueError, TypeError, KeyError) as problem:
        raise ModelError(f"{path} cannot be read: {problem}; resume the run, or begin it again") from problem
