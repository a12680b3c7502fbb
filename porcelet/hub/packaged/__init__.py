"""Models that come with the package itself: small enough to ship, there without a download.

Each has a folder beside this file that is like one of the store's: the model's files, its card and manifest.json. The
store lists, checks and resolves it as one of its own, and neither removes nor replaces it. The card's `widget` (the
Hugging Face hub's field) says what to ask: a model this small answers nothing else.

`python -m porcelet.hub.packaged RUN` makes such a folder of a training run (__main__.py).
"""

from __future__ import annotations

import re
from pathlib import Path

SOURCE = "package"
R1_MINI = "porcelet-r1-mini"
NAMES = (R1_MINI,)
CARD = "README.md"
EXAMPLE = re.compile(r'^- text: "(.+)"$', re.MULTILINE)


def folder_of(name: str) -> Path:
    """Where the package has one of `NAMES`."""
    return Path(__file__).parent / name


def examples_of(path: Path) -> tuple[str, ...]:
    """What its card says to ask a packaged model; nothing for any other path."""
    if path not in map(folder_of, NAMES):
        return ()
    front, _, _ = (path / CARD).read_text(encoding="utf-8").removeprefix("---\n").partition("\n---\n")
    return tuple(EXAMPLE.findall(front))
