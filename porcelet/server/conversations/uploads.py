"""An uploaded file as text: text and code by their bytes, PDF by a process of its own (pdf.py).

A file is judged by what is in it, not by its name. What comes in goes to a temporary file, and no more of it into
memory than the model could take. Left out: pictures, so a scanned PDF too, and office documents.
"""

from __future__ import annotations

import asyncio
import codecs
import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any
from uuid import uuid4

from porcelet.chat.sandbox import KEPT_VARIABLES
from porcelet.errors import InputError
from porcelet.server.conversations.attachments import File
from porcelet.server.generation.models import Model

MAX_FILE_BYTES = 20_000_000
MAX_BYTES_PER_TOKEN = 16  # of a whole text; English has 4 to 5
PDF_SECONDS = 30  # of computing, and as many again of waiting
PDF_MEMORY = 768 << 20  # bytes of address space
_BINARY = "it is binary data; text, code and PDF can be sent"
_AT_A_TIME = 1 << 16  # characters to tokenize
AT_ONCE = 2  # files being read; each may take much memory
_BOMS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
_PDF_CODES = {"encrypted": "file_encrypted", "scanned": "file_scanned"}
_PDF_PROBLEMS = {
    "encrypted": "it is protected by a password; save it without one",
    "damaged": "it is damaged; open it in a PDF viewer and save it again",
    "scanned": "it has no text, only pictures of pages; have its text recognised (OCR) first",
    "heavy": f"it takes more than {PDF_SECONDS} s or {PDF_MEMORY >> 20} MiB to read; send its text instead",
}


class FileTooLargeError(InputError):
    """More bytes than a file may have."""

    status = 413
    code = "file_too_large"


class FileUnreadableError(InputError):
    """A file that is no text and gives none; `code` says more where a person can do something about it."""

    status = 422

    def __init__(self, name: str, reason: str, code: str = "file_unreadable") -> None:
        super().__init__(f"{name} cannot be read: {reason}")
        self.code = code


class FileTooLongError(InputError):
    """More text than the model's context holds."""

    status = 422
    code = "file_too_long"


async def read_file(name: str, chunks: AsyncIterator[bytes], model: Model, slots: asyncio.Semaphore) -> File:
    """The text of an upload that is to be asked about; `slots` are shared by all that are read.

    Raises:
        FileTooLargeError: it has more than 20 MB.
        FileUnreadableError: it is neither text nor a PDF with text.
        FileTooLongError: the model's context does not hold it.
    """
    with TemporaryFile() as file:
        size = 0
        async for chunk in chunks:
            size += len(chunk)
            if size > MAX_FILE_BYTES:
                raise FileTooLargeError(f"{name} has more than {MAX_FILE_BYTES // 10**6} MB; send a part of it")
            await asyncio.to_thread(file.write, chunk)
        async with slots:
            return await asyncio.to_thread(_read, name, file, model)


def _read(name: str, file: IO[bytes], model: Model) -> File:
    file.seek(0)
    start = file.read(1024)
    is_pdf = b"%PDF-" in start
    pages = _pdf_pages(name, file, model) if is_pdf else None
    text = _text(name, file, model) if pages is None else _joined(pages)
    tokens = _require_fit(name, text, model)
    kind, num_pages = ("text", None) if pages is None else ("pdf", len(pages))
    return File(uuid4().hex, name, kind, text, tokens, num_pages, time.time())


# ---- text -----------------------------------------------------------------------------------------------------------


def _text(name: str, file: IO[bytes], model: Model) -> str:
    most = MAX_BYTES_PER_TOKEN * model.max_length
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    data = file.read(most)
    encoding = next((encoding for bom, encoding in _BOMS.items() if data.startswith(bom)), "utf-8")
    if encoding != "utf-16" and b"\0" in data:
        raise FileUnreadableError(name, _BINARY)
    try:
        # A part of a file may end within a character.
        text = codecs.getincrementaldecoder(encoding)().decode(data, final=size <= most)
    except UnicodeDecodeError as problem:
        reason = f"byte {problem.start} is neither UTF-8 nor UTF-16 text; save it as UTF-8"
        raise FileUnreadableError(name, reason, "file_encoding") from None
    if "\0" in text:
        raise FileUnreadableError(name, _BINARY)
    if size > most:
        num_tokens, num_counted = _count(text, model)
        raise _too_long(name, num_tokens * size // len(text[:num_counted].encode()), "about ", model)
    return text


def _require_fit(name: str, text: str, model: Model) -> int:
    """A text's tokens.

    Raises:
        FileTooLongError: they are too many for the model; how many is estimated by those counted until then.
    """
    num_tokens, num_counted = _count(text, model)
    if num_tokens < model.max_length:
        return num_tokens
    about = "" if num_counted == len(text) else "about "
    raise _too_long(name, num_tokens * len(text) // num_counted, about, model)


def _count(text: str, model: Model) -> tuple[int, int]:
    """Tokens of a text until it does not fit any more, and of how many characters those are."""
    num_counted = num_tokens = 0
    while num_counted < len(text) and num_tokens < model.max_length:
        part = text[num_counted : num_counted + _AT_A_TIME]
        num_tokens += len(model.tokenizer.encode(part))
        num_counted += len(part)
    return num_tokens, num_counted


def _too_long(name: str, num_tokens: int, about: str, model: Model) -> FileTooLongError:
    return FileTooLongError(
        f"{name} has {about}{num_tokens} tokens; {model.name} holds {model.max_length} with the question and the "
        "answer: send a part of it"
    )


# ---- PDF ------------------------------------------------------------------------------------------------------------


def _pdf_pages(name: str, file: IO[bytes], model: Model) -> list[str]:
    most = MAX_BYTES_PER_TOKEN * model.max_length
    found = _run_reader(file, most)
    if found.get("problem") == "long":
        raise FileTooLongError(
            f"{name} has more than {most} characters, more than the {model.max_length} tokens that {model.name} holds "
            "with the question and the answer: send a part of it"
        )
    pages: list[str] = found.get("pages", [])
    problem = found.get("problem") or (None if any(pages) else "scanned")
    if problem:
        raise FileUnreadableError(name, _PDF_PROBLEMS[problem], _PDF_CODES.get(problem, "file_unreadable"))
    return pages


def _run_reader(file: IO[bytes], max_characters: int) -> dict[str, Any]:
    """What pdf.py makes of the file; whatever is wrong with it, it ends here."""
    # JSON writes a character with at most twelve bytes.
    max_output = 12 * max_characters + (1 << 20)
    limits = (PDF_SECONDS, PDF_MEMORY, max_output, max_characters)
    command = [sys.executable, "-P", str(Path(__file__).with_name("pdf.py")), *map(str, limits)]
    environment = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
    file.flush()
    file.seek(0)
    with TemporaryFile() as output:  # not a pipe: the kernel bounds it
        try:
            ended = subprocess.run(
                command,
                stdin=file,
                stdout=output,
                stderr=subprocess.DEVNULL,
                timeout=2 * PDF_SECONDS,
                process_group=0,
                env=environment,
            )
        except subprocess.TimeoutExpired:
            return {"problem": "heavy"}
        if ended.returncode:
            return {"problem": "heavy"}
        output.seek(0)
        found = json.load(output)
    assert isinstance(found, dict)
    return found


def _joined(pages: list[str]) -> str:
    return "\n\n".join(f"[page {number}]\n{text}" for number, text in enumerate(pages, 1))
