"""Text to reasoning, content and tool calls: the same however it is cut, and nothing lost."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import combinations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from porcelet.chat import Content, Event, Reasoning, Splitter, ToolCallArguments, ToolCallStart
from porcelet.chat.calls import BARE, FENCED, TAGGED, CallForm
from porcelet.chat.messages import Call

CALLS, END_CALLS, CALL, END_CALL, SEP = (
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁calls▁end｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁sep｜>",
)
FENCED_GET = f'{CALL}function{SEP}get\n```json\n{{"x": "```"}}\n```{END_CALL}'
BARE_PUT = f"{CALL}put{SEP}{{}}{END_CALL}"
GET, PUT = [("call", 0, "get"), ("arguments", 0, '{"x": "```"}')], [("call", 1, "put"), ("arguments", 1, "{}")]
ATOMS = ["<think>", "</think>", CALLS, END_CALLS, CALL, END_CALL, SEP, "function", "\n```json\n", "\n```", "```"]
TAGS = ["<tool_call>", "</tool_call>", '{"name": "f", "arguments": {', '{"arguments": {}, "name": "f"}', '"name"']

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
    "V3's calls": (f"Wait.{CALLS}{FENCED_GET}\n{BARE_PUT}{END_CALLS}", False, [("content", "Wait."), *GET, *PUT]),
    "after reasoning": (f"r</think>\n\n{CALLS}{FENCED_GET}{END_CALLS}", True, [("reasoning", "r"), *GET]),
    "text after calls": (f"{CALLS}{FENCED_GET}{END_CALLS}Done.", False, [*GET, ("content", "Done.")]),
    "two lists": (f"{CALLS}{FENCED_GET}{END_CALLS}{CALLS}{BARE_PUT}{END_CALLS}", False, [*GET, *PUT]),
    "calls in reasoning": (f"{CALLS}{FENCED_GET}", True, [("reasoning", CALLS + FENCED_GET)]),
    "broken off within the fence": (
        f"{CALLS}{CALL}function{SEP}put\n```json\n{{}}\n``",
        False,
        [("call", 0, "put"), ("arguments", 0, "{}")],
    ),
    "a marker in a string": (
        f'{CALLS}{CALL}put{SEP}{{"a": "{END_CALL}\\"{{"}}{END_CALL}{END_CALLS}',
        False,
        [("call", 0, "put"), ("arguments", 0, f'{{"a": "{END_CALL}\\"{{"}}')],
    ),
    "more than an object": (
        f"{CALLS}{CALL}put{SEP}{{}} x{END_CALL}{END_CALLS}",
        False,
        [("call", 0, "put"), ("arguments", 0, "{} x")],
    ),
    "a tool named function": (
        f"{CALLS}{CALL}function{SEP}{{}}{END_CALL}{END_CALLS}",
        False,
        [("call", 0, "function"), ("arguments", 0, "{}")],
    ),
    "broken off in a list": (f"{CALLS}{FENCED_GET}\n", False, GET),
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
        f"{CALLS}{FENCED_GET}\n{CALL}oops{END_CALLS}",
        False,
        [*GET, ("content", f"\n{CALL}oops{END_CALLS}")],
    ),
}

GET_TAG = '<tool_call>\n{"name": "get", "arguments": {"x": "</tool_call>\\"}"}}\n</tool_call>'
PUT_TAG = '<tool_call>\n{"name": "put", "arguments": {}}\n</tool_call>'
GOT = [("call", 0, "get"), ("arguments", 0, '{"x": "</tool_call>\\"}"}')]
TAGGED_CASES = {
    "content": ("Hello <tool> \n\n", False, [("content", "Hello <tool> \n\n")]),
    "calls": (f"Wait.\n{GET_TAG}\n{PUT_TAG}", False, [("content", "Wait."), *GOT, *PUT]),
    "calls without breaks": (f"Wait.{GET_TAG}{PUT_TAG}\n \n", False, [("content", "Wait."), *GOT, *PUT]),
    "after reasoning": (f"<think>\nr {PUT_TAG}\n</think>\n\n{GET_TAG}", False, [("reasoning", f"r {PUT_TAG}"), *GOT]),
    "text after calls": (f"{GET_TAG}\nDone.", False, [*GOT, ("content", "\nDone.")]),
    "other white space": (
        '<tool_call> { "name" : "get" ,"arguments":{"x": "</tool_call>\\"}"} } </tool_call>',
        False,
        GOT,
    ),
    "arguments first": (
        '<tool_call>\n{"arguments": {"a":\n1}, "name": "get"}\n</tool_call>!',
        False,
        [("call", 0, "get"), ("arguments", 0, '{"a": 1}'), ("content", "!")],
    ),
    "a third member": (
        '<tool_call>{"id": 1, "name": "get", "arguments": {}}</tool_call>',
        False,
        [("call", 0, "get"), ("arguments", 0, "{}")],
    ),
    "a third member behind": (
        '<tool_call>{"name": "get", "arguments": {}, "id": 1}</tool_call>',
        False,
        [("call", 0, "get"), ("arguments", 0, "{}"), ("content", ', "id": 1}</tool_call>')],
    ),
    "no JSON": ("a\n<tool_call>\nget</tool_call>b", False, [("content", "a\n<tool_call>\nget</tool_call>b")]),
    "no object for arguments": (
        '<tool_call>{"name": "get", "arguments": [1]}</tool_call>',
        False,
        [("content", '<tool_call>{"name": "get", "arguments": [1]}</tool_call>')],
    ),
    "deep": (f"<tool_call>{'[' * 30}</tool_call>", False, [("content", f"<tool_call>{'[' * 30}</tool_call>")]),
    "not offered": (
        GET_TAG.replace("get", "got"),
        False,
        [("content", GET_TAG.replace("get", "got"))],
    ),
    "broken off before the name": ('\n<tool_call>\n{"name": "ge', False, [("content", '\n<tool_call>\n{"name": "ge')]),
    "broken off in arguments": (
        '<tool_call>\n{"name": "get", "arguments": {"a": "\\',
        False,
        [("call", 0, "get"), ("arguments", 0, '{"a": "\\')],
    ),
    "broken off behind arguments": (
        '<tool_call>\n{"name": "get", "arguments": {}}\n</tool',
        False,
        [("call", 0, "get"), ("arguments", 0, "{}")],
    ),
    "only a tag": ("a<tool_call>", False, [("content", "a<tool_call>")]),
    "white space without end": (f"<tool_call>{' ' * 70}", False, [("content", f"<tool_call>{' ' * 70}")]),
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


def split(
    pieces: list[str], starts_in_reasoning: bool, form: CallForm | None = FENCED, names: set[str] | None = None
) -> list[tuple[str | int, ...]]:
    splitter = Splitter(starts_in_reasoning, form, names)
    events = [event for piece in pieces for event in splitter.push(piece)]
    return joined(events + splitter.flush())


def cut(text: str, cuts: list[int]) -> list[str]:
    edges = [0, *sorted(cuts), len(text)]
    return [text[start:end] for start, end in zip(edges, edges[1:], strict=False)]


def every_cut(text: str) -> Iterator[list[str]]:
    """Whole, letter by letter, and in every way to cut it into two; short ones into three."""
    yield [text]
    yield list(text)
    ways = combinations(range(len(text) + 1), 2) if len(text) < 60 else ((at,) for at in range(len(text) + 1))
    yield from (cut(text, list(cuts)) for cuts in ways)


@pytest.mark.parametrize("name", CASES)
def test_each_text_is_what_it_is_at_every_cut(name: str) -> None:
    """DeepSeek's forms."""
    text, starts, expected = CASES[name]
    for pieces in every_cut(text):
        assert split(pieces, starts) == expected, pieces


@pytest.mark.parametrize("name", TAGGED_CASES)
def test_calls_between_tags_are_what_they_are_at_every_cut(name: str) -> None:
    """The form of the other models: name before arguments, arguments before name, broken, broken off."""
    text, starts, expected = TAGGED_CASES[name]
    for pieces in every_cut(text):
        assert split(pieces, starts, TAGGED, {"get", "put"}) == expected, pieces


@pytest.mark.parametrize("name", [*CASES, *TAGGED_CASES])
def test_without_tools_a_call_is_text(name: str) -> None:
    """Reasoning is told from content all the same."""
    text, starts, _ = (CASES | TAGGED_CASES)[name]
    assert {event[0] for event in split([text], starts, None)} <= {"reasoning", "content"}


@pytest.mark.parametrize(
    ("form", "text"), [(FENCED, CALLS + FENCED_GET + END_CALLS), (TAGGED, f"{GET_TAG}\n{PUT_TAG}")]
)
def test_a_call_of_what_was_not_offered_is_text(form: CallForm, text: str) -> None:
    """As it is, to the letter."""
    for pieces in every_cut("a" + text + "b"):
        assert split(pieces, False, form, {"other"}) == [("content", f"a{text}b")]


@given(
    st.lists(st.sampled_from([*ATOMS, *TAGS, "A", "B", "f", "{", "}", '"', "\\", "\n", " ", "<"])),
    st.booleans(),
    st.sampled_from([FENCED, TAGGED, None]),
    st.data(),
)
@example([CALLS, CALL, "function", SEP, "f", "\n```json\n", "A", "\n```", "B", END_CALL], False, FENCED, None)
@example(["<tool_call>", '{"arguments": {"A": 1}, "name": "f"}', "</tool_call>", "B"], False, TAGGED, None)
def test_any_text_is_cut_alike_and_nothing_is_lost(
    atoms: list[str], starts: bool, form: CallForm | None, data: st.DataObject | None
) -> None:
    """Any cuts give the events of the whole; every capital of the text comes out, in order."""
    text = "".join(atoms)
    whole = split([text], starts, form)
    cuts = data.draw(st.lists(st.integers(0, len(text)))) if data else list(range(len(text)))
    assert split(cut(text, cuts), starts, form) == whole
    out = "".join(str(event[-1]) for event in whole)
    assert [letter for letter in out if letter in "AB"] == [letter for letter in text if letter in "AB"]


@pytest.mark.parametrize("form", [FENCED, BARE, TAGGED])
def test_what_is_written_is_read(form: CallForm) -> None:
    """Every form gives back the calls that it writes, the bytes of the arguments included."""
    calls = (Call("", "get", '{"a":  ["}", "\\\\"]}'), Call("", "put-2", "{}"), Call("", "get", '{"b": {"c": []}}'))
    text = "".join(text for text, _ in form.write(calls))
    expected = [e for i, c in enumerate(calls) for e in (("call", i, c.name), ("arguments", i, c.arguments))]
    for pieces in every_cut(text):
        assert split(pieces, False, form, {"get", "put-2"}) == expected


@pytest.mark.parametrize(
    ("form", "beginning", "filler"),
    [
        (TAGGED, "", " "),
        (TAGGED, "<tool_call>", " "),
        (TAGGED, "<tool_call>", '{"name"'),
        (TAGGED, '<tool_call>{"name": "f", "arguments":', " "),
        (TAGGED, '<tool_call>{"name": "f", "arguments": {', "\\"),
        (TAGGED, '<tool_call>{"name": "f", "arguments": {"', "a"),
        (TAGGED, "", "\n<tool_call"),
        (FENCED, f"{CALLS}{CALL}f{SEP}{{", "["),
        (FENCED, f"{CALLS}{BARE_PUT}", "\n"),
    ],
)
def test_hostile_text_costs_linear_time(form: CallForm, beginning: str, filler: str) -> None:
    """A hundred thousand letters, one at a time, take seconds at most, whatever they seem to begin."""
    splitter, start = Splitter(calls=form), time.process_time()
    splitter.push(beginning)
    for letter in filler * (100_000 // len(filler)):
        splitter.push(letter)
    splitter.flush()
    assert time.process_time() - start < 10


def test_only_a_possible_marker_is_held_back() -> None:
    """What cannot become a marker comes at once; what can waits for the letter that decides."""
    splitter = Splitter(calls=FENCED)
    assert splitter.push("<") == [] and splitter.push("b") == [Content("<b")]
    assert splitter.push(" a <｜tool") == [Content(" a ")] and splitter.push("s") == [Content("<｜tools")]
    assert splitter.push(f"{CALLS}{CALL}f{SEP}") == [ToolCallStart(0, "f")]
    assert splitter.push("{1") == [ToolCallArguments(0, "{1")]
    assert splitter.push("}" + END_CALL) == [ToolCallArguments(0, "}")]
    reasoning = Splitter(starts_in_reasoning=True)
    assert reasoning.push("so\n") == [Reasoning("so")] and reasoning.push("on") == [Reasoning("\non")]


def test_arguments_come_as_they_are_written() -> None:
    """The name first, then each piece of the arguments, up to the brace that closes them."""
    splitter = Splitter(calls=TAGGED, names={"f"})
    assert splitter.push('<tool_call>\n{"name": "f", "arg') == []
    assert splitter.push('uments": {"a"') == [ToolCallStart(0, "f"), ToolCallArguments(0, '{"a"')]
    assert splitter.push(": 1") == [ToolCallArguments(0, ": 1")]
    assert splitter.push("}}\n") == [ToolCallArguments(0, "}")]
    assert splitter.push("</tool_call>") == [] and splitter.flush() == [] and splitter.num_calls == 1
