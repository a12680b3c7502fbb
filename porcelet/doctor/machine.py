"""The machine as the kernel shows it in files below `/`; another root is a machine laid out in a folder."""

from __future__ import annotations

from pathlib import Path

ROOT = Path("/")


def told_by(file: Path) -> str:
    """The file's text; empty where it is not there or not to be read, as in containers and on other kernels."""
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def number_in(file: Path) -> int | None:
    """The number that a file holds and nothing else; None where it holds another thing."""
    text = told_by(file).strip()
    return int(text) if text.isdecimal() else None
