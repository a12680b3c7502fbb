"""Training text that contains what a model will be asked: found by n words in a row that both share, and dropped.

13 words is GPT-3's choice (Brown et al. 2020, appendix C). The evaluation's n-grams are kept as a sorted array of
64-bit hashes. A text of fewer than n words cannot be looked for; `num_unchecked` says how many there were.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from porcelet.errors import InputError
from porcelet.train.corpus.ngrams import ngram_hashes
from porcelet.train.corpus.readers import Document

if TYPE_CHECKING:
    from jaxtyping import UInt64

NGRAM = 13  # words


@dataclass(frozen=True)
class Evaluation:
    """The n-grams of the texts to be kept out of training."""

    ngrams: UInt64[np.ndarray, "N"]
    length: int
    num_unchecked: int

    @classmethod
    def of(cls, texts: Iterable[str], length: int = NGRAM) -> Evaluation:
        """Of evaluation texts, questions and answers alike.

        Raises:
            InputError: `length` is not positive, or no text has that many words.
        """
        if length < 1:
            raise InputError(f"the n-gram length is {length}; it must be at least 1")
        found = [ngram_hashes(text, length) for text in texts]
        if not any(map(len, found)):
            raise InputError(f"none of the {len(found)} evaluation texts has {length} words; choose shorter n-grams")
        return cls(np.unique(np.concatenate(found)), length, sum(not len(grams) for grams in found))

    def overlap(self, text: str) -> float:
        """The share of a text's n-grams that the evaluation has too; 0 for a text that is too short."""
        grams = ngram_hashes(text, self.length)
        if not len(grams):
            return 0.0
        places = np.searchsorted(self.ngrams, grams).clip(max=len(self.ngrams) - 1)
        return float((self.ngrams[places] == grams).mean())


@dataclass
class Report:
    """What was taken out: (place, share of n-grams in common) of each document."""

    dropped: list[tuple[str, float]] = field(default_factory=list)


def decontaminate(documents: Iterable[Document], evaluation: Evaluation, report: Report) -> Iterator[Document]:
    """The documents that share no n-gram with the evaluation; `report` names the others."""
    for document in documents:
        overlap = evaluation.overlap(document.text)
        if overlap:
            report.dropped.append((document.place, overlap))
        else:
            yield document
