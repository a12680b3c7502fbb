"""Files as text: what is in them decides, a PDF is read in a process of its own, and what cannot be used is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from porcelet.server.conversations import pdf
from porcelet.server.conversations.uploads import MAX_FILE_BYTES
from tests.server.conftest import CONTEXT, Server
from tests.server.pdf_file import encrypted, pdf_of

PDF = pdf_of(["Hello from page one", "", "and three"])


def upload(server: Server, data: Any, name: str = "notes.txt", **query: str) -> httpx.Response:
    return httpx.post(f"{server.url}/api/files", params={"name": name, **query}, content=data, timeout=20)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_text_in_its_encodings(chat_server: Server, encoding: str) -> None:
    """Text arrives as it was written, whatever its encoding and its name, without a byte order mark."""
    text = "def f():\r\n\treturn 'é你🙂'\n"
    response = upload(chat_server, text.encode(encoding), "code.bin")
    facts = response.json()
    assert response.status_code == 201
    assert facts == {
        "id": facts["id"],
        "name": "code.bin",
        "kind": "text",
        "characters": len(text),
        "tokens": len(text.encode()),
        "pages": None,
    }
    kept = httpx.get(f"{chat_server.url}/api/files/{facts['id']}").json()
    assert (kept["text"], kept["name"], kept["kind"]) == (text, "code.bin", "text")


@pytest.mark.parametrize("data", [PDF, b"\n" + PDF, encrypted(PDF, "")], ids=["plain", "late", "encrypted for nobody"])
def test_pdf(chat_server: Server, data: bytes) -> None:
    """A PDF gives its pages' texts with their numbers, one that opens without a password too."""
    facts = upload(chat_server, data, "report.pdf").json()
    kept = httpx.get(f"{chat_server.url}/api/files/{facts['id']}").json()
    assert (facts["kind"], facts["pages"]) == ("pdf", 3)
    assert kept["text"] == "[page 1]\nHello from page one\n\n[page 2]\n\n\n[page 3]\nand three"


@pytest.mark.parametrize(
    ("data", "code", "reason"),
    [
        (b"\x89PNG\r\n\x1a\n\0\0", "file_unreadable", "binary"),
        (b"text\0text", "file_unreadable", "binary"),
        ("text\0text".encode("utf-16"), "file_unreadable", "binary"),
        ("é".encode("latin-1"), "file_encoding", "byte 0 is neither"),
        (b"\xff\xfe\x00", "file_encoding", "neither"),
        (encrypted(PDF, "secret"), "file_encrypted", "password"),
        (b"%PDF-1.4\nnothing of the kind", "file_unreadable", "damaged"),
        (PDF[:200], "file_unreadable", "damaged"),
        (pdf_of(["", ""]), "file_scanned", "only pictures"),
    ],
    ids=["png", "nul", "nul in UTF-16", "latin-1", "half", "encrypted", "no pdf", "cut", "scanned"],
)
def test_unreadable(chat_server: Server, data: bytes, code: str, reason: str) -> None:
    """A file without text says why, with a code of its own where a person can mend it."""
    response = upload(chat_server, data, "file.pdf")
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (422, code)
    assert "file.pdf" in error["message"] and reason in error["message"]


@pytest.mark.parametrize(
    ("data", "tokens"),
    [
        (b"x" * CONTEXT, f" {CONTEXT} tokens"),
        (("你" * 1000 + "\n").encode() * 100, "about 300"),
        (b"word " * 1_000_000, "about 5000000"),
        (pdf_of(["many words " * 4000]), " 44"),
    ],
    ids=["by one", "by far", "many megabytes", "pdf"],
)
def test_too_long(chat_server: Server, data: bytes, tokens: str) -> None:
    """More than the model holds is refused with the tokens it has and the tokens that fit."""
    response = upload(chat_server, data)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (422, "file_too_long")
    assert tokens in error["message"] and f" {CONTEXT} " in error["message"]


@pytest.mark.parametrize("chunked", [False, True])
def test_too_large(chat_server: Server, chunked: bool) -> None:
    """20 MB are the limit, with a declared length and without one."""
    data = b" " * (MAX_FILE_BYTES + 1)
    response = upload(chat_server, iter([data[:1000], data[1000:]]) if chunked else data)
    assert (response.status_code, response.json()["error"]["code"]) == (413, "file_too_large")


def test_names_and_models(chat_server: Server) -> None:
    """A file needs a model that is served and a name, in any script, that shows as it is."""
    for name in (
        "Screenshot 9.41\u202fAM",
        "no\u00a0break",
        "全\u3000角",
        "👩\u200d💻.txt",
        "\u200eWhatsApp",
        "x" * 200,
    ):
        response = upload(chat_server, b"x", name)
        assert (response.status_code, response.json().get("name")) == (201, name)
    for name in ("", "two\nlines", "nul\0", "\x9b", "fdp\u202e.exe", "\u2066x", "x" * 201):
        error = upload(chat_server, b"x", name).json()["error"]
        assert error["param"] == "name" and error["message"].isprintable() and len(error["message"]) < 400
    assert "201 characters; at most 200" in upload(chat_server, b"x", "x" * 201).json()["error"]["message"]
    unknown = upload(chat_server, b"x", model="gpt")
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")
    gone = httpx.get(f"{chat_server.url}/api/files/{'0' * 32}")
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "not_found")


def read_with(path: Path, *limits: int) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-P", pdf.__file__, *map(str, limits)]
    with path.open("rb") as file:
        return subprocess.run(command, stdin=file, capture_output=True, timeout=30)


def test_the_reader_is_limited(tmp_path: Path) -> None:
    """The process that reads a PDF ends by itself: with too many characters, too much memory or too much time."""
    path = tmp_path / "file.pdf"
    path.write_bytes(pdf_of(["a line of text"] * 500))
    memory = 1 << 29
    assert json.loads(read_with(path, 20, memory, 1 << 20, 1 << 20).stdout)["pages"] == ["a line of text"] * 500
    assert json.loads(read_with(path, 20, memory, 1 << 20, 100).stdout) == {"problem": "long"}
    assert b"pages" not in read_with(path, 20, 1 << 25, 1 << 20, 1 << 20).stdout
    path.write_bytes(pdf_of(["a line of text"] * 5_000))
    assert read_with(path, 1, memory, 1 << 20, 1 << 30).returncode == -9
