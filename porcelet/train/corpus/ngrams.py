"""Hashes of every n words in a row: what near-duplicates and leaked test questions have in common with the original.

Words are runs of letters, digits and underscores, without regard to case, so layout and punctuation do not matter.
"""

from __future__ import annotations

import hashlib
import re
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from porcelet.train.corpus.permutation import mixed

if TYPE_CHECKING:
    from jaxtyping import UInt64

_WORD = re.compile(r"\w+")
_BASE = 0x9E3779B97F4A7C15  # odd, so its powers lose no bits


def ngram_hashes(text: str, length: int) -> UInt64[np.ndarray, "N"]:
    """One 64-bit number for each `length` words in a row; empty if the text has fewer."""
    hashes = np.array([_word_hash(word) for word in _WORD.findall(text.casefold())], dtype=np.uint64)
    if len(hashes) < length:
        return hashes[:0]
    powers = np.array([pow(_BASE, i, 1 << 64) for i in range(length)], dtype=np.uint64)
    sums = np.zeros(len(hashes) - length + 1, dtype=np.uint64)
    for i, power in enumerate(powers):
        sums += hashes[i : i + len(sums)] * power
    return mixed(sums)


@lru_cache(maxsize=1 << 18)
def _word_hash(word: str) -> int:
    digest = hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")
