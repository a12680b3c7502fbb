"""The process that reads a PDF: a format so rich, from anywhere, is not parsed where keys and conversations are.

It is run by its path (uploads.py) with little memory and little time, reads the file from standard input and writes
one line of JSON: {"pages": [text, ...]} or {"problem": "encrypted" | "damaged" | "heavy" | "long"}.
"""

from __future__ import annotations

import json
import logging
import resource
import sys
from typing import Any, BinaryIO


def limit(seconds: int, max_memory: int, max_output: int) -> None:
    """Bound what this process may take, for good."""
    limits = {resource.RLIMIT_CPU: seconds, resource.RLIMIT_AS: max_memory, resource.RLIMIT_FSIZE: max_output}
    for what, most in limits.items():
        resource.setrlimit(what, (most, most))


def read(file: BinaryIO, max_characters: int) -> dict[str, Any]:
    """The text of each page."""
    from pypdf import PdfReader
    from pypdf.errors import DependencyError, FileNotDecryptedError, WrongPasswordError

    try:
        reader = PdfReader(file)
        # Many files are encrypted with no password, which only keeps them from being changed.
        if reader.is_encrypted and not reader.decrypt(""):
            return {"problem": "encrypted"}
        return _pages(reader, max_characters)
    except (DependencyError, FileNotDecryptedError, WrongPasswordError):
        return {"problem": "encrypted"}
    except MemoryError:
        return {"problem": "heavy"}
    except Exception:  # a file from outside can make the library fail in any way
        return {"problem": "damaged"}


def _pages(reader: Any, max_characters: int) -> dict[str, Any]:
    pages: list[str] = []
    for page in reader.pages:
        pages.append(_clean(page.extract_text()))
        max_characters -= len(pages[-1])
        if max_characters < 0:
            return {"problem": "long"}
    return {"pages": pages}


def _clean(text: str) -> str:
    """Valid Unicode: half a character, which a broken font can give, becomes a mark of its own."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").replace("\0", "").strip()


def main(seconds: str, max_memory: str, max_output: str, max_characters: str) -> None:
    limit(int(seconds), int(max_memory), int(max_output))
    logging.disable()  # the library tells of every oddity
    print(json.dumps(read(sys.stdin.buffer, int(max_characters))))


if __name__ == "__main__":
    main(*sys.argv[1:])
