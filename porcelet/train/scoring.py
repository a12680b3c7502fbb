"""Log-probabilities of drawn tokens under a model: packed, prompts shared, no gradient, and no other tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from porcelet.config import TrainConfig
from porcelet.models.attention import PackedView
from porcelet.models.transformer import Transformer
from porcelet.train.loss import drawn_logprobs
from porcelet.train.packing import cut, pack
from porcelet.train.policy import Drawn
from porcelet.types import Sample


@torch.no_grad()
def score_drawn(model: Transformer, samples: Sequence[Sample], config: TrainConfig) -> list[tuple[float, ...]]:
    """For each sample a list as long as its tokens, at the sampling temperature; 0 for what was not drawn."""
    scores: list[tuple[float, ...]] = []
    for some in cut([_asking(sample) for sample in samples], config.tokens_per_pass):
        batch = pack(some)
        hidden = model(batch.tokens, batch.positions, PackedView(batch.segments))
        logprobs = drawn_logprobs(model, hidden, batch, Drawn.of(batch), config.policy.temperature)
        pieces = logprobs.split([sample.num_drawn for sample in some])
        scores += [
            (0.0,) * (len(sample.tokens) - sample.num_drawn) + tuple(piece.tolist())
            for sample, piece in zip(some, pieces, strict=True)
        ]
    return scores


def _asking(sample: Sample) -> Sample:
    """A sample whose drawn tokens are all to be predicted, as those with a reference are."""
    return dataclasses.replace(sample, weights=(), reference_logprobs=(0.0,) * len(sample.tokens))
