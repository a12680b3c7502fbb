"""What tools make of an answer: random tokens under the grammar, split again, are calls that are right."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import jsonschema
import numpy as np
import pytest

from porcelet.chat import Content, Reasoning, Splitter, ToolCallArguments, ToolCallStart
from porcelet.chat.builtin import END_THINK, EOS, THINK
from porcelet.chat.calls import BARE, CALLS, END_TAG, FENCED, TAG, TAGGED, CallForm
from porcelet.chat.messages import check_tools
from porcelet.chat.tools import AUTO, NONE, REQUIRED, Beginning, Calling, ToolChoice, constraint_of, forbidden
from porcelet.engine.grammar import GrammarCompiler
from porcelet.errors import InputError
from porcelet.tokenizer import Tokenizer
from porcelet.types import Constraint
from tests.chat.conftest import SPECIAL, write_tokenizer

GET = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"], "additionalProperties": False}
PUT = {"properties": {"b": {"enum": ["</tool_call>", "<｜tool▁call▁end｜>", 'a"}']}}, "required": ["b"]}
TOOLS = check_tools(
    [
        {"function": {"name": "get", "parameters": GET, "strict": True}},
        {"function": {"name": "get_all"}},
        {"function": {"name": "put-1", "parameters": PUT}},
    ]
)
SCHEMAS = {"get": GET, "get_all": {"type": "object"}, "put-1": {"type": "object", **PUT}}
ANSWER = Constraint("regex", "[0-9]{3}")
CHOICES = [AUTO, REQUIRED, ToolChoice("required", "put-1"), ToolChoice("auto", "get")]


class Model:
    """Writes at random, but likes what ends things, or what it is asked to write first."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        end = tokenizer.token_id(EOS)
        assert end is not None
        self.tokenizer, self.end = tokenizer, end
        self.compiler = GrammarCompiler(tokenizer, [end])
        liked = ['"', "}", "]", ":", "{", "0", "\n"]
        self.liked = {self.tokenizer.encode(text)[0] for text in liked} | set(tokenizer.special_tokens.values())

    def write(self, constraint: Constraint, seed: int, first: str = "") -> str:
        draw, matcher, tokens = random.Random(seed), self.compiler.compile(constraint), list[int]()
        wanted = self.tokenizer.encode(first, special=True)
        while not matcher.finished:
            mask = None if matcher.waits else matcher.mask()
            allowed = range(256) if mask is None else _allowed(mask)
            may_end = mask is None or self.end in allowed
            if not wanted and may_end and len(tokens) > draw.randrange(60) and draw.random() < 0.5:
                break
            assert len(tokens) < 3000
            likely = [token for token in allowed if token in self.liked and token != self.end]
            choices = likely if likely and draw.random() < 0.7 else [t for t in allowed if t != self.end] or allowed
            token = wanted.pop(0) if wanted else draw.choice(choices)
            assert token in allowed or mask is None, f"{self.tokenizer.token_bytes(token)!r} is not allowed"
            matcher.push(token)
            tokens.append(token)
        return self.tokenizer.decode(tokens)


def _allowed(mask: bytes) -> list[int]:
    return np.flatnonzero(np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little")).tolist()


@pytest.fixture(scope="module")
def plain(tokenizer: Tokenizer) -> Model:
    """Tags are ordinary text to it."""
    return Model(tokenizer)


@pytest.fixture(scope="module")
def tagging(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Tags are tokens to it."""
    path = tmp_path_factory.mktemp("tags")
    write_tokenizer(path, [*SPECIAL, TAG, END_TAG])
    return Model(Tokenizer.from_folder(path))


@pytest.fixture(params=["FENCED", "BARE", "TAGGED", "TAGGED as tokens"])
def model_and_form(request: pytest.FixtureRequest) -> tuple[Model, CallForm]:
    model = request.getfixturevalue("tagging" if "tokens" in request.param else "plain")
    return model, {"FENCED": FENCED, "BARE": BARE}.get(request.param, TAGGED)


def split(text: str, form: CallForm, starts: bool = False) -> tuple[str, str, list[tuple[str, str]]]:
    """Reasoning, content, and calls."""
    splitter, texts, calls = Splitter(starts, form, set(SCHEMAS)), {Reasoning: "", Content: ""}, list[list[str]]()
    for event in splitter.push(text) + splitter.flush():
        match event:
            case ToolCallStart(_, name):
                calls.append([name, ""])
            case ToolCallArguments(index, part):
                calls[index][1] += part
            case _:
                texts[type(event)] += event.text
    return texts[Reasoning], texts[Content], [(name, arguments) for name, arguments in calls]


def require_right(calls: list[tuple[str, str]], choice: ToolChoice) -> None:
    for name, arguments in calls:
        assert choice.name in (None, name)
        value = json.loads(arguments)
        bound = choice.mode == "required" or name == "get"
        jsonschema.validate(value, SCHEMAS[name] if bound else {"type": "object"})


@pytest.mark.parametrize("choice", CHOICES, ids=str)
@pytest.mark.parametrize("parallel", [True, False])
def test_every_call_is_right(model_and_form: tuple[Model, CallForm], choice: ToolChoice, parallel: bool) -> None:
    """It names an offered tool, its arguments are an object, of the schema where that binds; as many as are allowed."""
    model, form = model_and_form
    constraint = constraint_of(Calling(form, TOOLS, choice, parallel), None, "answer", model.tokenizer)
    assert constraint
    nums = set()
    for seed in range(12):
        _, content, calls = split(model.write(constraint, seed, form.mark if seed % 3 else ""), form)
        require_right(calls, choice)
        nums.add(len(calls))
        if choice.mode == "required":
            assert calls and not content
    assert nums == {1} if choice == CHOICES[2] else max(nums) == 1 if not parallel else max(nums) > 1


def test_text_goes_before_calls(model_and_form: tuple[Model, CallForm]) -> None:
    """With auto an answer may be text alone, or text and calls, and the text is left alone."""
    model, form = model_and_form
    constraint = constraint_of(Calling(form, TOOLS), None, "answer", model.tokenizer)
    assert constraint
    assert (constraint.trigger is not None) == (model.tokenizer.token_id(form.mark) is not None)
    text = 'I <tool {"name": <｜tool▁call'
    for first, num_calls in ((text, 0), (text + form.mark, 1)):
        _, content, calls = split(model.write(constraint, 0, first), form)
        assert content.startswith(text) and (len(calls) >= num_calls)
        require_right(calls, AUTO)


@pytest.mark.parametrize("mode", ["auto", "required", "none"])
def test_an_answer_is_of_its_form_or_calls(model_and_form: tuple[Model, CallForm], mode: Any) -> None:
    """With a constraint of its own, what is no call keeps it, and nothing stands before calls."""
    model, form = model_and_form
    calling = Calling(form, TOOLS, ToolChoice(mode))
    constraint = constraint_of(calling, ANSWER, "answer", model.tokenizer)
    assert constraint
    found = set()
    for seed in range(20):
        first = form.mark if mode == "auto" and seed % 2 else ""
        _, content, calls = split(model.write(constraint, seed, first), form)
        require_right(calls, calling.choice)
        assert bool(calls) != bool(re.fullmatch("[0-9]{3}", content))
        found.add(bool(calls))
    assert found == {"auto": {True, False}, "required": {True}, "none": {False}}[mode]


@pytest.mark.parametrize("answer", [None, ANSWER])
@pytest.mark.parametrize("choice", [AUTO, REQUIRED, NONE])
@pytest.mark.parametrize("beginning", ["reasoning", "either"])
def test_reasoning_is_free(
    model_and_form: tuple[Model, CallForm], beginning: Beginning, choice: ToolChoice, answer: Constraint | None
) -> None:
    """Whether the model must reason first or may: the grammar holds for what comes after."""
    model, form = model_and_form
    constraint = constraint_of(Calling(form, TOOLS, choice), answer, beginning, model.tokenizer)
    if choice == NONE and answer is None:
        assert constraint is None
        return
    assert constraint
    thought = f'{THINK}\nWhat? {{"name": \n{END_THINK}\n\n' if beginning == "either" else "\n\n"
    after = "12" if answer and choice != REQUIRED else form.mark
    for seed in range(4):
        for prefix in (thought, ""):
            text = model.write(constraint, seed, prefix + after)
            starts = beginning == "reasoning"
            reasoning, content, calls = split(END_THINK + text if starts else text, form, starts)
            assert reasoning == ('What? {"name": ' if prefix.startswith(THINK) else "")
            require_right(calls, choice)
            assert calls or re.fullmatch("[0-9]{3}", content)


def test_a_call_that_may_not_be_is_forbidden(plain: Model, tagging: Model) -> None:
    """By the token that would open it; where that is text, text it is."""
    for form, model, token in ((FENCED, plain, CALLS), (BARE, plain, CALLS), (TAGGED, tagging, TAG)):
        assert forbidden(Calling(form, TOOLS, NONE), model.tokenizer) == (model.tokenizer.token_id(token),)
        assert forbidden(Calling(form, ()), model.tokenizer) == (model.tokenizer.token_id(token),)
        assert forbidden(Calling(form, TOOLS), model.tokenizer) == ()
    assert forbidden(Calling(TAGGED, TOOLS, NONE), plain.tokenizer) == ()


def test_what_cannot_be_called_is_refused() -> None:
    """A name that is not offered, a call without tools, parameters that are no object."""
    with pytest.raises(InputError, match="tool_choice names 'other'"):
        Calling(FENCED, TOOLS, ToolChoice("required", "other"))
    with pytest.raises(InputError, match="tools is empty"):
        Calling(FENCED, (), REQUIRED)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"type": "array"}, r"^tools\[1\].function.parameters \(f\) is of type 'array'; it must be an object"),
        ({"properties": {"a": {"not": {}}}}, r"^tools\[1\].function.parameters \(f\): .*not"),
        ({"properties": {"a": {"nullable": True}}}, r"^tools\[1\].function.parameters \(f\): .*nullable"),
        ({"properties": {"a": {"type": "wat"}}}, r"^tools\[1\].function.parameters \(f\): .*wat"),
        ({"description": "d" * 70_000}, "^the grammar of the tools and their parameters has 70,.*at most 65,536"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_schema_that_cannot_be_kept_is_named(plain: Model, parameters: dict[str, Any], message: str) -> None:
    """With the tool's place and name; and only where it would bind."""

    def compile(strict: bool) -> None:
        tools = check_tools([{"function": {"name": "g"}}, {"function": {"name": "f", "parameters": parameters}}])
        choice = REQUIRED if strict else AUTO
        constraint = constraint_of(Calling(BARE, tools, choice), None, "answer", plain.tokenizer)
        assert constraint
        plain.compiler.compile(constraint)

    compile(strict=False)
    with pytest.raises(InputError, match=message):
        compile(strict=True)
