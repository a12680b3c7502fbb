"""From logits to tokens: per-request parameters become the columns of one vectorised draw.

A draw's random number depends on the request's seed and the token's number alone, never on the batch, so a seeded
request repeats whatever runs beside it.
"""

from __future__ import annotations

import hashlib
import random
import struct

import torch
from torch import Tensor

from porcelet.kernels.sample import sample
from porcelet.types import Batch


class Sampler:
    """Draws one token for each sampled sequence of a batch. Requests without a seed draw from `seed`'s stream."""

    def __init__(self, seed: int | None = None) -> None:
        self._random = random.Random(seed)

    @torch.inference_mode()
    def draw(self, logits: Tensor, batch: Batch) -> tuple[list[int], list[float]]:
        """Tokens and log-probabilities for the rows of `logits` [number of sampled sequences, V]."""
        rows = [i for i, sampled in enumerate(batch.sampled) if sampled]
        if not rows:
            return [], []
        params = [batch.params[i] for i in rows]
        tokens, logprobs = sample(
            logits,
            torch.tensor([p.temperature for p in params], dtype=torch.float32),
            torch.tensor([p.top_k for p in params]),
            torch.tensor([p.top_p for p in params], dtype=torch.float32),
            torch.tensor(
                [self._uniform(batch.params[i].seed, batch.num_generated[i]) for i in rows], dtype=torch.float64
            ),
        )
        return tokens.tolist(), logprobs.tolist()

    def _uniform(self, seed: int | None, index: int) -> float:
        return self._random.random() if seed is None else uniform(seed, index)


def uniform(seed: int, index: int) -> float:
    """The `index`-th number in [0, 1) of a seed's stream, by hashing; 53 bits."""
    digest = hashlib.blake2b(struct.pack("<QQ", seed, index), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53
