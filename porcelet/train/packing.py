"""Sequences of any length side by side in one flat batch: no padding, and a shared prompt lies there once.

A sample of n tokens has n - 1 rows, each of which has read one token more. Samples that begin with the same prompt,
as the G answers of a group do, share its rows: P + G·R rows in the place of G·(P + R). The prompt's last row then
predicts the first token of every answer, so predictions are a list of their own: which row, which target, which weight.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain, pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from porcelet.kernels.attention import Segments
from porcelet.types import Sample

if TYPE_CHECKING:
    from jaxtyping import Float, Int


@dataclass(frozen=True)
class Further:
    """What the MTP layer computes: U rows, unshared, each from a row of the model and the token that follows it."""

    rows: Int[Tensor, "U"]
    tokens: Int[Tensor, "U"]
    positions: Int[Tensor, "U"]
    segments: Segments
    targets: Int[Tensor, "U"]  # two tokens ahead of the row
    weights: Float[Tensor, "U"]


@dataclass(frozen=True)
class Packed:
    """A flat batch of T rows and its N predictions: row rows[i] predicts targets[i], a token of sample samples[i].

    Only what has a weight or an advantage is predicted.
    """

    tokens: Int[Tensor, "T"]
    positions: Int[Tensor, "T"]
    segments: Segments
    rows: Int[Tensor, "N"]
    targets: Int[Tensor, "N"]
    samples: Int[Tensor, "N"]
    weights: Float[Tensor, "N"]
    advantages: Float[Tensor, "N"]
    old_logprobs: Float[Tensor, "N"]
    reference_logprobs: Float[Tensor, "N"]
    further: Further


def pack(samples: Sequence[Sample], *, share: bool = True) -> Packed:
    """Lay samples side by side; each needs two tokens at least, and the first token's entries must be 0 or absent.

    Without `share` every sample has rows of its own, prompt included.
    """
    layout = _Layout()
    prompts = Counter(_prompt(sample) for sample in samples) if share else Counter()
    for sample in samples:
        _check(sample)
        prompt = _prompt(sample)
        layout.add(sample, prompt if prompts[prompt] > 1 else ())
    return layout.packed(samples)


@dataclass
class _Layout:
    """Rows and predictions so far."""

    pieces: list[tuple[int, ...]] = field(default_factory=list)  # the tokens that each segment reads
    begins: list[int] = field(default_factory=list)  # and the position of its first
    prefixes: list[int] = field(default_factory=list)
    num_rows: int = 0
    places: dict[tuple[int, ...], tuple[int, int]] = field(default_factory=dict)  # prompt → its segment, its first row
    row_lists: list[Sequence[int]] = field(default_factory=list)  # of each sample: the row behind each of its tokens

    def add(self, sample: Sample, prompt: tuple[int, ...]) -> None:
        """One sample behind a shared prompt, or behind none."""
        if not prompt:
            first = self._segment(sample.tokens[:-1], 0, -1)
            self.row_lists.append(range(first, first + len(sample.tokens) - 1))
            return
        if prompt not in self.places:
            self.places[prompt] = len(self.pieces), self._segment(prompt, 0, -1)
        segment, first = self.places[prompt]
        rows: Sequence[int] = range(first, first + len(prompt))
        own = sample.tokens[len(prompt) : -1]
        if own:
            start = self._segment(own, len(prompt), segment)
            rows = [*rows, *range(start, start + len(own))]
        self.row_lists.append(rows)

    def _segment(self, tokens: tuple[int, ...], position: int, prefix: int) -> int:
        first = self.num_rows
        self.pieces.append(tokens)
        self.begins.append(position)
        self.prefixes.append(prefix)
        self.num_rows += len(tokens)
        return first

    def packed(self, samples: Sequence[Sample]) -> Packed:
        lengths = [len(piece) for piece in self.pieces]
        positions = [range(begin, begin + len(piece)) for begin, piece in zip(self.begins, self.pieces, strict=True)]
        columns = [[_entries(getattr(sample, name), sample) for sample in samples] for name in _COLUMNS]
        weights, advantages, old, reference = (_floats(column) for column in columns)
        chosen = ((weights != 0) | (advantages != 0)).nonzero()[:, 0]
        numbers = torch.arange(len(samples)).repeat_interleave(torch.tensor([len(s.tokens) - 1 for s in samples]))
        return Packed(
            tokens=_integers(self.pieces),
            positions=_integers(positions),
            segments=Segments(Segments.of(*lengths).offsets, tuple(self.prefixes)),
            rows=_integers(self.row_lists)[chosen],
            targets=_integers(sample.tokens[1:] for sample in samples)[chosen],
            samples=numbers[chosen],
            weights=weights[chosen],
            advantages=advantages[chosen],
            old_logprobs=old[chosen],
            reference_logprobs=reference[chosen],
            further=self._further(samples),
        )

    def _further(self, samples: Sequence[Sample]) -> Further:
        lengths = [len(sample.tokens) - 2 for sample in samples]
        return Further(
            rows=_integers(rows[:-1] for rows in self.row_lists),
            tokens=_integers(sample.tokens[1:-1] for sample in samples),
            positions=_integers(map(range, lengths)),
            segments=Segments.of(*lengths),
            targets=_integers(sample.tokens[2:] for sample in samples),
            weights=_floats(_entries(sample.weights, sample)[1:] for sample in samples),
        )


_COLUMNS = ("weights", "advantages", "old_logprobs", "reference_logprobs")


def _prompt(sample: Sample) -> tuple[int, ...]:
    """The tokens that may be shared; never the last one, whose prediction is the sample's own."""
    return sample.tokens[: min(sample.num_prompt, len(sample.tokens) - 1)]


def _check(sample: Sample) -> None:
    assert len(sample.tokens) > 1, "a sequence of one token predicts nothing"
    assert not any(sample.weights[:1] + sample.advantages[:1]), "nothing predicts the first token"


def _entries(values: tuple[float, ...], sample: Sample) -> Sequence[float]:
    assert len(values) in (0, len(sample.tokens)), "a sample's lists are as long as its tokens"
    return values[1:] if values else (0.0,) * (len(sample.tokens) - 1)


def _integers(pieces: Iterable[Iterable[int]]) -> Tensor:
    return torch.tensor(list(chain.from_iterable(pieces)), dtype=torch.int64)


def _floats(pieces: Iterable[Iterable[float]]) -> Tensor:
    return torch.tensor(list(chain.from_iterable(pieces)), dtype=torch.float32)


def passes(samples: Sequence[Sample], max_tokens: int) -> list[list[Sample]]:
    """Samples in order, cut into lists of at most `max_tokens` tokens (0: one list); a longer sample is alone.

    Samples that share a prompt count it once, so a group stays together where it fits.
    """
    cuts, total, prompts = [0], 0, set[tuple[int, ...]]()
    for number, sample in enumerate(samples):
        prompt = _prompt(sample)
        size = len(sample.tokens) - 1 - (len(prompt) if sample.num_prompt and prompt in prompts else 0)
        if max_tokens and number > cuts[-1] and total + size > max_tokens:
            cuts.append(number)
            total, prompts, size = 0, set(), len(sample.tokens) - 1
        total += size
        prompts.add(prompt)
    return [list(samples[a:b]) for a, b in pairwise([*cuts, len(samples)]) if b > a]
