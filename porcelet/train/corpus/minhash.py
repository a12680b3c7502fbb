"""Near-duplicates among any number of documents, without comparing each with each.

A document is the set of its 5-word sequences. The smallest hash of a set equals another set's smallest with the
probability of their Jaccard similarity J = |A and B| / |A or B| (Broder 1997), so the share of equal values in two
signatures of 120 such minima estimates J, with a standard error of at most 0.046. Signatures are cut into 24 bands of
5: two documents meet if any band is equal, which happens with probability 1 - (1 - J^5)^24 (99.99 % at J = 0.8, 54 % at
0.5, 5 % at 0.3). Only those that meet are compared. Memory: some 3 kB a document that stays.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from porcelet.errors import InputError
from porcelet.train.corpus.ngrams import ngram_hashes
from porcelet.train.corpus.permutation import mixed
from porcelet.train.corpus.readers import Document

if TYPE_CHECKING:
    from jaxtyping import UInt32

NGRAM = 5  # words
NUM_BANDS, BAND_ROWS = 24, 5
NUM_HASHES = NUM_BANDS * BAND_ROWS
CHUNK = 2048  # n-grams hashed at once: 2 MB

# Multiply-shift hashing (Dietzfelbinger et al. 1997) with fixed odd multipliers and offsets.
_MULTIPLIERS = mixed(np.arange(1, NUM_HASHES + 1, dtype=np.uint64)) | np.uint64(1)
_OFFSETS = mixed(np.arange(NUM_HASHES + 1, 2 * NUM_HASHES + 1, dtype=np.uint64))


def drop_near_duplicates(documents: Iterable[Document], threshold: float = 0.8) -> Iterator[Document]:
    """The documents that are not like one before them: estimated similarity below `threshold`.

    A document of fewer than 5 words has no signature and stays; dedup.py finds it if it comes again.

    Raises:
        InputError: `threshold` lies outside 0.4..1; below, too many pairs would never meet.
    """
    if not 0.4 <= threshold <= 1:
        raise InputError(f"the similarity threshold is {threshold}; it must lie in 0.4..1")
    index = Index()
    for document in documents:
        signature = signature_of(document.text)
        if signature is None or index.add(signature, threshold) is None:
            yield document


def signature_of(text: str) -> UInt32[np.ndarray, "120"] | None:
    """The minima of 120 hash functions over a text's 5-word sequences; None if it has none."""
    grams = np.unique(ngram_hashes(text, NGRAM))
    if not len(grams):
        return None
    minima = np.full(NUM_HASHES, 2**32 - 1, dtype=np.uint64)
    for start in range(0, len(grams), CHUNK):
        values = (grams[start : start + CHUNK, None] * _MULTIPLIERS + _OFFSETS) >> np.uint64(32)  # [chunk, 120]
        np.minimum(minima, values.min(axis=0), out=minima)
    return minima.astype(np.uint32)


class Index:
    """Signatures of documents unlike each other, found again by their bands."""

    def __init__(self) -> None:
        self._signatures: list[UInt32[np.ndarray, "120"]] = []
        self._bands: dict[tuple[int, bytes], list[int]] = {}

    def add(self, signature: UInt32[np.ndarray, "120"], threshold: float) -> int | None:
        """Store a signature, unless an earlier one is at least `threshold` like it: then return that one's number."""
        keys = [(band, row.tobytes()) for band, row in enumerate(signature.reshape(NUM_BANDS, BAND_ROWS))]
        candidates = sorted({number for key in keys for number in self._bands.get(key, ())})
        for number in candidates:
            if similarity(self._signatures[number], signature) >= threshold:
                return number
        for key in keys:
            self._bands.setdefault(key, []).append(len(self._signatures))
        self._signatures.append(signature)
        return None


def similarity(a: UInt32[np.ndarray, "120"], b: UInt32[np.ndarray, "120"]) -> float:
    """The estimated Jaccard similarity of two documents."""
    return float((a == b).mean())
