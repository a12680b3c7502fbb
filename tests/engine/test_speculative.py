"""Guesses change nothing but the number of steps, and stop where they do not pay."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from porcelet.config import EngineConfig, ModelConfig
from porcelet.engine import speculative
from porcelet.engine.engine import Engine
from porcelet.engine.speculative import MAX_READ, NGRAMS, Acceptance, Lookup, Pace
from porcelet.errors import InputError
from porcelet.kernels.attention import Segments
from porcelet.models.attention import PackedView
from porcelet.models.transformer import Transformer, build, initialize
from porcelet.types import Output, SamplingParams
from tests.models.variants import LLAMA, V3

CASES = [(LLAMA, "lookup"), (V3, "lookup"), (V3, "mtp"), (V3, "auto")]


def model_of(config: ModelConfig) -> Transformer:
    return initialize(build(config), seed=5).eval()


def generate(model: Transformer, speculation: str, params: SamplingParams) -> list[Output]:
    rng = random.Random(1)
    prompts = [[rng.randrange(97) for _ in range(length)] * 3 for length in (3, 20, 70)]
    return Engine(model, EngineConfig(speculation=speculation)).generate(prompts, params)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize(("config", "speculation"), CASES)
def test_tokens_are_those_without_guesses(config: ModelConfig, speculation: str, temperature: float) -> None:
    """Greedy and sampled, with penalties and without, the same tokens at the same log-probabilities."""
    model = model_of(config)
    for fields in ({}, {"frequency_penalty": 0.3, "top_p": 0.9, "n": 2}):
        params = SamplingParams(max_tokens=40, temperature=temperature, seed=7, ignore_eos=True, **fields)
        plain, guessed = generate(model, "off", params), generate(model, speculation, params)
        assert [output.tokens for output in guessed] == [output.tokens for output in plain]
        for ours, theirs in zip(guessed, plain, strict=True):
            assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)
        assert sum(output.num_drafted for output in guessed) > 0 == sum(output.num_drafted for output in plain)


def test_a_text_that_repeats_itself_takes_fewer_steps() -> None:
    """A greedy loop is guessed right: several tokens come in one output, and the counts say so."""
    engine = Engine(model_of(LLAMA), EngineConfig(speculation="lookup"))
    params = SamplingParams(max_tokens=60, temperature=0, repetition_penalty=0.1, ignore_eos=True)  # loops at once
    outputs = list(engine.stream([5] * 10, params))
    assert sum(len(output.tokens) for output in outputs) == 60 and len(outputs) < 30
    assert outputs[-1].num_accepted == 60 - len(outputs) == engine.stats()["num_accepted"]


@torch.inference_mode()
def tokens_after(model: Transformer, prompt: list[int], params: SamplingParams) -> list[Tensor]:
    """The probability of each token to be the first, the second and the third after `prompt`, over all before it."""
    texts, steps = [(prompt, 1.0)], list[Tensor]()
    for _ in range(3):
        step = torch.zeros(97)
        longer: list[tuple[list[int], float]] = []
        for text, probability in texts:
            hidden = model(torch.tensor(text), torch.arange(len(text)), PackedView(Segments.of(len(text))))
            best, ids = (model.logits(hidden[-1:])[0] / params.temperature).topk(params.top_k)
            for token, share in zip(ids.tolist(), (best.softmax(-1) * probability).tolist(), strict=True):
                step[token] += share
                longer.append(([*text, token], share))
        texts = longer
        steps.append(step)
    return steps


@pytest.mark.parametrize("kind", ["lookup", "mtp"])
def test_guesses_leave_the_distribution_alone(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chi-square of 1,500 unseeded third tokens, many of them behind a right guess and many behind a wrong one,
    against the model's own distribution of them."""
    monkeypatch.setattr(speculative, "MAX_READ", 1000)  # the whole prompt before the first guess
    model, count = model_of(V3), 1500
    if kind == "mtp":  # a layer that guesses what the model often says: the head scores its embedding alone
        with torch.no_grad():
            for name, parameter in model.model.layers[V3.num_hidden_layers].named_parameters():
                if name.endswith(("o_proj.weight", "down_proj.weight", "down_proj")):
                    parameter.zero_()
    prompt = [4, 9]
    params = SamplingParams(max_tokens=4, temperature=0.7, top_k=3, ignore_eos=True)
    for _ in range(3 * (kind == "lookup")):  # a prompt that has what most often follows 4 and any token
        likely = int(tokens_after(model, prompt, params)[1].argmax())
        prompt = [token for first in range(97) for token in (4, first, likely)] + [4]
    engine = Engine(model, EngineConfig(speculation=kind, max_sequences=16), seed=1)
    outputs = engine.generate([prompt] * count, params)
    assert engine.stats()["num_accepted"] > 10 and engine.stats()["num_drafted"] > 500
    drawn = Counter(output.tokens[2] for output in outputs)
    expected = tokens_after(model, prompt, params)[2] * count
    frequent = [token for token in range(97) if expected[token] >= 5]
    rare = [token for token in range(97) if expected[token] < 5]
    bins = [(drawn[token], float(expected[token])) for token in frequent]
    bins += [(sum(drawn[token] for token in rare), max(float(expected[rare].sum()), 1.0))]
    statistic, freedom = sum((seen - mean) ** 2 / mean for seen, mean in bins), len(bins) - 1
    assert freedom >= 5 and statistic < freedom + 4 * (2 * freedom) ** 0.5


def test_the_mtp_layer_has_to_be_there() -> None:
    """Insisting on a layer that the model lacks is refused by name; "auto" looks up instead."""
    with pytest.raises(InputError, match="no MTP layer"):
        Engine(model_of(LLAMA), EngineConfig(speculation="mtp"))
    assert Engine(model_of(LLAMA)).scheduler.drafter == "lookup" and Engine(model_of(V3)).scheduler.drafter == "mtp"


def test_a_guess_that_fails_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """When the MTP layer raises, the step's tokens stand, and later guesses are made again."""
    model = model_of(V3)
    params = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)
    (plain,) = Engine(model, EngineConfig(speculation="off")).generate([[1, 2]], params)
    engine = Engine(model, EngineConfig(speculation="mtp"))
    draft, failures = engine.runner.draft, iter([True, False, True])

    def failing(*arguments: Any) -> Tensor:
        if next(failures, False):
            raise RuntimeError("the layer")
        return draft(*arguments)

    monkeypatch.setattr(engine.runner, "draft", failing)
    (output,) = engine.generate([[1, 2]], params)
    assert output.tokens == plain.tokens and output.num_drafted > 10 and engine.runner.why_not == ""
    assert engine.runner.num_recordings == 2  # the model's step and the layer's


@given(st.lists(st.integers(0, 2), max_size=40), st.integers(1, 9), st.integers(0, 40))
def test_lookup_is_a_search(tokens: list[int], most: int, read_before: int) -> None:
    """The longest n-gram that ends the text is found where it last occurred before, however the text arrived."""
    lookup = Lookup()
    lookup.propose(tokens[:read_before], most)
    lookup = lookup.fork() if read_before % 2 else lookup
    expected: list[int] = []
    for size in reversed(NGRAMS):
        ends = [e for e in range(size, len(tokens)) if tokens[e - size : e] == tokens[-size:]] if tokens else []
        if ends:
            repeated = tokens[ends[-1] :]
            expected = [repeated[i % len(repeated)] for i in range(most)]
    assert lookup.propose(tokens, most) == expected


def test_a_long_prompt_is_read_a_little_at_a_time() -> None:
    """No step reads more of a text than it can afford; after some the beginning is found, too."""
    lookup, tokens = Lookup(), [*range(1000), 7, 8, 9]
    proposals = [lookup.propose(tokens, 2) for _ in range(1000 // MAX_READ + 1)]
    assert proposals[-1] == [10, 11] and lookup._num_read == len(tokens)


def test_guesses_stop_where_they_do_not_pay() -> None:
    """Wrong guesses are made less and less, right ones more, and the dearer a row the fewer."""
    wrong, right = Acceptance(), Acceptance()
    for _ in range(30):
        wrong.record(0, 1)
        right.record(8, 0)
    assert wrong.worth(0.1, 8) == 0 and right.worth(0.1, 8) == 8 and right.worth(1.0, 8) == 0
    assert [Acceptance(0.7).worth(price, 8) for price in (0.0, 0.1, 0.5, 0.69, 0.7)] == [8, 6, 1, 1, 0]
    for _ in range(400):
        wrong.rest()
    assert wrong.worth(0.3, 8) > 0  # another try, after a while


def test_the_price_of_a_guess_is_measured() -> None:
    """Seconds = 10 + 2 · rows: a row costs 2 of the 12 seconds of a lone token, and all but 10 of a large batch's."""
    pace = Pace()
    assert pace.price(1) == 0
    pace.record(1, 12.0)
    assert pace.price(1) == 0  # one number of rows tells no slope
    for rows in (2, 5, 1, 9, 3):
        pace.record(rows, 10.0 + 2 * rows)
    assert pace.price(1) == pytest.approx(2 / 12) and pace.price(40) == pytest.approx(80 / 90)
    pace.record_drafting(3.0)
    assert pace.price(1) == pytest.approx(5 / 12)
    alike = Pace()
    alike.record(2, 12.0)
    alike.record_drafting(3.0)
    assert alike.price(1) == pytest.approx(3 / 12)  # the draft's own time counts all the same
