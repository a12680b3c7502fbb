"""The text side of a model: the tokenizer and the chat format that its file or folder brings. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from porcelet.chat import ChatFormat
from porcelet.config import ModelConfig, read_file
from porcelet.errors import ModelError
from porcelet.tokenizer import Tokenizer
from porcelet.weights import gguf
from porcelet.weights.gguf import GGUF
from porcelet.weights.header import gguf_config


def open_codec(path: Path) -> tuple[Tokenizer, ChatFormat]:
    """Tokenizer and chat format of the model at `path`.

    Raises:
        ModelError: they are missing, damaged or not supported, or the model scores fewer tokens than there are.
    """
    if path.is_dir():
        return open_tokenizer(path), ChatFormat.from_folder(path)
    file = gguf.read(path)
    return _gguf_tokenizer(file), ChatFormat.from_gguf(file.metadata, str(path))


def open_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer alone, for models without a chat format as well.

    Raises:
        ModelError: as `open_codec`.
    """
    if not path.is_dir():
        return _gguf_tokenizer(gguf.read(path))
    return _fitting(Tokenizer.from_folder(path), read_file(path / "config.json"), path)


def _gguf_tokenizer(file: GGUF) -> Tokenizer:
    return _fitting(Tokenizer.from_gguf(file.metadata, str(file.path)), gguf_config(file), file.path)


def _fitting(tokenizer: Tokenizer, config: ModelConfig, path: Path) -> Tokenizer:
    if tokenizer.vocab_size > config.vocab_size:
        raise ModelError(
            f"{path}: the tokenizer has ids up to {tokenizer.vocab_size - 1}, the model a vocabulary of "
            f"{config.vocab_size}; they do not belong together"
        )
    return tokenizer
