"""Several sources in given shares, with random access: what is drawn at a position depends on (seed, position) alone.

Positions come in blocks of 4096. A block holds each source a fixed number of times, its weight's share, in an order
shuffled by hash. So how often a source was drawn before any position is a multiplication and a count in the block, and
nothing has to be replayed or stored when a run resumes. A weight is therefore kept to one part in 4096.

A draw names a source and how often that source was drawn before, so neighbouring draws of a source are neighbours in
it. A source never runs out: it begins its next epoch, while others may still be in their first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from porcelet.errors import InputError
from porcelet.train.corpus.permutation import Permutation

BLOCK = 4096


class Mixture:
    """Draws sources by `weights`, which need not add up to 1."""

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        """A source of weight 0 is never drawn.

        Raises:
            InputError: a weight is negative or not finite, all are zero, or one is too small to be kept at all.
        """
        self._counts = _shares(weights)
        self._seed = seed
        self._order = lru_cache(maxsize=2)(self._make_order)

    def draw(self, position: int) -> tuple[int, int]:
        """The source at a position, and how often it was drawn at earlier ones."""
        block, place = divmod(position, BLOCK)
        if len(self._counts) == 1:
            return 0, position
        source, count = self._order(block)[place]
        return source, block * self._counts[source] + count

    def _make_order(self, block: int) -> list[tuple[int, int]]:
        """The source at each place of a block, and how often the block has it at earlier ones."""
        slots = Permutation(BLOCK, "mixture", self._seed, block)(np.arange(BLOCK))
        sources = np.repeat(np.arange(len(self._counts)), self._counts)[slots]
        counts = np.empty(BLOCK, np.int64)
        for source in range(len(self._counts)):
            counts[sources == source] = np.arange(self._counts[source])
        return list(zip(sources.tolist(), counts.tolist(), strict=True))


def _shares(weights: Sequence[float]) -> list[int]:
    """How many of a block's places each source has; largest remainders first."""
    if not weights or not all(0 <= weight < math.inf for weight in weights) or not any(weights):
        raise InputError(f"the sources' weights are {list(weights)}; they must be 0 or more, and one above 0")
    exact = [weight / sum(weights) * BLOCK for weight in weights]
    counts = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])
    for i in by_remainder[: BLOCK - sum(counts)]:
        counts[i] += 1
    for weight, count in zip(weights, counts, strict=True):
        if weight and not count:
            raise InputError(
                f"the weight {weight} of {sum(weights)} is below 1/{BLOCK}; raise it or leave the source out"
            )
    return counts
