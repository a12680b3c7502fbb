"""Stop strings: however tokens cut the text, it ends where the first stop begins, and nothing beyond is ever shown."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from porcelet.config import EngineConfig
from porcelet.engine.engine import Engine
from porcelet.engine.scheduler import Scheduler
from porcelet.engine.stop import StopMatcher
from porcelet.errors import InputError, ModelError
from porcelet.models.transformer import build, initialize
from porcelet.types import Draw, Output, Request, SamplingParams, join_outputs
from tests.models.variants import LLAMA
from tests.tiny_model import save_tiny_model

LETTERS = "abé"
vocabularies = st.lists(st.text(LETTERS, max_size=4).map(str.encode), min_size=1, max_size=6)
halves = st.sampled_from([b"\xc3", b"\xa9"])  # of é
stops = st.lists(st.text(LETTERS, min_size=1, max_size=5), min_size=1, max_size=4)


def until_stop(text: bytes, stops: list[str]) -> tuple[bytes, str | None]:
    """The definition: the shortest beginning that ends with a stop, less the longest stop that it ends with."""
    for end in range(len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop.encode())]
        if complete:
            longest = max(complete, key=len)
            return text[: end - len(longest.encode())], longest
    return text, None


def run(vocabulary: list[bytes], drawn: list[int], params: SamplingParams) -> list[Output]:
    """What the scheduler tells when a model draws these tokens; each draw's log-probability is its number."""
    scheduler = Scheduler(LLAMA, EngineConfig(speculation="off"), 8, vocabulary.__getitem__)
    scheduler.add(Request(id="a", prompt=(1,), params=params))
    outputs: list[Output] = []
    for number, token in enumerate(drawn):
        assert scheduler.schedule()
        outputs += scheduler.commit([Draw(token, -float(number), -number - 0.5, ((token, -0.5),))])
        if outputs[-1].finish_reason:
            break
    return outputs


@given(vocabularies, st.lists(halves, max_size=2), stops, st.lists(st.integers(0, 100), min_size=1, max_size=30))
@settings(max_examples=500, deadline=None)
def test_text_ends_before_the_first_stop(
    words: list[bytes], more: list[bytes], stops: list[str], numbers: list[int]
) -> None:
    """In the step that completes a stop the text ends before it; until then only a beginning of that text is shown."""
    vocabulary = words + more
    drawn = [number % len(vocabulary) for number in numbers]
    params = SamplingParams(max_tokens=len(drawn), stop=tuple(stops), ignore_eos=True, logprobs=1)
    outputs = run(vocabulary, drawn, params)
    texts = [b"".join(vocabulary[token] for token in drawn[:count]) for count in range(len(drawn) + 1)]
    expected, stop = until_stop(texts[-1], stops)
    steps = next((count for count, text in enumerate(texts) if until_stop(text, stops)[1]), len(drawn))

    shown = b""
    for output in outputs:
        shown += b"".join(vocabulary[token] for token in output.tokens) + output.tail
        assert expected.startswith(shown)
    assert shown == expected
    whole = join_outputs(outputs)
    assert (len(outputs), whole.num_generated) == (steps, steps)
    assert (whole.finish_reason, whole.stop) == ("stop" if stop else "length", stop)
    # What is told of a token is its own: the draws are numbered.
    assert whole.tokens == tuple(drawn[: len(whole.tokens)])
    assert whole.logprobs == tuple(-float(number) for number in range(len(whole.tokens)))
    assert whole.raw_logprobs == tuple(logprob - 0.5 for logprob in whole.logprobs)
    assert whole.top_logprobs == tuple(((token, -0.5),) for token in whole.tokens)


@given(stops.map(lambda stops: stops[:1]), st.text(LETTERS, max_size=40))
def test_one_stop_is_a_split(stops: list[str], text: str) -> None:
    """With one stop, and a character a token, the text is what Python's split gives."""
    vocabulary = [letter.encode() for letter in LETTERS]
    drawn = [LETTERS.index(letter) for letter in text] or [0]
    outputs = run(vocabulary, drawn, SamplingParams(max_tokens=len(drawn), stop=tuple(stops), ignore_eos=True))
    answer = b"".join(vocabulary[token] for token in join_outputs(outputs).tokens) + outputs[-1].tail
    assert answer.decode() == (text or LETTERS[0]).split(stops[0])[0]


def test_only_what_may_be_a_stop_is_held_back() -> None:
    """A token is told of in its own step unless the text's end is a stop's beginning, and at once when it is not."""
    vocabulary = [b"a", b"b", b"c"]
    outputs = run(vocabulary, [0, 2, 0, 1, 1, 2], SamplingParams(max_tokens=6, stop=("abc",), ignore_eos=True))
    assert [output.tokens for output in outputs] == [(), (0, 2), (), (), (0, 1, 1), (2,)]


def test_other_ends_release_what_is_held() -> None:
    """A stop token, the length limit and an abort each give the tokens held back, the stop token's draw last."""
    vocabulary, params = [b"a", b"b", b"c"], SamplingParams(max_tokens=3, stop=("aaaaaa",), stop_token_ids=(1,))
    assert run(vocabulary, [0, 0, 1], params)[-1] == Output(
        request_id="a",
        tokens=(0, 0),
        logprobs=(0.0, -1.0, -2.0),
        stop_token=1,
        finish_reason="stop",
        num_prompt_tokens=1,
        num_generated=3,
    )
    assert [(o.tokens, o.finish_reason) for o in run(vocabulary, [0, 0, 0], params)][-1] == ((0, 0, 0), "length")
    scheduler = Scheduler(LLAMA, EngineConfig(speculation="off"), 8, vocabulary.__getitem__)
    scheduler.add(Request(id="a", prompt=(1,), params=params))
    scheduler.schedule()
    assert scheduler.commit([Draw(0, -1.0)])[0].tokens == ()
    (aborted,) = scheduler.abort("a")
    assert (aborted.tokens, aborted.logprobs, aborted.finish_reason) == ((0,), (-1.0,), "abort")
    assert scheduler.schedule() is None  # checks that all pages are free


def test_a_hard_stop_costs_linear_time() -> None:
    """A text made to fall back as often as possible is read in a few operations a byte."""
    matcher = StopMatcher(["a" * 1023 + "b"] * 16)
    released = sum(matcher.push(token).num_certain for token in [b"a" * 1000] * 20 + [b"c"])
    assert released == 21


def test_an_engine_without_a_tokenizer_refuses_stops() -> None:
    """Stop strings for an engine that knows no text are refused by name, and nothing stays queued."""
    engine = Engine(initialize(build(LLAMA), seed=0))
    with pytest.raises(InputError, match="no tokenizer .* stop_token_ids"):
        engine.generate([[1]], SamplingParams(stop=("x",)))
    assert not engine.has_work


def test_a_tokenizer_that_cannot_be_opened_refuses_one_request(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A model folder without a tokenizer serves requests without stops; those with stops are refused at once."""
    folder = save_tiny_model(tmp_path_factory.mktemp("bare") / "tiny")
    answer = Engine.load(folder).generate([[1, 2]], SamplingParams(max_tokens=50, temperature=0))[0]
    stop = chr(answer.tokens[-1])
    (folder / "tokenizer.json").unlink()
    engine = Engine.load(folder)
    with pytest.raises(ModelError, match="tokenizer.json"):
        engine.generate([[1, 2]], SamplingParams(stop=(stop,)))
    assert engine.generate([[1, 2]], SamplingParams(max_tokens=50, temperature=0))[0].tokens == answer.tokens
