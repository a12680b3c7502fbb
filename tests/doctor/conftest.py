"""An empty store of our own, and no variable that changes how porcelet computes."""

from __future__ import annotations

from pathlib import Path

import pytest

from porcelet import hub
from porcelet.doctor.environment import VARIABLES
from tests.tiny_model import save_tiny_model


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The store's folder, which is not there yet."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PORCELET_HOME", str(tmp_path / "store"))
    return tmp_path / "store"


@pytest.fixture
def tiny(home: Path, tmp_path: Path) -> Path:
    """A small model in the store: its folder there."""
    save_tiny_model(tmp_path / "tiny")
    return hub.pull(str(tmp_path / "tiny"), lambda done, total: None)
