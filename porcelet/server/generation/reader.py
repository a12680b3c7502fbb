"""One sample's outputs to events: a stream decoder turns tokens into whole characters, the splitter turns characters
into reasoning, content and tool calls.

Tokens are read one by one, so that each is known to belong to the reasoning or to the answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest

from porcelet.chat import Content, Reasoning, Splitter, ToolCallArguments
from porcelet.chat import Event as Part
from porcelet.server.generation.events import Ended, Event, Piece, TokenLogprob
from porcelet.tokenizer import StreamDecoder, Tokenizer
from porcelet.types import Output


class Reader:
    """Reads one sample. Without a splitter all of it is content."""

    def __init__(self, tokenizer: Tokenizer, splitter: Splitter | None) -> None:
        self.num_reasoning = 0
        self._tokenizer = tokenizer
        self._decoder = StreamDecoder(tokenizer)
        self._splitter = splitter

    def read(self, output: Output) -> Iterator[Event]:
        """What the next output adds."""
        parts: list[Part] = []
        logprobs: list[TokenLogprob] = []
        # The stop token, whose numbers come last, is not part of the answer.
        for token, logprob, top in zip_longest(output.tokens, output.raw_logprobs, output.top_logprobs):
            if token is None:
                break
            reasoning = self._splitter is not None and self._splitter.in_reasoning
            self.num_reasoning += reasoning
            parts += self._split(self._decoder.push([token]))
            if logprob is not None:
                logprobs.append(self._entry(token, logprob, top or (), reasoning))
        if output.finish_reason:
            parts += self._split(self._decoder.flush(output.tail)) + (self._splitter.flush() if self._splitter else [])
        if parts or logprobs:
            yield Piece(output.index, tuple(_joined(parts)), output.num_generated, tuple(logprobs))
        if output.finish_reason:
            yield Ended(output.index, self._reason(output), output.stop)

    def _split(self, text: str) -> list[Part]:
        if self._splitter:
            return self._splitter.push(text)
        return [Content(text)] if text else []

    def _reason(self, output: Output) -> str:
        """A call that was cut off, by the limit or by a stop string, is no reason to answer it."""
        assert output.finish_reason
        called = self._splitter is not None and self._splitter.num_calls > 0
        return "tool_calls" if called and output.finish_reason == "stop" and not output.stop else output.finish_reason

    def _entry(self, token: int, logprob: float, top: tuple[tuple[int, float], ...], reasoning: bool) -> TokenLogprob:
        best = tuple((other, self._tokenizer.token_bytes(other), value) for other, value in top)
        return TokenLogprob(token, self._tokenizer.token_bytes(token), logprob, best, reasoning)


def _joined(parts: list[Part]) -> Iterator[Part]:
    """Neighbours of one kind as one."""
    last: Part | None = None
    for part in parts:
        joined = _join(last, part)
        if joined is None and last is not None:
            yield last
        last = joined or part
    if last is not None:
        yield last


def _join(first: Part | None, second: Part) -> Part | None:
    match first, second:
        case Reasoning(a), Reasoning(b):
            return Reasoning(a + b)
        case Content(a), Content(b):
            return Content(a + b)
        case ToolCallArguments(i, a), ToolCallArguments(j, b) if i == j:
            return ToolCallArguments(i, a + b)
    return None
