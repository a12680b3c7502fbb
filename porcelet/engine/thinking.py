"""Where an answer's reasoning stands, and the tokens that close it when its budget is spent.

Reasoning ends when the tokens of `Reasoning.end` have come, in whatever steps. Once the budget is spent, the closing
words are forced, one token a step. Where the model has just begun to write the end itself, only its rest is forced.
"""

from __future__ import annotations

from copy import copy

from porcelet.types import Reasoning


class Thinking:
    """Reads one answer, which begins inside its reasoning, up to where the reasoning ends.

    `active` says whether it still goes on, `forced` which token has to come next, if one has.
    """

    def __init__(self, reasoning: Reasoning) -> None:
        self.active = True
        self._reasoning = reasoning
        self._recent: tuple[int, ...] = ()  # the last tokens, as many as may be the end
        self._num_read = 0
        self._closing = reasoning.closing if reasoning.budget == 0 else ()

    @property
    def forced(self) -> int | None:
        """The token that has to come next, or None if the model may choose."""
        return self._closing[0] if self._closing else None

    def push(self, token: int) -> None:
        """Read the next token of the reasoning: the forced one, if one is."""
        assert self.active and self.forced in (None, token)
        end = self._reasoning.end
        self._recent = (*self._recent, token)[-len(end) :]
        self._num_read += 1
        self._closing = self._closing[1:]
        if self._recent == end:
            self.active, self._closing = False, ()
        elif self._num_read == self._reasoning.budget:
            num_begun = self._num_begun()
            self._closing = end[num_begun:] if num_begun else self._reasoning.closing

    def fork(self) -> Thinking:
        """The same place in another answer with the same tokens so far."""
        return copy(self)

    def _num_begun(self) -> int:
        """How many of the last tokens are a beginning of the end."""
        recent, end = self._recent, self._reasoning.end
        return next((n for n in range(len(recent), 0, -1) if recent[-n:] == end[:n]), 0)
