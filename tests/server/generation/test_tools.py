"""Tools from the question to the events: real models, some that say a script and some that say noise."""

from __future__ import annotations

import asyncio
import json
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from porcelet.chat import V3_TEMPLATE, ToolCallArguments, ToolCallStart
from porcelet.chat.builtin import ASSISTANT, END_THINK, EOS
from porcelet.chat.calls import CALL, CALLS, END_CALL, END_CALLS, SEP, TAG
from porcelet.chat.tools import AUTO, NONE, REQUIRED, ToolChoice
from porcelet.config import EngineConfig, ModelEntry, ServeConfig
from porcelet.engine.codec import open_codec
from porcelet.engine.engine import Engine
from porcelet.engine.messages import Ready
from porcelet.engine.supervisor import Supervisor
from porcelet.errors import InputError
from porcelet.server.generation.ask import Ask
from porcelet.server.generation.events import Piece, Sample, collect
from porcelet.server.generation.models import Model
from porcelet.server.generation.prompt import Loaded, Prompt, prompt_of
from porcelet.server.generation.reader import Reader
from porcelet.server.generation.watch import LOCAL
from porcelet.types import Constraint, SamplingParams
from tests.chat.test_format import V3_1_TEMPLATE
from tests.scripted_model import save_scripted_model
from tests.tiny_model import save_tiny_model

GET = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"], "additionalProperties": False}
PUT = {"type": "object", "properties": {"b": {"enum": ["</tool_call>", 'a"}']}}, "required": ["b"]}
TOOLS = [
    {"type": "function", "function": {"name": "get", "description": "Get x.", "parameters": GET, "strict": True}},
    {"type": "function", "function": {"name": "put", "parameters": PUT}},
]
SCHEMAS = {"get": GET, "put": PUT}
QUESTION = [{"role": "user", "content": "What is x?"}]
CHATML = (
    "{% for m in messages %}[{{ m.role }}]\n{{ m.content }}[end]{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)
ARGUMENTS = ('{"x": ', "1", "}")
FENCED_CALL = (CALLS, CALL, "function", SEP, "get\n```json\n", *ARGUMENTS, "\n```", END_CALL, END_CALLS)
SCRIPTS = {
    "V3": (V3_TEMPLATE, [ASSISTANT, "Let me see.", *FENCED_CALL]),
    "R1": (None, ["\n", "I have to ask.\n", END_THINK, "\n\nWait.", *FENCED_CALL]),
    "V3.1": (V3_1_TEMPLATE, ["</think>", "Let me see.", CALLS, CALL, "get", SEP, *ARGUMENTS, END_CALL, END_CALLS]),
    "tags": (
        CHATML,
        ["\n", "Let me see.", "\n" + TAG, '\n{"name": "get', '", "arguments": ', *ARGUMENTS, "}\n</tool_call>"],
    ),
}


@dataclass
class Whole:
    """A model in this process: answers at once."""

    engine: Engine
    loaded: Loaded

    @classmethod
    def open(cls, folder: Path) -> Whole:
        engine = Engine.load(folder, EngineConfig(threads=1))
        facts = Ready(engine.model.config, "float32", engine.scheduler.max_length)
        return cls(engine, Loaded(facts, *open_codec(folder)))

    def answer(self, **fields: Any) -> list[Sample]:
        return self.run(prompt_of(Ask(**fields), self.loaded))[0]

    def run(self, prompt: Prompt) -> tuple[list[Sample], list[tuple[int, ...]]]:
        """Samples, and the tokens of each."""
        samples, tokens = [], []
        for output in self.engine.generate([prompt.tokens], prompt.params):
            sample = Sample()
            for event in Reader(self.loaded.tokenizer, prompt.splitter()).read(output):
                if isinstance(event, Piece):
                    for part in event.parts:
                        sample.add(part)
                else:
                    sample.reason, sample.stop = event.reason, event.stop
            samples.append(sample)
            tokens.append((*output.tokens, *([output.stop_token] if output.stop_token is not None else [])))
        return samples, tokens


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Whole]:
    folder = tmp_path_factory.mktemp("scripted")
    return {
        name: Whole.open(save_scripted_model(folder / name, [script], template))
        for name, (template, script) in SCRIPTS.items()
    }


@pytest.fixture(scope="module", params=["V3", "R1", "V3.1", "tags"])
def noise(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """Every token is as likely as any other, in every form."""
    path = tmp_path_factory.mktemp("noise") / "model"
    if request.param == "tags":
        return Whole.open(save_tiny_model(path))
    return Whole.open(save_scripted_model(path, [("a", "b", "a")], SCRIPTS[request.param][0]))


def calls_of(sample: Sample) -> list[tuple[str, str]]:
    return [(call.name, call.arguments) for call in sample.calls]


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_call_is_told_from_content(scripted: dict[str, Whole], name: str) -> None:
    """Auto: what the model says by itself, cut into reasoning, content and a call, to the letter."""
    (sample,) = scripted[name].answer(messages=QUESTION, tools=TOOLS, params=SamplingParams(max_tokens=60))
    assert calls_of(sample) == [("get", '{"x": 1}')] and sample.reason == "tool_calls"
    assert sample.content == ("Wait." if name == "R1" else "Let me see.")
    assert sample.reasoning == ("I have to ask." if name == "R1" else "")


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_limit_comes_in_the_middle_of_a_call(scripted: dict[str, Whole], name: str) -> None:
    """What came of the arguments is kept, and the reason is the limit, wherever it comes."""
    whole = scripted[name]
    params = SamplingParams(max_tokens=80, seed=1)
    prompt = prompt_of(Ask(messages=QUESTION, tools=TOOLS, params=params), whole.loaded)
    (sample,), (tokens,) = whole.run(prompt)
    assert sample.reason == "tool_calls"
    ((called, arguments),) = calls_of(sample)
    lengths = set()
    for max_tokens in range(1, len(tokens) - 1):
        (sample,), _ = whole.run(replace(prompt, params=replace(prompt.params, max_tokens=max_tokens)))
        assert sample.reason == "length"
        for cut in calls_of(sample):
            assert cut[0] == called and arguments.startswith(cut[1])
            lengths.add(len(cut[1]))
    assert len(arguments) in lengths and len(lengths) > 2


@pytest.mark.parametrize("name", SCRIPTS)
def test_no_call_where_none_may_be(scripted: dict[str, Whole], name: str) -> None:
    """A model that wants to call is kept from its special token; without tools all is text, and tags are text."""
    params = SamplingParams(max_tokens=40, seed=1)
    for fields in ({"tools": TOOLS, "tool_choice": NONE}, {"messages": [*QUESTION, *answered("get")]}):
        (sample,) = scripted[name].answer(**{"messages": QUESTION, "params": params} | fields)
        assert not sample.calls and sample.reason in ("stop", "length")
        assert CALLS not in sample.content + sample.reasoning


def answered(name: str) -> list[dict[str, Any]]:
    call = {"id": "1", "type": "function", "function": {"name": name, "arguments": '{"x": 1}'}}
    return [
        {"role": "assistant", "content": "Let me see.", "tool_calls": [call]},
        {"role": "tool", "content": "x is 7", "tool_call_id": "1"},
    ]


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_answer_is_written_again_as_it_was(scripted: dict[str, Whole], name: str) -> None:
    """With its result, the conversation's tokens begin with the prompt's and the answer's: the cache has them all."""
    whole = scripted[name]
    ask = Ask(messages=QUESTION, tools=TOOLS, params=SamplingParams(max_tokens=60))
    prompt = prompt_of(ask, whole.loaded)
    (sample,), (tokens,) = whole.run(prompt)
    call = {"id": "1", "type": "function", "function": {"name": "get", "arguments": sample.calls[0].arguments}}
    answer = {"role": "assistant", "content": sample.content, "tool_calls": [call]}
    answer |= {"reasoning_content": sample.reasoning} if sample.reasoning else {}
    result = {"role": "tool", "content": "7", "tool_call_id": "1"}
    again = prompt_of(replace(ask, messages=[*QUESTION, answer, result]), whole.loaded)
    encode, decode = whole.loaded.tokenizer.encode, whole.loaded.tokenizer.decode
    # Pieces of a script are tokens of their own; as text they are written by their letters.
    said = encode(decode([*prompt.tokens, *tokens]).removesuffix(EOS), special=True)
    assert list(again.tokens[: len(said)]) == said
    assert decode(again.tokens[len(said) :]).removeprefix(EOS).strip("\n").startswith(("<｜tool▁output", "[end]"))


@pytest.mark.parametrize(
    ("choice", "parallel"),
    [(AUTO, True), (REQUIRED, True), (REQUIRED, False), (ToolChoice("required", "put"), True)],
    ids=["auto", "required", "not parallel", "named"],
)
def test_noise_calls_rightly(noise: Whole, choice: ToolChoice, parallel: bool) -> None:
    """A model that knows nothing: every call that ends has a tool's name and arguments of its schema."""
    tokenizer = noise.loaded.tokenizer
    ends = {tokenizer.encode(letter)[0]: 3.5 for letter in '"}]'}
    likes = ends | {id: 4.0 for text in (CALLS, CALL) if (id := tokenizer.token_id(text)) is not None}
    params = SamplingParams(max_tokens=250, n=8, seed=5, logit_bias=tuple(likes.items()))
    fields = {"messages": QUESTION, "tools": TOOLS, "tool_choice": choice, "parallel_calls": parallel, "budget": 5}
    samples = noise.answer(params=params, **fields)
    called = [sample for sample in samples if sample.reason == "tool_calls"]
    assert called or choice == AUTO
    for sample in called:
        for name, arguments in calls_of(sample):
            assert choice.name in (None, name)
            value = json.loads(arguments)
            jsonschema.validate(value, SCHEMAS[name] if choice != AUTO or name == "get" else {"type": "object"})
        assert choice == AUTO or not sample.content
        assert len(sample.calls) == 1 or (parallel and choice.name is None)


def test_strict_parameters_bind(tmp_path: Path) -> None:
    """A model that wants a word where the schema has a number, or a tool that is not there, gets its way nowhere."""
    script = [
        ASSISTANT,
        CALLS,
        CALL,
        "function",
        SEP,
        "steal",
        "\n```json\n",
        '{"x": ',
        '"one"',
        "}",
        "\n```",
        END_CALL,
    ]
    whole = Whole.open(save_scripted_model(tmp_path / "model", [script], V3_TEMPLATE))
    params = SamplingParams(max_tokens=80, n=4, seed=2)
    for tools in (TOOLS[:1], TOOLS):
        for sample in whole.answer(messages=QUESTION, tools=tools, params=params):
            for name, arguments in calls_of(sample):
                assert name in ("get", "put")
                if sample.reason == "tool_calls" and name == "get":
                    jsonschema.validate(json.loads(arguments), GET)
    with pytest.raises(InputError, match=r"tools\[0\].function.parameters \(get\).*uniqueItems"):
        bad = {"name": "get", "strict": True, "parameters": {"properties": {"x": {"uniqueItems": True}}}}
        whole.answer(messages=QUESTION, tools=[{"function": bad}], params=params)


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_answers_form_and_tools_at_once(scripted: dict[str, Whole], name: str) -> None:
    """With response_format and tools, a model that wants to call may, and one that does not keeps the form."""
    answer, params = Constraint("choice", ("yes", "no")), SamplingParams(max_tokens=60, seed=3)
    (sample,) = scripted[name].answer(messages=QUESTION, tools=TOOLS, params=params, answer=answer)
    assert sample.content in ("yes", "no") if not sample.calls else not sample.content
    fields = {"messages": QUESTION, "tools": TOOLS, "params": params, "answer": answer, "tool_choice": NONE}
    (sample,) = scripted[name].answer(**fields)
    assert sample.content in ("yes", "no") and not sample.calls and sample.reason == "stop"


def test_calls_come_in_pieces_through_the_server(tmp_path: Path) -> None:
    """Through an engine's process: the name first, then the arguments, the reason, the cached tokens, a refusal."""
    folder = save_scripted_model(tmp_path / "model", [SCRIPTS["V3"][1]], V3_TEMPLATE)
    params, config = SamplingParams(max_tokens=60), EngineConfig(threads=1)

    async def talk(engine: Supervisor) -> None:
        serving = ServeConfig(models={"model": ModelEntry(str(folder), config)})
        model = Model("model", folder, engine, serving)
        await model.load(lambda done, total: None)
        ask = Ask(messages=QUESTION, tools=TOOLS, params=params)
        events = [event async for event in model.answer(ask, LOCAL)]
        parts = [part for event in events if isinstance(event, Piece) for part in event.parts]
        calls = [part for part in parts if isinstance(part, ToolCallStart | ToolCallArguments)]
        texts = [part.text for part in calls if isinstance(part, ToolCallArguments)]
        assert calls[0] == ToolCallStart(0, "get") and "".join(texts) == '{"x": 1}'
        samples, usage = await collect(model.answer(ask, LOCAL))
        assert samples[0].reason == "tool_calls" and samples[0].calls[0].arguments == '{"x": 1}'
        assert usage.num_cached_tokens > 0
        samples, _ = await collect(model.answer(replace(ask, tool_choice=NONE), LOCAL))
        assert not samples[0].calls and CALLS not in samples[0].content
        bad = {"name": "f", "parameters": {"properties": {"x": {"not": {}}}}}
        with pytest.raises(InputError, match=r"tools\[0\].function.parameters \(f\)"):
            await collect(model.answer(replace(ask, tools=[{"function": bad}], tool_choice=REQUIRED), LOCAL))

    async def main() -> None:
        with closing(Supervisor(folder, config)) as engine:
            await talk(engine)

    asyncio.run(main())
