"""Counters and histograms under the names that dashboards know, as Prometheus text. Server and trainer use the same.

A number that is counted elsewhere (an engine's statistics, say) is not counted again here: a `Readings` function tells
it at the moment somebody asks. There is no registry of the process's: two servers in one process do not meet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.registry import Collector

PREFIX = "porcelet:"
CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4

# Seconds. A first token may wait for a queue and a long prompt on a slow processor; the gap between two may be a
# millisecond.
TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2.5, 5, 10)
FIRST_TOKEN_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 600)
REQUEST_BUCKETS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500, 1000, 2500)


@dataclass(frozen=True)
class Reading:
    """One number of this moment. `name` without prefix; one that ends in "_total" is a counter, others are gauges."""

    name: str
    text: str
    labels: Mapping[str, str]
    value: float


Readings = Callable[[], Iterable[Reading]]


class Metrics:
    """A set of metrics and its text."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry(auto_describe=False)

    def counter(self, name: str, text: str, labels: Sequence[str]) -> Counter:
        return Counter(PREFIX + name, text, labels, registry=self._registry)

    def histogram(self, name: str, text: str, labels: Sequence[str], buckets: Sequence[float]) -> Histogram:
        return Histogram(PREFIX + name, text, labels, buckets=buckets, registry=self._registry)

    def read(self, readings: Readings) -> None:
        """Ask `readings` whenever the text is written."""
        self._registry.register(_Reader(readings))

    def text(self) -> bytes:
        """All of it in Prometheus's text format 0.0.4."""
        return generate_latest(self._registry)


class _Reader(Collector):
    def __init__(self, readings: Readings) -> None:
        self._readings = readings

    def collect(self) -> Iterator[Metric]:
        families: dict[str, CounterMetricFamily | GaugeMetricFamily] = {}
        for reading in self._readings():
            family = families.get(reading.name)
            if family is None:
                kind = CounterMetricFamily if reading.name.endswith("_total") else GaugeMetricFamily
                family = families[reading.name] = kind(PREFIX + reading.name, reading.text, labels=[*reading.labels])
            family.add_metric([*reading.labels.values()], reading.value)
        yield from families.values()
