"""Constraints and thinking budgets through the whole engine, on a model that would answer with noise."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest

from porcelet.chat.calls import CALLS
from porcelet.config import PAGE_SIZE, EngineConfig
from porcelet.engine.codec import open_tokenizer
from porcelet.engine.engine import Engine
from porcelet.errors import InputError
from porcelet.tokenizer import Tokenizer
from porcelet.types import Constraint, Output, Reasoning, Request, SamplingParams
from tests.scripted_model import save_scripted_model
from tests.tiny_model import save_tiny_model

SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"name": {"enum": ["Ada", "Zoë"]}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
)
WISHES = [
    (Constraint("json_schema", SCHEMA), lambda text: {"name", "age"} == set(json.loads(text))),
    (Constraint("regex", r"[ab]{3}-\d{2}"), lambda text: re.fullmatch(r"[ab]{3}-\d{2}", text)),
    (Constraint("choice", ("yes", "no", "naïve")), lambda text: text in ("yes", "no", "naïve")),
    (Constraint("lark", 'start: "x" "y"* "z"'), lambda text: re.fullmatch("xy*z", text)),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return open_tokenizer(folder)


def text_of(tokenizer: Tokenizer, output: Output) -> str:
    return tokenizer.decode(output.tokens)


@pytest.mark.parametrize(("constraint", "keeps"), WISHES, ids=lambda wish: getattr(wish, "kind", ""))
def test_answers_keep_their_constraint(folder: Path, tokenizer: Tokenizer, constraint: Constraint, keeps) -> None:
    """Every sample that ends by itself keeps it, in company, preempted, with guesses on; and needs no end token."""
    engine = Engine.load(folder, EngineConfig(cache_tokens=6 * PAGE_SIZE, max_batch_tokens=50, speculation="lookup"))
    params = SamplingParams(max_tokens=60, seed=3, n=6, constraint=constraint)
    outputs = engine.generate([[5] * 40, [1, 2]], [params, SamplingParams(max_tokens=150)])[:6]
    ended = [output for output in outputs if output.finish_reason == "stop"]
    assert len(ended) >= 3 and all(keeps(text_of(tokenizer, output)) for output in ended)
    alone = Engine.load(folder).generate([[5] * 40], params)
    assert [output.tokens for output in alone] == [output.tokens for output in outputs]


def test_a_constraint_begins_after_the_reasoning(folder: Path, tokenizer: Tokenizer) -> None:
    """What is thought is free; once the budget is spent the closing words come, and then the answer in its form."""
    end, closing = tuple(tokenizer.encode("</t>")), tuple(tokenizer.encode("So.</t>"))
    params = SamplingParams(
        max_tokens=60,
        seed=1,
        logprobs=0,
        constraint=Constraint("choice", ("yes", "no")),
        reasoning=Reasoning(end=end, budget=12, closing=closing),
    )
    (output,) = Engine.load(folder).generate([[1, 2, 3]], params)
    assert output.tokens[12 : 12 + len(closing)] == closing and output.finish_reason == "stop"
    assert tokenizer.decode(output.tokens[12 + len(closing) :]) in ("yes", "no")
    forced = output.logprobs[12 : 12 + len(closing)]
    assert set(forced) == {0.0} and 0.0 not in output.logprobs[:12]  # given, not drawn: the raw ones tell the model's
    assert all(logprob < 0 for logprob in output.raw_logprobs[12 : 12 + len(closing)])


def test_samples_think_and_answer_each_for_itself(folder: Path, tokenizer: Tokenizer) -> None:
    """Forked samples have budgets and grammars of their own."""
    end = tuple(tokenizer.encode("."))  # samples meet it at different places, or never
    reasoning = Reasoning(end=end, budget=30, closing=end)
    params = SamplingParams(max_tokens=60, seed=2, n=8, constraint=Constraint("regex", "[0-9]{4}"), reasoning=reasoning)
    outputs = Engine.load(folder).generate([[1, 2, 3]], params)
    for output in outputs:
        num_thought = output.tokens.index(end[0]) + 1
        assert num_thought <= 31 and re.fullmatch("[0-9]{4}", tokenizer.decode(output.tokens[num_thought:]))
    assert len({output.tokens for output in outputs}) == 8


def test_thought_cannot_end_a_constrained_answer(folder: Path, tokenizer: Tokenizer) -> None:
    """The end token is no way around the constraint: neither while thinking, nor with ignore_eos."""
    model = Engine.load(folder).model
    (end,) = model.config.eos_token_ids
    wish = SamplingParams(
        max_tokens=40,
        temperature=0,
        logit_bias=((end, 100.0),),  # it would end at once
        constraint=Constraint("regex", "[ab]{3}"),
        reasoning=Reasoning(end=(46,), budget=5, closing=(46,)),
    )
    for params in (wish, dataclasses.replace(wish, ignore_eos=True), dataclasses.replace(wish, reasoning=None)):
        (output,) = Engine.load(folder).generate([[1, 2]], params)
        assert output.finish_reason == "stop" and end not in output.tokens
        assert re.fullmatch("[ab]{3}", tokenizer.decode(output.tokens[-3:]))


def test_what_cannot_be_kept_is_refused(folder: Path) -> None:
    """A grammar that is none, an engine without a tokenizer, and ids out of the vocabulary are refused when asked."""
    engine = Engine.load(folder)
    only_special = Constraint("lark", "start: <[258]>")
    for constraint in (Constraint("regex", "("), Constraint("json_schema", '{"type": "thing"}'), only_special):
        with pytest.raises(InputError, match="cannot be used"):
            engine.submit(Request(id="a", prompt=(1,), params=SamplingParams(constraint=constraint)))
    with pytest.raises(InputError, match="closing"):
        engine.submit(Request(id="a", prompt=(1,), params=SamplingParams(reasoning=Reasoning(end=(10**6,)))))
    bare = Engine(engine.model)
    with pytest.raises(InputError, match="no tokenizer"):
        bare.submit(Request(id="a", prompt=(1,), params=SamplingParams(constraint=WISHES[1][0])))
    assert not engine.has_work and not bare.has_work


def test_a_trigger_begins_the_constraint(folder: Path, tokenizer: Tokenizer) -> None:
    """Before it, an answer is what it is without a constraint, guesses and all; from it on, the grammar holds. In the
    reasoning it is a token like others."""
    trigger = tokenizer.token_id("<|user|>")
    assert trigger is not None
    constraint = Constraint("lark", f'start: <[{trigger}]> "=" /[ab]{{3}}/', (), (trigger,), trigger)
    params = SamplingParams(
        max_tokens=80, temperature=0.3, seed=4, n=6, logit_bias=((trigger, 3.0),), constraint=constraint
    )
    engine = Engine.load(folder, EngineConfig(speculation="lookup"))
    outputs = engine.generate([[5] * 40], params)
    free = engine.generate([[5] * 40], dataclasses.replace(params, constraint=None))
    triggered = 0
    for output, other in zip(outputs, free, strict=True):
        if trigger not in output.tokens:
            assert output.tokens == other.tokens
            continue
        start = output.tokens.index(trigger)
        triggered += 1
        assert output.tokens[:start] == other.tokens[:start] and output.finish_reason == "stop"
        assert re.fullmatch("=[ab]{3}", tokenizer.decode(output.tokens[start + 1 :]))
    assert triggered and sum(output.num_accepted for output in outputs)
    plain = Engine.load(folder, EngineConfig(speculation="off")).generate([[5] * 40], params)
    assert [output.tokens for output in plain] == [output.tokens for output in outputs]
    reasoning = Reasoning(end=(46,), budget=30, closing=(46,))
    likely = dataclasses.replace(params, reasoning=reasoning, logit_bias=((trigger, 100.0),), n=1)
    (output,) = engine.generate([[5] * 40], likely)
    assert output.tokens[:31] == (*[trigger] * 30, 46) and output.tokens[31] == trigger
    assert re.fullmatch("=[ab]{3}", tokenizer.decode(output.tokens[32:]))


def test_guesses_end_at_the_trigger(tmp_path: Path) -> None:
    """What was guessed to follow it was not drawn under the grammar: it does not count, however right it was."""
    loop = ["a", "b", CALLS, "c", "d"]
    folder = save_scripted_model(tmp_path / "model", [[*loop, "a"]])
    tokenizer = open_tokenizer(folder)
    a, b, trigger, *_ = prompt = tokenizer.encode("".join(loop) * 3 + "a", special=True)
    constraint = Constraint("lark", f'start: <[{trigger}]> "zz"', (), (trigger,), trigger)
    params = SamplingParams(max_tokens=20, temperature=0, constraint=constraint)
    (output,) = Engine.load(folder, EngineConfig(speculation="lookup")).generate([prompt], params)
    assert output.num_drafted and output.tokens == (b, trigger, *tokenizer.encode("zz"))
    assert output.finish_reason == "stop"
