"""What was met before is dropped: whole documents, or single paragraphs of them.

Two texts count as the same if they differ in case and white space alone. Of each the first one stays. A text is
remembered by 63 bits of its hash, so 10^8 different ones collide with a probability of 0.05 %; a million take some
60 MB. Near-duplicates are minhash.py's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from porcelet.train.corpus.readers import Document
from porcelet.train.hashing import hashed

MIN_CHARACTERS = 40  # shorter paragraphs (headings, a brace, "Parameters:") may come again

_GAP = re.compile(r"(\n\s*\n)")


def drop_repeats(documents: Iterable[Document]) -> Iterator[Document]:
    """The documents whose text was not met before."""
    seen: set[int] = set()
    for document in documents:
        key = fingerprint(document.text)
        if key not in seen:
            seen.add(key)
            yield document


def drop_repeated_paragraphs(text: str, seen: set[int], min_characters: int = MIN_CHARACTERS) -> str:
    """The text without the paragraphs that are in `seen`, to which it adds its own.

    Paragraphs are parted by blank lines. Those of fewer than `min_characters` always stay.
    """
    pieces = [*_GAP.split(text), ""]
    kept = []
    for paragraph, gap in zip(pieces[::2], pieces[1::2], strict=True):
        if len(paragraph.strip()) >= min_characters:
            key = fingerprint(paragraph)
            if key in seen:
                continue
            seen.add(key)
        kept += [paragraph, gap]
    return "".join(kept)


def fingerprint(text: str) -> int:
    """63 bits of a text, the same whatever its case and white space."""
    return hashed(" ".join(text.casefold().split()))
