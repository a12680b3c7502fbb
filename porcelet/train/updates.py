"""How often a step's samples are learnt from, and in which pieces: one step of the optimizer each."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, groupby

from porcelet.config import PolicyConfig
from porcelet.train.hashing import shuffled
from porcelet.types import Sample


def batches(samples: Sequence[Sample], config: PolicyConfig, seed: int, step: int) -> list[list[Sample]]:
    """What each update of a step learns from: all samples, or a part of the groups, shuffled anew each time round.

    A group stays whole, as its answers share their prompt. Parts in which nothing teaches are left out.
    """
    found = []
    for update in range(config.updates_per_rollout):
        found += _parts(samples, config.minibatches, (seed, "minibatch", step, update))
    return [batch for batch in found if any(sample.teaches for sample in batch)]


def _parts(samples: Sequence[Sample], count: int, key: tuple[object, ...]) -> list[list[Sample]]:
    if count == 1:
        return [list(samples)]
    groups = [list(group) for _, group in groupby(samples, key=lambda sample: sample.tokens[: sample.num_prompt])]
    order = shuffled(groups, *key)
    return [list(chain.from_iterable(order[part::count])) for part in range(count)]
