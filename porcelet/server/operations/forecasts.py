"""Forecast beside reality: memory as it was planned before a model loaded, and the time of steps by the machine's
profile (`porcelet bench`).

A machine that was not measured, or under other conditions, gives no forecast of time; why is told once.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from porcelet.engine.messages import Ready
from porcelet.errors import InputError
from porcelet.memory.process import resident_bytes
from porcelet.metrics import Reading
from porcelet.plan.engine_time import FORMATS, EngineTime
from porcelet.plan.machine import Machine, check_current, load, processor

log = logging.getLogger(__name__)
COUNTED = ("num_decode_steps", "num_decode_tokens", "num_decode_cached")

Stats = Mapping[str, int | float]


@dataclass
class _Model:
    """What one model's steps should have taken so far, and what of them has been counted."""

    time: EngineTime | None
    seconds: float = 0.0
    counted: tuple[float, ...] = field(default=(0.0,) * len(COUNTED))

    def count(self, stats: Stats) -> None:
        """Steps since the last call, as many of their mean size; an engine that was started again counts from zero."""
        now = tuple(stats.get(name, 0) for name in COUNTED)
        before = self.counted if now[0] >= self.counted[0] else (0.0,) * len(COUNTED)
        steps, tokens, cached = (new - old for new, old in zip(now, before, strict=True))
        self.counted = now
        if self.time and steps:
            self.seconds += steps * sum(part.seconds for part in self.time.decode(tokens / steps, cached / tokens))


class Forecasts:
    """Of all models of a server; use it from one thread."""

    def __init__(self) -> None:
        self._models: dict[str, _Model] = {}

    def readings(self, name: str, facts: Ready, stats: Stats, pid: int) -> Iterator[Reading]:
        """A loaded model's, whose engine is the process `pid`."""
        labels = {"model_name": name}
        if name not in self._models:
            self._models[name] = _Model(_time_of(name, facts))
        yield Reading("engine_memory_bytes", "Resident memory of the engine.", labels, resident_bytes(pid))
        most = resident_bytes(pid, peak=True)
        yield Reading("engine_memory_peak_bytes", "The most it had so far.", labels, most)
        if facts.predicted_bytes:
            text = "The most it will take, as forecast before it loaded: cache full, steps as large as they may be."
            yield Reading("engine_memory_forecast_bytes", text, labels, facts.predicted_bytes)
        model = self._models[name]
        model.count(stats)
        if model.time:
            text = "Seconds that the steps of decode_seconds_total should have taken by the machine's profile."
            yield Reading("decode_forecast_seconds_total", text, labels, model.seconds)


def _time_of(name: str, facts: Ready) -> EngineTime | None:
    """None where the machine's profile does not hold, as on a GPU."""
    if facts.device != "cpu":
        return None
    try:
        profile = load()
        if profile is None:
            return None
        check_current(profile, Machine(processor(), facts.threads, facts.instructions, facts.torch, "", {}))
    except InputError as problem:
        log.info("no forecast of %s's speed: %s", name, problem)
        return None
    return EngineTime(facts.model, facts.weights, profile) if facts.weights in FORMATS else None
