"""What a conversation becomes before it is tokens: ordinary text and special tokens, each trainable or not.

Ordinary text between two special tokens is encoded in one go, so tokens are those of the plain way, white space at the
seams included. Where a trainable part begins or ends inside such a run, the token across the seam counts as trainable,
as in `transformers`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

from porcelet.tokenizer import Tokenizer


@dataclass(frozen=True)
class Piece:
    """Ordinary text, or the id of a special token; `trainable` if the assistant produced it."""

    content: str | int
    trainable: bool = False


@dataclass(frozen=True)
class Rendered:
    """A conversation's token ids.

    `last_mark` is the last special token. If it is `<think>`, the model's text begins inside its reasoning.
    """

    tokens: list[int]
    last_mark: str | None
    _mask: Callable[[], list[bool]]

    @property
    def opens_reasoning(self) -> bool:
        return self.last_mark == "<think>"

    @cached_property
    def trainable(self) -> list[bool]:
        """For each token, whether the assistant produced it: reasoning, content, tool calls and the token that ends.

        Raises:
            ModelError: the model's own template changes what the assistant said, so its place cannot be told.
        """
        mask = self._mask()
        assert len(mask) == len(self.tokens), "one flag a token"
        return mask


def tokens_of(pieces: Sequence[Piece], tokenizer: Tokenizer) -> list[int]:
    """Token ids of all pieces."""
    return [id for run in _runs(pieces) for id in _encode(run, tokenizer)]


def mask_of(pieces: Sequence[Piece], tokenizer: Tokenizer) -> list[bool]:
    """One flag for each of `tokens_of`."""
    return [flag for run in _runs(pieces) for flag in _flags(run, tokenizer)]


def _runs(pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
    """Neighbours that are encoded together: all the text, or all the special tokens."""
    filled = (piece for piece in pieces if piece.content != "")
    return (list(run) for _, run in groupby(filled, key=lambda piece: isinstance(piece.content, int)))


def _encode(run: list[Piece], tokenizer: Tokenizer) -> list[int]:
    ids = [piece.content for piece in run if isinstance(piece.content, int)]
    return ids or tokenizer.encode(_text(run))


def _flags(run: list[Piece], tokenizer: Tokenizer) -> list[bool]:
    if isinstance(run[0].content, int):
        return [piece.trainable for piece in run]
    spans = tokenizer.spans(_text(run))
    flags = [False] * len(spans)
    end = 0
    for trainable, parts in groupby(run, key=lambda piece: piece.trainable):
        start, end = end, end + len(_text(list(parts)))
        if trainable:
            flags = [flag or (a < end and b > start) for flag, (a, b) in zip(flags, spans, strict=True)]
    return flags


def _text(run: Sequence[Piece]) -> str:
    return "".join(piece.content for piece in run if isinstance(piece.content, str))
