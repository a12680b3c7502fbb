"""Tools: which of them an answer may call, and what its tokens must then look like.

Where tools are offered, every call names one of them and has a JSON object for its arguments: one that fits the tool's
schema where the tool is `strict` or the request forces a call. A grammar over tokens sees to that (engine/grammar.py):

    auto       text, or text and calls; or, where an answer's own constraint is given, that answer or calls
    required   calls, at least one; one call of the named tool where a name is given
    none       no call: the special token that would open one is forbidden

After its calls an answer ends. Where a special token opens the calls, an answer is free until that token comes, so that
text costs no mask and can be guessed ahead. A grammar begins after the reasoning; a model that may or may not begin to
reason by itself is left to do so.

Left out: with `none`, a model whose mark is ordinary text may spell out a call, which is content then.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from porcelet.chat.builtin import END_THINK, THINK
from porcelet.chat.calls import MARKS, CallForm
from porcelet.chat.messages import Tool
from porcelet.errors import InputError
from porcelet.tokenizer import Tokenizer
from porcelet.types import Constraint


@dataclass(frozen=True)
class ToolChoice:
    """Whether an answer calls tools: never, if the model likes to, or in any case; and if `name` is given, which."""

    mode: Literal["none", "auto", "required"]
    name: str | None = None


NONE, AUTO, REQUIRED = ToolChoice("none"), ToolChoice("auto"), ToolChoice("required")
# What an answer's tokens begin with: the answer proper, reasoning that the prompt opened, or reasoning if the model
# opens it.
Beginning = Literal["answer", "reasoning", "either"]


@dataclass(frozen=True)
class Calling:
    """What may be called, and how. `names` is empty where nothing may."""

    form: CallForm
    tools: tuple[Tool, ...]
    choice: ToolChoice = AUTO
    parallel: bool = True

    def __post_init__(self) -> None:
        known = [tool.name for tool in self.tools]
        if self.choice.mode == "required" and not known:
            raise InputError("tool_choice asks for a call, but tools is empty; give the tools")
        if self.choice.name is not None and self.choice.name not in known:
            raise InputError(f"tool_choice names {self.choice.name[:80]!r}, which is not among the tools")

    @property
    def offered(self) -> tuple[tuple[int, Tool], ...]:
        """The tools that may be called, with their places in the list."""
        if self.choice.mode == "none":
            return ()
        return tuple((i, tool) for i, tool in enumerate(self.tools) if self.choice.name in (None, tool.name))

    @property
    def names(self) -> frozenset[str]:
        return frozenset(tool.name for _, tool in self.offered)


def forbidden(calling: Calling, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The special token that would open a call where none may be."""
    mark = tokenizer.token_id(calling.form.mark)
    return () if calling.offered or mark is None else (mark,)


def constraint_of(
    calling: Calling, answer: Constraint | None, beginning: Beginning, tokenizer: Tokenizer
) -> Constraint | None:
    """What an answer must look like; `answer` is what it must be if it is no call."""
    if not calling.offered and (answer is None or beginning == "answer"):
        return answer
    return _Grammar(calling, answer, beginning, tokenizer).constraint()


# ---- the grammar ----------------------------------------------------------------------------------------------------

# What leaves no choice of letters leaves one of tokens, which is the model's: it was trained on some.
_OPTIONS = '%llguidance {"no_forcing": true}'
_ANY_OBJECT = json.dumps({"type": "object"})
_TOKENS = MARKS | {THINK, END_THINK}  # texts that are meant as tokens where the vocabulary has them


class _Grammar:
    """Writes one constraint in llguidance's dialect of Lark."""

    def __init__(self, calling: Calling, answer: Constraint | None, beginning: Beginning, tokenizer: Tokenizer) -> None:
        self._calling, self._answer, self._beginning, self._tokenizer = calling, answer, beginning, tokenizer
        self._parts: list[tuple[str, Constraint]] = []
        self._special: list[int] = []

    def constraint(self) -> Constraint:
        mark = self._tokenizer.token_id(self._calling.form.mark)
        lazy = self._is_free and mark is not None and self._beginning != "either"
        rules = ["start: calls", *self._calls()] if lazy else [*self._start(), *self._answers()]
        return Constraint(
            "lark", "\n".join([_OPTIONS, *rules]), tuple(self._parts), tuple(self._special), mark if lazy else None
        )

    @property
    def _is_free(self) -> bool:
        """Whether an answer may be any text."""
        return self._calling.choice.mode == "auto" and bool(self._calling.offered) and self._answer is None

    def _start(self) -> Iterator[str]:
        """The reasoning, if it may come, and the line breaks after it, which do not belong to the answer."""
        yield r"BREAKS: /\n{1,2}/"
        match self._beginning:
            case "answer":
                yield "start: answer"
            case "reasoning":
                yield "start: BREAKS? answer"
            case "either":
                yield "start: (reasoning BREAKS?)? answer"
                yield f"reasoning: {self._texts(THINK)} thought"
                yield self._until("thought", "/(?s:.*)/", END_THINK)

    def _answers(self) -> Iterator[str]:
        if self._is_free:
            mark = self._calling.form.mark
            yield "answer: TEXT | calls"
            yield f"TEXT: /(?s:.*)/ & ~/(?s:.*){re.escape(mark)}(?s:.*)/"
            yield self._until("head", "TEXT", mark)
            yield from self._calls("head")
            return
        ways = [self._part("", self._answer)] if self._answer and self._calling.choice.mode != "required" else []
        yield "answer: " + " | ".join(ways + ["calls"] * bool(self._calling.offered))
        yield from self._calls()

    def _until(self, name: str, text: str, mark: str) -> str:
        """A rule for text up to a mark, that included: a token ends the text by itself, letters are watched for."""
        lazy = "" if self._tokenizer.token_id(mark) is not None else "[lazy]"
        return f"{name}{lazy}: {text} {self._texts(mark)}"

    def _calls(self, head: str = "") -> Iterator[str]:
        """Rules for the calls; `head` is the rule that ends with their mark, where that has been read already."""
        form, choice = self._calling.form, self._calling.choice
        if not self._calling.offered:
            return
        first = self._texts(*(form.opening + form.before_name)[bool(head) :])
        several = self._calling.parallel and not (choice.mode == "required" and choice.name)
        more = f"({self._texts(*form.between, *form.before_name)} call)*" if several else ""
        yield f"calls: {head} {first} call {more} {self._texts(*form.closing)}"
        yield "call: " + " | ".join(f"call_{index}" for index, _ in self._calling.offered)
        any_object = ""
        for index, tool in self._calling.offered:
            if tool.strict or choice.mode == "required":
                place = f"tools[{index}].function.parameters"
                arguments = self._part(f"{place} ({tool.name})", _schema(tool, place))
            else:
                arguments = any_object = any_object or self._part("", Constraint("json_schema", _ANY_OBJECT))
            before = self._texts(tool.name, *form.before_arguments)
            yield f"call_{index}: {before} {arguments} {self._texts(*form.after_arguments)}"

    def _part(self, title: str, constraint: Constraint) -> str:
        self._parts.append((title, constraint))
        return f"@part_{len(self._parts) - 1}"

    def _texts(self, *texts: str) -> str:
        """Texts in a row: tokens by their ids, others between quotes."""
        return " ".join(map(self._text, texts))

    def _text(self, text: str) -> str:
        token = self._tokenizer.token_id(text) if text in _TOKENS else None
        if token is None:
            return json.dumps(text, ensure_ascii=False)
        if token not in self._special:
            self._special.append(token)
        return f"<[{token}]>"


def _schema(tool: Tool, place: str) -> Constraint:
    """A tool's parameters, which are an object even if they do not say so."""
    schema = {"type": "object", **tool.parameters}
    if schema["type"] != "object":
        raise InputError(f"{place} ({tool.name}) is of type {str(schema['type'])[:80]!r}; it must be an object")
    return Constraint("json_schema", json.dumps(schema, ensure_ascii=False))
