"""The whole of `porcelet.doctor`; tests/doctor has each finding with the fault it is there for."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from porcelet import doctor
from porcelet.doctor import Finding
from porcelet.doctor.environment import VARIABLES


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store of our own, empty, and no variable that changes how porcelet computes."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PORCELET_HOME", str(tmp_path / "store"))
    return tmp_path / "store"


def by_code() -> dict[str, Finding]:
    return {finding.code: finding for finding in doctor.examine()}


def test_every_state_but_ok_says_what_to_do(home: Path) -> None:
    """All is looked at once, the default model is missed, and what is no problem needs no exit code."""
    found = by_code()
    assert {"torch", "native_library", "openmp", "threads", "store", "disk", "environment", "port"} <= set(found)
    assert found["default_model"].remedy == "run `porcelet pull`" and not home.exists()
    assert all(finding.remedy for finding in found.values() if finding.state != "ok"), found
    assert found["network"].cause.startswith("not asked for")


def test_a_native_library_that_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is a problem, and the findings that do not need the library are there nevertheless."""
    monkeypatch.delattr("porcelet.kernels.cpu")
    monkeypatch.setitem(sys.modules, "porcelet.kernels.cpu", None)
    found = by_code()
    assert found["native_library"].state == "problem" and "does not load" in found["native_library"].cause
    assert "threads" in found and "instruction_set" not in found


def test_every_code_is_in_the_docs() -> None:
    """docs/doctor.md has a line for each code that a finding of ours can have, and no other."""
    root = Path(__file__).parent.parent
    sources = [*(root / "porcelet/doctor").glob("*.py"), root / "porcelet/cli/doctor.py"]
    form = r'(?:Finding|told)\(\s*"(\w+)"|^\s*code(?:, whole)? = "(\w+)"|^CODE = "(\w+)"'
    codes = {"".join(match) for source in sources for match in re.findall(form, source.read_text(), re.M | re.I)}
    assert codes == set(re.findall(r"^\| `(\w+)` \|", (root / "docs/doctor.md").read_text(), re.M))
