"""What dashboards ask for: a `Watch` that measures every generation, and what the engines count themselves.

The names are those of vLLM's metrics with our prefix, so a dashboard for one reads the other; each has the label
`model_name`. Prefix queries and hits are counted in tokens. A sample's tokens that arrive together share their gap.
Nothing of a request is a label but its model: not its caller, whose number has no bound.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from time import monotonic

from prometheus_client import Counter, Histogram

from porcelet.metrics import FIRST_TOKEN_BUCKETS, REQUEST_BUCKETS, TOKEN_BUCKETS, Metrics, Reading
from porcelet.server.generation.models import Model, Models
from porcelet.server.generation.watch import Job
from porcelet.server.operations.forecasts import Forecasts
from porcelet.types import Output

LABELS = ("model_name",)


@dataclass
class _Running:
    """What is remembered of a job: times of its last outputs and tokens so far, a sample each."""

    queue_seconds: float = 0.0
    first: float | None = None
    last: dict[int, float] = field(default_factory=dict)
    num_generated: dict[int, int] = field(default_factory=dict)


class Meters:
    """Measures the jobs; use it from one event loop."""

    def __init__(self, metrics: Metrics) -> None:
        self._running: dict[str, _Running] = {}
        self._of_model: dict[str, _ModelMeters] = {}
        self._families = _Families(metrics)
        self._http = metrics.counter("http_requests_total", "HTTP requests.", ("method", "route", "status"))

    def admit(self, job: Job) -> None:
        self._running[job.id] = _Running()
        if job.model not in self._of_model:
            self._of_model[job.model] = _ModelMeters(self._families, job.model)

    def progressed(self, job: Job, output: Output) -> None:
        now, running, meters = monotonic(), self._running[job.id], self._of_model[job.model]
        index = output.index
        num_new = output.num_generated - running.num_generated.get(index, 0)
        running.num_generated[index] = output.num_generated
        if running.first is None:
            running.first, running.queue_seconds = now, output.queue_seconds
            meters.prompt_tokens.inc(job.num_prompt_tokens)
            meters.first_token.observe(now - job.created)
        elif index in running.last and num_new:
            gap = (now - running.last[index]) / num_new
            for _ in range(num_new):
                meters.gap.observe(gap)
        running.last[index] = now
        meters.generation_tokens.inc(num_new)
        if output.finish_reason:
            meters.finished(output.finish_reason)

    def ended(self, job: Job, reason: str) -> None:
        running, meters = self._running.pop(job.id), self._of_model[job.model]
        if reason in ("abort", "error"):
            meters.finished(reason)
        if running.first is None or reason != "done":
            return
        now = monotonic()
        seconds, decoding = now - job.created, now - running.first
        meters.whole.observe(seconds)
        meters.queue.observe(running.queue_seconds)
        meters.inference.observe(max(seconds - running.queue_seconds, 0.0))
        meters.prefill.observe(max(running.first - job.created - running.queue_seconds, 0.0))
        meters.decode.observe(decoding)
        num_later = max(job.num_generated) - 1
        if num_later > 0:
            meters.per_token.observe(decoding / num_later)

    def answered(self, method: str, route: str, status: int) -> None:
        """An HTTP request is over. `route` is the pattern of its path, never the path itself."""
        self._http.labels(method, route, str(status)).inc()


class _Families:
    """The metrics that have a value for each model."""

    def __init__(self, metrics: Metrics) -> None:
        def seconds(name: str, text: str, buckets: tuple[float, ...] = REQUEST_BUCKETS) -> Histogram:
            return metrics.histogram(name + "_seconds", text, LABELS, buckets)

        self.first_token = seconds(
            "time_to_first_token", "From a request's admission to its first token.", FIRST_TOKEN_BUCKETS
        )
        self.gap = seconds("inter_token_latency", "Between two tokens of an answer.", TOKEN_BUCKETS)
        self.per_token = seconds("request_time_per_output_token", "A request's mean after the first.", TOKEN_BUCKETS)
        self.whole = seconds("e2e_request_latency", "From a request's admission to its end.")
        self.queue = seconds("request_queue_time", "In the engine's queue.")
        self.prefill = seconds("request_prefill_time", "From leaving the queue to the first token.")
        self.decode = seconds("request_decode_time", "From the first token to the last.")
        self.inference = seconds("request_inference_time", "From leaving the queue to the last token.")
        self.prompt_tokens = metrics.counter("prompt_tokens_total", "Tokens of prompts, cached ones included.", LABELS)
        self.generation_tokens = metrics.counter("generation_tokens_total", "Tokens drawn.", LABELS)
        self.success = metrics.counter(
            "request_success_total", "Samples that ended, by what ended them.", (*LABELS, "finished_reason")
        )


class _ModelMeters:
    """One model's: each is looked up once, and not for every token."""

    def __init__(self, families: _Families, model: str) -> None:
        def of(family: Histogram) -> Histogram:
            return family.labels(model)

        self.first_token, self.gap, self.per_token = of(families.first_token), of(families.gap), of(families.per_token)
        self.whole, self.queue, self.prefill = of(families.whole), of(families.queue), of(families.prefill)
        self.decode, self.inference = of(families.decode), of(families.inference)
        self.prompt_tokens = families.prompt_tokens.labels(model)
        self.generation_tokens = families.generation_tokens.labels(model)
        self._success: dict[str, Counter] = {}
        self._family, self._model = families.success, model

    def finished(self, reason: str) -> None:
        if reason not in self._success:
            self._success[reason] = self._family.labels(self._model, reason)
        self._success[reason].inc()


# ---- what the engines count -----------------------------------------------------------------------------------------

# Our name in an engine's statistics, theirs, and what it is.
ENGINE = (
    ("num_running", "num_requests_running", "Sequences that take part in the steps."),
    ("num_waiting", "num_requests_waiting", "Sequences in the engine's queue."),
    ("num_preempted", "num_preemptions_total", "Sequences that gave their pages back and waited again."),
    ("num_prompt_tokens", "prefix_cache_queries_total", "Tokens of prompts that were looked up."),
    ("num_hit_tokens", "prefix_cache_hits_total", "Tokens of prompts that were found."),
    ("num_drafts", "spec_decode_num_drafts_total", "Drafts of guessed tokens."),
    ("num_drafted", "spec_decode_num_draft_tokens_total", "Tokens guessed."),
    ("num_accepted", "spec_decode_num_accepted_tokens_total", "Tokens guessed right."),
    ("num_decode_steps", "decode_steps_total", "Steps that gave each sequence one token and did nothing else."),
    ("num_decode_tokens", "decode_tokens_total", "Tokens of these steps."),
    ("decode_seconds", "decode_seconds_total", "Seconds that these steps took."),
    ("num_expert_hits", "expert_hits_total", "Chosen experts of those on disk that were in memory."),
    ("num_expert_misses", "expert_misses_total", "Chosen experts that were not."),
    ("num_expert_prefetches", "expert_prefetches_total", "Experts read ahead of their choice."),
    ("num_expert_bytes_read", "expert_read_bytes_total", "Bytes of experts read from disk."),
    ("num_expert_bytes_resident", "expert_resident_bytes", "Bytes of the experts on disk that are in memory."),
)
AT = "num_accepted_at_"


def engine_readings(models: Models, forecasts: Forecasts) -> Iterator[Reading]:
    """Every engine's statistics after its last step, and forecasts beside them; none of one that is down or still
    loading."""
    for name, model in models.all.items():
        labels, stats = {"model_name": name}, model.engine.stats
        for key, metric, text in ENGINE:
            if key in stats:
                yield Reading(metric, text, labels, stats[key])
        if stats:
            used = 1 - stats["num_free_pages"] / stats["num_pages"]
            yield Reading("kv_cache_usage_perc", "Share of the cache's pages in use; 1 is all.", labels, used)
        for key in (key for key in stats if key.startswith(AT)):
            at = labels | {"position": key.removeprefix(AT)}
            text = "Tokens guessed right, by their place in the draft."
            yield Reading("spec_decode_num_accepted_tokens_per_pos_total", text, at, stats[key])
        if model.loaded:
            yield from forecasts.readings(name, model.loaded.facts, stats, model.engine.pid)
        yield from _server_readings(labels, model)


def _server_readings(labels: dict[str, str], model: Model) -> Iterator[Reading]:
    for reason, count in model.queue.num_rejected.items():
        text = "Requests refused because too many were under way, or given up before their first token."
        yield Reading("admission_rejections_total", text, labels | {"reason": reason}, count)
    yield Reading("requests_in_flight", "Requests admitted and not ended.", labels, model.queue.num_running)
    yield Reading("engine_up", "1 while the engine serves.", labels, model.loaded is not None and model.engine.alive)
    yield Reading("engine_restarts_total", "Engine processes started again.", labels, model.engine.num_restarts)
