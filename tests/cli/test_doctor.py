"""`porcelet doctor` as a user meets it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.tiny_model import save_tiny_model


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PORCELET_")}
    return kept | {"PORCELET_HOME": str(tmp_path / "store"), "OMP_NUM_THREADS": "1"}


def porcelet(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "porcelet", "doctor", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=60)


def test_findings_for_people_and_for_programs(environment: dict[str, str]) -> None:
    """A line a finding and a count; --json has the same findings and nothing else."""
    shown, found = porcelet(environment), porcelet(environment, "--json")
    findings = json.loads(found.stdout)
    assert shown.returncode == found.returncode == 0, shown.stdout + found.stdout
    assert all(set(finding) == {"code", "state", "cause", "remedy"} for finding in findings)
    assert {"native_library", "threads", "sandbox"} <= {finding["code"] for finding in findings}
    assert all(f"{finding['state']:<8} {finding['code']:<16} " in shown.stdout for finding in findings)
    assert shown.stdout.splitlines()[-1].startswith("0 problems, ")


def test_a_problem_is_in_the_exit_code(environment: dict[str, str], tmp_path: Path) -> None:
    """A store that cannot be written ends with 1, the finding and its remedy on standard output."""
    (tmp_path / "store").touch()
    done = porcelet(environment)
    assert done.returncode == 1 and done.stderr == "", done.stderr
    assert "problem  store " in done.stdout and "→ set PORCELET_HOME" in done.stdout
    assert porcelet(environment, "--json").returncode == 1


def test_an_output_that_lacks_characters(environment: dict[str, str]) -> None:
    """Where the terminal's encoding has no arrow, the findings come with another sign, one of them about that."""
    done = porcelet(environment | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"})
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert "note     encoding " in done.stdout and " ? " in done.stdout


def test_a_changed_byte_is_found_on_demand(environment: dict[str, str], tmp_path: Path) -> None:
    """--deep reads what only sizes were compared of, the database of --config included."""
    save_tiny_model(tmp_path / "tiny")
    pull = [sys.executable, "-m", "porcelet", "pull", str(tmp_path / "tiny")]
    subprocess.run(pull, check=True, capture_output=True, env=environment, timeout=60)
    weights = tmp_path / "store" / "models" / "tiny" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\xff")
    (tmp_path / "other.db").write_bytes(b"no database" * 1000)
    database = f'[models.tiny]\nsource = "tiny"\n[server]\ndatabase = "sqlite:///{tmp_path}/other.db"\n'
    (tmp_path / "serve.toml").write_text(database)
    assert porcelet(environment).returncode == 0
    done = porcelet(environment, "--deep", "--config", str(tmp_path / "serve.toml"))
    assert done.returncode == 1 and "problem  store_integrity " in done.stdout, done.stdout
    assert f"problem  database         {tmp_path}/other.db is damaged" in done.stdout


def test_a_bundle_for_support(environment: dict[str, str], tmp_path: Path) -> None:
    """It says what is in the file, beside the findings or, with --json, on standard error; it replaces nothing."""
    (tmp_path / "serve.log").write_text("GET /v1/models 200 in 0.1 s\nsomebody's words\n")
    arguments = ("--bundle", str(tmp_path / "a.zip"), "--log", str(tmp_path / "serve.log"))
    done = porcelet(environment, *arguments)
    assert done.returncode == 0 and "1 lines of the log" in done.stdout, done.stdout + done.stderr
    with zipfile.ZipFile(tmp_path / "a.zip") as bundle:
        assert all(f"  {name:<18} " in done.stdout for name in bundle.namelist())
        assert {"findings.json", "versions.json", "server.log", "redactions.json"} <= set(bundle.namelist())
        assert bundle.read("server.log") == b"GET /v1/models 200 in 0.1 s\n"
    again = porcelet(environment, *arguments)
    assert again.returncode == 2 and "is there already" in again.stderr and not again.stdout
    programs = porcelet(environment, "--json", "--bundle", str(tmp_path / "b.zip"))
    assert json.loads(programs.stdout) and "findings.json" in programs.stderr
    assert porcelet(environment, "--log", "x").returncode == 2
