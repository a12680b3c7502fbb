"""Documents from files: text, JSONL, Parquet and the `datasets` library's folders, streamed in constant memory.

A source is a file, a folder (all files in it that can be read, by name, at any depth) or a glob pattern. A text file
is one document; a row of the other kinds is one, its text under a key. `rows` gives whole rows, for conversations and
whatever else has more than a text. Files may be gzipped. What cannot be read raises and names the file and the line.
"""

from __future__ import annotations

import glob
import gzip
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from porcelet.errors import InputError
from porcelet.extras import optional

TEXTS = (".txt", ".md", ".rst")
TABLES = (".jsonl", ".parquet", ".arrow")
BATCH_ROWS = 1024  # rows of a Parquet or Arrow file that are in memory at once

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Document:
    """A text and where it came from: "corpus/a.jsonl:17"."""

    text: str
    place: str


def as_line(document: Document) -> str:
    """A document as a line of JSONL, its place as "id"."""
    return json.dumps({"id": document.place, "text": document.text}, ensure_ascii=False) + "\n"


def documents(source: str | Path, key: str = "text") -> Iterator[Document]:
    """The documents of a source; `key` is where a row has its text.

    Raises:
        InputError: nothing is there, or something that cannot be read.
        MissingExtraError: the format needs a package that is not installed.
    """
    for path in files_of(source):
        if _kind(path) in TEXTS:
            yield Document(_text(path), str(path))
            continue
        for place, row in _rows(path):
            text = row.get(key)
            if not isinstance(text, str):
                raise InputError(f"{place}: {key!r} is {_short(text)}; a text was expected; keys: {', '.join(row)}")
            _require_unicode(text, f"{place}: {key!r}")
            yield Document(text, place)


def _require_unicode(text: str, place: str) -> None:
    """JSON can escape half of a surrogate pair, which is no character."""
    try:
        text.encode()
    except UnicodeEncodeError as problem:
        raise InputError(f"{place} is not Unicode: {problem}") from problem


def rows(source: str | Path) -> Iterator[tuple[str, Row]]:
    """(place, row) of every row of a source's tables.

    Raises:
        InputError, MissingExtraError: as `documents`; also for a text file, which has no rows.
    """
    for path in files_of(source):
        if _kind(path) in TEXTS:
            raise InputError(f"{path} is a text; rows come from {', '.join(TABLES)} or a dataset's folder")
        yield from _rows(path)


# ---- which files ----------------------------------------------------------------------------------------------------


def files_of(source: str | Path) -> Iterator[Path]:
    """The files of a source, and folders that are datasets, in an order that is the same everywhere."""
    path = Path(source)
    if not path.exists():
        found = [Path(name) for name in sorted(glob.glob(str(source), recursive=True))]
        found = [name for name in found if _kind(name)]
        if not found:
            raise InputError(f"{source} does not exist and matches no file of the kinds {', '.join(TEXTS + TABLES)}")
        yield from found
    elif path.is_dir() and not _is_dataset(path):
        files = sorted(entry for entry in path.rglob("*") if entry.is_file() and _kind(entry))
        if not files:
            raise InputError(f"{path} holds no file of the kinds {', '.join(TEXTS + TABLES)}")
        yield from files
    elif _kind(path):
        yield path
    else:
        raise InputError(f"{path} is of no known kind; known: {', '.join(TEXTS + TABLES)}, each also as .gz")


def _is_dataset(folder: Path) -> bool:
    if (folder / "dataset_dict.json").exists():
        parts = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
        raise InputError(f"{folder} holds several splits; name one: {', '.join(str(folder / part) for part in parts)}")
    return (folder / "state.json").exists() and (folder / "dataset_info.json").exists()


def _kind(path: Path) -> str:
    """The suffix that says how to read it; "" if none does."""
    if path.is_dir():
        return "dataset" if _is_dataset(path) else ""
    suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    readable = suffix in TEXTS or suffix == ".jsonl" or (suffix in TABLES and path.suffix != ".gz")
    return suffix if readable else ""


# ---- how to read them -----------------------------------------------------------------------------------------------


def _text(path: Path) -> str:
    try:
        with _open(path) as file:
            return file.read().decode("utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError) as problem:
        raise InputError(f"{path} cannot be read as UTF-8: {problem}") from problem


def _open(path: Path) -> Any:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")


def _rows(path: Path) -> Iterator[tuple[str, Row]]:
    readers = {".jsonl": _jsonl, ".parquet": _parquet, ".arrow": _arrow, "dataset": _dataset}
    yield from readers[_kind(path)](path)


def _jsonl(path: Path) -> Iterator[tuple[str, Row]]:
    number = 0
    try:
        with _open(path) as file:
            for number, line in enumerate(file, start=1):  # noqa: B007  the message below needs it
                if line.strip():
                    yield f"{path}:{number}", _object(line, f"{path}:{number}")
    except (OSError, EOFError) as problem:
        raise InputError(f"{path}: cannot be read behind line {number}: {problem}") from problem


def _object(line: bytes, place: str) -> Row:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as problem:
        raise InputError(f"{place}: not JSON: {problem}") from problem
    if not isinstance(row, dict):
        raise InputError(f"{place}: {_short(row)} is not a JSON object")
    return row


def _parquet(path: Path) -> Iterator[tuple[str, Row]]:
    parquet = optional("pyarrow.parquet")
    yield from _batches(path, lambda: parquet.ParquetFile(path).iter_batches(batch_size=BATCH_ROWS))


def _arrow(path: Path) -> Iterator[tuple[str, Row]]:
    arrow = optional("pyarrow")
    yield from _batches(path, lambda: arrow.ipc.open_stream(arrow.memory_map(str(path))))


def _batches(path: Path, read: Any) -> Iterator[tuple[str, Row]]:
    number = 0
    try:
        for batch in read():
            for row in batch.to_pylist():
                number += 1
                yield f"{path}:{number}", row
    except (OSError, optional("pyarrow").ArrowException) as problem:
        raise InputError(f"{path}: cannot be read behind row {number}: {problem}") from problem


def _dataset(path: Path) -> Iterator[tuple[str, Row]]:
    """A folder written by `save_to_disk`: memory-mapped, with its own order of rows."""
    try:
        dataset = optional("datasets").load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as problem:
        raise InputError(f"{path} is not a dataset that `datasets` can read: {problem}") from problem
    for number, row in enumerate(dataset, start=1):
        yield f"{path}:{number}", row


def _short(value: object) -> str:
    return repr(value)[:80]
