"""The metrics of a real server, read by Prometheus's own parser."""

from __future__ import annotations

import time

import httpx
from prometheus_client.parser import text_string_to_metric_families

from tests.server.conftest import Server

ASK = {"model": "tiny", "messages": [{"role": "user", "content": "count me"}], "temperature": 0, "max_tokens": 20}
LATENCIES = ("time_to_first_token", "e2e_request_latency", "request_queue_time", "request_prefill_time")
LATENCIES += ("request_decode_time", "request_inference_time", "request_time_per_output_token")


def scrape(server: Server) -> dict[str, float]:
    """Samples by name and labels, as Prometheus reads them."""
    response = httpx.get(f"{server.url}/metrics")
    assert response.status_code == 200 and response.headers["content-type"].startswith("text/plain; version=0.0.4")
    samples = {}
    for family in text_string_to_metric_families(response.text):
        assert family.documentation
        for sample in family.samples:
            assert sample.name.startswith("porcelet:")
            labels = ",".join(f"{key}={value}" for key, value in sorted(sample.labels.items()))
            samples[f"{sample.name.removeprefix('porcelet:')}{{{labels}}}"] = sample.value
    return samples


def grown(server: Server, **changes: object) -> dict[str, float]:
    """What one request adds."""
    before = scrape(server)
    httpx.post(f"{server.url}/v1/chat/completions", json=ASK | changes, timeout=20)
    return {name: value - before.get(name, 0.0) for name, value in scrape(server).items()}


def test_one_request_is_counted_once(server: Server) -> None:
    """Tokens, latencies and the reason for the end, each for the model that answered."""
    more = grown(server)
    assert more["generation_tokens_total{model_name=tiny}"] == 20
    assert more["prompt_tokens_total{model_name=tiny}"] > 8
    assert more["request_success_total{finished_reason=length,model_name=tiny}"] == 1
    assert more["inter_token_latency_seconds_count{model_name=tiny}"] == 19
    for name in LATENCIES:
        assert more[f"{name}_seconds_count{{model_name=tiny}}"] == 1, name
    whole, parts = (
        sum(more[f"{name}_seconds_sum{{model_name=tiny}}"] for name in names)
        for names in (LATENCIES[1:2], ("request_queue_time", "request_prefill_time", "request_decode_time"))
    )
    assert whole > 0 and abs(whole - parts) < 1e-6


def test_http_requests_are_counted(server: Server) -> None:
    """By method, route and status, when their answers have been sent."""
    name, deadline = "http_requests_total{method=GET,route=/v1/models,status=200}", time.monotonic() + 10
    before = scrape(server).get(name, 0)
    for _ in range(3):
        httpx.get(f"{server.url}/v1/models")
    while scrape(server).get(name, 0) != before + 3:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_engines_own_numbers(server: Server) -> None:
    """Gauges are at rest when nothing runs; a prompt that comes again is a hit."""
    long = [{"role": "user", "content": "a long prompt " * 40}]
    grown(server, messages=long, max_tokens=1)
    more = grown(server, messages=long, max_tokens=1)
    assert more["prefix_cache_hits_total{model_name=tiny}"] >= 512
    assert more["prefix_cache_queries_total{model_name=tiny}"] >= more["prefix_cache_hits_total{model_name=tiny}"]
    now = scrape(server)
    for gauge in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "requests_in_flight"):
        assert now[f"{gauge}{{model_name=tiny}}"] == 0, gauge
    assert now["engine_up{model_name=tiny}"] == 1
    for counter in ("num_preemptions", "engine_restarts", "spec_decode_num_draft_tokens"):
        assert now[f"{counter}_total{{model_name=tiny}}"] >= 0


def test_labels_have_few_values(server: Server) -> None:
    """Neither a path nor a method that a stranger makes up becomes a label of its own."""
    for path in ("/a", "/b", "/static/nothing.js", "/static/none.js"):
        httpx.request("BREW", server.url + path)
    time.sleep(0.1)  # the last one is counted when it has been sent
    labels = [name for name in scrape(server) if name.startswith("http_requests_total{method=(other)")]
    assert {name.partition("route=")[2].partition(",")[0] for name in labels} == {"(none)", "/static"}
