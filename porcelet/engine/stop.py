"""Where a stop string ends a text that arrives token by token. Pure Python, no tensors.

Tokens cut text anywhere, within a stop string or a character, so stops are looked for among the tokens' bytes. One
automaton a stop (Knuth, Morris and Pratt, 1977) reads every byte once and knows how many of the last bytes may be the
beginning of its stop; the most that any of them claims is what has to be held back.

The text ends before the first stop to be complete, of several that are complete at the same byte before the longest.
So where it ends does not depend on how it was cut into tokens.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Verdict:
    """What is known after a token: how many of the tokens held back, oldest first, are certain to be text.

    When `stop` is complete, the tokens after those are not text, but for the bytes `tail` of the first of them.
    """

    num_certain: int
    stop: str | None = None
    tail: bytes = b""


class StopMatcher:
    """Reads one text up to its first stop. Costs a few operations a byte and stop, whatever the stops are."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._automata = [_Automaton(stop) for stop in stops]
        self._held: deque[bytes] = deque()
        self._num_held_bytes = 0

    def push(self, token: bytes) -> Verdict:
        """Read one more token's bytes; not to be called again after a stop."""
        self._held.append(token)
        self._num_held_bytes += len(token)
        for num_read, byte in enumerate(token, 1):
            complete = [automaton for automaton in self._automata if automaton.reads(byte)]
            if complete:
                return self._cut(max(complete, key=lambda a: a.matched), len(token) - num_read)
        return Verdict(self._release(max(automaton.matched for automaton in self._automata)))

    def _cut(self, automaton: _Automaton, num_unread: int) -> Verdict:
        claimed = automaton.matched + num_unread
        num_certain = self._release(claimed)
        return Verdict(num_certain, automaton.stop, self._held[0][: self._num_held_bytes - claimed])

    def _release(self, num_claimed: int) -> int:
        """Let go of the tokens that end before the last `num_claimed` bytes."""
        count = 0
        while self._held and len(self._held[0]) <= self._num_held_bytes - num_claimed:
            self._num_held_bytes -= len(self._held.popleft())
            count += 1
        return count


class _Automaton:
    """`matched` is the length of the longest beginning of the stop that the bytes read so far end with."""

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.matched = 0
        self._bytes = stop.encode()
        self._borders = array("H", [0])  # of each beginning: its longest proper beginning that is its end, too
        for byte in self._bytes[1:]:
            self._borders.append(self._extended(self._borders[-1], byte))

    def reads(self, byte: int) -> bool:
        """Whether the stop is complete with this byte."""
        self.matched = self._extended(self.matched, byte)
        return self.matched == len(self._bytes)

    def _extended(self, length: int, byte: int) -> int:
        while length and self._bytes[length] != byte:
            length = self._borders[length - 1]
        return length + (self._bytes[length] == byte)
