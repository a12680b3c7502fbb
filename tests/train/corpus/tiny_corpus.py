"""Small stores: byte tokens, so that lengths are the test's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from porcelet.train.corpus.readers import Document
from porcelet.train.corpus.store import Store, write_store
from porcelet.train.rendering import make_tokenizer

WORDS = [f"word{i}" for i in range(500)]


def tokenizer_folder(path: Path) -> Path:
    """The smallest tokenizer: a token is a byte."""
    make_tokenizer(path / "tokenizer")
    return path / "tokenizer"


def store_of(path: Path, texts: Sequence[str], name: str = "store") -> Store:
    documents = [Document(text, f"text {i}") for i, text in enumerate(texts)]
    return write_store(path / name, documents, tokenizer_folder(path), sources=["texts"])
