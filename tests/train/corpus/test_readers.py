from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest

from porcelet.errors import InputError
from porcelet.train.corpus.readers import documents, rows

TEXTS = ["eins", "zwei\nzeilig", "drei ｜ 你好 🐷", ""]


def jsonl(path: Path, key: str = "text") -> Path:
    path.write_text("".join(json.dumps({key: text, "n": i}) + "\n" for i, text in enumerate(TEXTS)), encoding="utf-8")
    return path


def test_every_format_gives_the_same_texts(tmp_path: Path) -> None:
    """JSONL, gzipped or not, Parquet, Arrow and a dataset's folder hold the same documents, each with its place."""
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    datasets = pytest.importorskip("datasets")
    plain = jsonl(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    table = arrow.table({"text": TEXTS})
    parquet.write_table(table, tmp_path / "c.parquet", row_group_size=2)
    with arrow.OSFile(str(tmp_path / "d.arrow"), "wb") as file, arrow.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path / "e")
    for name in ("a.jsonl", "b.jsonl.gz", "c.parquet", "d.arrow", "e"):
        found = list(documents(tmp_path / name))
        assert [document.text for document in found] == TEXTS
        assert [document.place for document in found] == [f"{tmp_path / name}:{i}" for i in (1, 2, 3, 4)]


def test_a_dataset_keeps_its_own_order(tmp_path: Path) -> None:
    """Rows chosen and reordered before saving come as they were saved."""
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"text": TEXTS}).select([2, 0]).save_to_disk(tmp_path / "set")
    assert [document.text for document in documents(tmp_path / "set")] == [TEXTS[2], TEXTS[0]]


def test_folders_and_patterns_are_read_by_name(tmp_path: Path) -> None:
    """A folder gives all files that can be read, at any depth, in order; a pattern those that match; others stay."""
    (tmp_path / "b").mkdir()
    for name in ("b/z.md", "a.txt", "c.rst", "picture.png", "b/notes.log"):
        (tmp_path / name).write_text(name, encoding="utf-8")
    assert [document.text for document in documents(tmp_path)] == ["a.txt", "b/z.md", "c.rst"]
    assert [document.text for document in documents(f"{tmp_path}/**/*.md")] == ["b/z.md"]


def test_rows_come_whole(tmp_path: Path) -> None:
    """What is not a text, conversations for one, is the caller's to read."""
    talk = [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}]
    (tmp_path / "talk.jsonl").write_text(json.dumps({"messages": talk}) + "\n\n", encoding="utf-8")
    assert list(rows(tmp_path / "talk.jsonl")) == [(f"{tmp_path}/talk.jsonl:1", {"messages": talk})]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "ok"}\n{"text": \n', r"a\.jsonl:2: not JSON"),
        ("a.jsonl", b'{"text": "ok"}\n["text"]\n', r"a\.jsonl:2: .*not a JSON object"),
        ("a.jsonl", b'\n{"body": "ok"}\n', r"a\.jsonl:2: 'text' is None.*keys: body"),
        ("a.jsonl", b'{"text": 3}', r"a\.jsonl:1: 'text' is 3"),
        ("a.jsonl", b'{"text": "\xff"}', r"a\.jsonl:1: not JSON"),
        ("a.jsonl", b'\n{"text": "a\\ud800"}', r"a\.jsonl:2: 'text' is not Unicode: .*surrogates"),
        ("a.jsonl", b'\n{"text": ' + b"[" * 100_000, r"a\.jsonl:2: not JSON: .*recursion"),
        ("a.jsonl.gz", b"no gzip", r"a\.jsonl\.gz: cannot be read behind line 0"),
        ("a.jsonl.gz", gzip.compress(os.urandom(1000).hex().encode())[:300], r"a\.jsonl\.gz: cannot be read"),
        ("a.txt", b"\xff\xfe", r"a\.txt cannot be read as UTF-8"),
        ("a.parquet", b"PAR1", r"a\.parquet: cannot be read behind row 0"),
        ("a.arrow", b"nonsense", r"a\.arrow: cannot be read behind row 0"),
        ("a.bin", b"", r"a\.bin is of no known kind"),
    ],
)
def test_what_cannot_be_read_names_its_place(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    """File and line or row, and what is wrong there."""
    if name.endswith(("parquet", "arrow")):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        list(documents(tmp_path / name))


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    """A missing file, an empty folder, a dataset of several splits."""
    with pytest.raises(InputError, match="does not exist"):
        list(documents(tmp_path / "none.txt"))
    with pytest.raises(InputError, match="holds no file"):
        list(documents(tmp_path))
    (tmp_path / "set" / "train").mkdir(parents=True)
    (tmp_path / "set" / "dataset_dict.json").write_text("{}", encoding="utf-8")
    with pytest.raises(InputError, match="name one: .*set/train"):
        list(documents(tmp_path / "set"))
    (tmp_path / "a.txt").write_text("a", encoding="utf-8")
    with pytest.raises(InputError, match="has no rows|is a text"):
        list(rows(tmp_path / "a.txt"))
