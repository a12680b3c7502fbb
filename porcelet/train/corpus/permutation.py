"""A shuffle of 0..n-1 that needs no memory: any place of it is computed when it is asked for.

A Feistel network permutes the numbers of 2k bits whatever its round function; those that fall outside 0..n-1 are sent
through again until they fall inside ("cycle walking", Black and Rogaway 2002). 4^k is below 4n, so that takes four
rounds of the network on average at most.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from porcelet.train.hashing import hashed

if TYPE_CHECKING:
    from jaxtyping import Int64, UInt64

NUM_ROUNDS = 6


class Permutation:
    """A permutation of range(size), decided by `key` (a seed, an epoch, ...)."""

    def __init__(self, size: int, *key: object) -> None:
        assert size > 0, "there is nothing to permute"
        self.size = size
        self._half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
        self._keys = [np.uint64(hashed("permutation", *key, i)) for i in range(NUM_ROUNDS)]

    def __call__(self, positions: Int64[np.ndarray, "N"]) -> Int64[np.ndarray, "N"]:
        """What lies at `positions`, each in 0..size-1."""
        values = self._shuffle(np.asarray(positions).astype(np.uint64))
        while len(outside := np.flatnonzero(values >= self.size)):
            values[outside] = self._shuffle(values[outside])
        return values.astype(np.int64)

    def _shuffle(self, values: UInt64[np.ndarray, "N"]) -> UInt64[np.ndarray, "N"]:
        bits = np.uint64(self._half_bits)
        mask = np.uint64((1 << self._half_bits) - 1)
        left, right = values >> bits, values & mask
        for key in self._keys:
            left, right = right, left ^ (mixed(right + key) & mask)
        return (left << bits) | right


def mixed(values: UInt64[np.ndarray, "N"]) -> UInt64[np.ndarray, "N"]:
    """64 bits of which each depends on all bits of the input: splitmix64's finaliser (Steele et al. 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
