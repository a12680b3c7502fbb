"""The text side of a model: the tokenizer and the chat format that its file or folder brings. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from porcelet.chat import ChatFormat
from porcelet.tokenizer import Tokenizer
from porcelet.weights import gguf


def open_codec(path: Path) -> tuple[Tokenizer, ChatFormat]:
    """Tokenizer and chat format of the model at `path`.

    Raises:
        ModelError: they are missing, damaged or not supported.
    """
    if path.is_dir():
        return Tokenizer.from_folder(path), ChatFormat.from_folder(path)
    metadata = gguf.read(path).metadata
    return Tokenizer.from_gguf(metadata), ChatFormat.from_gguf(metadata)
