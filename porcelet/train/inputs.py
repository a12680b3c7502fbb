"""What a run reads besides its recipe, by content: a resumed run must find the same behind the same names."""

from __future__ import annotations

import hashlib
from pathlib import Path

from porcelet import hub
from porcelet.config import TrainConfig
from porcelet.errors import InputError
from porcelet.train.corpus.store import open_store


def input_hashes(config: TrainConfig) -> dict[str, str]:
    """SHA-256 by name: of conversations, of token stores, and of the base under adapters, which no checkpoint holds.

    Raises:
        InputError: one of them is not there.
    """
    found = {name: _hash(Path(name)) for name in config.data.conversations}
    found |= {name: open_store(Path(name)).header.content_sha256 for name in config.data.corpus}
    if config.lora.rank:
        base = hub.resolve(config.model)
        files = sorted(base.glob("*.safetensors")) if base.is_dir() else [base]
        found[config.model] = hashlib.sha256("".join(map(_hash, files)).encode()).hexdigest()
    return found


def _hash(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as problem:
        raise InputError(f"{path} cannot be read: {problem.strerror}; give a file that is there") from problem
