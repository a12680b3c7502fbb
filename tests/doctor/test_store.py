"""The store and its disk: each finding with the fault it is there for."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest

from porcelet import hub
from porcelet.doctor import disk, store
from porcelet.hub import store as hub_store
from porcelet.kernels import cpu
from porcelet.weights.load import load
from porcelet.weights.offload import Offload
from tests.doctor.machine import lay_out
from tests.weights import tiny_gguf


class Disk(NamedTuple):
    free: int


@pytest.mark.skipif(not cpu.available(), reason="no compiler, hence no native module")
def test_experts_on_disk(home: Path, tmp_path: Path) -> None:
    """A file of experts is told of with its model; without that, or damaged, with what to do."""
    assert not list(store.kept_experts())
    model = tmp_path / "moe.gguf"
    tiny_gguf.write(model, "Q4_0", architecture="deepseek2")
    load(model, "stored", offload=Offload(home / "experts", 1 << 20))
    [there] = store.kept_experts()
    assert there.state == "ok" and str(model) in there.cause
    model.unlink()
    [gone] = store.kept_experts()
    assert gone.state == "note" and "is gone or has changed" in gone.cause and gone.remedy
    [file] = (home / "experts").iterdir()
    file.write_bytes(b"{}")
    [damaged] = store.kept_experts()
    assert damaged.state == "note" and "delete it" in damaged.remedy


def test_a_small_disk(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for the default model is needed as long as it is to be fetched; after that little room is a note."""
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Disk(10_000_000))
    assert disk.disk().state == "problem" and "PORCELET_HOME" in disk.disk().remedy
    monkeypatch.setattr(disk.hub, "list_models", lambda: [_Named(hub.DEFAULT_MODEL)])
    assert disk.disk().state == "note"
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Disk(10**12))
    assert disk.disk().state == "ok"


class _Named(NamedTuple):
    name: str


def test_a_store_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder below a file can never be made, and nothing is left where one can."""
    assert store.store().state == "ok" and not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    monkeypatch.setenv("PORCELET_HOME", str(tmp_path / "file" / "store"))
    assert store.store().state == "problem" and str(tmp_path / "file" / "store") in store.store().cause


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_why_a_store_cannot_be_written(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """A disk mounted for reading, rights that are lacking and a full disk each have a remedy of their own."""

    def refuse(dir: Path) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    found = store.store()
    assert os.strerror(number) in found.cause and found.remedy.endswith(store.ALSO[number])


def test_whole_models(tiny: Path) -> None:
    """Sizes are compared by themselves, bytes only on demand."""
    [found] = store.integrity()
    assert found.state == "ok" and "sizes compared" in found.cause
    [found] = store.integrity(deep=True)
    assert found.state == "ok" and "every byte compared" in found.cause


def test_a_file_that_was_cut(tiny: Path) -> None:
    """The file is named, and how to get it again; the other models are looked at nevertheless."""
    weights = tiny / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 1)
    damaged, whole = store.integrity()
    assert damaged.state == "problem" and f"{weights} is gone or cut" in damaged.cause
    assert "porcelet pull" in damaged.remedy and whole.state == "ok"


def test_a_byte_that_changed(tiny: Path) -> None:
    """Only reading all of it finds that."""
    weights = tiny / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert [finding.state for finding in store.integrity()] == ["ok"]
    damaged, _ = store.integrity(deep=True)
    assert damaged.state == "problem" and "SHA-256" in damaged.cause and "porcelet rm tiny" in damaged.remedy


def test_a_manifest_that_cannot_be_read(tiny: Path) -> None:
    """Such a model counts as absent everywhere; here it is said why."""
    (tiny / "manifest.json").write_text("{")
    damaged, _ = store.integrity()
    assert damaged.state == "problem" and "manifest.json cannot be read" in damaged.cause
    assert "porcelet rm tiny" in damaged.remedy


def test_a_disk_that_fails(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of the disk while reading is a finding."""

    def fail(name: str) -> hub.StoredModel:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(hub, "verify", fail)
    found = next(store.integrity(deep=True))
    assert found.state == "problem" and "Input/output error" in found.cause and "smartctl" in found.remedy


def test_a_folder_that_is_no_model(tiny: Path) -> None:
    """What somebody put into the store under a name that no model can have is a note."""
    (tiny.parent / "My model").mkdir()
    (tiny.parent / "notes.txt").touch()
    assert [finding.state for finding in store.integrity()] == ["note", "ok"]


def test_what_an_interrupted_pull_left(home: Path) -> None:
    """Named with its size and the ways on, unless a pull holds its lock or wrote there a moment ago."""
    left = home / "downloads" / "tiny-0123456789ab"
    left.mkdir(parents=True)
    (left / "model.gguf.part").write_bytes(b"x" * 1_500_000)
    assert not list(store.left_over())
    aside = home / "tmp-abc"
    aside.mkdir()
    for path in (left / "model.gguf.part", left, aside):
        os.utime(path, (0, 0))
    with hub_store.lock("tiny"):
        assert [finding.cause for finding in store.left_over()] == [f"{aside}: 0.0 MB of a pull that did not end"]
    workspace, download = store.left_over()
    assert "delete it" in workspace.remedy
    assert download.state == "note" and "1.5 MB" in download.cause and "`porcelet rm tiny`" in download.remedy


@pytest.mark.parametrize(
    ("left", "most", "state"), [(0, 10**6, "problem"), (10, 10**6, "note"), (10**5, 10**6, "ok"), (0, 0, "ok")]
)
def test_no_more_files(monkeypatch: pytest.MonkeyPatch, left: int, most: int, state: str) -> None:
    """A disk can have room and no names left; some file systems do not count them."""
    monkeypatch.setattr(os, "statvfs", lambda folder: SimpleNamespace(f_files=most, f_favail=left))
    assert disk.inodes().state == state


def test_a_disk_over_the_network(home: Path, tmp_path: Path) -> None:
    """The file system that the store is on is the innermost of those around it; a space in its name is written so."""
    home.mkdir()
    mounts = f"/dev/sda1 / ext4 rw 0 0\nserver:/a {home} nfs4 rw 0 0\nproc /proc proc rw 0 0\n"
    root = lay_out(tmp_path / "root", {"proc/self/mounts": mounts})
    found = disk.file_system(root)
    assert found.state == "note" and f"{home}, which is nfs4" in found.cause and "PORCELET_HOME" in found.remedy
    assert disk.file_system().state == "ok"


def test_a_temporary_folder_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TMPDIR names no folder: Python takes another one in silence, so it is said."""
    monkeypatch.setattr(tempfile, "tempdir", None)
    assert disk.temporary().state == "ok"
    monkeypatch.setenv("TMPDIR", str(tmp_path / "missing"))
    found = disk.temporary()
    assert found.state == "note" and str(tmp_path / "missing") in found.cause and "TMPDIR" in found.remedy
