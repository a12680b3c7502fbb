"""What other packages can lack: each finding with the fault it is there for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from porcelet.doctor import libraries


def wants(monkeypatch: pytest.MonkeyPatch, *requirements: str) -> None:
    """Let porcelet ask for these."""
    monkeypatch.setattr(libraries, "requires", lambda package: list(requirements))


def test_what_is_asked_for_is_there() -> None:
    """In a whole installation all is well, of extras at least those that the tests need."""
    assert libraries.dependencies().state == "ok"
    assert [finding.state for finding in libraries.extras()] == ["ok"]


def test_a_package_that_is_missing_or_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is named with its reason, and one command gets them all; markers of other systems do not count."""
    elsewhere = "pywin32; sys_platform == 'win32'"
    wants(monkeypatch, "no-such-package>=2", "numpy>=1000", "safetensors", elsewhere, "pytest; extra == 'dev'")
    found = libraries.dependencies()
    assert found.state == "problem" and "no-such-package is not installed" in found.cause
    assert "not numpy>=1000" in found.cause and "safetensors" not in found.cause
    assert found.remedy == "pip install 'no-such-package>=2' 'numpy>=1000'"


def test_an_extra_that_is_there_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of a set is a note; none of it is what nobody asked for."""
    wants(monkeypatch, "numpy; extra == 'train'", "no-such-package; extra == 'train'", "nor-this; extra == 'eval'")
    [found] = libraries.extras()
    assert found.state == "note" and "'train'" in found.cause and "no-such-package would" in found.cause
    assert found.remedy == "pip install 'porcelet[train]'"


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("raise ImportError('libfoo.so.1: cannot open shared object file')", "ImportError: libfoo.so.1: cannot open"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGILL)", "SIGILL: built for another processor"),
    ],
)
def test_native_code_that_does_not_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, said: str) -> None:
    """A library that is lacking, and an instruction that the processor does not know: the package is named."""
    assert libraries.native_parts().state == "ok"
    (tmp_path / "tokenizers.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = libraries.native_parts()
    assert found.state == "problem" and f"tokenizers does not load: {said}" in found.cause
    assert found.remedy.endswith(" tokenizers")


@pytest.mark.parametrize("broken", ["torch", "httpx2"])
def test_what_cannot_be_imported_is_a_finding(tmp_path: Path, broken: str) -> None:
    """A dependency that fails to load ends the examination with a finding, not with a traceback."""
    (tmp_path / f"{broken}.py").write_text(f"raise ImportError('{broken} is broken')")
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "PORCELET_HOME": str(tmp_path / "store")}
    command = [sys.executable, "-m", "porcelet", "doctor"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "problem  imports " in done.stdout and f"{broken} is broken" in done.stdout
