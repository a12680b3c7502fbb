"""Documents as token ids on disk, memory-mapped: tokenized once, read by any number of runs.

    FOLDER/tokens.bin     the ids of all documents, one after the other: uint16, or uint32 for vocabularies above 65536
    FOLDER/offsets.bin    int64 [D+1]: document d is tokens[offsets[d]:offsets[d+1]]
    FOLDER/header.json    counts, sources, the tokenizer's hash, the content's, and the header's own
    FOLDER/tokenizer*     what the ids mean: a new model gets this tokenizer

Neither the begin nor the end of a document is stored; packing adds them. Fill-in-the-middle is decided here, once, by
the document's position, since it changes how many tokens a document has. A store appears under its name when it is
complete. Opening checks the hashes of header and tokenizer and the files' sizes, `verify` every byte.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from porcelet.errors import InputError, ModelError
from porcelet.tokenizer import Tokenizer
from porcelet.train.corpus.fim import FillInTheMiddle
from porcelet.train.corpus.outputs import appearing
from porcelet.train.corpus.readers import Document

if TYPE_CHECKING:
    from jaxtyping import Int64, UInt

VERSION = 1
FILES = ("tokens.bin", "offsets.bin")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a store says about itself. `num_bytes` are the documents' in UTF-8."""

    version: int
    dtype: str
    num_documents: int
    num_tokens: int
    num_bytes: int
    bos: int
    eos: int
    vocab_size: int
    tokenizer_sha256: str
    content_sha256: str
    sources: tuple[str, ...]
    fim_rate: float
    seed: int


@dataclass(frozen=True)
class Store:
    """An open store."""

    path: Path
    header: Header

    @cached_property
    def tokens(self) -> UInt[np.ndarray, "N"]:
        """All ids, in the file's own type."""
        return _mapped(self.path / "tokens.bin", self.header.dtype)

    @cached_property
    def offsets(self) -> Int64[np.ndarray, "D1"]:
        """Where each document begins, and where the last one ends."""
        return _mapped(self.path / "offsets.bin", "int64")

    def document(self, number: int) -> UInt[np.ndarray, "N"]:
        """The ids of one document."""
        return self.tokens[self.offsets[number] : self.offsets[number + 1]]


def write_store(
    path: Path,
    documents: Iterable[Document],
    tokenizer_folder: Path,
    *,
    sources: Sequence[str] = (),
    fim_rate: float = 0.0,
    seed: int = 0,
    report: Callable[[int, int], None] = lambda num_documents, num_bytes: None,
) -> Store:
    """Tokenize documents into a new store at `path`.

    Raises:
        InputError: `path` exists or cannot be written, there is no text, or a document cannot be encoded.
        ModelError: the tokenizer cannot be read, or lacks a token that is needed.
    """
    with appearing(path) as unfinished:
        _write(unfinished, documents, tokenizer_folder, sources, fim_rate, seed, report)
    return open_store(path)


def _write(
    folder: Path,
    documents: Iterable[Document],
    tokenizer_folder: Path,
    sources: Sequence[str],
    fim_rate: float,
    seed: int,
    report: Callable[[int, int], None],
) -> None:
    folder.mkdir()
    tokenizer, (bos, eos) = Tokenizer.from_folder(tokenizer_folder), sentence_ends(tokenizer_folder)
    encoder = FillInTheMiddle(tokenizer, fim_rate, seed)
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    offsets, num_bytes = _write_tokens(folder, dtype, documents, encoder, report)
    if not offsets[-1]:
        what = "no text in the documents" if len(offsets) > 1 else "no document"
        raise InputError(f"there is {what} to tokenize; check the sources: {', '.join(sources)}")
    header = Header(
        version=VERSION,
        dtype=dtype,
        num_documents=len(offsets) - 1,
        num_tokens=offsets[-1],
        num_bytes=num_bytes,
        bos=bos,
        eos=eos,
        vocab_size=tokenizer.vocab_size,
        tokenizer_sha256=tokenizer_sha256(tokenizer_folder),
        content_sha256=_content_sha256(folder),
        sources=tuple(sources),
        fim_rate=fim_rate,
        seed=seed,
    )
    for name in TOKENIZER_FILES:
        if (tokenizer_folder / name).exists():
            shutil.copyfile(tokenizer_folder / name, folder / name)
    _write_header(folder, header)


def open_store(path: Path) -> Store:
    """Open a store, its header and sizes checked.

    Raises:
        ModelError: it is missing, damaged or of another version.
    """
    try:
        fields = json.loads((path / "header.json").read_text(encoding="utf-8"))
        digest = fields.pop("header_sha256")
        header = Header(**fields | {"sources": tuple(fields["sources"])})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
        raise ModelError(f"{path} is not a token store of `porcelet data tokenize`: {problem!r}") from problem
    if header.version != VERSION:
        raise ModelError(f"{path} is of version {header.version}; this porcelet reads {VERSION}: tokenize again")
    if digest != _sha256_of(fields):
        raise ModelError(f"{path / 'header.json'} was changed after it was written; tokenize again")
    sizes = (header.num_tokens * np.dtype(header.dtype).itemsize, (header.num_documents + 1) * 8)
    for name, size in zip(FILES, sizes, strict=True):
        found = (path / name).stat().st_size if (path / name).exists() else 0
        if found != size:
            raise ModelError(f"{path / name} has {found} bytes instead of {size}; tokenize again")
    if tokenizer_sha256(path) != header.tokenizer_sha256:
        raise ModelError(f"{path / 'tokenizer.json'} is not the one its tokens were made with; tokenize again")
    return Store(path, header)


def verify(store: Store) -> None:
    """Read everything and compare it with the hash in the header.

    Raises:
        ModelError: it differs.
    """
    if _content_sha256(store.path) != store.header.content_sha256:
        raise ModelError(f"{store.path} does not have the content that its header names; tokenize again")


def sentence_ends(folder: Path) -> tuple[int, int]:
    """The ids that begin and end a document, as the tokenizer's folder names them; without a first, the second twice.

    Raises:
        ModelError: the folder names no token that ends one.
    """
    try:
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise ModelError(f"{folder / 'tokenizer_config.json'} cannot be read: {problem}") from problem
    tokenizer = Tokenizer.from_folder(folder)
    bos, eos = (tokenizer.token_id(_token_text(settings.get(name))) for name in ("bos_token", "eos_token"))
    if eos is None:
        raise ModelError(f"{folder} names no eos_token that its tokenizer has; a document could not end")
    return (eos if bos is None else bos), eos


def tokenizer_sha256(folder: Path) -> str:
    """The hash that says which vocabulary ids belong to.

    Raises:
        ModelError: the folder has no tokenizer.json that can be read.
    """
    try:
        return hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()
    except OSError as problem:
        raise ModelError(f"{folder / 'tokenizer.json'} cannot be read: {problem.strerror}") from problem


def _token_text(value: Any) -> str:
    return str(value.get("content", "")) if isinstance(value, dict) else str(value or "")


def _write_tokens(
    folder: Path,
    dtype: str,
    documents: Iterable[Document],
    encoder: FillInTheMiddle,
    report: Callable[[int, int], None],
) -> tuple[array[int], int]:
    """Write both arrays; the offsets, and how many bytes of text they stand for."""
    offsets, num_bytes = array("q", [0]), 0
    with (folder / "tokens.bin").open("wb") as file:
        for number, document in enumerate(documents):
            ids = _encoded(encoder, document, number)
            np.asarray(ids, dtype=dtype).tofile(file)
            offsets.append(offsets[-1] + len(ids))
            num_bytes += len(document.text.encode())
            report(number + 1, num_bytes)
    np.frombuffer(offsets, dtype=np.int64).tofile(folder / "offsets.bin")
    return offsets, num_bytes


def _encoded(encoder: FillInTheMiddle, document: Document, number: int) -> list[int]:
    try:
        return encoder.encode(document.text, number)
    except InputError as problem:
        raise InputError(f"{document.place}: {problem}") from problem


def _write_header(folder: Path, header: Header) -> None:
    fields = json.loads(json.dumps(asdict(header)))
    text = json.dumps(fields | {"header_sha256": _sha256_of(fields)}, indent=2, ensure_ascii=False)
    (folder / "header.json").write_text(text + "\n", encoding="utf-8")
    for name in (*FILES, "header.json"):
        with (folder / name).open("rb") as file:
            os.fsync(file.fileno())


def _sha256_of(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _content_sha256(folder: Path) -> str:
    digest = hashlib.sha256()
    for name in FILES:
        with (folder / name).open("rb") as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
    return digest.hexdigest()


def _mapped(path: Path, dtype: str) -> Any:
    """A file as a plain array, of which slices cost less than a memmap's; an empty one cannot be mapped."""
    return np.asarray(np.memmap(path, dtype=dtype, mode="r")) if path.stat().st_size else np.zeros(0, dtype=dtype)
