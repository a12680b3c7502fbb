from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from porcelet.errors import InputError, ModelError
from porcelet.tokenizer import Tokenizer
from porcelet.train.corpus import store as stores
from porcelet.train.corpus.readers import Document
from porcelet.train.corpus.store import open_store, verify, write_store
from tests.train.corpus.tiny_corpus import store_of, tokenizer_folder

TEXTS = ["eins", "", "Grüße 🐷", "x" * 5000]


def test_a_store_gives_every_document_back(tmp_path: Path) -> None:
    """Token by token, empty ones too, with true counts; and the tokenizer lies beside them."""
    store = store_of(tmp_path, TEXTS)
    tokenizer = Tokenizer.from_folder(store.path)
    assert [tokenizer.decode(store.document(i).tolist()) for i in range(4)] == TEXTS
    header = store.header
    assert (header.num_documents, header.num_bytes) == (4, sum(len(text.encode()) for text in TEXTS))
    assert header.num_tokens == len(store.tokens) == header.num_bytes and store.tokens.dtype == np.uint16
    assert (header.bos, header.eos, header.sources) == (0, 1, ("texts",))
    verify(store)


def test_the_same_documents_make_the_same_store(tmp_path: Path) -> None:
    """The content's hash names the content alone."""
    first, second = store_of(tmp_path, TEXTS, "a"), store_of(tmp_path, TEXTS, "b")
    assert first.header == second.header
    assert store_of(tmp_path, TEXTS[:3], "c").header.content_sha256 != first.header.content_sha256


def test_a_killed_run_leaves_nothing_in_the_way(tmp_path: Path) -> None:
    """What a broken run wrote has not the store's name, and the next run replaces it."""

    def broken() -> Iterator[Document]:
        yield Document("a", "1")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_store(tmp_path / "store", broken(), tokenizer_folder(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer"]
    store = store_of(tmp_path, TEXTS)
    assert store.header.num_documents == 4
    with pytest.raises(InputError, match="exists"):
        store_of(tmp_path, TEXTS)


def test_two_writers_do_not_share_a_place(tmp_path: Path) -> None:
    """What a living process still writes stays, what a dead one left goes; who is second to end is told so."""
    with subprocess.Popen(["true"]) as dead:
        pass
    living, left = (tmp_path / f"store.{pid}.unfinished" for pid in (os.getppid(), dead.pid))
    living.mkdir()
    left.mkdir()
    (left / "tokens.bin").write_bytes(b"some")
    store = store_of(tmp_path, TEXTS)
    assert living.is_dir() and not left.exists()

    def overtaken() -> Iterator[Document]:
        yield Document("a", "1")
        shutil.copytree(store.path, tmp_path / "other")

    with pytest.raises(InputError, match="other exists"):
        write_store(tmp_path / "other", overtaken(), store.path)
    verify(open_store(tmp_path / "other"))


@pytest.mark.parametrize("change", ["missing", "another"])
def test_a_store_without_its_tokenizer_is_refused(tmp_path: Path, change: str) -> None:
    """Its ids mean nothing; the message names the store's own file."""
    file = store_of(tmp_path, TEXTS).path / "tokenizer.json"
    file.write_text(file.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    if change == "missing":
        file.unlink()
    with pytest.raises(ModelError, match=r"/store/tokenizer\.json (cannot be read: No such|is not the one)"):
        open_store(tmp_path / "store")


def test_damage_is_found(tmp_path: Path) -> None:
    """A short file and a changed header on opening, a changed token by verify; other folders are no store."""
    store = store_of(tmp_path, TEXTS)
    tokens, header = store.path / "tokens.bin", store.path / "header.json"
    good = tokens.read_bytes()
    tokens.write_bytes(good[:-2])
    with pytest.raises(ModelError, match=r"tokens\.bin has \d+ bytes instead of"):
        open_store(store.path)
    tokens.write_bytes(b"\x09" + good[1:])
    with pytest.raises(ModelError, match="content"):
        verify(open_store(store.path))
    tokens.write_bytes(good)
    fields = json.loads(header.read_text(encoding="utf-8"))
    header.write_text(json.dumps(fields | {"bos": 5}), encoding="utf-8")
    with pytest.raises(ModelError, match=r"header\.json was changed"):
        open_store(store.path)
    header.write_text(json.dumps(fields | {"version": 9}), encoding="utf-8")
    with pytest.raises(ModelError, match="version 9"):
        open_store(store.path)
    with pytest.raises(ModelError, match="is not a token store"):
        open_store(tmp_path)


def test_no_document_and_no_end_are_refused(tmp_path: Path) -> None:
    """Nothing to write, text that is no Unicode with its place, and a tokenizer that cannot end a document."""
    folder = tokenizer_folder(tmp_path)
    with pytest.raises(InputError, match="no document"):
        write_store(tmp_path / "a", [], folder, sources=["nowhere"])
    with pytest.raises(InputError, match="no text in the documents"):
        write_store(tmp_path / "a", [Document("", "a.txt")], folder)
    with pytest.raises(InputError, match=r"b\.jsonl:3: .*surrogate"):
        write_store(tmp_path / "b", [Document("\ud800", "b.jsonl:3")], folder)
    (folder / "tokenizer_config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ModelError, match="eos_token"):
        write_store(tmp_path / "c", [Document("a", "a")], folder)


def test_a_large_vocabulary_takes_wider_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Above 65536 tokens ids are 32 bits wide."""
    monkeypatch.setattr(stores.Tokenizer, "from_folder", _large)
    store = store_of(tmp_path, ["ab"])
    assert store.tokens.dtype == np.uint32 and len(store.document(0)) == 2


def _large(path: Path) -> Tokenizer:
    from porcelet.tokenizer import _from_json

    tokenizer = _from_json(json.loads((path / "tokenizer.json").read_text(encoding="utf-8")), "test")
    tokenizer.vocab_size = (1 << 16) + 1
    return tokenizer
