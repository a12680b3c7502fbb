"""What the scripted models of these tests say, and the server that serves them.

`talker` has V3.1's form: it thinks if it is asked to, and fills in. Each of its `MIXED` scripts begins after the letter
that an unfinished answer ends with. `caller` has R1's form, and calls a tool. `agent`, in V3.1's form, thinks if it is
asked to, answers, and calls a tool.
"""

from __future__ import annotations

import random
import string
from dataclasses import dataclass

from porcelet.chat import builtin

V3_1_TEMPLATE = """\
{{- bos_token }}{% if not thinking is defined %}{% set thinking = false %}{% endif %}
{%- for message in messages %}
    {%- if message.role == "system" %}{{- message.content }}{% endif %}
    {%- if message.role == "user" %}{{- "<｜User｜>" + message.content }}{% endif %}
    {%- if message.role == "assistant" %}
        {{- "<｜Assistant｜></think>" + message.content.split("</think>")[-1] + eos_token }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- "<｜Assistant｜>" + ("<think>" if thinking else "</think>") }}{% endif %}"""

THOUGHT, ANSWER = ("Let me", " think."), ("Hi", " there")
MIDDLE = ("mid", "dle")
CALL = ("get_weather\n```json\n", '{"city"', ': "Par', 'is"}', "\n```")


@dataclass(frozen=True)
class Mixed:
    """A script whose `</think>` is spelled out, cut anywhere; it begins after `letter`."""

    letter: str
    pieces: tuple[str, ...]
    reasoning: str
    content: str


def _mixed(letters: str) -> list[Mixed]:
    """A script for each letter, cut at random, inside `</think>` above all, so that no piece occurs twice."""
    dice = random.Random(5)
    taken = set(letters)
    mixed = []
    for letter in letters:
        words = [f"{letter}{number}" for number in range(100, 112)]
        reasoning, content = " ".join(words[:6]), "\n".join(words[6:])
        pieces = _cut(f"{reasoning}{builtin.END_THINK}{content}", dice)
        while len(set(pieces)) < len(pieces) or taken & set(pieces):
            pieces = _cut(f"{reasoning}{builtin.END_THINK}{content}", dice)
        taken.update(pieces)
        mixed.append(Mixed(letter, tuple(pieces), reasoning, content))
    return mixed


def _cut(text: str, dice: random.Random) -> list[str]:
    mark = text.index(builtin.END_THINK)
    inside = dice.sample(range(mark, mark + len(builtin.END_THINK) + 1), dice.randint(1, 4))
    cuts = sorted({*inside, *dice.sample(range(1, len(text)), 6)})
    return [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]


MIXED = _mixed(string.ascii_uppercase)
TALKER = [
    (builtin.THINK, *THOUGHT, builtin.END_THINK, *ANSWER),
    ("<｜fim▁end｜>", *MIDDLE),
    *((mixed.letter, *mixed.pieces) for mixed in MIXED),
]
CALLER = [
    (
        *("\n", "need", builtin.END_THINK, builtin.CALLS, builtin.CALL, "function", builtin.SEP, *CALL),
        *(builtin.END_CALL, builtin.END_CALLS),
    )
]
AGENT = [
    (
        *(builtin.THINK, "Let me", " think", ".", builtin.END_THINK, "Hi", " there", "!"),
        *(builtin.CALLS, builtin.CALL, "get_weather", builtin.SEP, '{"city": ', '"Paris"', "}"),
        *(builtin.END_CALL, builtin.END_CALLS),
    )
]
