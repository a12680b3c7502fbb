"""`porcelet keys` as an administrator meets it: real processes over a database of their own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from porcelet.errors import CapacityError, InputError
from porcelet.server.gate import usage
from porcelet.server.gate.usage import Amounts
from porcelet.server.store import Database

SECRET = re.compile(r"sk-porcelet-([0-9a-z]{10})-[A-Za-z0-9_-]{43}")


def keys(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "porcelet", "keys", *arguments]
    environment = os.environ | {"PORCELET_HOME": str(home)}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=60)


def test_a_life_of_a_key(tmp_path: Path) -> None:
    """Made, it is alone on standard output; listed with its limits, expiry and usage, never again itself; revoked, it
    says so."""
    limits = ["--model", "a", "-m", "b", "--requests-per-minute", "7", "--token-budget", "1000"]
    made = keys(tmp_path, "create", "ada", "--expires", "90d", *limits)
    found = SECRET.fullmatch(made.stdout.strip())
    assert made.returncode == 0 and found
    assert SECRET.search(made.stderr) is None and "once" in made.stderr
    database = Database.open(f"sqlite:///{tmp_path / 'porcelet.db'}")
    database.run_now(
        lambda connection: usage.add(connection, "2026-02-01", found[1], "a", Amounts(2, 0, 30, 10, 40, 5))
    )
    database.run_now(lambda connection: usage.add(connection, "2026-02-01", "", "a", Amounts(1)))
    database.close()

    listed = keys(tmp_path, "list", "--json", "--usage")
    told = json.loads(listed.stdout)
    (key,) = told["keys"]
    assert (key["id"], key["name"], key["revoked"]) == (found[1], "ada", None)
    assert 89.9 < (key["expires"] - time.time()) / 86400 <= 90
    assert key["limits"]["models"] == ["a", "b"] and key["limits"]["requests_per_minute"] == 7
    assert key["usage"][0] | {"date": "2026-02-01", "generated_tokens": 40, "prompt_tokens": 30} == key["usage"][0]
    assert told["without_key"][0]["requests"] == 1
    plain = keys(tmp_path, "list", "--usage").stdout
    assert f"{found[1]}  ada  valid until" in plain and "token_budget=1000" in plain and "generated_tokens=40" in plain
    for output in (listed.stdout, listed.stderr, plain):
        assert made.stdout.strip()[-43:] not in output and "hash" not in output

    assert "is revoked" in keys(tmp_path, "revoke", "ada").stdout
    assert "revoked already" in keys(tmp_path, "revoke", found[1]).stdout
    assert "  ada  revoked " in keys(tmp_path, "list").stdout


def test_a_second_key_of_a_name_is_announced(tmp_path: Path) -> None:
    """It shares history with the first: whoever makes it by mistake is told."""
    keys(tmp_path, "create", "ada")
    second = keys(tmp_path, "create", "ada")
    assert second.returncode == 0 and "share its history" in second.stderr


def test_the_configs_database_is_used(tmp_path: Path) -> None:
    """With the server's TOML file the keys are those of the server's own database."""
    file = tmp_path / "serve.toml"
    file.write_text(f'[server]\ndatabase = "sqlite:///{tmp_path / "own.db"}"\n[models.m]\nsource = "default"\n')
    keys(tmp_path, "create", "ada", "--config", str(file))
    assert (tmp_path / "own.db").exists() and not (tmp_path / "porcelet.db").exists()
    assert "ada" in keys(tmp_path, "list", "--config", str(file)).stdout


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["create", ""], InputError.exit_code, "name is ''"),
        (["create", "ada", "--expires", "soon"], InputError.exit_code, "90d"),
        (["create", "ada", "--expires", "0d"], InputError.exit_code, "90d"),
        (["create", "ada", "--concurrency", "99999999999999999999"], InputError.exit_code, "concurrency is"),
        (["revoke", "nobody"], InputError.exit_code, "porcelet keys list"),
        (["list", "--config", "/nowhere.toml"], InputError.exit_code, "/nowhere.toml"),
    ],
)
def test_mistakes_get_one_line(tmp_path: Path, arguments: list[str], code: int, message: str) -> None:
    """What cannot be used is named, and nothing is stored."""
    done = keys(tmp_path, *arguments)
    assert done.returncode == code and done.stdout == ""
    assert message in done.stderr and done.stderr.count("\n") == 1
    assert keys(tmp_path, "list").stdout == ""


def test_a_database_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    """A home that is no folder ends in one line."""
    (tmp_path / "file").write_text("")
    done = keys(tmp_path / "file", "list")
    assert done.returncode == CapacityError.exit_code and done.stderr.count("\n") == 1
