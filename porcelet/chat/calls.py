"""The forms in which models write tool calls. Writing, constraining and reading a call all go by these descriptions.

    FENCED  <｜tool▁calls▁begin｜>CALL\\nCALL<｜tool▁calls▁end｜>                                               V3, R1
            CALL: <｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME\\n```json\\nARGUMENTS\\n```<｜tool▁call▁end｜>
    BARE    <｜tool▁calls▁begin｜>CALLCALL<｜tool▁calls▁end｜>                                                   V3.1
            CALL: <｜tool▁call▁begin｜>NAME<｜tool▁sep｜>ARGUMENTS<｜tool▁call▁end｜>
    TAGGED  CALL\\nCALL                                                                                      the others
            CALL: <tool_call>\\n{"name": "NAME", "arguments": ARGUMENTS}\\n</tool_call>

TAGGED is what Qwen's models and others were trained on. A model whose template has no tools, or another form for them,
gets it explained in words (`spelled_out`). Left out: the forms of Llama 3 and Mistral.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace

from porcelet.chat.messages import Call, Conversation, Tool, Turn
from porcelet.tokenizer import Tokenizer

CALLS, END_CALLS = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL, SEP, END_CALL = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
TAG, END_TAG = "<tool_call>", "</tool_call>"
RESULT, END_RESULT = "<tool_response>", "</tool_response>"
MARKS = frozenset([CALLS, END_CALLS, CALL, SEP, END_CALL, TAG, END_TAG])


@dataclass(frozen=True)
class CallForm:
    """The texts around the calls, their names and their arguments."""

    opening: tuple[str, ...]
    before_name: tuple[str, ...]
    before_arguments: tuple[str, ...]
    after_arguments: tuple[str, ...]
    between: tuple[str, ...]
    closing: tuple[str, ...]

    @property
    def mark(self) -> str:
        """What tells that calls begin."""
        return (self.opening + self.before_name)[0]

    def is_known(self, tokenizer: Tokenizer) -> bool:
        """Whether the vocabulary has the form's marks as tokens."""
        texts = self.opening + self.before_name + self.before_arguments + self.after_arguments + self.closing
        return all(tokenizer.token_id(text) is not None for text in texts if text in MARKS)

    def write(self, calls: tuple[Call, ...]) -> Iterator[tuple[str, bool]]:
        """Texts, and whether each is a mark of the form. Names are written as they are."""
        texts: list[tuple[str, bool]] = []
        for index, call in enumerate(calls):
            texts += _marked(self.between if index else self.opening)
            texts += (*_marked(self.before_name), (call.name, False))
            texts += (*_marked(self.before_arguments), (call.arguments, False), *_marked(self.after_arguments))
        return iter([*texts, *_marked(self.closing)] if calls else [])


def _marked(texts: tuple[str, ...]) -> Iterator[tuple[str, bool]]:
    return ((text, text in MARKS) for text in texts)


FENCED = CallForm(
    opening=(CALLS,),
    before_name=(CALL, "function", SEP),
    before_arguments=("\n```json\n",),
    after_arguments=("\n```", END_CALL),
    between=("\n",),
    closing=(END_CALLS,),
)
BARE = CallForm((CALLS,), (CALL,), (SEP,), (END_CALL,), (), (END_CALLS,))
TAGGED = CallForm((), (TAG, '\n{"name": "'), ('", "arguments": ',), ("}\n", END_TAG), ("\n",), ())


# ---- tools in words -------------------------------------------------------------------------------------------------


def spelled_out(conversation: Conversation, takes_system: bool) -> Conversation:
    """The same conversation with nothing but text in it: the list of tools in the system message, or in the first
    message where there can be no such, calls in the answers, results in messages of the user."""
    turns = list[Turn]()
    is_result = False
    for turn in conversation.turns:
        was_result, is_result = is_result, turn.role == "tool"
        if is_result and was_result:
            turns[-1] = replace(turns[-1], content=f"{turns[-1].content}\n{_result(turn)}")
        elif is_result:
            turns.append(Turn("user", _result(turn)))
        elif was_result and turn.role == "user":  # templates may want the roles to alternate
            turns[-1] = replace(turns[-1], content=f"{turns[-1].content}\n\n{turn.content}")
        else:
            turns.append(replace(turn, content=_with_calls(turn), calls=()))
    if conversation.tools:
        turns = _with_tools(turns, "".join(describe(conversation.tools)), takes_system)
    return replace(conversation, turns=tuple(turns), tools=())


def describe(tools: tuple[Tool, ...]) -> Iterator[str]:
    """The list of tools and the form of a call, in our words."""
    yield "You can call these functions, one JSON object a line:\n"
    for tool in tools:
        yield listed(tool) + "\n"
    yield "\nTo call one, end the answer with exactly this:\n"
    yield f'{TAG}\n{{"name": NAME, "arguments": ARGUMENTS}}\n{END_TAG}'
    yield (
        "\nNAME is the function's name, ARGUMENTS a JSON object that fits its parameters. For several calls write that "
        f"several times. Results come back between {RESULT} and {END_RESULT}."
    )


def listed(tool: Tool) -> str:
    """A tool as one line of JSON."""
    function = {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
    return json.dumps(function, ensure_ascii=False)


def _with_tools(turns: list[Turn], text: str, takes_system: bool) -> list[Turn]:
    first = turns[0]
    if not takes_system and first.role == "user":
        return [replace(first, content=f"{text}\n\n{first.content}"), *turns[1:]]
    if first.role == "system":
        return [replace(first, content=f"{first.content}\n\n{text}"), *turns[1:]]
    return [Turn("system" if takes_system else "user", text), *turns]


def _result(turn: Turn) -> str:
    return f"{RESULT}\n{turn.content}\n{END_RESULT}"


def _with_calls(turn: Turn) -> str:
    content = turn.content or ""
    if not turn.calls:
        return content
    calls = tuple(replace(call, name=json.dumps(call.name, ensure_ascii=False)[1:-1]) for call in turn.calls)
    return (content and content + "\n") + "".join(text for text, _ in TAGGED.write(calls))
