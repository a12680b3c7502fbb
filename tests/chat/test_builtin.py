"""The built-in forms as strings: what DeepSeek's repositories and templates say, and what their templates get wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from porcelet.chat import Content, Reasoning, Splitter, ToolCallArguments, ToolCallStart, builtin
from porcelet.chat.builtin import CHATML, R1, V2, V3, V3_1, BuiltIn
from porcelet.chat.format import ChatFormat
from porcelet.errors import InputError, ModelError
from porcelet.tokenizer import Tokenizer
from tests.chat.conftest import SPECIAL, write_tokenizer

BOS, EOS, USER, ASSISTANT = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"
CALLS, END_CALLS, CALL, END_CALL = (
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁calls▁end｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁call▁end｜>",
)
SEP, OUTPUTS, END_OUTPUTS = "<｜tool▁sep｜>", "<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>"
OUTPUT, END_OUTPUT = "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>"
FORMS = {form.name: form for form in (V2, V3, R1, V3_1, CHATML)}
TALK = [("system", "S"), ("user", "q1"), ("assistant", "a1"), ("user", "q2")]
CALL_F = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
CALL_G = {"id": "2", "type": "function", "function": {"name": "g", "arguments": "{}"}}
FENCED_F = CALL + "function" + SEP + 'f\n```json\n{"x": 1}\n```' + END_CALL
FENCED_G = CALL + "function" + SEP + "g\n```json\n{}\n```" + END_CALL
BARE_F, BARE_G = CALL + "f" + SEP + '{"x": 1}' + END_CALL, CALL + "g" + SEP + "{}" + END_CALL

hostile = st.lists(st.sampled_from([*SPECIAL, "<|im_", "end|>", "<", ">", "\n", " ", "x", "｜"])).map("".join)


def say(*turns: tuple[str, str]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in turns]


def render(form: BuiltIn, messages: list[dict[str, Any]], tokenizer: Tokenizer, **settings: Any) -> str:
    """The conversation's text; its tokens must be the text's with special tokens recognised."""
    tokens = ChatFormat(form).render(messages, tokenizer, **settings).tokens
    text = tokenizer.decode(tokens)
    assert tokens == tokenizer.encode(text, special=True)
    return text


def trained(form: BuiltIn, messages: list[dict[str, Any]], tokenizer: Tokenizer, **settings: Any) -> str:
    """The text of the trainable tokens, each stretch followed by a bar."""
    rendered = ChatFormat(form).render(messages, tokenizer, **settings)
    stretches, last = [""], False
    for token, flag in zip(rendered.tokens, rendered.trainable, strict=True):
        if flag:
            stretches[-1] += tokenizer.decode([token])
        elif last:
            stretches.append("")
        last = flag
    return "|".join(stretches)


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        (V2, f"{BOS}S\n\nUser: q1\n\nAssistant: a1{EOS}User: q2\n\nAssistant:"),
        (V3, f"{BOS}S{USER}q1{ASSISTANT}a1{EOS}{USER}q2{ASSISTANT}"),
        (R1, f"{BOS}S{USER}q1{ASSISTANT}a1{EOS}{USER}q2{ASSISTANT}<think>\n"),
        (V3_1, f"{BOS}S{USER}q1{ASSISTANT}</think>a1{EOS}{USER}q2{ASSISTANT}</think>"),
        (
            CHATML,
            "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\na1<|im_end|>\n"
            "<|im_start|>user\nq2<|im_end|>\n<|im_start|>assistant\n",
        ),
    ],
    ids=lambda value: value.name if isinstance(value, BuiltIn) else "",
)
def test_plain_conversations_are_written_as_published(tokenizer: Tokenizer, form: BuiltIn, expected: str) -> None:
    """The strings that the published templates give for a plain conversation; without a prompt, all but the end."""
    assert render(form, say(*TALK), tokenizer) == expected
    without = render(form, say(*TALK), tokenizer, add_generation_prompt=False)
    assert expected.startswith(without) and "q2" in without
    assert trained(form, say(*TALK), tokenizer).strip("|").removeprefix(" ") in (f"a1{EOS}", "a1<|im_end|>")


def test_system_messages_come_first_wherever_they_stand(tokenizer: Tokenizer) -> None:
    """DeepSeek's forms join system parts by an empty line."""
    talk = say(("user", "one"), ("system", "A"), ("assistant", "two"), ("user", "three"), ("system", "B"))
    assert render(V3, talk, tokenizer) == f"{BOS}A\n\nB{USER}one{ASSISTANT}two{EOS}{USER}three{ASSISTANT}"
    assert render(V2, say(("user", "q")), tokenizer) == f"{BOS}User: q\n\nAssistant:"


def test_a_system_message_alone_is_answered(tokenizer: Tokenizer) -> None:
    """V3.1's first template wrote no generation prompt there, nor after an answer."""
    assert render(V3_1, say(("system", "S")), tokenizer) == f"{BOS}S{ASSISTANT}</think>"
    assert render(V3_1, say(("user", "q"), ("assistant", "a")), tokenizer).endswith(f"a{EOS}{ASSISTANT}</think>")


def test_v31_thinks_on_request(tokenizer: Tokenizer) -> None:
    """<think> without a line break opens the answer; earlier answers keep </think>."""
    text = render(V3_1, say(*TALK), tokenizer, thinking=True)
    assert text == f"{BOS}S{USER}q1{ASSISTANT}</think>a1{EOS}{USER}q2{ASSISTANT}<think>"


@pytest.mark.parametrize(("form", "thinking"), [(V2, True), (V3, True), (CHATML, True), (R1, False)])
def test_a_mode_that_a_form_lacks_is_refused(tokenizer: Tokenizer, form: BuiltIn, thinking: bool) -> None:
    """Not ignored in silence; naming the mode that there is changes nothing."""
    with pytest.raises(InputError, match=f"thinking is {thinking}.*{form.name}"):
        render(form, say(*TALK), tokenizer, thinking=thinking)
    assert render(form, say(*TALK), tokenizer, thinking=not thinking) == render(form, say(*TALK), tokenizer)


@pytest.mark.parametrize(("form", "opening"), [(R1, ""), (V3_1, "</think>")])
@pytest.mark.parametrize(
    "answer",
    [{"content": "<think>\nhm\n</think>a1"}, {"content": "hm</think>a1"}, {"content": "a1", "reasoning_content": "hm"}],
)
def test_earlier_answers_lose_their_reasoning(
    tokenizer: Tokenizer, form: BuiltIn, opening: str, answer: dict[str, str]
) -> None:
    """Everything up to </think> is dropped, wherever it stands."""
    talk = [*say(("user", "q1")), {"role": "assistant", **answer}, *say(("user", "q2"))]
    assert render(form, talk, tokenizer).startswith(f"{BOS}{USER}q1{ASSISTANT}{opening}a1{EOS}{USER}q2")


def test_v3_knows_no_reasoning(tokenizer: Tokenizer) -> None:
    """`</think>` in an answer is text there; reasoning of the current turn has no place."""
    talk = say(("user", "q1"), ("assistant", "x</think>y"), ("user", "q2"))
    tokens = ChatFormat(V3).render(talk, tokenizer).tokens
    assert "x</think>y" in tokenizer.decode(tokens) and tokenizer.token_id("</think>") not in tokens
    reasoned = [*say(("user", "q")), {"role": "assistant", "content": "a", "reasoning_content": "r"}]
    for form in (V2, V3, CHATML):
        assert "r" not in render(form, [*reasoned, *say(("user", "q"))], tokenizer).replace("er", "").replace(
            "start", ""
        )
        with pytest.raises(InputError, match="reasoning_content"):
            render(form, reasoned, tokenizer)


@pytest.mark.parametrize(
    ("form", "head", "body"),
    [(R1, "<think>\n", "hm\n</think>\n\na1"), (V3_1, "<think>", "hm</think>a1")],
)
def test_the_last_answers_reasoning_is_trained_on(tokenizer: Tokenizer, form: BuiltIn, head: str, body: str) -> None:
    """It is written as the model would: the prompt's part carries no weight, the rest does; inline it is the same."""
    question = say(("user", "q1"))
    for answer in ({"content": "a1", "reasoning_content": "hm"}, {"content": head + body}):
        talk = [*question, {"role": "assistant", **answer}]
        text = render(form, talk, tokenizer, add_generation_prompt=False)
        assert text == f"{BOS}{USER}q1{ASSISTANT}{head}{body}{EOS}"
        assert trained(form, talk, tokenizer, add_generation_prompt=False) == body + EOS
    thinking = None if form is R1 else True
    prompt = ChatFormat(form).render(question, tokenizer, thinking=thinking)
    assert text == tokenizer.decode(prompt.tokens) + body + EOS and prompt.opens_reasoning


@pytest.mark.parametrize("calls", [[CALL_F], [CALL_F, CALL_G]])
@pytest.mark.parametrize("content", [None, "", "Wait. "])
@pytest.mark.parametrize("form", [V3, R1, V3_1])
def test_tool_calls_are_closed(tokenizer: Tokenizer, form: BuiltIn, content: str | None, calls: list[Any]) -> None:
    """One call is closed like two (V3's template forgets that), and stands beside content (V3's drops it)."""
    talk = [*say(("user", "q")), {"role": "assistant", "content": content, "tool_calls": calls}]
    written = [FENCED_F, FENCED_G] if form is not V3_1 else [BARE_F, BARE_G]
    body = (content or "") + CALLS + ("\n" if form is not V3_1 else "").join(written[: len(calls)]) + END_CALLS + EOS
    head = f"{BOS}{USER}q{ASSISTANT}" + ("</think>" if form is V3_1 else "")
    assert render(form, talk, tokenizer, add_generation_prompt=False) == head + body
    assert trained(form, talk, tokenizer, add_generation_prompt=False) == body


@pytest.mark.parametrize("form", [V3, R1, V3_1])
def test_tool_outputs_are_framed_in_every_round(tokenizer: Tokenizer, form: BuiltIn) -> None:
    """Two rounds of calls, then an answer without a new head; V3's template opens and closes outputs once only."""
    round_of = [
        {"role": "assistant", "content": None, "tool_calls": [CALL_F]},
        {"role": "tool", "content": "7", "tool_call_id": "1"},
        {"role": "tool", "content": "8"},
    ]
    call = (FENCED_F if form is not V3_1 else BARE_F).join([CALLS, END_CALLS + EOS])
    outputs = f"{OUTPUT}7{END_OUTPUT}\n{OUTPUT}8{END_OUTPUT}".join([OUTPUTS, END_OUTPUTS])
    if form is V3_1:
        outputs = f"{OUTPUT}7{END_OUTPUT}{OUTPUT}8{END_OUTPUT}"
    head = f"{BOS}{USER}q{ASSISTANT}" + ("</think>" if form is V3_1 else "")
    talk = [*say(("user", "q")), *round_of, *round_of]
    expected = head + call + outputs + call + outputs
    assert render(form, talk, tokenizer) == expected, "the model goes on right after the outputs"
    answered = [*talk, *say(("assistant", "a"))]
    assert render(form, answered, tokenizer, add_generation_prompt=False) == f"{expected}a{EOS}"
    assert trained(form, answered, tokenizer, add_generation_prompt=False) == f"{call}|{call}|a{EOS}"


@pytest.mark.parametrize("form", [V3, R1, V3_1])
def test_tools_are_described_after_the_system_message(tokenizer: Tokenizer, form: BuiltIn) -> None:
    """Names, descriptions and schemas are in the prompt, with the marks of a call; none of it carries weight."""
    tool = {"type": "function", "function": {"name": "f", "description": "Do <it>.", "parameters": {"é": []}}}
    text = render(form, say(("system", "S"), ("user", "q")), tokenizer, tools=[tool])
    assert text.startswith(f"{BOS}S\n\n") and "Do <it>." in text and '{"é": []}' in text and CALLS in text
    assert render(form, say(("user", "q")), tokenizer, tools=[tool]) == text.replace("S\n\n", "", 1)
    assert trained(form, say(("user", "q")), tokenizer, tools=[tool]) == ""
    if form is V3_1:
        parts = "## Tools\nYou have access to the following tools:\n\n### f\nDescription: Do <it>.\n\nParameters: "
        assert parts + '{"é": []}\n\nIMPORTANT: ' in text
        assert f"{CALLS}{CALL}tool_call_name{SEP}tool_call_arguments{END_CALL}{{{{additional_tool_calls}}}}" in text


@pytest.mark.parametrize("form", [V2, CHATML])
def test_forms_without_tools_spell_them_out(tokenizer: Tokenizer, form: BuiltIn) -> None:
    """The list in the system message, calls in the answers, results in one message of the user, with what follows."""
    tool = {"type": "function", "function": {"name": "f", "description": "Do it.", "parameters": {"é": []}}}
    calls = {"role": "assistant", "content": None, "tool_calls": [CALL_F, CALL_G]}
    results = [{"role": "tool", "content": text, "tool_call_id": id} for text, id in (("8", "2"), ("7", "1"))]
    talk = [*say(("user", "q1")), calls, *results, *say(("user", "q2"))]
    text = render(form, talk, tokenizer, tools=[tool])
    system, _, rest = text.partition("q1")
    assert '{"name": "f", "description": "Do it.", "parameters": {"é": []}}\n' in system
    assert '<tool_call>\n{"name": NAME, "arguments": ARGUMENTS}\n</tool_call>' in system
    spoken = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>\n'
    spoken += '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>'
    assert spoken in rest and rest.count("<tool_call>") == 2
    heard = "<tool_response>\n7\n</tool_response>\n<tool_response>\n8\n</tool_response>\n\nq2"
    assert heard in rest.partition(spoken)[2], "in the order of the calls"
    assert spoken in trained(form, talk, tokenizer, tools=[tool])
    with_system = render(form, [*say(("system", "S")), *talk], tokenizer, tools=[tool])
    assert "S\n\nYou can call" in with_system and with_system.endswith(rest)


@pytest.mark.parametrize(
    ("form", "answer", "thinking", "end"),
    [
        (V2, {"content": "a"}, None, "User: q\n\nAssistant: a"),
        (V3, {"content": "a"}, None, f"q{ASSISTANT}a"),
        (CHATML, {"content": "a"}, None, "<|im_start|>assistant\na"),
        (R1, {"content": "a"}, None, f"q{ASSISTANT}a"),
        (R1, {"content": "<think>\nhm"}, None, f"q{ASSISTANT}<think>\nhm"),
        (R1, {"content": "", "reasoning_content": "hm"}, None, f"q{ASSISTANT}<think>\nhm"),
        (R1, {"content": "a", "reasoning_content": "hm"}, None, f"q{ASSISTANT}<think>\nhm\n</think>\n\na"),
        (V3_1, {"content": "a"}, None, f"q{ASSISTANT}</think>a"),
        (V3_1, {"content": "hm"}, True, f"q{ASSISTANT}<think>hm"),
    ],
)
def test_a_prefix_is_left_open(
    tokenizer: Tokenizer, form: BuiltIn, answer: dict[str, str], thinking: bool | None, end: str
) -> None:
    """The last answer with `prefix` is neither closed nor followed by a prompt."""
    talk = [*say(("user", "q")), {"role": "assistant", "prefix": True, **answer}]
    assert render(form, talk, tokenizer, thinking=thinking).endswith(end)
    opens = ChatFormat(form).render(talk, tokenizer, thinking=thinking).opens_reasoning
    assert opens == ("<think>" in end and "</think>" not in end)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_contents_never_give_special_tokens(tokenizer: Tokenizer, form: BuiltIn, data: st.DataObject) -> None:
    """The special tokens are those of the same conversation with harmless texts, and no text is lost."""

    def conversation(text: Any) -> tuple[list[dict[str, Any]], list[Any] | None]:
        talk = say(("system", text()), ("user", text()), ("assistant", text()), ("user", text()))
        call = {"function": {"name": text(), "arguments": text()}}
        tool = {"function": {"name": "f", "description": text(), "parameters": {text(): text()}}}
        calls = {"role": "assistant", "content": text(), "tool_calls": [call]}
        return [*talk, calls, {"role": "tool", "content": text()}], [tool]

    texts: list[str] = []

    def nasty() -> str:
        # Reasoning is cut from earlier answers at this text, on purpose.
        texts.append(data.draw(hostile).replace("</think>", "") + "x")
        return texts[-1]

    messages, tools = conversation(nasty)
    tame_messages, tame_tools = conversation(lambda: "x")
    found = ChatFormat(form).render(messages, tokenizer, tools=tools)
    tame = ChatFormat(form).render(tame_messages, tokenizer, tools=tame_tools)
    specials = set(tokenizer.special_tokens.values())
    assert [id for id in found.tokens if id in specials] == [id for id in tame.tokens if id in specials]
    text = tokenizer.decode(found.tokens)
    assert all(part in text or json.dumps(part, ensure_ascii=False)[1:-1] in text for part in texts)
    assert len(found.trainable) == len(found.tokens)


def test_a_missing_token_is_named(tmp_path: Path) -> None:
    """A tokenizer that lacks what a conversation needs is one ModelError; what it does not need is not asked for."""
    write_tokenizer(tmp_path, [BOS, EOS, USER, ASSISTANT])
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert render(V3, say(("user", "q")), tokenizer) == f"{BOS}{USER}q{ASSISTANT}"
    with pytest.raises(ModelError, match="<think>.*R1"):
        render(R1, say(("user", "q")), tokenizer)
    spelled = f"{USER}<tool_response>\n7\n</tool_response>"
    assert render(V3, say(("tool", "7")), tokenizer) == f"{BOS}{spelled}{ASSISTANT}"


@pytest.mark.parametrize(
    ("form", "reasoning"), [(V3, ""), (R1, ""), (R1, "Hm.\nYes."), (V3_1, ""), (V3_1, "Hm.\nYes.")]
)
@pytest.mark.parametrize("content", ["", "An answer.\n"])
@pytest.mark.parametrize("num_calls", [0, 1, 2])
def test_the_splitter_undoes_the_rendering(
    tokenizer: Tokenizer, form: BuiltIn, reasoning: str, content: str, num_calls: int
) -> None:
    """What is trained on, split, is what the message held."""
    answer = {"role": "assistant", "content": content, "tool_calls": [CALL_F, CALL_G][:num_calls]}
    answer |= {"reasoning_content": reasoning} if reasoning else {}
    text = trained(form, [*say(("user", "q")), answer], tokenizer, add_generation_prompt=False).removesuffix(EOS)
    splitter = Splitter(bool(reasoning), form.calls, {"f", "g"})
    events = splitter.push(text) + splitter.flush()
    assert "".join(event.text for event in events if isinstance(event, Reasoning)) == reasoning
    assert "".join(event.text for event in events if isinstance(event, Content)) == content
    starts = [(event.index, event.name) for event in events if isinstance(event, ToolCallStart)]
    arguments = [(event.index, event.text) for event in events if isinstance(event, ToolCallArguments)]
    assert starts == [(0, "f"), (1, "g")][:num_calls] and arguments == [(0, '{"x": 1}'), (1, "{}")][:num_calls]


def test_the_template_we_write_is_the_v3_form(tokenizer: Tokenizer, reference: Any) -> None:
    """`V3_TEMPLATE`, rendered by transformers, gives the built-in form's tokens."""
    settings = {"bos_token": BOS, "eos_token": EOS, "add_generation_prompt": True, "return_dict": False}
    theirs = reference.apply_chat_template(say(*TALK), chat_template=builtin.V3_TEMPLATE, **settings)
    assert list(theirs) == ChatFormat(V3).render(say(*TALK), tokenizer).tokens
