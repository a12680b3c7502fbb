"""Variables, clock and encoding: each finding with the fault it is there for."""

from __future__ import annotations

import io
import os
import sys
import time
from pathlib import Path

import pytest

from porcelet.doctor import environment


def test_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is set is shown; a misspelt name gets the near one; a value that cannot be used is a problem."""
    assert "PORCELET_HOME=" in environment.environment().cause
    monkeypatch.setenv("PORCELET_ACTIVATIONS", "4")
    assert environment.environment().state == "problem"
    monkeypatch.setenv("PORCELET_ISAS", "avx2")
    found = environment.environment()
    assert found.state == "note" and "PORCELET_ISAS" in found.cause and "PORCELET_ISA?" in found.remedy


def test_a_clock_that_is_behind(tmp_path: Path) -> None:
    """A file that was written tomorrow says so; one of a minute ahead does not."""
    file = tmp_path / "file"
    file.touch()
    assert environment.clock([file]).state == "ok" and environment.clock().state == "ok"
    written = time.time() + 24 * 3600
    os.utime(file, (written, written))
    found = environment.clock([file])
    assert found.state == "problem" and "24 h later" in found.cause and "timedatectl" in found.remedy


def test_an_encoding_that_lacks_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Standard output in Latin-1 is a note with the variable that changes it."""
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="UTF-8"))
    assert environment.encoding().state == "ok"
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="latin-1"))
    assert environment.encoding().state == "note" and "PYTHONUTF8=1" in environment.encoding().remedy
