"""Text to reasoning, content and tool calls: the same however it is cut, and nothing lost."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from porcelet.chat import Content, Event, Reasoning, Splitter, ToolCallArguments, ToolCallStart

CALLS, END_CALLS, CALL, END_CALL, SEP = (
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁calls▁end｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁sep｜>",
)
FENCED = f'{CALL}function{SEP}get\n```json\n{{"x": "```"}}\n```{END_CALL}'
BARE = f"{CALL}put{SEP}{{}}{END_CALL}"
GET, PUT = [("call", 0, "get"), ("arguments", 0, '{"x": "```"}')], [("call", 1, "put"), ("arguments", 1, "{}")]
ATOMS = ["<think>", "</think>", CALLS, END_CALLS, CALL, END_CALL, SEP, "function", "\n```json\n", "\n```", "```"]

# (text, starts in reasoning, what it is)
CASES = {
    "content": ("Hello.\n\n", False, [("content", "Hello.\n\n")]),
    "leading space": (" \n Hello", False, [("content", " \n Hello")]),
    "reasoning": ("<think>\nHm.\n</think>\n\nHi.", False, [("reasoning", "Hm."), ("content", "Hi.")]),
    "R1's prompt": ("Hm.\n</think>\n\nHi.", True, [("reasoning", "Hm."), ("content", "Hi.")]),
    "V3.1's prompt": ("Hm.</think>Hi.", True, [("reasoning", "Hm."), ("content", "Hi.")]),
    "an opening too many": ("<think>\nHm.</think>Hi.", True, [("reasoning", "Hm."), ("content", "Hi.")]),
    "no closing": ("<think>Hm. </thin", False, [("reasoning", "Hm. </thin")]),
    "no closing, no opening": ("Hm.\n", True, [("reasoning", "Hm.\n")]),
    "empty reasoning": ("<think>\n\n</think>\n\nHi.", False, [("content", "Hi.")]),
    "more breaks than the form's": (
        "<think>\n\na\n\n</think>\n\n\nb",
        False,
        [("reasoning", "\na\n"), ("content", "\nb")],
    ),
    "think later": ("a<think>b</think>c", False, [("content", "a<think>b</think>c")]),
    "second think": ("a</think>b</think>c", True, [("reasoning", "a"), ("content", "b</think>c")]),
    "V3's calls": (f"Wait.{CALLS}{FENCED}\n{BARE}{END_CALLS}", False, [("content", "Wait."), *GET, *PUT]),
    "after reasoning": (f"r</think>\n\n{CALLS}{FENCED}{END_CALLS}", True, [("reasoning", "r"), *GET]),
    "text after calls": (f"{CALLS}{FENCED}{END_CALLS}Done.", False, [*GET, ("content", "Done.")]),
    "two lists": (f"{CALLS}{FENCED}{END_CALLS}{CALLS}{BARE}{END_CALLS}", False, [*GET, *PUT]),
    "calls in reasoning": (f"{CALLS}{FENCED}", True, [("reasoning", CALLS + FENCED)]),
    "a tool named function": (
        f"{CALLS}{CALL}function{SEP}{{}}{END_CALL}{END_CALLS}",
        False,
        [("call", 0, "function"), ("arguments", 0, "{}")],
    ),
    "broken off in a list": (f"{CALLS}{FENCED}\n", False, GET),
    "broken off in arguments": (f'{CALLS}{CALL}put{SEP}{{"a', False, [("call", 0, "put"), ("arguments", 0, '{"a')]),
    "broken off after the fence": (
        f"{CALLS}{CALL}function{SEP}put\n```json\n{{}}\n```",
        False,
        [("call", 0, "put"), ("arguments", 0, "{}")],
    ),
    "a list with nothing": (f"{CALLS}{END_CALLS}", False, [("content", CALLS + END_CALLS)]),
    "a list and no call": (f"{CALLS} hm", False, [("content", f"{CALLS} hm")]),
    "only a list's marker": (f"a{CALLS}", False, [("content", f"a{CALLS}")]),
    "no separator": (
        f"{CALLS}{CALL}put{END_CALL}{END_CALLS}",
        False,
        [("content", f"{CALLS}{CALL}put{END_CALL}{END_CALLS}")],
    ),
    "no name": (f"{CALLS}{CALL}{SEP}{{}}", False, [("content", f"{CALLS}{CALL}{SEP}{{}}")]),
    "an endless name": (f"{CALLS}{CALL}{'n' * 129}{SEP}", False, [("content", f"{CALLS}{CALL}{'n' * 129}{SEP}")]),
    "a second call that is none": (
        f"{CALLS}{FENCED}\n{CALL}oops{END_CALLS}",
        False,
        [*GET, ("content", f"\n{CALL}oops{END_CALLS}")],
    ),
}


def joined(events: list[Event]) -> list[tuple[str | int, ...]]:
    """Events with the texts of neighbours of one kind put together."""
    found: list[tuple[str | int, ...]] = []
    for event in events:
        match event:
            case ToolCallStart(index, name):
                found.append(("call", index, name))
                continue
            case ToolCallArguments(index, text):
                head: tuple[str | int, ...] = ("arguments", index)
            case Reasoning(text) | Content(text):
                head = (type(event).__name__.lower(),)
        assert text, "no empty text"
        if found and found[-1][:-1] == head:
            text = str(found.pop()[-1]) + text
        found.append((*head, text))
    return found


def split(pieces: list[str], starts_in_reasoning: bool) -> list[tuple[str | int, ...]]:
    splitter = Splitter(starts_in_reasoning)
    events = [event for piece in pieces for event in splitter.push(piece)]
    return joined(events + splitter.flush())


def cut(text: str, cuts: list[int]) -> list[str]:
    edges = [0, *sorted(cuts), len(text)]
    return [text[start:end] for start, end in zip(edges, edges[1:], strict=False)]


@pytest.mark.parametrize("name", CASES)
def test_each_text_is_what_it_is_at_every_cut(name: str) -> None:
    """Whole, letter by letter, and in every way to cut it into two; short ones into three."""
    text, starts, expected = CASES[name]
    assert split([text], starts) == expected
    assert split(list(text), starts) == expected
    ways = combinations(range(len(text) + 1), 2) if len(text) < 60 else ((at,) for at in range(len(text) + 1))
    for cuts in ways:
        assert split(cut(text, list(cuts)), starts) == expected, cuts


@given(st.lists(st.sampled_from([*ATOMS, "A", "B", "f", "{", "\n", " ", "<"])), st.booleans(), st.data())
@example([CALLS, CALL, "function", SEP, "f", "\n```json\n", "A", "\n```", "B", END_CALL], False, None)
def test_any_text_is_cut_alike_and_nothing_is_lost(atoms: list[str], starts: bool, data: st.DataObject | None) -> None:
    """Any cuts give the events of the whole; every capital of the text comes out, in order."""
    text = "".join(atoms)
    whole = split([text], starts)
    cuts = data.draw(st.lists(st.integers(0, len(text)))) if data else list(range(len(text)))
    assert split(cut(text, cuts), starts) == whole
    out = "".join(str(event[-1]) for event in whole)
    assert [letter for letter in out if letter in "AB"] == [letter for letter in text if letter in "AB"]


def test_only_a_possible_marker_is_held_back() -> None:
    """What cannot become a marker comes at once; what can waits for the letter that decides."""
    splitter = Splitter()
    assert splitter.push("<") == [] and splitter.push("b") == [Content("<b")]
    assert splitter.push(" a <｜tool") == [Content(" a ")] and splitter.push("s") == [Content("<｜tools")]
    assert splitter.push(f"{CALLS}{CALL}f{SEP}") == [ToolCallStart(0, "f")]
    assert splitter.push("{1") == [ToolCallArguments(0, "{1")]
    assert splitter.push("}" + END_CALL) == [ToolCallArguments(0, "}")]
    reasoning = Splitter(starts_in_reasoning=True)
    assert reasoning.push("so\n") == [Reasoning("so")] and reasoning.push("on") == [Reasoning("\non")]
