"""From token stores to batches of a fixed size, without losing or repeating a token.

A document is [begin] its tokens [end], and every token but the first is to be predicted once an epoch. An epoch is one
long row of predictions: documents in an order shuffled by hash, each document's predictions in order. Step s takes
predictions s·T to (s+1)·T of that row, which goes on with the next epoch where one ends, so a step is a function of
its number and resuming needs nothing else. Within a document it is cut at every `context` predictions, and where the
step ends; a piece begins with the last token of the one before, so no target is lost.

With several stores a mixture (mix.py) draws, for windows of `context` predictions each, the store whose row goes on. A
step joins a store's windows, which follow each other, so that they cut no document.

A piece is a sample that sees nothing but itself. Without document masks (V3's way, report section 4.1) the pieces of a
step are joined up to `context` tokens instead, and see the documents before them. Nothing then asks the end of one
document to predict the begin of the next.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from porcelet.errors import InputError
from porcelet.train.corpus.mix import Mixture
from porcelet.train.corpus.permutation import Permutation
from porcelet.train.corpus.store import Store
from porcelet.types import Sample

if TYPE_CHECKING:
    from jaxtyping import Int64


@dataclass(frozen=True)
class Piece:
    """Predictions `start` to `stop` of a document, and the tokens that make them: one more than there are predictions.

    `number` is the document's in its store; it has `length` predictions in all.
    """

    number: int
    start: int
    stop: int
    length: int


class Row:
    """A store's predictions, epoch after epoch, as one endless row."""

    def __init__(self, store: Store, seed: int) -> None:
        self.store = store
        self._seed = seed
        # Two integers a document in memory; the order of another epoch is computed when it is reached.
        self._lengths = np.diff(store.offsets) + 1  # [D] a document's tokens and its end
        self.num_predictions = int(self._lengths.sum())
        self._order = lru_cache(maxsize=2)(self._make_order)

    def pieces(self, start: int, stop: int) -> Iterator[Piece]:
        """The documents' parts that predictions `start` to `stop` of the row are made of."""
        while start < stop:
            epoch, place = divmod(start, self.num_predictions)
            end = min(stop - start + place, self.num_predictions)
            yield from self._epoch_pieces(epoch, place, end)
            start += end - place

    def tokens(self, piece: Piece) -> list[int]:
        """What a piece reads and predicts."""
        header, document = self.store.header, self.store.document(piece.number)
        begin = [header.bos] if piece.start == 0 else []
        end = [header.eos] if piece.stop == piece.length else []
        return [*begin, *document[max(piece.start - 1, 0) : piece.stop].tolist(), *end]

    def _epoch_pieces(self, epoch: int, start: int, stop: int) -> Iterator[Piece]:
        numbers, ends = self._order(epoch)
        first = int(np.searchsorted(ends, start, side="right"))
        while start < stop:
            number, end = int(numbers[first]), int(ends[first])
            length = int(self._lengths[number])
            begin = end - length
            yield Piece(number, start - begin, min(stop, end) - begin, length)
            start, first = end, first + 1

    def _make_order(self, epoch: int) -> tuple[Int64[np.ndarray, "D"], Int64[np.ndarray, "D"]]:
        """The documents in an epoch's order, and where each ends in its row."""
        count = len(self._lengths)
        numbers = Permutation(count, "documents", self._seed, epoch)(np.arange(count))
        return numbers, self._lengths[numbers].cumsum()


class Pretraining:
    """The source of pre-training: step → its samples, and what there is to log about them."""

    def __init__(
        self,
        stores: Sequence[Store],
        *,
        tokens_per_step: int,
        context: int,
        seed: int,
        weights: Sequence[float] = (),
        document_mask: bool = True,
    ) -> None:
        """`weights` are the stores' shares of the predictions; empty, a store's share is its size.

        Raises:
            InputError: there is no store, they have different tokenizers, or the numbers cannot be used.
        """
        _check(stores, tokens_per_step, context, weights)
        self._rows = [Row(store, seed) for store in stores]
        sizes = [row.num_predictions for row in self._rows]
        self._mixture = Mixture(weights or sizes, seed)
        self._tokens_per_step, self._context = tokens_per_step, context
        self._document_mask = document_mask

    def __call__(self, step: int) -> tuple[list[Sample], dict[str, float]]:
        first = step * self._tokens_per_step
        parts = list(self._parts(first, first + self._tokens_per_step))
        cut = _masked if self._document_mask else _joined
        return cut(parts, self._context), {"epoch": self._epoch(step + 1)}

    def _parts(self, start: int, stop: int) -> Iterator[tuple[Row, Piece]]:
        """The documents' parts of a range of predictions, all stores mixed."""
        if len(self._rows) == 1:
            yield from ((self._rows[0], piece) for piece in self._rows[0].pieces(start, stop))
            return
        ranges: dict[int, tuple[int, int]] = {}
        for window in range(start // self._context, -(-stop // self._context)):
            source, count = self._mixture.draw(window)
            low = max(start - window * self._context, 0) + count * self._context
            high = min(stop - window * self._context, self._context) + count * self._context
            first, end = ranges.get(source, (low, low))
            assert end == low, "a store's windows follow each other"
            ranges[source] = first, high
        for source, (low, high) in ranges.items():
            yield from ((self._rows[source], piece) for piece in self._rows[source].pieces(low, high))

    def _epoch(self, step: int) -> float:
        """How often the corpus as a whole has been read after so many steps."""
        return step * self._tokens_per_step / sum(row.num_predictions for row in self._rows)


def _masked(parts: Sequence[tuple[Row, Piece]], context: int) -> list[Sample]:
    """A sample for each part, cut where a document's predictions reach a multiple of the context."""
    samples = []
    for row, piece in parts:
        inner = range((piece.start // context + 1) * context, piece.stop, context)
        for start, stop in pairwise([piece.start, *inner, piece.stop]):
            tokens = row.tokens(Piece(piece.number, start, stop, piece.length))
            samples.append(Sample(tokens=tuple(tokens), weights=(0.0, *(1.0,) * (stop - start))))
    return samples


def _joined(parts: Sequence[tuple[Row, Piece]], context: int) -> list[Sample]:
    """Samples of up to context + 1 tokens, whatever documents they are from; each begins with its predecessor's end."""
    tokens: list[int] = []
    weights: list[float] = []
    previous: tuple[Row, int, int] | None = None
    for row, piece in parts:
        follows = previous == (row, piece.number, piece.start)
        part = row.tokens(piece)[1 if follows else 0 :]
        tokens += part
        weights += [0.0] * (0 if follows else 1) + [1.0] * (piece.stop - piece.start)
        previous = row, piece.number, piece.stop
    samples = []
    for start in range(0, len(tokens) - 1, context):
        cut = slice(start, start + context + 1)
        samples.append(Sample(tokens=tuple(tokens[cut]), weights=(0.0, *weights[cut][1:])))
    return samples


def _check(stores: Sequence[Store], tokens_per_step: int, context: int, weights: Sequence[float]) -> None:
    if not stores:
        raise InputError("there is no corpus to train on; name a folder that `porcelet data tokenize` wrote")
    if tokens_per_step < 1 or context < 1:
        raise InputError(f"tokens_per_step is {tokens_per_step} and context {context}; both must be at least 1")
    if weights and len(weights) != len(stores):
        raise InputError(f"there are {len(weights)} weights for {len(stores)} corpora; give one each, or none")
    for store in stores:
        if store.header.tokenizer_sha256 != stores[0].header.tokenizer_sha256:
            raise InputError(f"{store.path} and {stores[0].path} were tokenized by different tokenizers")
