"""Guessing tokens ahead, and when that pays.

A guess is only ever a guess of what the draw will be: the model scores all guesses of a sequence in one step, each
position is drawn as it would have been without them (the same random number, see sampler.py), and the first draw that
differs from its guess ends the run. So speculation changes no token and no distribution; a guess can only save steps.

`Lookup` finds the last tokens earlier in the text and proposes what followed there (prompt lookup decoding, A. Saxena
2023): for models without a multi-token-prediction layer, whose guesses come from the runner. `Pace` measures what a
guess costs, `Acceptance` what it brings; speculation goes off where that is less.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import cycle, islice

from porcelet.config import ModelConfig
from porcelet.errors import InputError

NGRAMS = (4, 3, 2)  # longest first
MAX_DRAFTS = {"lookup": 8, "mtp": 1, "off": 0}
MAX_READ = 128  # tokens a step
WINDOW = 8192  # tokens of a prompt that are looked up
FORGETTING = 0.97  # of a step's weight in the measurement of the next
LEARNING = 0.1  # of a guess's weight in its sequence's acceptance
PRIOR = 0.5


def choose_drafter(speculation: str, model: ModelConfig) -> str:
    """Who guesses: "mtp", "lookup" or "off".

    Raises:
        InputError: the MTP layer is asked for, and the model has none.
    """
    if speculation == "mtp" and not model.num_nextn_predict_layers:
        raise InputError("speculation is 'mtp', but this model has no MTP layer; use 'lookup' or 'auto'")
    if speculation == "auto":
        return "mtp" if model.num_nextn_predict_layers else "lookup"
    return speculation


class Lookup:
    """Where each n-gram of one text last occurred."""

    def __init__(self) -> None:
        self._after: dict[tuple[int, ...], int] = {}
        self._num_read = 0

    def propose(self, tokens: Sequence[int], most: int) -> list[int]:
        """Up to `most` tokens that followed the text's last n-gram where it occurred before."""
        self._read(tokens, MAX_READ)
        for size in NGRAMS:
            start = self._after.get(tuple(tokens[-size:])) if len(tokens) > size else None
            if start is not None:
                return list(islice(cycle(tokens[start : start + most]), most))  # what repeats goes on repeating
        return []

    def fork(self) -> Lookup:
        """The same for another text that begins alike."""
        other = Lookup()
        other._after, other._num_read = dict(self._after), self._num_read
        return other

    def _read(self, tokens: Sequence[int], most: int) -> None:
        """Enter the n-grams that a token follows, all but the ones at the very end; `most` at a time, since a prompt of
        thousands must not hold up a step, and of a long one its end alone."""
        start = max(self._num_read, len(tokens) - WINDOW, 1)
        for end in range(start, min(start + most, len(tokens))):
            for size in NGRAMS:
                if end >= size:
                    self._after[tuple(tokens[end - size : end])] = end
            self._num_read = end + 1


class Acceptance:
    """How likely the next guess is right, from how the last ones went."""

    def __init__(self, rate: float = PRIOR) -> None:
        self.rate = rate

    def record(self, num_right: int, num_wrong: int) -> None:
        for hit in (1.0,) * num_right + (0.0,) * num_wrong:
            self.rate += LEARNING * (hit - self.rate)

    def rest(self) -> None:
        """A step without a guess: after a while another try is due."""
        self.rate += LEARNING * LEARNING * (PRIOR - self.rate)

    def worth(self, price: float, most: int) -> int:
        """How many guesses pay: the j-th is right with probability rate^j, which must exceed the price of its row."""
        if self.rate <= price:
            return 0
        if price <= 0 or self.rate >= 1:
            return most
        return min(most, int(math.log(price) / math.log(self.rate)))


class Pace:
    """Seconds a step = start + rows · slope, fitted to the steps so far, recent ones weighing most."""

    def __init__(self) -> None:
        self._sums = [0.0] * 5  # weight, rows, rows², seconds, rows · seconds
        self._drafting = 0.0

    def record(self, num_rows: int, seconds: float) -> None:
        terms = (1.0, num_rows, num_rows * num_rows, seconds, num_rows * seconds)
        self._sums = [FORGETTING * old + new for old, new in zip(self._sums, terms, strict=True)]

    def record_drafting(self, seconds: float) -> None:
        """What the drafts themselves took since the last step that only decoded."""
        self._drafting += (1 - FORGETTING) * (seconds - self._drafting) if self._drafting else seconds

    def price(self, num_sequences: int) -> float:
        """What a guess costs, in tokens: the time of its row and of its draft over the time that a token takes now.
        What is unknown counts as 0."""
        weight, rows, squares, seconds, products = self._sums
        if not weight:
            return 0.0
        spread = weight * squares - rows * rows
        known = spread > 1e-6 * rows * rows  # steps of one size tell nothing of what a row more would cost
        slope = max((weight * products - rows * seconds) / spread, 0.0) if known else 0.0
        step = max((seconds - slope * rows) / weight, 0.0) + slope * num_sequences
        return min((slope * num_sequences + self._drafting) / step, 1.0) if step > 0 else 0.0
