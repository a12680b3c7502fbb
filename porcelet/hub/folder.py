"""Models from this machine: a model folder or a .gguf file, copied into the store.

A copy, not a link: whatever happens to the folder, the store's bytes stay those of its manifest. A model that is used
where it lies needs no pull; every command takes its path.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from porcelet.errors import ModelError
from porcelet.hub import gather
from porcelet.hub.download import Report
from porcelet.hub.gather import Gathered, Offer
from porcelet.types import Progress

CHUNK = 1 << 22


def fetch(path: Path, ready: Path, progress: Progress) -> Gathered:
    """Gather the model at a path of this machine in `ready`.

    Raises:
        InputError: several GGUF files to choose from.
        ModelError: no model there, or a file that cannot be read.
        CapacityError: not enough disk.
    """
    ready.mkdir(exist_ok=True)
    if path.is_file():
        sha256 = gather.gather_gguf(_offer(path), path.name, ready, str(path), progress)
        return Gathered(folder=ready, sha256=sha256)
    names = sorted(entry.name for entry in path.iterdir())
    if gguf := gather.choose_gguf(names, "", str(path)):
        return fetch(path / gguf, ready, progress)
    extras = [name for name in names if gather.is_extra(name)]
    sha256 = gather.gather_folder(lambda name: _offer(path / name), extras, ready, str(path), progress)
    return Gathered(folder=ready, sha256=sha256)


def _offer(path: Path) -> Offer | None:
    if not path.is_file():
        return None
    size = path.stat().st_size
    return Offer(size=size, disk=size, obtain=lambda target, report: _copy(path, target, report))


def _copy(path: Path, target: Path, report: Report) -> str:
    digest, done = hashlib.sha256(), 0
    try:
        source = path.open("rb")
    except OSError as problem:
        raise ModelError(f"{path} cannot be read: {problem}") from problem
    with source, target.open("wb") as file:
        while chunk := source.read(CHUNK):
            digest.update(chunk)
            file.write(chunk)
            done += len(chunk)
            report(done)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()
