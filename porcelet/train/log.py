"""Where a run's metrics go: metrics.jsonl always, TensorBoard and trackio on request.

A resumed run repeats the steps behind its checkpoint with the same numbers. metrics.jsonl is cut back to the
checkpoint; TensorBoard is told which step comes next and drops what it has from there on; what trackio was sent cannot
be taken back, so the steps it has are noted and not sent again.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from porcelet.config import TrainConfig
from porcelet.errors import ModelError
from porcelet.extras import optional
from porcelet.train.files import write_durably, writing
from porcelet.train.types import Metrics

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sink:
    """A place for metrics: `write` one step's, `flush` before a checkpoint that counts on them, `close` at the end."""

    write: Callable[[Metrics], None]
    flush: Callable[[], None]
    close: Callable[[], None]


@contextmanager
def open_log(config: TrainConfig, recipe: Mapping[str, Any], first: int) -> Iterator[Log]:
    """All the places of a run that has done `first` steps, opened together.

    Raises:
        MissingExtraError: a place's package is not installed.
        ModelError: what an earlier session left there is damaged.
        CapacityError: the disk is full.
    """
    output = Path(config.output)
    with ExitStack() as stack:
        sinks: list[Sink] = []

        def add(sink: Sink) -> None:
            stack.callback(sink.close)
            sinks.append(sink)

        add(metrics_file(output / "metrics.jsonl", first))
        if config.log.tensorboard:
            add(tensorboard(output / "tensorboard", first))
        if config.log.trackio:
            add(trackio(config, recipe, first))
        yield Log(sinks)


@dataclass(frozen=True)
class Log:
    """All the places of a run."""

    sinks: Sequence[Sink]

    def write(self, metrics: Metrics) -> None:
        """One step's numbers; what is not finite is left out, as JSON has no word for it."""
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        for sink in self.sinks:
            sink.write(finite)

    def flush(self) -> None:
        for sink in self.sinks:
            sink.flush()


def metrics_file(path: Path, first: int) -> Sink:
    """JSON lines, one a step, behind those of the steps up to `first`."""
    write_durably(path, "".join(_lines_up_to(path, first)))
    with writing(path):
        file = path.open("ab", buffering=0)  # a line is one write: a killed run has it or has it not

    def write(metrics: Metrics) -> None:
        with writing(path):
            file.write((json.dumps(metrics) + "\n").encode())

    def flush() -> None:
        with writing(path):
            os.fsync(file.fileno())

    return Sink(write, flush, file.close)


def tensorboard(folder: Path, first: int) -> Sink:
    """TensorBoard's event files."""
    optional("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder), purge_step=first + 1)

    def write(metrics: Metrics) -> None:
        for name, value in metrics.items():
            if name != "step":
                writer.add_scalar(name, value, int(metrics["step"]))

    return Sink(write, writer.flush, writer.close)


def trackio(config: TrainConfig, recipe: Mapping[str, Any], first: int) -> Sink:
    """A run of a trackio project, under the name of the output folder."""
    module, note = optional("trackio", "track"), Path(config.output) / "trackio.step"
    sent = _noted(note) if first and note.exists() else 0
    run = config.output.strip("/").replace("/", "-")
    module.init(project=config.log.trackio, name=run, config=dict(recipe), resume="allow" if sent else "never")

    def write(metrics: Metrics) -> None:
        step = int(metrics["step"])
        if step > sent:
            module.log({name: value for name, value in metrics.items() if name != "step"}, step=step)
            write_durably(note, str(step))

    return Sink(write, lambda: None, module.finish)


def _noted(note: Path) -> int:
    try:
        return int(note.read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise ModelError(
            f"{note} cannot be read: {problem}; write the last step that trackio has into it, or delete it to send a "
            "new run there"
        ) from problem


def _lines_up_to(path: Path, last: int) -> list[str]:
    """A metrics file's lines of the steps up to `last`; a line that was cut off ends them.

    Raises:
        ModelError: a line is damaged.
    """
    kept: list[str] = []
    try:
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else ():
            if not line.endswith("\n") or json.loads(line)["step"] > last:
                break
            kept.append(line)
    except (OSError, ValueError, TypeError, KeyError) as problem:
        place = f"{path}, behind line {len(kept)},"
        raise ModelError(f"{place} cannot be read: {problem}; delete that line, or the file, and resume") from problem
    if len(kept) < last:
        log.warning("%s has %d of the %d steps that the checkpoint counts; the others are lost", path, len(kept), last)
    return kept
