"""Draws: their distribution against transformers' processors, what is reported of them, and what ends in an error."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from porcelet.config import EngineConfig
from porcelet.engine.engine import Engine
from porcelet.engine.sampler import Sampler
from porcelet.errors import EngineError, InputError
from porcelet.kernels.attention import Segments
from porcelet.models.attention import PackedView
from porcelet.models.transformer import Transformer, build, initialize
from porcelet.types import Draw, Drawing, Request, SamplingParams
from tests.models.variants import LLAMA

VOCABULARY = 60
PROMPT, ANSWER = (3, 5, 5, 8), (7, 8, 7, 11, 7)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return initialize(build(LLAMA), seed=5).eval()


def drawings(params: list[SamplingParams]) -> list[Drawing]:
    """A row each; every sequence has drawn ANSWER after PROMPT and is to draw its next token."""
    return [
        Drawing(row, own, own.seed or 0, len(ANSWER), PROMPT + ANSWER if own.penalizes else ())
        for row, own in enumerate(params)
    ]


def reference(logits: Tensor, params: SamplingParams) -> Tensor:
    """Log-probabilities [V] by transformers' processors; OpenAI's two penalties and the bias from their definitions."""
    scores = logits.clone()
    for token, bias in params.logit_bias:
        scores[token] += bias
    ids = torch.tensor([PROMPT + ANSWER])
    scores = RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(ids, scores[None])[0]
    for token in ANSWER:
        scores[token] -= params.frequency_penalty
    for token in set(ANSWER):
        scores[token] -= params.presence_penalty
    warpers: list[LogitsProcessor] = [TemperatureLogitsWarper(params.temperature), MinPLogitsWarper(params.min_p)]
    warpers += [TopKLogitsWarper(params.top_k)] if params.top_k else []
    warpers += [TopPLogitsWarper(params.top_p)] if params.top_p < 1 else []
    scores = scores[None].double()
    for warper in warpers:
        scores = warper(ids, scores)
    return scores[0].log_softmax(-1)


PARAMS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.3},
    {"temperature": 7.5},
    {"top_k": 5},
    {"top_k": 10_000},
    {"top_p": 0.4},
    {"top_p": 1e-9},
    {"min_p": 0.2},
    {"min_p": 1.0},
    {"repetition_penalty": 3.0},
    {"repetition_penalty": 0.5},
    {"frequency_penalty": 0.7},
    {"presence_penalty": 1.5},
    {"presence_penalty": -2.0, "frequency_penalty": -0.5},
    {"logit_bias": ((7, 4.0), (9, -100.0), (30, 2.5))},
    {
        "temperature": 1.4,
        "top_k": 12,
        "top_p": 0.8,
        "min_p": 0.05,
        "repetition_penalty": 1.3,
        "frequency_penalty": 0.4,
        "presence_penalty": 0.6,
        "logit_bias": ((8, 3.0),),
    },
]


@pytest.mark.parametrize("values", PARAMS, ids=str)
def test_distribution_is_transformers(values: dict[str, Any]) -> None:
    """The tokens drawn and their log-probabilities are those of transformers' processors in the same order."""
    logits = torch.randn(VOCABULARY, generator=torch.manual_seed(1)) * 2
    params = SamplingParams(**values)
    expected = reference(logits, params)
    count = 4000
    seeded = [dataclasses.replace(params, seed=seed) for seed in range(count)]
    draws = Sampler().draw(logits.expand(count, -1), drawings(seeded))
    logprobs = {draw.token: draw.logprob for draw in draws}
    assert all(abs(logprob - expected[token]) < 1e-5 for token, logprob in logprobs.items())
    assert set((expected > -6).nonzero()[:, 0].tolist()) <= set(logprobs)  # 10 draws are expected of each
    frequencies = torch.bincount(torch.tensor([draw.token for draw in draws]), minlength=VOCABULARY) / count
    assert (frequencies - expected.exp()).abs().max() < 0.035  # 4 standard deviations at most


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    """Every kind of request draws in a crowd, bit for bit, what it draws alone, and reports the same."""
    logits = torch.randn(len(PARAMS) * 3, VOCABULARY, generator=torch.manual_seed(2))
    params = [SamplingParams(**values, seed=seed) for seed, values in enumerate(PARAMS * 2)]
    params += [SamplingParams(**values | {"temperature": 0.0}, logprobs=3) for values in PARAMS]
    crowd = Sampler().draw(logits, drawings(params))
    for row, own in enumerate(params):
        (alone,) = Sampler().draw(logits[row : row + 1], drawings([own]))
        assert (alone.token, alone.top) == (crowd[row].token, crowd[row].top)
        assert alone.logprob == pytest.approx(crowd[row].logprob, abs=1e-6)


def test_raw_logprobs_are_the_models_own() -> None:
    """Whatever shapes the draw, the raw log-probability and the alternatives are those of the unmodified logits."""
    logits = torch.randn(4, VOCABULARY, generator=torch.manual_seed(3)) * 3
    before = logits.clone()
    shaped = SamplingParams(temperature=0.5, top_k=3, repetition_penalty=2.0, logit_bias=((1, 9.0),), logprobs=4)
    params = [shaped, SamplingParams(temperature=0, logprobs=0), SamplingParams(), SamplingParams(logprobs=20)]
    draws = Sampler().draw(logits, drawings(params))
    expected = logits.log_softmax(-1)
    for row, (draw, count) in enumerate(zip(draws, (4, 0, 0, 20), strict=True)):
        best, ids = expected[row].topk(count)
        assert [token for token, _ in draw.top] == ids.tolist()
        assert [logprob for _, logprob in draw.top] == pytest.approx(best.tolist())
        if params[row].logprobs is not None:
            assert draw.raw_logprob == pytest.approx(expected[row, draw.token].item(), abs=1e-5)
    assert draws[1].logprob == pytest.approx(draws[1].raw_logprob)
    assert torch.equal(logits, before)


def test_a_mask_comes_before_everything() -> None:
    """Only allowed tokens are drawn, whatever bias or penalty; the raw log-probability knows no mask. A mask that
    ends early forbids the rest, and one that allows nothing shows in the log-probability."""
    logits = torch.randn(1, VOCABULARY, generator=torch.manual_seed(6)) * 3
    params = SamplingParams(logit_bias=((5, 100.0), (8, 1.0)), presence_penalty=2.0, logprobs=1)
    history = PROMPT + ANSWER
    draws = [Drawing(0, params, seed, len(ANSWER), history, bytes([0b10000010, 0b11])) for seed in range(300)]
    drawn = Sampler().draw(logits, draws)
    scores = logits[0, [1, 7, 8, 9]] + torch.tensor([0, -2.0, 1 - 2.0, 0])
    expected = dict(zip((1, 7, 8, 9), scores.log_softmax(-1).tolist(), strict=True))
    assert {draw.token for draw in drawn} <= set(expected)
    raw = logits[0].log_softmax(-1)
    for draw in drawn:
        assert draw.logprob == pytest.approx(expected[draw.token], abs=1e-5)
        assert draw.raw_logprob == pytest.approx(raw[draw.token].item(), abs=1e-5)
    (nothing,) = Sampler().draw(logits, [Drawing(0, SamplingParams(), 0, 0, (), bytes(8))])
    assert not torch.tensor(nothing.logprob).isfinite()


def test_drawings_share_rows() -> None:
    """Drawings from one row, plain, shaped and given among each other, are what each is from a row of its own."""
    logits = torch.randn(2, VOCABULARY, generator=torch.manual_seed(7)) * 2
    params = [SamplingParams(**values, logprobs=2) for values in PARAMS]
    draws = [
        Drawing(i % 2, own, i, len(ANSWER), PROMPT + ANSWER if own.penalizes else (), token=9 if i % 5 == 0 else None)
        for i, own in enumerate(params * 2)
    ]
    alone = [Sampler().draw(logits[d.row : d.row + 1], [dataclasses.replace(d, row=0)])[0] for d in draws]
    assert Sampler().draw(logits, draws) == alone


def test_a_given_token_is_scored_not_drawn() -> None:
    """It comes back with log-probability 0, and with the model's own if the request asks for it."""
    logits = torch.randn(1, VOCABULARY, generator=torch.manual_seed(8))
    raw = logits[0].log_softmax(-1)
    scored, plain = Sampler().draw(
        logits, [Drawing(0, SamplingParams(logprobs=1), 0, 0, token=4), Drawing(0, SamplingParams(), 0, 0, token=0)]
    )
    assert (scored.token, scored.logprob, plain) == (4, 0.0, Draw(0, 0.0))
    assert scored.raw_logprob == pytest.approx(raw[4].item(), abs=1e-6)
    assert scored.top[0] == (int(raw.argmax()), pytest.approx(raw.max().item(), abs=1e-6))


@torch.inference_mode()
def test_greedy_with_penalties_equals_a_lone_loop(model: Transformer) -> None:
    """Greedy takes the best token after the penalties, over prompt and answer, preempted and in chunks, too."""
    prompt = [random.Random(0).randrange(97) for _ in range(30)]
    tokens = list(prompt)
    processor = RepetitionPenaltyLogitsProcessor(1.8)
    for _ in range(40):
        hidden = model(torch.tensor(tokens), torch.arange(len(tokens)), PackedView(Segments.of(len(tokens))))
        tokens.append(int(processor(torch.tensor([tokens]), model.logits(hidden[-1:])).argmax()))
    params = SamplingParams(max_tokens=40, temperature=0, repetition_penalty=1.8, ignore_eos=True)
    others = [SamplingParams(max_tokens=90, ignore_eos=True)] * 3
    engine = Engine(model, EngineConfig(cache_tokens=256, max_batch_tokens=20))
    outputs = engine.generate([[5] * 60, [6] * 60, [7] * 60, prompt], [*others, params])
    assert list(outputs[-1].tokens) == tokens[len(prompt) :]
    assert engine.stats()["num_preempted"] > 0


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("values", PARAMS + [{"temperature": 0.0}, {"temperature": 0.0, "top_p": 0.5}], ids=str)
def test_logits_that_are_not_finite_never_give_a_token(poison: float, values: dict[str, Any]) -> None:
    """NaN or +inf anywhere in a row, or a row of -inf alone, shows in its log-probability; other rows do not see it."""
    logits = torch.randn(3, VOCABULARY, generator=torch.manual_seed(4))
    logits[1, slice(None) if poison == float("-inf") else 50] = poison
    params = SamplingParams(**values, seed=0)
    draws: list[Draw] = Sampler().draw(logits, drawings([params] * 3))
    finite = [torch.tensor(draw.logprob).isfinite().item() for draw in draws]
    assert finite == [True, False, True]


def test_a_damaged_row_ends_its_request_alone() -> None:
    """NaN logits end a request with an error that names it; its neighbours and later requests get their tokens."""
    model = initialize(build(dataclasses.replace(LLAMA, tie_word_embeddings=False)), seed=5).eval()
    greedy = SamplingParams(max_tokens=20, temperature=0)
    expected = Engine(model).generate([[1, 2]], greedy)[0].tokens
    damaged = next(token for token in range(97) if token not in (*expected, 1, 2))
    with torch.no_grad():
        model.get_parameter("model.embed_tokens.weight")[damaged] = torch.nan
    engine = Engine(model)
    engine.submit(Request(id="bad", prompt=(1, damaged), params=greedy))
    engine.submit(Request(id="good", prompt=(1, 2), params=greedy))
    outputs = [output for _ in range(20) for output in engine.step()]
    (failed,) = [output for output in outputs if output.request_id == "bad"]
    assert failed.finish_reason == "error" and failed.error and "'bad'" in failed.error and failed.tokens == ()
    assert sum((o.tokens for o in outputs if o.request_id == "good"), ()) == expected
    assert not engine.has_work
    with pytest.raises(EngineError, match="token 1 of the answer"):
        engine.generate([[1, 2], [damaged]], greedy)
    with pytest.raises(EngineError, match="token 1 of the answer"):
        list(engine.stream([damaged], greedy))
    assert engine.generate([[1, 2]], greedy)[0].tokens == expected  # in pages that held NaN


def test_a_bias_beyond_the_vocabulary_is_refused(model: Transformer) -> None:
    """A bias for a token that the model lacks is refused by name."""
    with pytest.raises(InputError, match="token 97 of logit_bias"):
        Engine(model).generate([[1]], SamplingParams(logit_bias=((97, 1.0),)))
