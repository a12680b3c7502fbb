"""A small server that is easily overwhelmed, shared by the tests that leave it as they found it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.reliability.processes import Running, start
from tests.tiny_model import save_tiny_model

MAX_WAITING = 8
KEEP_ALIVE = 0.3
QUEUE_TIMEOUT = 8.0


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def small(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Two sequences at once, eight requests under way, signs of life three times a second."""
    limits = f"max_waiting = {MAX_WAITING}\nkeep_alive = {KEEP_ALIVE}\nqueue_timeout = {QUEUE_TIMEOUT}\n"
    engine = "max_sequences = 2\nmax_batch_tokens = 64\ncache_tokens = 200000\nspeculation = 'off'"
    with start(folder, tmp_path_factory.mktemp("small"), config=limits, engine=engine) as running:
        yield running


@pytest.fixture
def at_rest(small: Running) -> Iterator[Running]:
    """The small server; nothing is under way before and after."""
    yield small
    small.wait_for(lambda: small.counts() == (0, 0) and small.metric("requests_in_flight") == 0)
    small.wait_for(lambda: small.metric("kv_cache_usage_perc") == 0)
