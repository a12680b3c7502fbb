"""The forms that DeepSeek published, and ChatML, as plain functions from a conversation to pieces.

No template text is ever mixed with a message, so a content cannot become a special token whatever it holds; but
`</think>` in an assistant's own content ends its reasoning, as in the published templates. Special tokens are looked up
by their text, so one form serves every vocabulary that has them (R1-Distill on Qwen and Llama).

    V2    {bos}{system}\\n\\nUser: {u}\\n\\nAssistant: {a}{eos}User: ...
    V3    {bos}{system}<｜User｜>{u}<｜Assistant｜>{a}{eos}
    R1    as V3; an answer begins with <think>\\n
    V3.1  as V3; <｜Assistant｜> is followed by <think> or </think>; a tool call has no fence and no type

What came before the last user message keeps its answers without the reasoning. After it, reasoning is written (as it
is to be learned, or to go on from): the published templates drop that too, as they were made for prompts alone.

Mistakes of the published templates that are not repeated: V3 leaves out `<｜tool▁calls▁end｜>` and eos after exactly
one tool call, drops calls beside content, opens tool outputs only once in a conversation, and leaves them open when
more calls follow; V3.1 gives no generation prompt after a system message or an answer. V3 and R1 ignore the list of
tools; see `_fenced_tools`.

Facts: DeepSeek-V2's README, the tokenizer_config.json of V3, R1 and V3.1 and their model cards.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from porcelet.chat.calls import BARE, CALL, CALLS, END_CALL, END_CALLS, FENCED, SEP, TAGGED, CallForm, listed
from porcelet.chat.messages import Conversation, Tool, Turn
from porcelet.chat.pieces import Piece
from porcelet.errors import InputError, ModelError
from porcelet.tokenizer import Tokenizer

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
THINK, END_THINK = "<think>", "</think>"
OUTPUTS, END_OUTPUTS = "<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>"
OUTPUT, END_OUTPUT = "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>"
IM_START, IM_END = "<|im_start|>", "<|im_end|>"

# V3's plain form as a template, for other programs that read a folder we write. Our own rendering does not use it.
V3_TEMPLATE = """\
{{- bos_token }}
{{- messages | selectattr("role", "equalto", "system") | map(attribute="content") | join("\\n\\n") }}
{%- for message in messages %}
    {%- if message.role == "user" %}{{- "<｜User｜>" + message.content }}{% endif %}
    {%- if message.role == "assistant" %}{{- "<｜Assistant｜>" + message.content + eos_token }}{% endif %}
    {%- if message.role == "tool" %}{{- raise_exception("this template has no tool messages") }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- "<｜Assistant｜>" }}{% endif %}"""
# R1's, likewise: a prompt opens the reasoning, and an earlier answer has lost its own.
R1_TEMPLATE = V3_TEMPLATE.replace("message.content + eos_token", 'message.content.split("</think>")[-1] + eos_token')
R1_TEMPLATE = R1_TEMPLATE.replace('{{- "<｜Assistant｜>" }}', '{{- "<｜Assistant｜><think>\\n" }}')


@dataclass(frozen=True)
class Part:
    """Ordinary text, or with `special` the text of a special token."""

    text: str
    special: bool = False
    trainable: bool = False


@dataclass(frozen=True)
class BuiltIn:
    """A form: its name, the function that writes a conversation, special tokens that a vocabulary for it has, whether
    its answers begin with reasoning (None leaves that to the caller), and how they call tools.

    V2 and ChatML have no calls of their own: `write` gets them spelled out."""

    name: str
    write: Callable[[Conversation], Iterator[Part]]
    tokens: tuple[str, ...]
    thinking: bool | None = False
    calls: CallForm = TAGGED

    def pieces(self, conversation: Conversation, tokenizer: Tokenizer) -> list[Piece]:
        """The conversation, its special tokens looked up.

        Raises:
            InputError: the form has no way to write something in the conversation.
            ModelError: the tokenizer lacks a special token.
        """
        return [_look_up(part, tokenizer, self.name) for part in self.write(conversation)]

    def text(self, conversation: Conversation) -> str:
        """The conversation as a template would write it."""
        return "".join(part.text for part in self.write(conversation))


def _look_up(part: Part, tokenizer: Tokenizer, name: str) -> Piece:
    if not part.special:
        return Piece(part.text, part.trainable)
    id = tokenizer.token_id(part.text)
    if id is None:
        raise ModelError(
            f"the tokenizer has no token {part.text!r}, which the chat format {name} needs for this conversation; "
            "give the folder a chat_template.jinja that fits its tokenizer"
        )
    return Piece(id, part.trainable)


def _special(*texts: str, trainable: bool = False) -> Iterator[Part]:
    return (Part(text, special=True, trainable=trainable) for text in texts)


# ---- V3, R1, V3.1 ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Spoken:
    """An answer as it is written: the text between the thinking tokens, if they are written, and what follows."""

    reasoning: str | None
    content: str = ""
    closed: bool = True


@dataclass(frozen=True)
class _DeepSeek:
    """How the three forms differ. `after_think` etc. are the line breaks around the two thinking tokens."""

    name: str
    thinking: bool | None  # the only mode there is, or None for a choice
    calls: CallForm
    after_think: str = ""
    before_end: str = ""
    after_end: str = ""

    @property
    def fenced(self) -> bool:
        """Whether the list of tools is in our words, and tool outputs stand in a frame."""
        return self.calls is FENCED

    def __call__(self, conversation: Conversation) -> Iterator[Part]:
        thinking = _mode(conversation, self.name, self.thinking)
        yield from _special(BOS)
        yield from self._system(conversation)
        turns = [turn for turn in conversation.turns if turn.role != "system"]
        last_user = max((i for i, turn in enumerate(turns) if turn.role == "user"), default=-1)
        before: Turn | None = None
        for index, turn in enumerate(turns):
            yield from self._frame(before, turn)
            if turn.role == "user":
                yield from (*_special(USER), Part(turn.content or ""))
            elif turn.role == "tool":
                yield from (*_special(OUTPUT), Part(turn.content or ""), *_special(END_OUTPUT))
            else:
                follows = before is not None and before.role == "tool"
                yield from self._answer(turn, index > last_user, follows, thinking)
            before = turn
        yield from self._frame(before, None)
        if conversation.prompt and not (before and before.role == "tool"):
            yield from self._head(thinking)

    def _system(self, conversation: Conversation) -> Iterator[Part]:
        parts = [turn.content or "" for turn in conversation.turns if turn.role == "system"]
        yield Part("\n\n".join(parts))
        if conversation.tools:
            if parts:
                yield Part("\n\n")
            yield from (_fenced_tools if self.fenced else _bare_tools)(conversation.tools)

    def _frame(self, before: Turn | None, turn: Turn | None) -> Iterator[Part]:
        """What opens, parts and closes a run of tool outputs."""
        was, is_now = (item is not None and item.role == "tool" for item in (before, turn))
        if self.fenced and was and is_now:
            yield Part("\n")
        elif self.fenced and was != is_now:
            yield from _special(OUTPUTS if is_now else END_OUTPUTS)

    def _head(self, thinking: bool) -> Iterator[Part]:
        """What stands before an answer: the prompt, if it is still to come."""
        yield from _special(ASSISTANT)
        if thinking:
            yield from (*_special(THINK), Part(self.after_think))
        elif self.thinking is None:
            yield from _special(END_THINK)

    def _answer(self, turn: Turn, current: bool, follows: bool, thinking: bool) -> Iterator[Part]:
        """An assistant's turn. After tool outputs it goes on without a new head, and opens its reasoning itself."""
        spoken = self._spoken(turn, current, thinking)
        if not follows:
            yield from self._head(spoken.reasoning is not None)
        elif spoken.reasoning is not None:
            yield from (*_special(THINK, trainable=True), Part(self.after_think, trainable=True))
        if spoken.reasoning is not None:
            yield Part(spoken.reasoning, trainable=True)
            yield from _special(*[END_THINK] * spoken.closed, trainable=True)
        yield Part(spoken.content, trainable=True)
        yield from (Part(text, special, trainable=True) for text, special in self.calls.write(turn.calls))
        if not turn.prefix:
            yield from _special(EOS, trainable=True)

    def _spoken(self, turn: Turn, current: bool, thinking: bool) -> _Spoken:
        content = turn.content or ""
        if self.thinking is False:
            if turn.reasoning and current:
                raise InputError(f"reasoning_content: the chat format {self.name} has no reasoning; leave it out")
            return _Spoken(None, content)
        if turn.reasoning:
            if not current:
                return _Spoken(None, content)
            if turn.prefix and not content:
                return _Spoken(turn.reasoning, closed=False)
            return _Spoken(turn.reasoning + self.before_end, self.after_end + content)
        if END_THINK in content:
            reasoning, _, content = content.rpartition(END_THINK)
            return _Spoken(self._without_opening(reasoning) if current else None, content)
        if turn.prefix and (content.startswith(THINK) or (thinking and self.thinking is None)):
            return _Spoken(self._without_opening(content), closed=False)
        return _Spoken(None, content)

    def _without_opening(self, text: str) -> str:
        return text.removeprefix(THINK + self.after_think).removeprefix(THINK)


def _mode(conversation: Conversation, name: str, only: bool | None) -> bool:
    """Whether the model is to think: the one mode there is, or the caller's choice, which is no by default."""
    wanted = conversation.thinking
    if only is not None and wanted not in (None, only):
        raise InputError(f"thinking is {wanted}; the chat format {name} {'always' if only else 'never'} thinks")
    return bool(wanted) if only is None else only


def _bare_tools(tools: tuple[Tool, ...]) -> Iterator[Part]:
    """V3.1's list of tools, word for word as its model card prescribes: the model was trained on it."""
    yield Part("## Tools\nYou have access to the following tools:\n")
    for tool in tools:
        parameters = json.dumps(tool.parameters, ensure_ascii=False)
        yield Part(f"\n### {tool.name}\nDescription: {tool.description}\n\nParameters: {parameters}\n")
    yield Part("\nIMPORTANT: ALWAYS adhere to this exact format for tool use:\n")
    yield from (*_special(CALLS, CALL), Part("tool_call_name"), *_special(SEP), Part("tool_call_arguments"))
    yield from (*_special(END_CALL), Part("{{additional_tool_calls}}"), *_special(END_CALLS))
    yield Part(
        "\n\nWhere:\n\n- `tool_call_name` must be an exact match to one of the available tools\n"
        "- `tool_call_arguments` must be valid JSON that strictly follows the tool's Parameters Schema\n"
        "- For multiple tool calls, chain them directly without separators or spaces\n"
    )


def _fenced_tools(tools: tuple[Tool, ...]) -> Iterator[Part]:
    """A list of tools for V3 and R1, whose templates write none: the wording is ours, the form of a call theirs."""
    yield Part("You can call these functions, one JSON object a line:\n")
    for tool in tools:
        yield Part(listed(tool) + "\n")
    yield Part("\nTo call functions, end the answer with calls in exactly this form:\n")
    yield from (*_special(CALLS, CALL), Part("function"), *_special(SEP))
    yield from (Part("NAME\n```json\nARGUMENTS\n```"), *_special(END_CALL, END_CALLS))
    yield Part(
        "\nNAME is the function's name, ARGUMENTS a JSON object that fits its parameters. "
        "Write further calls before the closing mark, each on a new line."
    )


# ---- V2, ChatML -----------------------------------------------------------------------------------------------------


def _plain(conversation: Conversation, name: str) -> tuple[Turn, ...]:
    """The turns, if they hold nothing but text."""
    _mode(conversation, name, False)
    assert not conversation.uses_tools, "calls are spelled out for this form"
    last_user = max((i for i, turn in enumerate(conversation.turns) if turn.role == "user"), default=-1)
    if any(turn.reasoning for turn in conversation.turns[last_user + 1 :]):
        raise InputError(f"reasoning_content: the chat format {name} has no reasoning; leave it out")
    return conversation.turns


def _write_v2(conversation: Conversation) -> Iterator[Part]:
    yield from _special(BOS)
    for turn in _plain(conversation, "V2"):
        content = turn.content or ""
        if turn.role == "assistant":
            yield from (Part("Assistant:"), Part(f" {content}", trainable=True))
            yield from _special(*[EOS] * (not turn.prefix), trainable=True)
        else:
            yield Part(f"User: {content}\n\n" if turn.role == "user" else f"{content}\n\n")
    if conversation.prompt:
        yield Part("Assistant:")


def _write_chatml(conversation: Conversation) -> Iterator[Part]:
    for turn in _plain(conversation, "ChatML"):
        spoken = turn.role == "assistant"
        yield from (*_special(IM_START), Part(f"{turn.role}\n"), Part(turn.content or "", trainable=spoken))
        if not turn.prefix:
            yield from (*_special(IM_END, trainable=spoken), Part("\n"))
    if conversation.prompt:
        yield from (*_special(IM_START), Part("assistant\n"))


_DEEPSEEK = (BOS, EOS, USER, ASSISTANT)
_THINKING = (*_DEEPSEEK, THINK, END_THINK)
_R1 = _DeepSeek("R1", thinking=True, calls=FENCED, after_think="\n", before_end="\n", after_end="\n\n")
V2 = BuiltIn("V2", _write_v2, (BOS, EOS))
V3 = BuiltIn("V3", _DeepSeek("V3", thinking=False, calls=FENCED), _DEEPSEEK, calls=FENCED)
R1 = BuiltIn("R1", _R1, _THINKING, thinking=True, calls=FENCED)
_V3_1 = _DeepSeek("V3.1", thinking=None, calls=BARE)
V3_1 = BuiltIn("V3.1", _V3_1, _THINKING, thinking=None, calls=BARE)
CHATML = BuiltIn("ChatML", _write_chatml, (IM_START, IM_END))
