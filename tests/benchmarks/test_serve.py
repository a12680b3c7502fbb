"""What benchmarks/serve.py computes from events, the requests it makes, and the replay that all engines share."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pytest

from benchmarks import serve, workload
from benchmarks.rivals import protocol
from benchmarks.rivals.protocol import Asked, Came
from porcelet.kernels import cpu
from tests.tiny_model import save_tiny_model
from tests.weights import tiny_gguf


def encode(text: str) -> list[int]:
    """A token a word."""
    return [workload.WORDS.split().index(word) for word in text.lower().replace(".", "").split()]


class Echo:
    """An engine that gives one token a step to each request, and remembers the most it had at once."""

    versions: Mapping[str, str] = {}

    def __init__(self) -> None:
        self.running: list[Asked] = []
        self.counts: Counter[str] = Counter()
        self.most = 0

    def submit(self, request: Asked) -> None:
        self.running.append(request)
        self.most = max(self.most, len(self.running))

    def step(self, deadline: float) -> Iterable[Came]:
        time.sleep(0.001)
        given = [Came(request.id, [7], time.perf_counter()) for request in self.running]
        self.counts.update(request.id for request in self.running)
        self.running = [request for request in self.running if self.counts[request.id] < request.max_tokens]
        return given

    def cancel(self, ids: Sequence[str]) -> None:
        self.running = [request for request in self.running if request.id not in ids]


def test_rounds_ask_for_equal_work_with_other_words() -> None:
    """Lengths and arrivals depend on the seed, the text on the round as well; the same call gives the same list."""
    first, again, second = (
        workload.mixed(20, workload.Lengths(), encode, seed=3, round=round, window=30.0) for round in (0, 0, 1)
    )
    assert first == again
    assert [(len(r.prompt), r.max_tokens, r.arrival) for r in first] == [
        (len(r.prompt), r.max_tokens, r.arrival) for r in second
    ]
    assert all(a.prompt[:16] != b.prompt[:16] for a, b in zip(first, second, strict=True))
    assert all(50 <= len(r.prompt) <= 500 and 32 <= r.max_tokens <= 256 for r in first)


def test_poisson_arrivals_rise_and_fill_the_window() -> None:
    """Without a window all come at once; with one they come in order, at its rate."""
    at_once = workload.mixed(5, workload.Lengths(), encode, seed=0, round=0)
    spread = [r.arrival for r in workload.mixed(400, workload.Lengths((1, 1)), encode, seed=0, round=0, window=30.0)]
    assert {r.arrival for r in at_once} == {0.0}
    assert spread == sorted(spread)
    assert spread[-1] == pytest.approx(30.0, rel=0.2)


def test_the_second_request_shares_exactly_the_prefix() -> None:
    """2,000 tokens are the same; the ends differ."""
    first, second = workload.shared_prefix(encode, seed=0, round=0)
    assert first.prompt[: workload.PREFIX_TOKENS] == second.prompt[: workload.PREFIX_TOKENS]
    assert first.prompt[workload.PREFIX_TOKENS :] != second.prompt[workload.PREFIX_TOKENS :]
    assert len(first.prompt) == len(second.prompt) == workload.PREFIX_TOKENS + workload.TAIL_TOKENS


def test_replay_keeps_to_the_number_in_flight() -> None:
    """Never more than asked for at once; every answer has its length, one time a token, and begins when submitted."""
    engine = Echo()
    requests = [Asked(str(i), [1], 2 + i, 0.0) for i in range(5)]
    done = protocol.replay(engine, requests, limit=10.0, at_most=2)
    assert engine.most == 2
    for request in requests:
        answer = done["answers"][request.id]
        assert len(answer["tokens"]) == len(answer["times"]) == request.max_tokens
        assert answer["begun"] <= answer["times"][0]
    assert done["answers"]["4"]["begun"] > done["answers"]["0"]["begun"]


def test_replay_waits_for_arrivals_and_stops_at_the_limit() -> None:
    """A request is not submitted before its time, and one that cannot end in time is cancelled."""
    engine = Echo()
    done = protocol.replay(engine, [Asked("a", [1], 1, 0.03), Asked("b", [1], 10**6, 0.0)], limit=0.1, at_most=None)
    assert done["answers"]["a"]["begun"] == 0.03 <= done["answers"]["a"]["times"][0]
    assert 0 < len(done["answers"]["b"]["tokens"]) < 10**6
    assert not engine.running
    assert 0.1 <= done["seconds"] < 1.0


def test_figures_of_a_known_run() -> None:
    """Two requests: one whose tokens came in two pieces, one that had nothing when the run was cut off."""
    requests = [Asked("a", range(10), 3, 0.0), Asked("b", range(30), 4, 1.0)]
    answers = {
        "a": {"begun": 0.0, "times": [0.5, 1.5, 1.5], "tokens": [1, 2, 3]},
        "b": {"begun": 1.0, "times": [], "tokens": []},
    }
    figures = serve.figures(requests, {"seconds": 4.0, "peak_bytes": 2_000_000, "answers": answers})
    assert figures["output"] == 3 / 4
    assert figures["total"] == 13 / 4
    assert figures["ttft_ms"] == 1750  # the median of 0.5 and the 3 seconds that b waited
    assert figures["ttft_p99_ms"] == 3000
    assert figures["gap_ms"] == 1000  # one pause, not a pause and nothing
    assert figures["per_token_ms"] == 500
    assert figures["finished"] == 0.5
    assert figures["peak_megabytes"] == 2


def test_percentile_is_a_value_that_was_measured() -> None:
    """The nearest rank, whatever the order; of nothing it is zero."""
    values = [5.0, 1.0, 4.0, 2.0, 3.0]
    assert [serve.percentile(values, share) for share in (0.0, 0.2, 0.5, 0.99, 1.0)] == [1, 1, 3, 5, 5]
    assert serve.percentile([], 0.5) == 0


def test_agreement_counts_leading_tokens() -> None:
    """What comes after the first difference does not count, nor what one side has not got."""

    def answers(*rows: list[int]) -> dict[str, dict[str, list[int]]]:
        return {str(i): {"tokens": row} for i, row in enumerate(rows)}

    assert serve.agreement(answers([1, 2, 3, 4]), answers([1, 2, 9, 4])) == 0.5
    assert serve.agreement(answers([1, 2], [5]), answers([1, 2, 3], [6])) == 0.5
    assert serve.agreement(answers([1]), answers([])) == 0


@pytest.mark.parametrize("way", ["client", "http"])
def test_our_own_engine_behind_its_server(tmp_path: Path, way: str) -> None:
    """The same requests through the engine's process alone and through the server get all of their tokens."""
    options = {
        "model": str(save_tiny_model(tmp_path / "tiny")),
        "threads": 1,
        "format": "float32",
        "speculation": "off",
    }
    process = serve.Process(serve.Engine("porcelet_http", options | {"way": way}), {})
    try:
        requests = [Asked(str(i), range(40 + i), 5 + i, 0.0) for i in range(6)]
        done = process.run(requests, limit=60.0, at_most=3)
    finally:
        process.close()
    assert [len(done["answers"][request.id]["tokens"]) for request in requests] == [r.max_tokens for r in requests]
    assert serve.figures(requests, done)["finished"] == 1


def test_every_weight_mode_of_ours_has_its_name(tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """Engines are named by their weights, the default setting by what it is; where that is something else, it is not
    measured under that name."""
    tiny_gguf.write(tmp_path / "model.gguf", "Q4_1")
    monkeypatch.setattr(serve.hub, "resolve", lambda name: tmp_path / "model.gguf")
    known = serve.engines(threads=1)
    settings = {name: known[f"porcelet_{name}"].options["format"] for name in serve.OUR_WEIGHTS}
    assert settings == {"float32": "float32", "int8": "int8", "int4": "int4", "stored": "auto"}
    assert set(serve.DEFAULT) <= set(known) and "porcelet_stored" in serve.DEFAULT
    monkeypatch.setattr(sys, "argv", ["serve", "--engines", "porcelet_stored_http"])
    monkeypatch.setattr(cpu, "available", lambda: True)
    assert serve.parse().engines == ["porcelet_stored_http"]
    monkeypatch.setattr(cpu, "available", lambda: False)
    with pytest.raises(SystemExit):
        serve.parse()


def test_what_is_not_installed_is_told(tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """A rival without its environment has a reason that names the remedy; ours needs none."""
    monkeypatch.setenv("PORCELET_BENCH", str(tmp_path))
    monkeypatch.setattr(serve.hub, "resolve", lambda name: tmp_path / "model.gguf")
    known = serve.engines(threads=1)
    assert known["porcelet_int8"].missing is None
    assert "benchmarks.rivals.environments vllm" in (known["vllm_float32"].missing or "")
