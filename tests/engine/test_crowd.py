"""Hundreds of random requests in a crowd, under a cache far too small, against each of them alone."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import pytest

from porcelet.config import PAGE_SIZE, EngineConfig, ModelConfig
from porcelet.engine.engine import Engine
from porcelet.models.transformer import build, initialize
from porcelet.types import Constraint, Output, Reasoning, Request, SamplingParams, join_outputs
from porcelet.weights.load import save
from tests.models.variants import LLAMA, V3
from tests.tiny_model import save_tiny_model

CONSTRAINTS = [Constraint("regex", "[0-9 ]{5,30}[.]"), Constraint("choice", ("one", "two", "three"))]


def save_model(folder: Path, config: ModelConfig) -> None:
    """A model of the tiny tokenizer's vocabulary."""
    save_tiny_model(folder)
    save(initialize(build(dataclasses.replace(config, vocab_size=260, eos_token_ids=(259,))), seed=5), folder)


def request_of(rng: random.Random, number: int) -> Request:
    """Prompts share beginnings; everything a request can ask for is asked for by some."""
    shared = [(i * i) % 251 for i in range(rng.choice([0, 64, 100, 128, 200]))]
    prompt = shared + [rng.randrange(256) for _ in range(rng.randrange(1, 60))]
    reasoning = Reasoning(end=(46,), budget=rng.randrange(20), closing=(33, 46))
    params = SamplingParams(
        max_tokens=rng.randrange(1, 50),
        temperature=rng.choice([0.0, 0.7, 1.0]),
        top_p=rng.choice([1.0, 0.9]),
        top_k=rng.choice([0, 30]),
        frequency_penalty=rng.choice([0.0, 0.0, 0.5]),
        seed=rng.randrange(1000),
        n=rng.choice([1, 1, 1, 3]),
        stop=rng.choice([(), (), ("a",), ("\n", "zz")]),
        prompt_logprobs=rng.choice([None, None, None, 1]),
        constraint=rng.choice([None, None, None, *CONSTRAINTS]),
        reasoning=rng.choice([None, None, reasoning]),
        ignore_eos=rng.random() < 0.5,
    )
    tenant, priority = rng.choice(["", "a", "b"]), rng.choice([0, 0, 1])
    return Request(id=str(number), prompt=tuple(prompt), params=params, tenant=tenant, priority=priority)


def crowd(engine: Engine, requests: list[Request], rng: random.Random) -> dict[tuple[str, int], Output]:
    """All requests, some at a time, one in ten aborted on the way."""
    pieces: dict[tuple[str, int], list[Output]] = {}
    waiting = list(requests)
    while waiting or engine.has_work:
        for _ in range(min(rng.randrange(4), len(waiting))):
            engine.submit(waiting.pop(0))
        if rng.random() < 0.02:
            engine.abort(str(rng.randrange(len(requests))))
        for output in engine.step():
            pieces.setdefault((output.request_id, output.index), []).append(output)
        engine.scheduler.check()
    engine.check_idle()
    return {key: join_outputs(outputs) for key, outputs in pieces.items()}


@pytest.mark.parametrize(
    ("config", "speculation", "count"), [(LLAMA, "lookup", 200), (V3, "mtp", 100)], ids=["llama", "v3"]
)
def test_a_crowd_gets_what_each_gets_alone(tmp_path: Path, config: ModelConfig, speculation: str, count: int) -> None:
    """Preempted, forked, aborted, guessed ahead, constrained and served from the cache: the lone tokens.

    Sums are rounded in another order where a prompt is cut otherwise, so a draw may fall on the other side of an edge:
    at most one token in 1,000 may be the first of its answer to differ.
    """
    rng = random.Random(3)
    requests = [request_of(rng, number) for number in range(count)]
    save_model(tmp_path, config)
    tight = EngineConfig(cache_tokens=9 * PAGE_SIZE, max_batch_tokens=150, max_sequences=8, speculation=speculation)
    engine = Engine.load(tmp_path, tight)
    answers = crowd(engine, requests, rng)
    lone = Engine.load(tmp_path, EngineConfig(speculation="off", prefix_cache="off"))
    num_tokens = num_ties = 0
    for request in requests:
        for alone in lone.generate([request.prompt], request.params):
            ours = answers.pop((request.id, alone.index))
            assert ours.finish_reason in ("abort", alone.finish_reason)
            num_tokens += len(ours.tokens)
            expected = alone.tokens[: len(ours.tokens)] if ours.finish_reason == "abort" else alone.tokens
            num_ties += ours.tokens != expected
            if ours.tokens == expected:
                assert ours.logprobs == pytest.approx(alone.logprobs[: len(ours.logprobs)], abs=1e-3)
                assert ours.stop == alone.stop or ours.finish_reason == "abort"
    assert not answers and num_tokens > 15 * count and num_ties * 1000 <= num_tokens, (num_ties, num_tokens)
    stats = engine.stats()
    assert min(stats[name] for name in ("num_preempted", "num_hit_tokens", "num_drafted")) > count / 8, stats
    assert stats["num_accepted"] > 0
