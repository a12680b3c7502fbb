"""What a step of the engine costs beside the model, and how long a whole model takes that all others are compared with.

A model of one narrow layer is run by the engine, at several numbers of sequences and with a small and a large
vocabulary; its own kernels are next to nothing. The planner adds these costs to the kernels' (plan/engine_time.py), and
scales the sum by what the reference model takes over what it should: caches, meetings and memory that kernels share.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from porcelet.config import EngineConfig, ModelConfig
from porcelet.engine.engine import Engine
from porcelet.models.transformer import build, initialize
from porcelet.types import Request, SamplingParams
from porcelet.weights.load import load, save

SEQUENCES = (1, 4, 16)
SMALL, LARGE = 1024, 33792  # vocabularies
STEPS, PROMPT = 40, 512


REFERENCE = ModelConfig(
    architecture="llama",
    vocab_size=16384,
    hidden_size=1024,
    intermediate_size=2816,
    num_hidden_layers=12,
    num_attention_heads=16,
    num_key_value_heads=4,
    head_dim=64,
    max_position_embeddings=4096,
    tie_word_embeddings=True,
)
REFERENCE_PROMPT = 256
FORMATS = ("float32", "int8", "int4")


@contextmanager
def reference_engine(weights: str) -> Iterator[Engine]:
    """An engine with the reference model, random and loaded in a format."""
    with TemporaryDirectory() as folder:
        save(initialize(build(REFERENCE), seed=0), Path(folder))
        settings = EngineConfig(speculation="off", prefix_cache="off", cache_tokens=16384)
        engine = Engine(load(Path(folder), weights), settings)
        timed(engine, 1, REFERENCE_PROMPT)  # records
        yield engine


def reference() -> Iterator[tuple[str, float]]:
    """`reference.int4.N` are seconds of a step of N sequences of the reference model, behind `REFERENCE_PROMPT` tokens
    and half the steps; `reference_prompt.int4` those of its prompts, for each of their tokens."""
    for weights in FORMATS:
        with reference_engine(weights) as engine:
            for count in SEQUENCES:
                step, prompt = timed(engine, count, REFERENCE_PROMPT)
                yield f"reference.{weights}.{count}", step
            yield f"reference_prompt.{weights}", prompt


def costs() -> Iterator[tuple[str, float]]:
    """`step.N` are seconds of a step of N sequences with a small vocabulary, `token` what each further entry of the
    vocabulary costs a sequence, its share of the head among it, `prompt` seconds a prompt token."""
    small, large = (_engine(vocabulary) for vocabulary in (SMALL, LARGE))
    steps = {}
    for count in SEQUENCES:
        steps[count], prompt = timed(small, count)
        yield f"step.{count}", steps[count]
        if count == SEQUENCES[-1]:
            wide, _ = timed(large, count)
            yield "token", max(wide - steps[count], 0.0) / (count * (LARGE - SMALL))
            yield "prompt", prompt


def _engine(vocabulary: int) -> Engine:
    config = ModelConfig(
        architecture="llama",
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=4096,
    )
    settings = EngineConfig(speculation="off", prefix_cache="off", cache_tokens=32768)
    return Engine(initialize(build(config), seed=0), settings)


def timed(engine: Engine, count: int, length: int = PROMPT, steps: int = STEPS) -> tuple[float, float]:
    """Median seconds of a step that writes one token of `count` sequences, and of a prompt token."""
    params = SamplingParams(max_tokens=steps, temperature=0, ignore_eos=True)
    for index in range(count):
        prompt = tuple((i + 31 * index) % SMALL for i in range(length))
        engine.submit(Request(id=str(index), prompt=prompt, params=params))
    start, taken = time.perf_counter(), []
    begun: set[str] = set()
    while len(begun) < count:
        begun |= {output.request_id for output in engine.step()}
    first = time.perf_counter() - start
    while engine.has_work:
        start = time.perf_counter()
        outputs = engine.step()
        if len(outputs) == count:
            taken.append(time.perf_counter() - start)
    return statistics.median(taken), first / (count * length)
