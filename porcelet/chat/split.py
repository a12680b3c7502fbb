"""A model's text, as it streams in, into reasoning, content and tool calls.

    [<think>] reasoning </think> content <｜tool▁calls▁begin｜>call call ...<｜tool▁calls▁end｜> content
    call: <｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME\\n```json\\nARGUMENTS\\n```<｜tool▁call▁end｜>      V3, R1
          <｜tool▁call▁begin｜>NAME<｜tool▁sep｜>ARGUMENTS<｜tool▁call▁end｜>                            V3.1

What it returns, joined, does not depend on how the text was cut, and only what may yet become a marker is held back.
It tolerates a `<think>` too many at the beginning, reasoning that never ends (it stays reasoning), and calls that break
off. What begins like a call and is none becomes content as it is. Dropped with the markers are the line breaks that
the forms put around them: one after `<think>`, one before and two after `</think>`, white space between calls.

It sees text, not tokens: a model that spells a marker out, letter by letter, is taken to mean it. Arguments are passed
on as they are, JSON or not. `<think>` counts at the beginning only, `</think>` only inside reasoning.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from porcelet.chat.builtin import CALL, CALLS, END_CALL, END_CALLS, END_THINK, SEP, THINK

_FENCE = "\n```"
_NAME = re.compile(r"[^\s<{]{1,128}")
_BARE = (CALL, _NAME, SEP)
_FENCED = (CALL, "function", SEP, _NAME, _FENCE + "json\n")


@dataclass(frozen=True)
class Reasoning:
    """What the model thinks before it answers."""

    text: str


@dataclass(frozen=True)
class Content:
    """The answer."""

    text: str


@dataclass(frozen=True)
class ToolCallStart:
    """A call begins; calls count from 0."""

    index: int
    name: str


@dataclass(frozen=True)
class ToolCallArguments:
    """The next part of a call's arguments."""

    index: int
    text: str


Event = Reasoning | Content | ToolCallStart | ToolCallArguments


class Splitter:
    """Feed it text with `push` and end with `flush`; each returns the events that have become certain.

    `starts_in_reasoning`: the prompt ended with `<think>` (`Rendered.opens_reasoning`). `num_calls` have begun so far.
    """

    def __init__(self, starts_in_reasoning: bool = False) -> None:
        self._starts_in_reasoning = starts_in_reasoning
        self._state: Callable[[], Iterator[Event]] = self._beginning
        self._buffer = ""
        self._final = False
        self._fenced = False
        self.num_calls = 0
        self._opened_at = -1  # calls so far when the marker of a list was met

    @property
    def in_reasoning(self) -> bool:
        """Whether the text so far ends inside the reasoning, or may yet turn out to."""
        if self._state == self._beginning:
            return self._starts_in_reasoning
        return self._state in (self._after_think, self._in_reasoning)

    def push(self, text: str) -> list[Event]:
        """What is certain, now that `text` has come."""
        self._buffer += text
        return self._run()

    def flush(self) -> list[Event]:
        """The rest, at the end of the text."""
        self._final = True
        return self._run()

    def _run(self) -> list[Event]:
        events: list[Event] = []
        before = None
        while before != (self._state, self._buffer):  # no step changes anything: more text is needed
            before = (self._state, self._buffer)
            events += self._state()
        return events

    def _beginning(self) -> Iterator[Event]:
        text = self._buffer.lstrip()
        if text.startswith(THINK):
            self._buffer, self._state = text.removeprefix(THINK), self._after_think
        elif self._final or not THINK.startswith(text):
            self._state = self._in_reasoning if self._starts_in_reasoning else self._in_content
        yield from ()

    def _after_think(self) -> Iterator[Event]:
        if self._buffer:
            self._buffer, self._state = self._buffer.removeprefix("\n"), self._in_reasoning
        yield from ()

    def _in_reasoning(self) -> Iterator[Event]:
        text, ended = self._take(("\n" + END_THINK, END_THINK))
        if text:
            yield Reasoning(text)
        if ended:
            self._state = self._after_reasoning

    def _after_reasoning(self) -> Iterator[Event]:
        num_breaks = min(2, len(self._buffer) - len(self._buffer.lstrip("\n")))
        if self._final or num_breaks == 2 or num_breaks < len(self._buffer):
            self._buffer, self._state = self._buffer[num_breaks:], self._in_content
        yield from ()

    def _in_content(self) -> Iterator[Event]:
        text, opened = self._take((CALLS,))
        if text:
            yield Content(text)
        if opened:
            self._opened_at, self._state = self.num_calls, self._before_call

    def _before_call(self) -> Iterator[Event]:
        """A call, the end of the list, or neither: then all of it is content, with the list's marker if it is empty."""
        empty = self.num_calls == self._opened_at
        try:
            end = None if empty else self._match((END_CALLS,))
            fenced = self._match(_FENCED) if end is None else None
            found = end or fenced or self._match(_BARE)
        except _Incomplete:
            return
        self._state = self._in_content
        if found:
            self._buffer = self._buffer[found[0] :]
        elif empty:
            yield Content(CALLS)
        elif self._final and self._buffer.isspace():
            self._buffer = ""
        if found and not end:
            yield ToolCallStart(self.num_calls, found[1])
            self.num_calls, self._fenced, self._state = self.num_calls + 1, fenced is not None, self._in_arguments

    def _in_arguments(self) -> Iterator[Event]:
        text, ended = self._take((_FENCE + END_CALL, END_CALL) if self._fenced else (END_CALL,))
        if self._final and self._fenced and not ended:
            text = text.removesuffix(_FENCE)
        if text:
            yield ToolCallArguments(self.num_calls - 1, text)
        if ended:
            self._state = self._before_call

    def _take(self, markers: tuple[str, ...]) -> tuple[str, bool]:
        """The text up to the first marker, which is dropped, or up to where one may begin; whether there was one."""
        found = [(start, len(marker)) for marker in markers if (start := self._buffer.find(marker)) >= 0]
        held = 0 if self._final else _partial(self._buffer, markers)
        start, length = min(found, default=(len(self._buffer) - held, 0))
        text, self._buffer = self._buffer[:start], self._buffer[start + length :]
        return text, bool(found)

    def _match(self, parts: tuple[str | re.Pattern[str], ...]) -> tuple[int, str] | None:
        """Where the parts, after white space, end in the buffer, and what the pattern among them matched.

        Raises:
            _Incomplete: more text must decide.
        """
        at, name = len(self._buffer) - len(self._buffer.lstrip()), ""
        for part in parts:
            rest = self._buffer[at:]
            found = part if isinstance(part, str) and rest.startswith(part) else None
            if isinstance(part, re.Pattern) and (match := part.match(rest)):
                found = name = match[0]
            if found is None:
                if not self._final and (part.startswith(rest) if isinstance(part, str) else not rest):
                    raise _Incomplete
                return None
            at += len(found)
        return at, name


class _Incomplete(Exception):
    """What has come so far is the beginning of something."""


def _partial(text: str, markers: tuple[str, ...]) -> int:
    """Length of the longest end of `text` that begins a marker."""
    longest = max(map(len, markers)) - 1
    return next((n for n in range(min(longest, len(text)), 0, -1) if any(m.startswith(text[-n:]) for m in markers)), 0)
