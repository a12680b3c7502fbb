"""The engine against an uncached loop over the same model."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch

from porcelet.config import PAGE_SIZE, EngineConfig
from porcelet.engine.cache import count_pages
from porcelet.engine.engine import Engine
from porcelet.engine.sampler import uniform
from porcelet.engine.sequence import sample_seed
from porcelet.errors import CapacityError, EngineError, InputError
from porcelet.kernels.attention import Segments
from porcelet.models.attention import PackedView
from porcelet.models.transformer import Transformer, build, initialize
from porcelet.types import Request, SamplingParams
from porcelet.weights.load import quantized
from porcelet.weights.memory import available_memory
from tests.models.variants import LLAMA, V3

GREEDY = SamplingParams(max_tokens=24, temperature=0)


@pytest.fixture(scope="module", params=[LLAMA, V3], ids=["llama", "v3"])
def model(request: pytest.FixtureRequest) -> Transformer:
    return initialize(build(request.param), seed=5).eval()


def prompts(count: int, longest: int = 150) -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(97) for _ in range(rng.randrange(1, longest))] for _ in range(count)]


@torch.inference_mode()
def uncached(model: Transformer, asked: list[list[int]], num_tokens: int) -> list[tuple[int, ...]]:
    """Greedy decoding that recomputes everything for every token."""
    texts = [list(prompt) for prompt in asked]
    for _ in range(num_tokens):
        ends = torch.tensor([len(text) for text in texts]).cumsum(0)
        positions = torch.cat([torch.arange(len(text)) for text in texts])
        view = PackedView(Segments.of(*map(len, texts)))
        hidden = model(torch.tensor(sum(texts, [])), positions, view)
        for text, token in zip(texts, model.logits(hidden[ends - 1]).argmax(-1).tolist(), strict=True):
            text.append(token)
    return [tuple(text[len(prompt) :]) for text, prompt in zip(texts, asked, strict=True)]


@pytest.fixture(scope="module")
def expected(model: Transformer) -> list[tuple[int, ...]]:
    return uncached(model, prompts(6), 24)


@pytest.mark.parametrize(
    ("config", "preempts"),
    [
        (EngineConfig(), False),
        (EngineConfig(max_batch_tokens=17), False),
        (EngineConfig(cache_tokens=PAGE_SIZE * 4, max_batch_tokens=50), True),
        (EngineConfig(max_sequences=1), False),
    ],
    ids=["roomy", "small chunks", "preempting", "one at a time"],
)
def test_batched_greedy_equals_uncached(
    model: Transformer, expected: list[tuple[int, ...]], config: EngineConfig, preempts: bool
) -> None:
    """Whoever shares the batch, however prompts are chunked, whoever loses its pages: the uncached tokens."""
    engine = Engine(model, config)
    asked = prompts(6)
    outputs = engine.generate(asked, GREEDY)
    assert [output.tokens for output in outputs] == expected
    assert (engine.stats()["num_preempted"] > 0) == preempts
    assert engine.stats()["num_free_pages"] == engine.stats()["num_pages"]
    assert all(o.finish_reason == "length" and o.num_generated == len(o.logprobs) == 24 for o in outputs)


def test_logprobs_are_the_models(model: Transformer) -> None:
    """The log-probability that comes with a drawn token is the model's, temperature applied."""
    prompt = prompts(1)[0]
    (output,) = Engine(model).generate([prompt], SamplingParams(max_tokens=20, temperature=0.7, seed=3))
    sequence = torch.tensor([*prompt, *output.tokens])
    with torch.inference_mode():
        hidden = model(sequence, torch.arange(len(sequence)), PackedView(Segments.of(len(sequence))))
        scores = (model.logits(hidden) / 0.7).log_softmax(-1)
    expected = scores[len(prompt) - 1 : -1].gather(1, sequence[len(prompt) :, None])[:, 0]
    assert (torch.tensor(output.logprobs) - expected).abs().max() < 1e-4


def test_seeded_request_repeats_in_any_batch(model: Transformer) -> None:
    """A seed fixes a request's tokens whatever runs beside it; another seed gives others."""
    prompt, seeded = prompts(1)[0], SamplingParams(max_tokens=30, seed=11)
    alone = Engine(model).generate([prompt], seeded)[0]
    crowd = Engine(model).generate([*prompts(5), prompt], [SamplingParams(max_tokens=30)] * 5 + [seeded])[-1]
    other = Engine(model).generate([prompt], SamplingParams(max_tokens=30, seed=12))[0]
    assert alone.tokens == crowd.tokens != other.tokens


def test_stop_token_ends_the_request(model: Transformer) -> None:
    """A stop token ends the request in its step, is reported with its log-probability, and is not among the tokens."""
    prompt = prompts(1)[0]
    (tokens,) = uncached(model, [prompt], 24)
    stop = tokens[10]
    params = SamplingParams(max_tokens=24, temperature=0, stop_token_ids=(stop,))
    (output,) = Engine(model).generate([prompt], params)
    length = tokens.index(stop)
    assert output.tokens == tokens[:length] and output.stop_token == stop and output.finish_reason == "stop"
    assert output.num_generated == len(output.logprobs) == length + 1


def test_abort_frees_everything(model: Transformer) -> None:
    """Aborting in the queue, in the prompt and while decoding gives one last output and all pages back."""
    engine = Engine(model, EngineConfig(max_batch_tokens=64, max_sequences=2))
    for index, prompt in enumerate(prompts(4)):
        engine.submit(Request(id=str(index), prompt=tuple(prompt), params=GREEDY))
    engine.step()
    for index in range(4):
        engine.abort(str(index))
    engine.abort("never existed")
    last = engine.step()
    assert sorted(o.request_id for o in last) == ["0", "1", "2", "3"]
    assert {o.finish_reason for o in last} == {"abort"}
    assert not engine.has_work and engine.stats()["num_free_pages"] == engine.stats()["num_pages"]


def test_closed_stream_leaves_the_engine_idle(model: Transformer) -> None:
    """A caller that stops listening ends its request."""
    engine = Engine(model)
    stream = engine.stream(prompts(1)[0], GREEDY)
    next(stream)
    stream.close()
    assert not engine.has_work and engine.stats()["num_free_pages"] == engine.stats()["num_pages"]


def test_refusals_name_the_reason(model: Transformer) -> None:
    """What can never be served is refused at once, and nothing stays queued."""
    engine = Engine(model, EngineConfig(cache_tokens=128))
    for prompt, reason in [((), "empty"), ((1,) * 128, "at most 127"), ((1, 97), "token 97"), ((-1,), "token -1")]:
        with pytest.raises(InputError, match=reason):
            engine.generate([(1, 2), prompt], GREEDY)
    assert not engine.has_work
    engine.submit(Request(id="twice", prompt=(1,), params=GREEDY))
    with pytest.raises(InputError, match="twice"):
        engine.submit(Request(id="twice", prompt=(1,), params=GREEDY))


def test_a_cache_beyond_the_machine_is_refused(model: Transformer) -> None:
    """Asking for more cache than there is memory fails at once, with both numbers and the remedy."""
    with pytest.raises(CapacityError, match="lower cache_tokens"):
        Engine(model, EngineConfig(cache_tokens=10**13))


def test_generation_ends_at_the_context(model: Transformer) -> None:
    """A request may ask for more than fits; it ends by length where the cache ends."""
    engine = Engine(model, EngineConfig(cache_tokens=128))
    (output,) = engine.generate([(1,) * 120], SamplingParams(max_tokens=100, temperature=0))
    assert output.finish_reason == "length" and output.num_generated == 8


def test_uniform_is_uniform() -> None:
    """The hashed numbers lie in [0, 1), differ by seed and index, and have the right mean."""
    numbers = [uniform(seed, index) for seed in range(40) for index in range(50)]
    assert len(set(numbers)) == 2000 and min(numbers) >= 0 and max(numbers) < 1
    assert abs(sum(numbers) / 2000 - 0.5) < 0.03


def test_samples_are_requests_of_their_own(model: Transformer) -> None:
    """Three samples of a prompt draw what three requests with their seeds draw, preempted or not."""
    prompt = prompts(3)[2]
    params = SamplingParams(max_tokens=30, seed=4)
    own = [dataclasses.replace(params, seed=sample_seed(4, index)) for index in range(3)]
    expected = [output.tokens for output in Engine(model).generate([prompt] * 3, own)]
    for config in (EngineConfig(), EngineConfig(cache_tokens=PAGE_SIZE * 4, max_batch_tokens=40)):
        outputs = Engine(model, config).generate([prompt], dataclasses.replace(params, n=3))
        assert [output.tokens for output in outputs] == expected and [o.index for o in outputs] == [0, 1, 2]
    assert len(set(expected)) == 3


def test_a_prefix_hit_changes_no_token(model: Transformer) -> None:
    """What is found in the cache gives the tokens that computing it gives, and is reported."""
    shared = prompts(1, 250)[0] * 3
    asked = [(shared + [token] * 5)[-300:] for token in range(4)]
    expected = uncached(model, asked, 10)
    engine = Engine(model)
    params = SamplingParams(max_tokens=10, temperature=0)
    outputs = [engine.generate([prompt], params)[0] for prompt in asked]
    assert [output.tokens for output in outputs] == expected
    assert [output.num_cached_tokens for output in outputs] == [0, 256, 256, 256]
    engine.weights_changed()
    assert engine.generate(asked[:1], params)[0].num_cached_tokens == 0


@torch.inference_mode()
def test_prompt_logprobs_are_a_forward_pass(model: Transformer) -> None:
    """Log-probabilities and best alternatives of the prompt's tokens, in chunks and beside others, hit or not."""
    prompt = prompts(1)[0] * 2
    view = PackedView(Segments.of(len(prompt)))
    scores = model.logits(model(torch.tensor(prompt), torch.arange(len(prompt)), view)).log_softmax(-1)
    expected = scores[:-1].gather(1, torch.tensor(prompt)[1:, None])[:, 0].tolist()
    engine = Engine(model, EngineConfig(max_batch_tokens=50))
    for _ in range(2):
        *_, scored = engine.generate([*prompts(2), prompt], [GREEDY, GREEDY, SamplingParams(prompt_logprobs=2)])
        assert [logprob for logprob, _ in scored.prompt_logprobs] == pytest.approx(expected, abs=1e-4)
        assert [top[0][0] for _, top in scored.prompt_logprobs] == scores[:-1].argmax(-1).tolist()
        assert scored.raw_logprobs == () and {len(top) for _, top in scored.prompt_logprobs} == {2}


def test_a_cache_of_half_precision_is_close(model: Transformer) -> None:
    """float16 in the cache moves log-probabilities by its rounding and halves what a page takes."""
    params = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)
    full, half = (Engine(model, EngineConfig(cache_dtype=dtype)) for dtype in ("float32", "float16"))
    for ours, theirs in zip(half.generate(prompts(4), params), full.generate(prompts(4), params), strict=True):
        same = next((i for i in range(20) if ours.tokens[i] != theirs.tokens[i]), 20)
        assert ours.logprobs[:same] == pytest.approx(theirs.logprobs[:same], abs=2e-2) and same > 5
    sizes = [sum(part.nbytes for layer in engine.runner.cache for part in layer) for engine in (half, full)]
    assert sizes[0] * 2 == sizes[1]


@pytest.mark.parametrize("length", [1, 5, 100])
def test_weights_replaced_between_requests_count(length: int) -> None:
    """Recordings are compared with the model when requests come, not at each token: also behind a prompt that is too
    long to be replayed."""
    model = initialize(build(LLAMA), seed=5).eval()
    engine = Engine(model, EngineConfig(prefix_cache="off"))
    prompt = [prompts(1, 300)[0][i % 50] for i in range(length)]
    (before,) = engine.generate([prompt], GREEDY)
    layer = model.model.layers[1].mlp.down_proj
    layer.weight = torch.nn.Parameter(layer.weight.detach() * -3)
    (after,) = engine.generate([prompt], GREEDY)
    (expected,) = Engine(model, EngineConfig(prefix_cache="off")).generate([prompt], GREEDY)
    assert after.tokens == expected.tokens != before.tokens


def test_packed_weights_bring_a_cache_of_half_precision() -> None:
    """What "auto" says: float16 beside packed weights, float32 beside full ones, and what is asked for otherwise."""
    model = initialize(build(LLAMA), seed=5).eval()
    packed = quantized(model)
    for weights, asked, dtype in (
        (packed, "auto", torch.float16),
        (model, "auto", torch.float32),
        (packed, "float32", torch.float32),
    ):
        engine = Engine(weights, EngineConfig(cache_dtype=asked))
        assert {part.dtype for layer in engine.runner.cache for part in layer} == {dtype}


def test_a_failed_step_ends_who_took_part(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A computation that raises ends its requests with the reason; those that wait are served; three in a row end it
    all."""
    engine = Engine(model, EngineConfig(max_sequences=1))
    for name in ("bad", "good"):
        engine.submit(Request(id=name, prompt=(1, 2), params=GREEDY))
    run = engine.runner.run
    monkeypatch.setattr(engine.runner, "run", lambda batch, **_: torch.empty(-1))
    (failed,) = engine.step()
    assert failed.request_id == "bad" and failed.finish_reason == "error" and "RuntimeError" in str(failed.error)
    monkeypatch.setattr(engine.runner, "run", run)
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    assert outputs[-1].request_id == "good" and outputs[-1].finish_reason == "length"
    engine.step()  # checks that nothing is held
    monkeypatch.setattr(engine.runner, "run", lambda batch, **_: torch.empty(-1))
    told = []
    with pytest.raises(EngineError, match="3 steps in a row"):
        for number in range(3):
            engine.submit(Request(id=str(number), prompt=(1, 2), params=GREEDY))
            told += engine.step()
    monkeypatch.setattr(engine.runner, "run", run)
    told += engine.step()  # what the raising step had to say is not lost, and the engine can go on
    assert [(output.request_id, output.finish_reason) for output in told] == [(str(i), "error") for i in range(3)]
    assert engine.generate([(1, 2)], GREEDY)[0].tokens == sum((o.tokens for o in outputs), ())


def test_a_leak_is_found_when_idle(model: Transformer) -> None:
    """An engine without work that still holds a page stops with an assertion."""
    engine = Engine(model)
    engine.generate([[1]], GREEDY)
    engine.step()
    engine.scheduler.pool.extend([], 1)  # a page that nobody owns
    with pytest.raises(AssertionError, match="pages"):
        engine.step()


@pytest.mark.parametrize(("memory", "pages"), [("1MB", 61), ("64 KiB", 4), ("1e6", 61)])
def test_the_cache_is_measured_in_bytes(memory: str, pages: int) -> None:
    """Bytes become pages by the model's own count: 2 layers of 64 values, 64 tokens, 2 bytes."""
    config = EngineConfig(cache_memory=memory, cache_dtype="float16", speculation="off")
    model = initialize(build(LLAMA), seed=5).eval()
    assert Engine(model, config).stats()["num_pages"] == pages


def test_a_cache_is_a_fraction_of_what_is_free() -> None:
    """A fraction is one of the memory that the machine can give; too little for a page is refused."""
    page = PAGE_SIZE * 2 * 64 * 4
    pages = count_pages(EngineConfig(cache_memory="0.25"), LLAMA, 2, 4)
    assert 0.2 * available_memory() < pages * page < 0.3 * available_memory()
    with pytest.raises(CapacityError, match="less than one page of 32768 bytes"):
        count_pages(EngineConfig(cache_memory="1kB"), LLAMA, 2, 4)
    for strange in ("much", "2 GBit", "-1", "0", "0.5GiB of it"):
        with pytest.raises(InputError, match="cache_memory is"):
            EngineConfig(cache_memory=strange)
