"""Guesses change nothing but the number of steps, and stop where they do not pay."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from porcelet.config import EngineConfig, ModelConfig
from porcelet.engine.engine import Engine
from porcelet.engine.speculative import NGRAMS, Acceptance, Lookup, Pace
from porcelet.errors import InputError
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
def second_tokens(model: Transformer, prompt: list[int], temperature: float) -> Tensor:
    """The probability of each token to be the second after `prompt`, over all first ones."""
    texts, length = [[*prompt, token] for token in range(97)], len(prompt) + 1
    view = PackedView(torch.arange(98) * length)
    hidden = model(torch.tensor(sum(texts, [])), torch.arange(length).repeat(97), view)
    first, second = (hidden.unflatten(0, (97, length))[:, place] for place in (-2, -1))
    probabilities = [(model.logits(states) / temperature).softmax(-1) for states in (first[:1], second)]
    return (probabilities[0] @ probabilities[1])[0]


@pytest.mark.parametrize("speculation", ["lookup", "mtp"])
def test_guesses_leave_the_distribution_alone(speculation: str) -> None:
    """Chi-square of 3,000 unseeded second tokens against the model's own distribution of them."""
    # After 4 and whatever comes first, the prompt has what it is most likely followed by, so that there is a guess.
    model, count, prompt = model_of(V3), 3000, [4]
    for _ in range(3):
        follows = int(second_tokens(model, prompt, 0.7).argmax())
        prompt = [token for first in range(97) for token in (4, first, follows)] + [4]
    params = SamplingParams(max_tokens=3, temperature=0.7, n=60, ignore_eos=True)
    engine = Engine(model, EngineConfig(speculation=speculation), seed=1)
    outputs = engine.generate([prompt] * (count // 60), params)
    if speculation == "lookup":
        assert engine.stats()["num_accepted"] > 20
    drawn = Counter(output.tokens[1] for output in outputs)
    expected = second_tokens(model, prompt, 0.7) * count
    frequent = [token for token in range(97) if expected[token] >= 5]
    rare = [token for token in range(97) if expected[token] < 5]
    bins = [(drawn[token], float(expected[token])) for token in frequent]
    bins += [(sum(drawn[token] for token in rare), float(expected[rare].sum()))]
    statistic, freedom = sum((seen - mean) ** 2 / mean for seen, mean in bins), len(bins) - 1
    assert freedom > 20 and statistic < freedom + 4 * (2 * freedom) ** 0.5


def test_the_mtp_layer_has_to_be_there() -> None:
    """Insisting on a layer that the model lacks is refused by name; "auto" looks up instead."""
    with pytest.raises(InputError, match="no MTP layer"):
        Engine(model_of(LLAMA), EngineConfig(speculation="mtp"))
    assert Engine(model_of(LLAMA)).scheduler.drafter == "lookup" and Engine(model_of(V3)).scheduler.drafter == "mtp"


@given(st.lists(st.integers(0, 2), max_size=40), st.integers(1, 9), st.integers(0, 40))
def test_lookup_is_a_search(tokens: list[int], most: int, read_before: int) -> None:
    """The longest n-gram that ends the text is found where it last occurred before, however the text arrived."""
    lookup = Lookup()
    lookup.propose(tokens[:read_before], most)
    expected: list[int] = []
    for size in reversed(NGRAMS):
        ends = [e for e in range(size, len(tokens)) if tokens[e - size : e] == tokens[-size:]] if tokens else []
        if ends:
            repeated = tokens[ends[-1] :]
            expected = [repeated[i % len(repeated)] for i in range(most)]
    assert lookup.propose(tokens, most) == expected


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
