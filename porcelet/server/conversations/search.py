"""What a search compares: texts without case and accents, in any language.

A text is kept a second time, folded, so that the database's own LIKE finds a word in it; Chinese needs no word borders
that way. Left out: an index over words. A search reads all that its owner ever wrote, which takes 0.15 s for 40 MB.
"""

from __future__ import annotations

from unicodedata import combining, normalize

MAX_WORDS = 10
_EXCERPT_BEFORE, _EXCERPT_AFTER = 40, 120  # characters around what was found


def fold(text: str) -> str:
    """A text as searches see it: NFKD and casefold without marks, so "É", "é" and "e" are one, and "ß" is "ss"."""
    folded = normalize("NFKD", text).casefold()
    return folded if folded.isascii() else "".join(letter for letter in folded if not combining(letter))


def words_of(query: str) -> list[str]:
    """What a query asks for, folded; each of them must occur."""
    return [word for word in map(fold, query.split()[:MAX_WORDS]) if word]


def like(word: str) -> str:
    """A pattern of SQL's LIKE that finds `word` anywhere; to be escaped with a backslash."""
    return "%" + word.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_") + "%"


def excerpt(text: str, word: str) -> str:
    """One line around the first place where the folded `word` occurs in `text`."""
    at = _place(text, word)
    start, end = max(at - _EXCERPT_BEFORE, 0), at + _EXCERPT_AFTER
    line = " ".join(text[start:end].split())
    return f"{'…' if start else ''}{line}{'…' if end < len(text) else ''}"


def _place(text: str, word: str) -> int:
    """Where in `text` the `word` begins that was found in its folded form, which may be longer or shorter."""
    found, length = fold(text).find(word), 0
    if text.isascii():
        return found
    for place, letter in enumerate(text):
        length += len(fold(letter))
        if length > found:
            return place
    return 0
