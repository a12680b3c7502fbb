"""A model's text, as it streams in, into reasoning, content and tool calls.

    [<think>] reasoning </think> content calls content          the forms of calls are described in calls.py

What it returns, joined, does not depend on how the text was cut, and only what may yet become a marker is held back.
It tolerates a `<think>` too many at the beginning, reasoning that never ends (it stays reasoning), and arguments that
break off. What begins like a call and is none becomes content as it is: one that breaks off before its name is known,
or names no tool that was offered. Dropped with the markers are the line breaks that the forms put around them: one
after `<think>`, one before and two after `</think>`, one before `<tool_call>`, white space between calls.

Arguments are passed on as they come, JSON or not; markers inside a JSON string are text. Between tags, a name must come
before the arguments for that; any other JSON object is read whole and is a call if it has both.

It sees text, not tokens: a model that spells a marker out, letter by letter, is taken to mean it. `<think>` counts at
the beginning only, `</think>` only inside reasoning. Every character is looked at a bounded number of times.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

from porcelet.chat.builtin import END_THINK, THINK
from porcelet.chat.calls import CALL, CALLS, END_CALL, END_CALLS, END_TAG, SEP, TAG, TAGGED, CallForm

_FENCE = "\n```"
_NAME = re.compile(r'[^\s<{"\\]{1,128}')
_BARE = (CALL, _NAME, SEP)
_FENCED = (CALL, "function", SEP, _NAME, _FENCE + "json\n")
_HEAD = ("{", '"name"', ":", '"', _NAME, '"', ",", '"arguments"', ":", "{")
MAX_GAP = 64  # white space in a row, within a call, that is taken for layout


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

    `starts_in_reasoning`: the prompt ended with `<think>` (`Rendered.opens_reasoning`). Calls are looked for in the
    form `calls`, of tools among `names` (None: of any). `num_calls` have begun so far.
    """

    def __init__(
        self, starts_in_reasoning: bool = False, calls: CallForm | None = None, names: Collection[str] | None = None
    ) -> None:
        self._starts_in_reasoning = starts_in_reasoning
        self._tagged = calls is TAGGED
        self._opening = () if calls is None else ("\n" + TAG, TAG) if self._tagged else (CALLS,)
        self._names = names
        self._state: Callable[[], Iterator[Event]] = self._beginning
        self._buffer = ""
        self._final = False
        self._object = _Object()
        self._ends: tuple[str, ...] = ()  # what may end the arguments
        self._opened = ""  # the marker of the calls, as long as it may turn out to be none
        self._whole: list[str] = []  # a call that is read whole
        self.num_calls = 0

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

    # ---- reasoning and content --------------------------------------------------------------------------------------

    def _beginning(self) -> Iterator[Event]:
        gap, text = self._gap()
        if text.startswith(THINK):
            self._buffer, self._state = text.removeprefix(THINK), self._after_think
        elif self._final or gap > MAX_GAP or not THINK.startswith(text):
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
        text, self._opened = self._take(self._opening)
        if text:
            yield Content(text)
        if self._opened:
            self._state = self._before_tagged if self._tagged else self._before_call

    # ---- calls ------------------------------------------------------------------------------------------------------

    def _before_call(self) -> Iterator[Event]:
        """DeepSeek's forms: a call, the end of the list, or neither: then all of it is content, with the list's marker
        if no call has come."""
        try:
            end = None if self._opened else self._match((END_CALLS,))
            fenced = None if end else self._match(_FENCED)
            found = end or fenced or self._match(_BARE)
        except _Incomplete:
            if not self._final:
                return
            end = fenced = found = None
        self._state = self._in_content
        if found and (end or self._is_offered(found[1])):
            self._buffer = self._buffer[found[0] :]
            if not end:
                yield self._begin(found[1], (_FENCE + END_CALL, END_CALL) if fenced else (END_CALL,))
        elif self._opened:
            yield Content(self._opened)
        elif self._final and self._buffer.isspace():
            self._buffer = ""

    def _before_tagged(self) -> Iterator[Event]:
        """Between tags: the beginning of an object whose arguments can be passed on, or of something to read whole."""
        try:
            found = self._match(_HEAD, spaced=True)
        except _Incomplete:
            if not self._final:
                return
            found = None
        if found and self._is_offered(found[1]):
            self._buffer = self._buffer[found[0] - 1 :]
            yield self._begin(found[1], ())
        else:
            self._whole, self._state = [], self._in_whole

    def _begin(self, name: str, ends: tuple[str, ...]) -> Event:
        self._opened, self._ends, self._object, self._state = "", ends, _Object(), self._in_object
        self.num_calls += 1
        return ToolCallStart(self.num_calls - 1, name)

    def _in_object(self) -> Iterator[Event]:
        """Arguments, up to the end of the JSON object that they are."""
        if not self._buffer:
            if self._final:
                self._state = self._after_object
            return
        length = self._object.read(self._buffer)
        text, self._buffer = self._buffer[:length], self._buffer[length:]
        if self._object.is_over:
            self._state = self._after_object
        if text:
            yield ToolCallArguments(self.num_calls - 1, text)

    def _after_object(self) -> Iterator[Event]:
        """What is left of the arguments, if they are not as they should be, and what closes the call."""
        if not self._ends:
            yield from self._after_tagged()
            return
        text, ended = self._take(self._ends)
        if self._final and not ended:
            text = text[: len(text) - _partial(text, self._ends)]
        if text:
            yield ToolCallArguments(self.num_calls - 1, text)
        if ended:
            self._state = self._before_call

    def _after_tagged(self) -> Iterator[Event]:
        try:
            closed = self._match(("}", END_TAG), spaced=True)
        except _Incomplete:
            if self._final:
                self._buffer = ""
            return
        if closed:
            self._buffer = self._buffer[closed[0] :]
        self._state = self._between_tagged
        yield from ()

    def _between_tagged(self) -> Iterator[Event]:
        gap, text = self._gap()
        if self._final and not text:
            self._buffer = ""
        elif text.startswith(TAG):
            self._buffer = text
        elif not self._final and gap <= MAX_GAP and TAG.startswith(text):
            return
        self._state = self._in_content
        yield from ()

    def _in_whole(self) -> Iterator[Event]:
        text, ended = self._take((END_TAG,))
        self._whole.append(text)
        if not (ended or self._final):
            return
        whole, self._whole = "".join(self._whole), []
        call = _call_in(whole)
        if call and self._is_offered(call[0]):
            yield self._begin(call[0], ())
            if call[1]:
                yield ToolCallArguments(self.num_calls - 1, call[1])
            self._state = self._between_tagged
        else:
            self._state = self._in_content
            yield Content(self._opened + whole + ended)

    def _is_offered(self, name: str) -> bool:
        return self._names is None or name in self._names

    # ---- the buffer -------------------------------------------------------------------------------------------------

    def _gap(self) -> tuple[int, str]:
        """How much white space the buffer begins with, and what follows."""
        text = self._buffer.lstrip()
        return len(self._buffer) - len(text), text

    def _take(self, markers: tuple[str, ...]) -> tuple[str, str]:
        """The text up to the first marker, which is dropped, or up to where one may begin; and that marker."""
        found = [(start, len(marker)) for marker in markers if (start := self._buffer.find(marker)) >= 0]
        held = 0 if self._final else _partial(self._buffer, markers)
        start, length = min(found, default=(len(self._buffer) - held, 0))
        text, marker = self._buffer[:start], self._buffer[start : start + length]
        self._buffer = self._buffer[start + length :]
        return text, marker

    def _match(self, parts: tuple[str | re.Pattern[str], ...], spaced: bool = False) -> tuple[int, str] | None:
        """Where the parts, after white space, end in the buffer, and what the pattern among them matched. With `spaced`
        there may be white space before each part.

        Raises:
            _Incomplete: more text must decide.
        """
        at, name = 0, ""
        for index, part in enumerate(parts):
            if spaced or not index:
                gap = len(self._buffer) - at - len(self._buffer[at:].lstrip())
                if gap > MAX_GAP:
                    return None
                at += gap
            rest = self._buffer[at:]
            found = part if isinstance(part, str) and rest.startswith(part) else None
            if isinstance(part, re.Pattern) and (match := part.match(rest)):
                found = name = match[0]
            if found is None:
                if part.startswith(rest) if isinstance(part, str) else not rest:
                    raise _Incomplete
                return None
            at += len(found)
        return at, name


class _Incomplete(Exception):
    """What has come so far is the beginning of something."""


_BRACKETS = re.compile(r'["\\{}\[\]]')


class _Object:
    """Finds the end of a JSON object in text that comes in pieces. Text that begins otherwise is over at once."""

    def __init__(self) -> None:
        self.is_over = False
        self._depth = 0
        self._in_string = self._escaped = False

    def read(self, text: str) -> int:
        """How much of `text`, which is not empty, belongs to it."""
        at = 0
        if self._escaped:
            at, self._escaped = 1, False
        elif not self._depth:
            at = len(text) - len(text.lstrip())
            if at < len(text) and text[at] != "{":
                self.is_over = True
                return 0
        while bracket := _BRACKETS.search(text, at):
            at = bracket.end()
            self._enter(bracket[0])
            if self._in_string and bracket[0] == "\\":
                self._escaped = at == len(text)
                at += 1
            if not self._depth:
                self.is_over = True
                return at
        return len(text)

    def _enter(self, character: str) -> None:
        if character == '"':
            self._in_string = not self._in_string
        elif not self._in_string and character != "\\":
            self._depth += 1 if character in "{[" else -1


def _call_in(text: str) -> tuple[str, str] | None:
    """Name and arguments of a call that is one JSON object."""
    try:
        value = json.loads(text)
        name, arguments = value["name"], value["arguments"]
        if isinstance(name, str) and isinstance(arguments, dict):
            return name, json.dumps(arguments, ensure_ascii=False)
    except (ValueError, TypeError, KeyError, RecursionError):  # a model wrote it, and models err
        pass
    return None


def _partial(text: str, markers: tuple[str, ...]) -> int:
    """Length of the longest end of `text` that begins a marker."""
    longest = max(map(len, markers), default=1) - 1
    return next((n for n in range(min(longest, len(text)), 0, -1) if any(m.startswith(text[-n:]) for m in markers)), 0)
