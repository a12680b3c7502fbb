"""Samples on the disk: rollouts before they are learnt from, and batches that a step refused.

    output/rollouts/step-12.jsonl   {"step", "recipe", "metrics", "note"}, then one sample a line

A rollout is written before its first update. A run that was killed finds it and does not draw again, so it repeats
itself even where rewards are slow or differ from call to call. A journal of another recipe is not used.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from porcelet.errors import ModelError
from porcelet.train.files import write_durably
from porcelet.train.types import Metrics, Source
from porcelet.types import Sample

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """One step's samples with what was measured when they were drawn."""

    step: int  # counted from 1, as in the metrics
    recipe: str
    metrics: Metrics
    samples: list[Sample]
    note: str = ""


@dataclass(frozen=True)
class Journal:
    """A source that writes down what another one draws, and reads what is written down already."""

    source: Source
    folder: Path
    recipe: str

    def __call__(self, step: int) -> tuple[list[Sample], Metrics]:
        path = path_of(self.folder, step)
        if path.exists():
            entry = read(path)
            if entry.recipe == self.recipe:
                return entry.samples, entry.metrics
            log.warning("%s was drawn under another recipe; its step is drawn anew", path)
        samples, metrics = self.source(step)
        write(self.folder, Entry(step + 1, self.recipe, metrics, samples))
        return samples, metrics


def path_of(folder: Path, step: int) -> Path:
    """The file of a step counted from 0; its name counts from 1, as the metrics do."""
    return folder / f"step-{step + 1}.jsonl"


def write(folder: Path, entry: Entry) -> Path:
    """Write one step's file, durably."""
    header = {name: getattr(entry, name) for name in ("step", "recipe", "metrics", "note")}
    lines = [header, *(_stored(sample) for sample in entry.samples)]
    path = path_of(folder, entry.step - 1)
    write_durably(path, "".join(json.dumps(line) + "\n" for line in lines))
    return path


def read(path: Path) -> Entry:
    """What `write` wrote: every number bit for bit.

    Raises:
        ModelError: the file is damaged.
    """
    try:
        header, *lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        return Entry(**header, samples=[_sample(line) for line in lines])
    except (OSError, ValueError, TypeError, AttributeError) as problem:
        raise ModelError(f"journal {path} cannot be read: {problem}; delete it to draw the step anew") from problem


def prune(folder: Path, last: int) -> None:
    """Delete the files of the steps up to `last`, counted from 1."""
    for path in folder.glob("step-*.jsonl"):
        if int(path.stem.removeprefix("step-")) <= last:
            path.unlink()


def digest(recipe: Mapping[str, Any], rules: Sequence[Any]) -> str:
    """A recipe's name: what decides the samples of a run."""
    return hashlib.blake2b(json.dumps([recipe, rules], sort_keys=True).encode(), digest_size=8).hexdigest()


def _stored(sample: Sample) -> dict[str, Any]:
    """The fields that are not empty."""
    return {name: value for name, value in dataclasses.asdict(sample).items() if value}


def _sample(line: Mapping[str, Any]) -> Sample:
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in line.items()}
    return Sample(**values)
