"""Machines laid out in a folder, as /proc, /sys and /dev show them."""

from __future__ import annotations

from pathlib import Path


def lay_out(root: Path, files: dict[str, str]) -> Path:
    """The root of a machine that has these files, by path below `/`."""
    for name, text in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root
