from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from porcelet.chat import builtin as chat
from porcelet.config import EngineConfig, TrainConfig
from porcelet.engine.engine import Engine
from porcelet.errors import InputError, ModelError
from porcelet.train.conversations import Conversations, read_conversations, render
from porcelet.train.loop import train
from porcelet.train.rendering import Renderer, make_tokenizer
from porcelet.train.tasks import Problem
from porcelet.types import SamplingParams
from tests.chat.conftest import SPECIAL, write_tokenizer
from tests.train.tiny_run import FIELDS, config, metrics_of, model

CALL = {"type": "function", "function": {"name": "add", "arguments": "{}"}}
TOOL = {"type": "function", "function": {"name": "add"}}
TALK = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "1"},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "2"},
]
TOOLS = [
    {"role": "user", "content": "Add."},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "3"},
    {"role": "assistant", "content": "It is 3."},
]
THOUGHT = [*TALK[:-1], {"role": "assistant", "content": "2", "reasoning_content": "so"}]
PLAIN = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
)
E, CALLED = chat.EOS, f"{chat.CALLS}{chat.CALL}"
# chat format, conversation → what is trained, "·" between what is apart
TRAINED = {
    ("V2", "talk"): f" 1{E}· 2{E}",
    ("V3", "talk"): f"1{E}·2{E}",
    ("R1", "talk"): f"1{E}·2{E}",
    ("R1", "thought"): f"1{E}·so\n</think>\n\n2{E}",
    ("V3.1", "talk"): f"1{E}·2{E}",
    ("V3.1", "thought"): f"1{E}·so</think>2{E}",
    ("ChatML", "talk"): "1<|im_end|>·2<|im_end|>",
    ("template", "talk"): "1<|im_end|>·2<|im_end|>",
    ("V3", "tools"): f"{CALLED}function{chat.SEP}add\n```json\n{{}}\n```{chat.END_CALL}{chat.END_CALLS}{E}·It is 3.{E}",
    ("R1", "tools"): f"{CALLED}function{chat.SEP}add\n```json\n{{}}\n```{chat.END_CALL}{chat.END_CALLS}{E}·It is 3.{E}",
    ("V3.1", "tools"): f"{CALLED}add{chat.SEP}{{}}{chat.END_CALL}{chat.END_CALLS}{E}·It is 3.{E}",
    ("ChatML", "tools"): '<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call><|im_end|>·It is 3.<|im_end|>',
}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
LINES = {
    "talk": {"messages": TALK},
    "thought": {"messages": THOUGHT},
    "tools": {"messages": TOOLS, "tools": [TOOL]},
}


@pytest.fixture(scope="module")
def renderers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Renderer]:
    """Every built-in chat format and a template, over a tokenizer whose merges join what lies at seams."""
    folder = tmp_path_factory.mktemp("formats")
    write_tokenizer(folder, SPECIAL)
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": PLAIN}), encoding="utf-8")
    made = {"template": Renderer(folder)}
    for form in (chat.V2, chat.V3, chat.R1, chat.V3_1, chat.CHATML):
        made[form.name] = Renderer(folder)
        made[form.name].chat = type(made["template"].chat)(form)
    return made


def spoken(renderer: Renderer, values: dict[str, Any], train_on: str = "all") -> str:
    """The trained tokens' text, "·" where others lie between."""
    one = render(values, renderer, "here", train_on)
    runs: list[list[int]] = []
    for index, token in enumerate(one.tokens):
        if one.mask[index] and index and one.mask[index - 1]:
            runs[-1].append(token)
        elif one.mask[index]:
            runs.append([token])
    return "·".join(map(renderer.tokenizer.decode, runs))


@pytest.mark.parametrize(("form", "name"), TRAINED)
def test_only_what_the_assistant_says_and_its_end_are_trained(
    renderers: dict[str, Renderer], form: str, name: str
) -> None:
    """By hand, for every chat format; with the last answer alone, only that one."""
    renderer, wanted = renderers[form], TRAINED[form, name]
    assert spoken(renderer, LINES[name]) == wanted
    assert spoken(renderer, LINES[name], "last") == wanted.rpartition("·")[2]


def test_three_forms_of_a_line_are_one_conversation(renderers: dict[str, Renderer]) -> None:
    """Prompt and completion, question and answer, messages: the same tokens and mask; reasoning where R1 thinks."""
    messages = [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "1"}]
    forms = [{"messages": messages}, {"prompt": "One?", "completion": "1"}, {"question": "One?", "answer": "1"}]
    first, *others = [render(values, renderers["V3"], "here") for values in forms]
    assert all(other == first for other in others)
    thought = {"question": "One?", "answer": "1", "reasoning": "so"}
    assert spoken(renderers["R1"], thought) == f"so\n</think>\n\n1{E}"


def test_null_is_absent_and_ignored_fields_are_left_out(tmp_path: Path) -> None:
    """A table's empty cells, and columns that [data] ignore names, change nothing."""
    plain = '{"question": "a", "answer": "b"}'
    full = '{"question": "a", "answer": "b", "reasoning": null, "id": 7, "source": "x"}'
    found = read(tmp_path / "one", full, ignore=("id", "source")), read(tmp_path / "two", plain)
    assert found[0].renderings == found[1].renderings
    with pytest.raises(InputError, match=r"unknown field 'source'.*\[data\] ignore"):
        read(tmp_path / "three", full, ignore=("id",))


REFUSED: list[tuple[str, str]] = [
    ("[1]", "a.jsonl:2: .* is not a JSON object"),
    ("{", "a.jsonl:2: not JSON"),
    ('{"text": "a"}', "a.jsonl:2: the fields are text; a conversation has messages or"),
    ('{"question": "a", "answer": "b", "reasonning": "c"}', "a.jsonl:2: unknown field 'reasonning'; known here"),
    ('{"prompt": "a", "completion": 1}', "a.jsonl:2: completion is a int"),
    ('{"messages": "a"}', "a.jsonl:2: messages is a str"),
    ('{"messages": []}', r"a.jsonl:2: messages\[0\] is not the assistant's"),
    ('{"messages": [{"role": "user", "content": "a"}]}', r"a.jsonl:2: messages\[0\] is not the assistant's"),
    ('{"messages": [{"role": "assistant", "content": "a", "prefix": true}]}', r"a.jsonl:2: messages\[0\].prefix"),
    ('{"messages": [{"role": "usr", "content": "a"}, {"role": "assistant", "content": "a"}]}', r"messages\[0\].role"),
    ('{"messages": [{"role": "assistant", "content": "a"}], "tools": 1}', "a.jsonl:2: tools is a int"),
    ('{"question": "a", "answer": "b", "reasoning": "c"}', "a.jsonl:2: reasoning_content: the chat format V3 has no"),
    ('{"prompt": "' + 70 * "a" + '", "completion": ""}', "a.jsonl:2: the conversation has 74 tokens, more than 64"),
]  # fmt: skip


def write(folder: Path, *lines: str) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "a.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return str(folder / "a.jsonl")


def read(folder: Path, *lines: str, **changes: Any) -> Conversations:
    """The source over a file of these lines, in the chat format of new models."""
    make_tokenizer(folder)
    run = config(folder, method="sft", conversations=(write(folder, *lines),), **changes)
    return read_conversations(run, model().config, Renderer(folder))


@pytest.mark.parametrize(("line", "named"), REFUSED)
def test_unusable_line_is_named(tmp_path: Path, line: str, named: str) -> None:
    """File, line and field, before the first step."""
    with pytest.raises(InputError, match=named):
        read(tmp_path, '{"prompt": "a", "completion": "b"}', line)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    """One that is not there, and one without a conversation."""
    with pytest.raises(InputError, match="a.jsonl: no conversation is left"):
        read(tmp_path, "")
    with pytest.raises(InputError, match="b.jsonl does not exist"):
        run = config(tmp_path, method="sft", conversations=(str(tmp_path / "b.jsonl"),))
        read_conversations(run, model().config, Renderer(tmp_path))


def test_files_are_read_as_a_corpus_is(tmp_path: Path) -> None:
    """A byte order mark, gzip and a folder: the same conversations."""
    plain = read(tmp_path, *lines_of(10, 30))
    content = (tmp_path / "a.jsonl").read_bytes()
    (tmp_path / "marked.jsonl").write_bytes("\ufeff".encode() + content)
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "a.jsonl.gz").write_bytes(gzip.compress(content))
    for name in ("marked.jsonl", "packed/a.jsonl.gz", "packed"):
        run = config(tmp_path, method="sft", conversations=(str(tmp_path / name),))
        assert read_conversations(run, model().config, Renderer(tmp_path)).renderings == plain.renderings


def test_end_that_the_model_does_not_know_is_refused(tmp_path: Path) -> None:
    """Else nothing would ever stop its answers."""
    make_tokenizer(tmp_path)
    run = config(tmp_path, method="sft", conversations=(write(tmp_path, '{"prompt": "a", "completion": "b"}'),))
    with pytest.raises(
        ModelError, match="a.jsonl:1: the chat format ends an answer with '<｜end▁of▁sentence｜>'.*'<｜▁pad▁｜>'"
    ):
        read_conversations(run, model(eos_token_ids=(2,)).config, Renderer(tmp_path))


def lines_of(*lengths: int) -> list[str]:
    """Conversations of so many tokens: the four marks of the chat format, and bytes."""
    return [json.dumps({"prompt": chr(97 + i), "completion": (size - 5) * "x"}) for i, size in enumerate(lengths)]


def test_too_long_conversations_are_dropped_or_cut_and_counted(tmp_path: Path) -> None:
    """By the rule, and every step's metrics say how many."""
    samples, metrics = read(tmp_path, *lines_of(10, 30), too_long="drop", context=20, samples_per_step=2)(0)
    assert [len(sample.tokens) for sample in samples] == [10, 10] and metrics["dropped"] == 1
    samples, metrics = read(tmp_path, *lines_of(10, 30), too_long="cut", context=20, samples_per_step=2)(0)
    assert {len(sample.tokens) for sample in samples} == {10, 20} and metrics["cut"] == 1
    assert {sample.tokens[-1] == 1 for sample in samples} == {True, False}


def test_an_epoch_is_a_permutation_that_the_seed_and_its_number_decide(tmp_path: Path) -> None:
    """Each conversation once an epoch, in another order in the next; a later start sees what it would have seen."""
    source = read(tmp_path, *lines_of(*[10] * 8), samples_per_step=4)
    drawn = [source(step)[0] for step in range(4)]
    epochs = [tuple(sample.tokens for sample in drawn[i] + drawn[i + 1]) for i in (0, 2)]
    assert len(set(epochs[0])) == 8 and set(epochs[0]) == set(epochs[1]) and epochs[0] != epochs[1]
    again = read(tmp_path, *lines_of(*[10] * 8), samples_per_step=4)
    assert again(3) == source(3) and again(0) == source(0)
    assert read(tmp_path, *lines_of(*[10] * 8), samples_per_step=4, seed=1)(0) != source(0)


def test_steps_by_tokens_hold_what_fits(tmp_path: Path) -> None:
    """Neighbours in the stream of steps by samples, as many as the tokens hold, and one that is longer alone."""
    lines = lines_of(10, 20, 30, 12, 50, 14)
    source = read(tmp_path, *lines, step_of="tokens", tokens_per_step=40)
    steps = [source(step)[0] for step in range(12)]
    one_by_one = read(tmp_path, *lines, samples_per_step=1)
    joined = [sample for samples in steps for sample in samples]
    assert joined == [one_by_one(position)[0][0] for position in range(len(joined))]
    sizes = [[len(sample.tokens) for sample in samples] for samples in steps]
    assert all(sum(some) <= 40 or some == [50] for some in sizes)
    assert all(sum(some) + following[0] > 40 for some, following in zip(sizes, sizes[1:], strict=False))
    assert read(tmp_path, *lines, step_of="tokens", tokens_per_step=40)(9)[0] == steps[9]


def test_weights_count_tokens_or_conversations(tmp_path: Path) -> None:
    """1 a trained token, or 1 a conversation."""
    for weigh, totals in (("tokens", {6.0, 16.0}), ("conversations", {1.0})):
        samples, _ = read(tmp_path, *lines_of(10, 20), weigh=weigh, samples_per_step=2)(0)
        assert {round(sum(sample.weights), 9) for sample in samples} == totals


def test_fine_tuned_model_says_what_it_was_shown(tmp_path: Path) -> None:
    """Four conversations learnt by heart; the engine then says their answers, and stops."""
    known = {"sky?": "blue", "grass?": "green", "snow?": "white and cold", "bye": "."}
    make_tokenizer(tmp_path / "text")
    file = write(tmp_path / "text", *(json.dumps({"prompt": q, "completion": a}) for q, a in known.items()))
    start = train(config(tmp_path / "start", steps=1), LLAMA)
    changes = {"conversations": (file,), "samples_per_step": 4, "steps": 60, "learning_rate": 2e-2}
    run = config(tmp_path / "sft", method="sft", model=str(start), **changes)
    output = train(run, {})
    assert metrics_of(output)[-1]["cross_entropy"] < 0.05
    engine, renderer = Engine.load(output, EngineConfig(weights="float32")), Renderer(output)
    outputs = engine.generate([renderer.prompt(q) for q in known], SamplingParams(max_tokens=30, temperature=0.0))
    assert [renderer.tokenizer.decode(output.tokens) for output in outputs] == list(known.values())
    assert all(output.finish_reason == "stop" for output in outputs)


def test_traces_are_reasoning_and_prompts_begin_inside_it(tmp_path: Path) -> None:
    """A cold start in R1's chat format: the prompt opens the reasoning, the sample goes on with trace and answer."""
    make_tokenizer(tmp_path, "R1")
    renderer, problem = Renderer(tmp_path), Problem("1+2=", "3", "one more than 2")
    sample, prompt = renderer.sample(problem), renderer.prompt(problem.question)
    assert renderer.tokenizer.decode(prompt).endswith("<｜User｜>1+2=<｜Assistant｜><think>\n")
    assert sample.tokens[: len(prompt)] == prompt and sum(sample.weights) == len(sample.tokens) - len(prompt)
    assert renderer.tokenizer.decode(sample.tokens[len(prompt) :]) == f"one more than 2\n</think>\n\n3{E}"
    with pytest.raises(InputError, match="has no trace"):
        renderer.sample(Problem("1+2=", "3"))
    make_tokenizer(tmp_path)
    with pytest.raises(InputError, match="V3 has no reasoning"):
        Renderer(tmp_path).sample(problem)


def test_conversations_are_for_fine_tuning_alone(tmp_path: Path) -> None:
    """A recipe that names them with another method is told so."""
    run = config(tmp_path / "run", conversations=(write(tmp_path, *lines_of(10)),), samples_per_step=1)
    assert isinstance(run, TrainConfig)
    with pytest.raises(InputError, match="conversations is for method = 'sft'"):
        train(run, FIELDS)
