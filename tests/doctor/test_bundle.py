"""The bundle for support: what is in it, what is not, and how it is written."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path

import pytest

from porcelet.doctor import Finding, bundle
from porcelet.doctor.logs import tail
from porcelet.doctor.redaction import Redactor
from porcelet.errors import CapacityError, InputError
from tests.doctor.machine import lay_out

SECRET = "Tell me about my illness"
ACCESS = "POST /v1/chat/completions 200 in 0.512 s"
LOG = f"""porcelet: model 'x' is not in the store
{ACCESS}
{SECRET}
Traceback (most recent call last):
  File "/opt/porcelet/server/app.py", line 12, in answer
    return ask("{SECRET}")
ValueError: {SECRET}
the engine is down: UnicodeDecodeError('utf-8', b'{SECRET}, and much more of what somebody wrote to it')
serving tiny on http://192.0.2.7:8000 (weights int8, context 4096)
"""
JSON_LOG = [
    {"time": "2026-01-01T00:00:00", "level": "info", "logger": "porcelet.server", "message": ACCESS, "caller": SECRET},
    {"logger": "somebody.else", "message": SECRET},
    {"logger": "porcelet.engine", "message": "failed", "exception": f'  File "a.py", line 1, in f\nKeyError: {SECRET}'},
]


def test_a_bundle_has_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Secrets in findings, variables, configuration and log are in none of its files; what was taken out is counted."""
    monkeypatch.setenv("HTTPS_PROXY", "me:hunter2$@proxy.lan:3128")
    monkeypatch.setenv("HF_TOKEN", "hf_hunter2hunter2")
    config = tmp_path / "serve.toml"
    config.write_text('[server]\ndatabase = "postgresql://me:hunter2@192.0.2.9/db"\nkeep_alive = 5.0\n')
    log = tmp_path / "serve.log"
    log.write_text(LOG)
    found = [Finding("store", "problem", "/home/hunter2/store cannot be read", "mail hunter2@example.org")]
    texts = bundle.contents(found, log, config, Redactor(user="hunter2", host="hunter2-host"))
    everything = "\n".join(texts.values())
    assert "hunter2" not in everything and "192.0.2" not in everything and SECRET not in everything
    assert "proxy.lan:3128" in texts["environment.json"] and "keep_alive" in texts["config.json"]
    assert json.loads(texts["environment.json"])["whether HF_TOKEN is set"] == "yes"
    assert json.loads(texts["findings.json"])[0]["code"] == "store"
    assert json.loads(texts["versions.json"])["torch"] and json.loads(texts["machine.json"])["cores"] >= 1
    taken = json.loads(texts["redactions.json"])
    assert {"passwords", "home folders", "network addresses", "e-mail addresses"} <= set(taken["taken_out"])
    assert taken["lines_of_the_log_left_out"] == 2


def test_what_of_a_log_is_shown(tmp_path: Path) -> None:
    """Requests, porcelet's own lines, the places and kinds of exceptions; no line that could be somebody's text."""
    (tmp_path / "plain").write_text(LOG)
    lines, left_out = tail(tmp_path / "plain")
    assert ACCESS in lines and "ValueError" in lines and lines[-1].startswith("serving tiny")
    assert SECRET not in "\n".join(lines) and left_out == 2
    (tmp_path / "json").write_text("".join(f"{json.dumps(line)}\n" for line in JSON_LOG) + "{cut")
    lines, left_out = tail(tmp_path / "json")
    first, last = map(json.loads, lines)
    assert first["message"] == ACCESS and "caller" not in first
    assert last["exception"] == '  File "a.py", line 1, in f\nKeyError' and left_out == 2


def test_only_the_end_of_a_long_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last lines, none of them cut at its beginning."""
    monkeypatch.setattr("porcelet.doctor.logs.MOST_BYTES", 1000)
    (tmp_path / "log").write_text("".join(f"GET /v1/models 200 in {number}.5 s\n" for number in range(1000)))
    lines, left_out = tail(tmp_path / "log")
    assert lines[-1] == "GET /v1/models 200 in 999.5 s" and 20 < len(lines) < 40 and not left_out


def test_it_is_written_whole_and_replaces_nothing(tmp_path: Path) -> None:
    """Only its owner may read it; a file that is there, a folder that is not, and a full disk are errors."""
    file = tmp_path / "bundle.zip"
    assert bundle.write(file, {"a.json": "{}\n", "b.log": "ü"}) == file.stat().st_size
    with zipfile.ZipFile(file) as opened:
        assert {name: opened.read(name).decode() for name in opened.namelist()} == {"a.json": "{}\n", "b.log": "ü"}
    assert file.stat().st_mode & 0o777 == 0o600 and [path.name for path in tmp_path.iterdir()] == ["bundle.zip"]
    before = file.read_bytes()
    with pytest.raises(InputError, match="is there already"):
        bundle.write(file, {"a.json": "other"})
    assert file.read_bytes() == before
    with pytest.raises(InputError, match="is no folder"):
        bundle.write(tmp_path / "missing" / "bundle.zip", {})


def test_a_disk_that_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing half written is left."""

    def full(*arguments: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(zipfile.ZipFile, "writestr", full)
    with pytest.raises(CapacityError, match="No space left"):
        bundle.write(tmp_path / "bundle.zip", {"a": "a"})
    assert not list(tmp_path.iterdir())


def test_the_machine(tmp_path: Path) -> None:
    """The first processor's fields, the flags that matter, and the memory; of another system nothing."""
    cpuinfo = "processor : 0\nmodel name : A\nflags : fpu avx2 avx512_vnni sgx\n\nprocessor : 1\nmodel name : B\n"
    told = bundle.machine(lay_out(tmp_path, {"proc/cpuinfo": cpuinfo, "proc/meminfo": "MemTotal: 5 kB\nX: 1 kB\n"}))
    assert told == {
        "processor": {"model name": "A"},
        "flags": ["avx2", "avx512_vnni"],
        "cores": 2,
        "memory": {"MemTotal": "5 kB"},
    }
    assert bundle.machine(tmp_path / "none")["cores"] == 0


@pytest.mark.parametrize("option", ["log", "config"])
def test_files_that_cannot_be_read(tmp_path: Path, option: str) -> None:
    """The option is named."""
    with pytest.raises(InputError, match=f"No such file.*--{option}"):
        bundle.contents([], **{option: tmp_path / "missing"})
    (tmp_path / "serve.toml").write_text("[")
    with pytest.raises(InputError, match="is not TOML"):
        bundle.contents([], config=tmp_path / "serve.toml")
