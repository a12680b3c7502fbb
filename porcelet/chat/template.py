"""A model's own Jinja template: conversation to pieces.

A template writes special tokens as text, and a message may hold the same text: "<|im_end|>" from a user must stay ten
characters, or anybody could end their turn and speak as the system. So before the template runs, every character that
begins or ends a special token is swapped, in the messages and tools only, for a stand-in: one unused private character
each. No special token can then lie in, begin in or end in a content; the template's own are found in what it wrote.
Then the stand-ins are swapped back in the ordinary text between special tokens. So ordinary text gives exactly the
tokens of the plain way, and filters such as `trim` act on it as usual. All that a template sees differently is those
few characters: a test like `'</think>' in content` fails.

Two more stand-ins find what to train on: a second rendering has every answer between brackets. Tool calls have no such
place, so a conversation that holds some has no mask here (the built-in forms have one).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from porcelet.chat.messages import Call, Conversation, Tool, Turn, is_deep
from porcelet.chat.pieces import Piece
from porcelet.chat.sandbox import Sandbox
from porcelet.errors import InputError, ModelError
from porcelet.tokenizer import Tokenizer


@dataclass(frozen=True)
class _StandIns:
    """Private characters that occur nowhere else: one for each end of a special token, for the first character of each
    text that is the inside of one, and two brackets."""

    ends: dict[int, str]
    insides: dict[str, str]
    opening: str
    closing: str

    def mask(self, value: Any) -> Any:
        """A JSON value with stand-ins in all its texts."""
        if isinstance(value, str):
            return self.insides.get(value, value[:1]).translate(self.ends) + value[1:].translate(self.ends)
        if isinstance(value, Mapping):
            return {self.mask(key): self.mask(item) for key, item in value.items()}
        return [self.mask(item) for item in value] if isinstance(value, list | tuple) else value

    def without_brackets(self, text: str) -> str:
        return text.replace(self.opening, "").replace(self.closing, "")

    @property
    def originals(self) -> dict[int, str]:
        firsts = {ord(stand_in): text[0] for text, stand_in in self.insides.items()}
        return firsts | {ord(stand_in): chr(character) for character, stand_in in self.ends.items()}


@dataclass(frozen=True)
class Template:
    """A template's source with the texts of its two tokens, and the process that renders it."""

    source: str
    bos: str
    eos: str
    sandbox: Sandbox

    def pieces(self, conversation: Conversation, tokenizer: Tokenizer) -> list[Piece]:
        """The conversation; no piece is marked trainable.

        Raises:
            InputError: the template refuses the conversation, or does not know something in it.
            ModelError: the template does not work.
        """
        self._refuse_unknown(conversation)
        stand_ins = _stand_ins(self.source, conversation, tokenizer)
        return list(_cut(self._fill(conversation, stand_ins, False), tokenizer, stand_ins))

    def marked(self, conversation: Conversation, tokenizer: Tokenizer) -> list[Piece]:
        """The conversation, with what the assistant produced marked trainable.

        Raises:
            ModelError: the template changes the answers, or there are tool calls, so their place cannot be told.
        """
        if any(turn.calls for turn in conversation.turns):
            raise ModelError(
                "the model's own chat template does not tell which tokens of a tool call to train on; "
                "leave tool calls out, or use a model with one of DeepSeek's chat formats"
            )
        stand_ins = _stand_ins(self.source, conversation, tokenizer)
        text = self._fill(conversation, stand_ins, True)
        if stand_ins.without_brackets(text) != self._fill(conversation, stand_ins, False):
            raise ModelError(
                "the model's own chat template changes what the assistant said (white space at its ends, perhaps), so "
                "the tokens to train on cannot be told; strip the answers, or give another chat_template.jinja"
            )
        return list(_cut(text, tokenizer, stand_ins))

    def text(self, conversation: Conversation) -> str:
        """What the template writes for a conversation that we made ourselves."""
        return self._fill(conversation, _StandIns({}, {}, "", ""), False)

    def _refuse_unknown(self, conversation: Conversation) -> None:
        """A template that never names a variable would drop it in silence. Tools come only to one that knows them."""
        last_user = max((i for i, turn in enumerate(conversation.turns) if turn.role == "user"), default=-1)
        reasoning = any(turn.reasoning for turn in conversation.turns[last_user + 1 :])
        chosen = conversation.thinking is not None
        for given, name in ((reasoning, "reasoning_content"), (chosen, "thinking")):
            if given and name not in self.source:
                raise InputError(f"{name}: the model's own chat template does not know it; leave it out")

    def _fill(self, conversation: Conversation, stand_ins: _StandIns, bracketed: bool) -> str:
        messages = [_message(turn, stand_ins, bracketed) for turn in conversation.turns]
        if conversation.continues:
            # What follows the answer's end is cut off: with a bracket there, the end can be found.
            messages[-1]["content"] += "" if bracketed else stand_ins.closing
        names: dict[str, Any] = {"messages": messages, "bos_token": self.bos, "eos_token": self.eos, "documents": None}
        names["tools"] = [_function(tool, stand_ins) for tool in conversation.tools] or None
        names["add_generation_prompt"] = conversation.prompt
        if conversation.thinking is not None:
            names |= dict.fromkeys(("thinking", "enable_thinking"), conversation.thinking)
        text = self.sandbox.render(names)
        return _up_to_the_end(text, stand_ins, bracketed) if conversation.continues else text


def _up_to_the_end(text: str, stand_ins: _StandIns, bracketed: bool) -> str:
    start, bracket, _ = text.rpartition(stand_ins.closing)
    if not bracket:
        raise InputError("messages: the model's chat template cannot continue an answer; leave prefix out")
    return start + bracket if bracketed else start


def _message(turn: Turn, stand_ins: _StandIns, bracketed: bool) -> dict[str, Any]:
    """A message as templates expect it: OpenAI's form, but arguments as an object."""
    message: dict[str, Any] = {"content": turn.content}
    if turn.reasoning:
        message["reasoning_content"] = turn.reasoning
    if turn.calls:
        message["tool_calls"] = [_call(call) for call in turn.calls]
    if turn.call_id:
        message["tool_call_id"] = turn.call_id
    message = {name: stand_ins.mask(value) for name, value in message.items()}
    if bracketed and turn.role == "assistant":
        # One span from the reasoning to the content's end, or the content alone where the template drops the reasoning.
        message = {name: stand_ins.opening + value for name, value in message.items()}
        message["content"] += stand_ins.closing
    return {"role": turn.role, **message}


def _call(call: Call) -> dict[str, Any]:
    try:
        arguments = json.loads(call.arguments)
        arguments = call.arguments if is_deep(arguments) else arguments
    except (ValueError, RecursionError):
        arguments = call.arguments  # a model wrote it, and models err
    function = {"name": call.name, "arguments": arguments}
    return {"type": "function", "function": function} | ({"id": call.id} if call.id else {})


def _function(tool: Tool, stand_ins: _StandIns) -> dict[str, Any]:
    values = {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
    return {"type": "function", "function": {name: stand_ins.mask(value) for name, value in values.items()}}


def _stand_ins(source: str, conversation: Conversation, tokenizer: Tokenizer) -> _StandIns:
    specials = list(tokenizer.special_tokens)
    ends = sorted({character for token in specials for character in (token[0], token[-1])})
    # A template may put "<" and ">" around a name or a key itself: one that is the inside of a special token loses its
    # first character, too.
    insides = sorted({text for text in _all_strings(conversation) if text and any(text in token for token in specials)})
    used = set(source).union(*_texts(conversation), *tokenizer.special_tokens)
    unused = (chr(code) for code in range(0xF0000, 0x110000) if chr(code) not in used)
    needed = len(ends) + len(insides) + 2
    free = [character for character, _ in zip(unused, range(needed), strict=False)]
    if len(free) < needed:
        raise InputError("messages hold nearly every private character of Unicode (from U+F0000); remove some")
    firsts = dict(zip(insides, free[2 + len(ends) :], strict=True))
    return _StandIns(dict(zip(map(ord, ends), free[2 : 2 + len(ends)], strict=True)), firsts, free[0], free[1])


def _all_strings(conversation: Conversation) -> Iterator[str]:
    """Every string that a template can write on its own: contents, names, keys and values."""
    for turn in conversation.turns:
        yield from (turn.content or "", turn.reasoning, turn.call_id)
        for call in turn.calls:
            yield from (call.id, call.name, *_strings_in(_call(call)["function"]["arguments"]))
    for tool in conversation.tools:
        yield from (tool.name, tool.description, *_strings_in(tool.parameters))


def _strings_in(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from (str(key), *_strings_in(item))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings_in(item)


def _texts(conversation: Conversation) -> Iterator[str]:
    """Every text that comes from outside."""
    for turn in conversation.turns:
        yield from (turn.content or "", turn.reasoning, turn.call_id)
        for call in turn.calls:
            # The parsed arguments too: JSON can spell a character in two ways.
            yield from (call.id, call.name, call.arguments, json.dumps(_call(call), ensure_ascii=False))
    for tool in conversation.tools:
        yield from (tool.name, tool.description, json.dumps(tool.parameters, ensure_ascii=False))


def _cut(text: str, tokenizer: Tokenizer, stand_ins: _StandIns) -> Iterator[Piece]:
    """Pieces of a filled template. A special token that directly follows an answer is the answer's own end."""
    originals = stand_ins.originals
    inside = ends = False
    for part in tokenizer.split(text):
        if isinstance(part, int):
            yield Piece(part, inside or ends)
            ends = False
            continue
        for piece in re.split(f"([{stand_ins.opening}{stand_ins.closing}])", part):
            if piece in (stand_ins.opening, stand_ins.closing):
                inside = piece == stand_ins.opening
                ends = not inside
            elif piece:
                yield Piece(piece.translate(originals), inside)
                ends = False
