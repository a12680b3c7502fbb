"""Whether models fit into memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from porcelet import hub
from porcelet.doctor import models
from porcelet.weights import memory


def test_memory_of_the_models(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model fits; it fits with other settings, which are named; it does not fit at all."""
    monkeypatch.setattr(hub, "DEFAULT_MODEL", "tiny")
    fits = next(finding for finding in models.model_memory() if "tiny" in finding.cause)
    assert fits.state == "ok" and "runtime" in fits.cause
    monkeypatch.setattr(memory, "available_memory", lambda: 256_500_000)
    scarce = next(finding for finding in models.model_memory() if "tiny" in finding.cause)
    assert scarce.state == "problem" and "cache_tokens=8192" in scarce.remedy
    monkeypatch.setattr(memory, "available_memory", lambda: 1000)
    scarce = next(finding for finding in models.model_memory() if "tiny" in finding.cause)
    assert scarce.state == "problem" and "free some memory" in scarce.remedy
    weights = tiny / "model.safetensors"
    weights.write_bytes(b"\xff" * weights.stat().st_size)
    assert "problem" in [finding.state for finding in models.model_memory() if finding.code == "model"]
