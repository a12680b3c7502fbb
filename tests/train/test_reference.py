from __future__ import annotations

import resource
from pathlib import Path

import pytest

from porcelet.errors import CapacityError
from porcelet.train.reference import Reference
from tests.train.tiny_run import model


def test_reference_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    """A file in the place of its folder, or a full disk: one line with the place, and no half file under its name."""
    (tmp_path / "reference").write_text("mine", encoding="utf-8")
    with pytest.raises(CapacityError, match=r"step-0.safetensors cannot be written: File exists"):
        Reference(model(), tmp_path, 0).at(0)
    (tmp_path / "reference").unlink()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        with pytest.raises(CapacityError, match=r"step-0.safetensors cannot be written: .*File too large"):
            Reference(model(), tmp_path, 0).at(0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (tmp_path / "reference" / "step-0.safetensors").exists()
