"""What a run reads besides its recipe, by content: a resumed run must find the same behind the same names."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from porcelet import hub
from porcelet.config import DRAWING, TrainConfig
from porcelet.errors import InputError
from porcelet.train.corpus.readers import files_of
from porcelet.train.corpus.store import open_store


def input_hashes(config: TrainConfig) -> dict[str, str]:
    """SHA-256 by name: of conversations, of a task's problems, of token stores, of the code of rewards, and of models that
    no checkpoint holds: the base under adapters, a teacher, and the one that samples are drawn from.

    Raises:
        InputError: one of them is not there.
    """
    found = {name: _hash_all(files_of(name)) for name in (*config.data.conversations, *_problems(config))}
    found |= {name: open_store(Path(name)).header.content_sha256 for name in config.data.corpus}
    found |= {name: _hash(Path(name)) for name in _code(config)}
    held = [config.model] * bool(config.lora.rank or config.method == "sample") + [config.policy.teacher]
    return found | {name: _hash_model(hub.resolve(name)) for name in held if name}


def unread(config: TrainConfig) -> tuple[str, ...]:
    """Tables and settings that a method never looks at. An evaluation may, but that may be another one each time."""
    if config.method == "sample":
        return ("data", "optimizer", "tokens_per_pass")
    if config.method in DRAWING:
        return ("data",)
    has_texts = config.data.conversations or config.data.corpus
    return ("policy", "rewards", "task") if has_texts else ("policy", "rewards")


def _problems(config: TrainConfig) -> list[str]:
    """Where a task of the user's has them from."""
    options = {} if "task" in unread(config) else config.task.options
    return [str(options["path"])] if config.task.name == "jsonl" and "path" in options else []


def _code(config: TrainConfig) -> list[str]:
    """The files of rewards of the user's."""
    rewards = () if "rewards" in unread(config) else config.rewards
    return [path for path, _, _ in (reward.name.rpartition(":") for reward in rewards) if path.endswith(".py")]


def _hash_model(path: Path) -> str:
    return _hash_all(sorted(path.glob("*.safetensors")) if path.is_dir() else [path])


def _hash_all(paths: Iterable[Path]) -> str:
    """One hash of some files in their order; of a folder, of all in it."""
    files = [file for path in paths for file in (sorted(path.rglob("*.arrow")) if path.is_dir() else [path])]
    hashes = [_hash(file) for file in files]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def _hash(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as problem:
        raise InputError(f"{path} cannot be read: {problem.strerror}; give a file that is there") from problem
