"""Forecast beside reality: of a real server's memory and steps, and by the profile of a machine."""

from __future__ import annotations

import dataclasses
import logging
import os
from pathlib import Path

import httpx
import msgspec
import pytest

from porcelet.engine.messages import Ready
from porcelet.plan.engine_time import EngineTime
from porcelet.plan.machine import processor, save
from porcelet.server.operations.forecasts import Forecasts
from tests.models.variants import LLAMA
from tests.plan.test_engine_time import MACHINE
from tests.server.conftest import Server
from tests.server.operations.test_metrics import ASK, scrape

HERE = dataclasses.replace(MACHINE, processor=processor())
FACTS = Ready(LLAMA, "int8", 100, 10**9, threads=2, instructions="avx2", torch="2.13")


def test_a_servers_memory_beside_its_forecast(server: Server) -> None:
    """What the engine takes, what it took at most, and what was foretold; a tiny model is all runtime."""
    now = {name: value for name, value in scrape(server).items() if name.startswith("engine_memory")}
    resident, most, forecast = (
        now[f"engine_memory{kind}_bytes{{model_name=tiny}}"] for kind in ("", "_peak", "_forecast")
    )
    assert 100e6 < resident <= most < 1.15 * forecast
    assert forecast < 400e6


def test_steps_that_only_decode_are_timed(server: Server) -> None:
    """Each gives one token to each sequence; without the machine's profile there is no forecast of their time."""
    before = scrape(server)
    httpx.post(f"{server.url}/v1/chat/completions", json=ASK, timeout=20)
    after = scrape(server)
    steps, tokens, seconds = (
        after[f"decode_{what}_total{{model_name=tiny}}"] - before.get(f"decode_{what}_total{{model_name=tiny}}", 0)
        for what in ("steps", "tokens", "seconds")
    )
    assert 5 <= steps <= tokens < 20 and 0 < seconds < 20
    assert not any(name.startswith("decode_forecast") for name in after)


def _readings(forecasts: Forecasts, steps: int, tokens: int, cached: int) -> dict[str, float]:
    stats = {"num_decode_steps": steps, "num_decode_tokens": tokens, "num_decode_cached": cached}
    return {reading.name: reading.value for reading in forecasts.readings("m", FACTS, stats, os.getpid())}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own for the machine's profile."""
    monkeypatch.setenv("PORCELET_HOME", str(tmp_path))
    return tmp_path


def test_the_forecast_follows_the_steps(home: Path) -> None:
    """By their mean size since the last look; an engine that starts again counts from zero, the forecast goes on."""
    assert save(HERE).parent == home
    forecasts, expected = Forecasts(), EngineTime(LLAMA, "int8", HERE)
    first = 10 / expected.decode_rate(1, 50)
    assert _readings(forecasts, 10, 10, 500)["decode_forecast_seconds_total"] == pytest.approx(first)
    assert _readings(forecasts, 10, 10, 500)["decode_forecast_seconds_total"] == pytest.approx(first)
    second = first + 5 * 4 / expected.decode_rate(4, 100)
    assert _readings(forecasts, 15, 30, 2500)["decode_forecast_seconds_total"] == pytest.approx(second)
    again = second + 2 / expected.decode_rate(1, 20)
    found = _readings(forecasts, 2, 2, 40)
    assert found["decode_forecast_seconds_total"] == pytest.approx(again)
    assert found["engine_memory_forecast_bytes"] == 10**9
    assert 0 < found["engine_memory_bytes"] <= found["engine_memory_peak_bytes"]


def test_a_profile_of_other_conditions_gives_none(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Why is told once."""
    assert save(dataclasses.replace(HERE, threads=16)).parent == home
    forecasts = Forecasts()
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            assert "decode_forecast_seconds_total" not in _readings(forecasts, 10, 10, 500)
    assert caplog.text.count("no forecast of m's speed: the machine was measured with threads 16") == 1


def test_a_gpu_is_not_forecast(home: Path) -> None:
    """Neither its steps, which the processor's profile says nothing of, nor its memory, of which nothing was said."""
    assert save(HERE).parent == home
    facts = msgspec.structs.replace(FACTS, device="cuda", predicted_bytes=0)
    names = {reading.name for reading in Forecasts().readings("m", facts, {"num_decode_steps": 3}, os.getpid())}
    assert names == {"engine_memory_bytes", "engine_memory_peak_bytes"}
