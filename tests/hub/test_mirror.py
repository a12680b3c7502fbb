"""Pulls from a plain server over http and https, broken off in every way, and from folders."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx2
import pytest

from porcelet import hub
from porcelet.errors import CapacityError, InputError, ModelError
from porcelet.hub import download
from porcelet.hub import store as store_module
from tests.hub.conftest import pulled
from tests.hub.server import Server, serve

GGUF = b"GGUF" + bytes(range(256)) * 400
SHA256 = hashlib.sha256(GGUF).hexdigest()


@pytest.fixture
def mirror(server: Server, tiny: dict[str, bytes]) -> str:
    """A folder URL with a model's files, and a GGUF file beside it."""
    server.files |= {f"tiny/{name}": content for name, content in tiny.items()}
    server.files["Model.Q4_0.gguf"] = GGUF
    return f"{server.url}/files"


def test_a_folder_url_becomes_a_model(mirror: str, server: Server, store: Path, tiny: dict[str, bytes]) -> None:
    """The files of a repository are fetched from a plain server; LICENSE and the rest where they are there."""
    seen: list[tuple[int, int]] = []
    path = hub.pull(f"{mirror}/tiny", progress=lambda done, total: seen.append((done, total)))
    assert path == store / "models" / "tiny"
    assert {file.name: file.read_bytes() for file in path.iterdir() if file.name != "manifest.json"} == tiny
    total = sum(len(content) for name, content in tiny.items() if name != "config.json")
    assert seen[-1] == (total, total)
    assert hub.verify("tiny").source == f"{mirror}/tiny/"
    assert hub.pull(f"{mirror}/tiny/") == path


def test_a_file_is_checked_by_the_hash_in_its_url(mirror: str, server: Server) -> None:
    """#sha256= decides; a wrong one leaves nothing visible."""
    with pytest.raises(ModelError, match=f"has SHA-256 {SHA256}, not 0000"):
        hub.pull(f"{mirror}/Model.Q4_0.gguf#sha256={'0' * 64}")
    assert pulled() == []
    assert hub.pull(f"{mirror}/Model.Q4_0.gguf#sha256={SHA256}").read_bytes() == GGUF
    assert hub.verify("model.q4_0").files[0].sha256 == SHA256


def test_a_hash_in_the_url_holds_for_a_stored_model_too(mirror: str, server: Server) -> None:
    """What is there already must be what the URL names."""
    hub.pull(f"{mirror}/Model.Q4_0.gguf")
    with pytest.raises(ModelError, match="not 0000"):
        hub.pull(f"{mirror}/Model.Q4_0.gguf#sha256={'0' * 64}")


def test_a_file_is_checked_by_the_hash_beside_it(mirror: str, server: Server, caplog: pytest.LogCaptureFixture) -> None:
    """`file.sha256` is compared; without one that is said."""
    caplog.set_level("INFO")
    server.files["Model.Q4_0.gguf.sha256"] = f"{'1' * 64}  Model.Q4_0.gguf\n".encode()
    with pytest.raises(ModelError, match=f"has SHA-256 {SHA256}, not 1111"):
        hub.pull(f"{mirror}/Model.Q4_0.gguf")
    server.files["Model.Q4_0.gguf.sha256"] = SHA256.encode()
    hub.pull(f"{mirror}/Model.Q4_0.gguf", name="a")
    assert "only sizes were checked" not in caplog.text
    del server.files["Model.Q4_0.gguf.sha256"]
    hub.pull(f"{mirror}/Model.Q4_0.gguf", name="b")
    assert "only sizes were checked" in caplog.text


def test_a_later_pull_resumes(mirror: str, server: Server) -> None:
    """When a server keeps breaking off, the pull fails; the next one asks for the rest alone."""
    server.cuts["Model.Q4_0.gguf"] = [30_000, 0, 0, 0, 0]
    with pytest.raises(ModelError, match="breaks off.*pull again to resume"):
        hub.pull(f"{mirror}/Model.Q4_0.gguf")
    assert pulled() == []
    assert hub.pull(f"{mirror}/Model.Q4_0.gguf").read_bytes() == GGUF
    assert server.ranges("Model.Q4_0.gguf") == ["", *["bytes=30000-"] * 5]


@pytest.mark.parametrize("etags", [True, False], ids=["other ETag", "no ETag"])
def test_a_changed_file_starts_over(mirror: str, server: Server, etags: bool) -> None:
    """Bytes of an old version never meet those of a new one."""
    server.etags = etags
    server.cuts["Model.Q4_0.gguf"] = [30_000, 0, 0, 0, 0]
    with pytest.raises(ModelError, match="breaks off"):
        hub.pull(f"{mirror}/Model.Q4_0.gguf")
    server.files["Model.Q4_0.gguf"] = b"GGUF" + b"new" * 40_000
    asked = len(server.ranges("Model.Q4_0.gguf"))
    assert hub.pull(f"{mirror}/Model.Q4_0.gguf").read_bytes() == b"GGUF" + b"new" * 40_000
    assert server.ranges("Model.Q4_0.gguf")[asked:] == [""]


def test_a_killed_pull_is_resumed(mirror: str, server: Server, store: Path) -> None:
    """kill -9 in the middle: no model is visible, and the next pull goes on where the file broke off."""
    server.stall.clear()
    server.cuts["Model.Q4_0.gguf"] = [30_000]
    program = f"from porcelet import hub; hub.pull('{mirror}/Model.Q4_0.gguf')"
    process = subprocess.Popen([sys.executable, "-c", program])
    while not (parts := list(store.glob("downloads/*/*.part"))) or parts[0].stat().st_size == 0:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    server.stall.set()
    assert pulled() == []
    (size,) = [path.stat().st_size for path in store.glob("downloads/*/*.part")]
    assert hub.pull(f"{mirror}/Model.Q4_0.gguf").read_bytes() == GGUF
    assert server.ranges("Model.Q4_0.gguf") == ["", f"bytes={size}-"]


def test_a_disk_that_fills_up(mirror: str, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is full in the middle is a CapacityError; what was written is resumed."""

    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(CapacityError, match="the disk is full.*PORCELET_HOME"):
            hub.pull(f"{mirror}/Model.Q4_0.gguf")
    assert pulled() == []
    assert hub.pull(f"{mirror}/Model.Q4_0.gguf").read_bytes() == GGUF


def test_removal_drops_an_unfinished_pull(mirror: str, server: Server, store: Path) -> None:
    """`rm` of a model that was never finished frees what was fetched of it."""
    server.cuts["Model.Q4_0.gguf"] = [30_000, 0, 0, 0, 0]
    with pytest.raises(ModelError, match="breaks off"):
        hub.pull(f"{mirror}/Model.Q4_0.gguf")
    assert len(os.listdir(store / "downloads")) == 1
    hub.remove("model.q4_0")
    assert os.listdir(store / "downloads") == []
    with pytest.raises(ModelError, match="neither a file"):
        hub.remove("model.q4_0")


def test_what_is_no_model_is_refused(mirror: str, server: Server, tiny: dict[str, bytes]) -> None:
    """A page instead of a file, a folder without config, damaged JSON, a caller's own check, no access."""
    server.files |= {"page.gguf": b"<html>", "bad/config.json": b"{", "noweights/config.json": tiny["config.json"]}
    for path, message in (
        ("page.gguf", "not a GGUF file"),
        ("absent.gguf", "does not exist"),
        ("absent/", "has no config.json"),
        ("bad/", "is not valid JSON"),
        ("noweights/", "has no model.safetensors"),
    ):
        with pytest.raises(ModelError, match=message):
            hub.pull(f"{mirror}/{path}")

    def refuse(path: Path) -> None:
        assert path.is_file()
        raise ModelError("not for us")

    with pytest.raises(ModelError, match="not for us"):
        hub.pull(f"{mirror}/Model.Q4_0.gguf", check=refuse)
    server.token = "x"
    with pytest.raises(ModelError, match="refuses access .HTTP 401"):
        hub.pull(f"{mirror}/tiny")
    assert pulled() == []


def test_urls_that_cannot_be_used() -> None:
    """http to another machine, a fragment that is no hash, a query on a folder; secrets are not repeated."""
    for url, message in (
        ("http://example.org/a.gguf", "is not https"),
        ("https://example.org/a.gguf#sha256=12", "64 hexadecimal"),
        ("https://[example.org/a.gguf", "is not a URL"),
        (f"https://example.org/a/#sha256={'0' * 64}", "64 hexadecimal"),
        ("https://example.org/a/?key=secret", "a query"),
    ):
        with pytest.raises(InputError, match=message) as raised:
            hub.pull(url)
        assert "secret" not in str(raised.value)


def test_a_redirect_never_leaves_https() -> None:
    """An answer that came over plain http from another machine is refused, if the way there began with https."""
    start = httpx2.Response(302, request=httpx2.Request("GET", "https://example.org/a.gguf"))
    request = httpx2.Request("GET", "http://example.org/a.gguf")
    with pytest.raises(ModelError, match="leads to http://example.org/a.gguf, which is not https"):
        download.check_response(httpx2.Response(200, request=request, history=[start]))


def test_another_model_of_the_same_name(mirror: str, server: Server) -> None:
    """A name that is taken by another source is refused with the two ways out; --name is one."""
    server.files["other/model.q4_0.gguf"] = GGUF
    hub.pull(f"{mirror}/Model.Q4_0.gguf")
    with pytest.raises(InputError, match="another model 'model.q4_0'.*--name.*porcelet rm model.q4_0"):
        hub.pull(f"{mirror}/other/model.q4_0.gguf")
    hub.pull(f"{mirror}/other/model.q4_0.gguf", name="other")
    assert [model.name for model in pulled()] == ["model.q4_0", "other"]


# ---- TLS ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variable", ["SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"])
def test_a_private_authority(authority: dict[str, Path], monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    """A server whose certificate a private authority signed is refused with the remedy, and trusted once it is set."""
    for name in ("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    with serve((authority["leaf.pem"], authority["leaf.key"])) as server:
        server.files["a.gguf"] = GGUF
        with pytest.raises(ModelError, match=r"certificate is not trusted.*SSL_CERT_FILE"):
            hub.pull(f"{server.url}/files/a.gguf")
        monkeypatch.setenv(variable, str(authority["ca.pem"]))
        assert hub.pull(f"{server.url}/files/a.gguf").read_bytes() == GGUF
        monkeypatch.setenv(variable, "/nowhere.pem")
        with pytest.raises(InputError, match=r"check SSL_CERT_FILE"):
            hub.pull(f"{server.url}/files/b.gguf")


def test_a_proxy_is_used(mirror: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """HTTPS_PROXY is where the connection goes; one that does not answer is named."""
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "")
    with pytest.raises(ModelError, match="example.org cannot be reached.*HTTPS_PROXY"):
        hub.pull("https://example.org/a.gguf")


# ---- folders --------------------------------------------------------------------------------------------------------


def test_a_folder_is_copied(tiny_folder: Path, tmp_path: Path, store: Path) -> None:
    """A model folder is copied whole; what happens to it later does not reach the store."""
    folder = shutil.copytree(tiny_folder, tmp_path / "My Model")
    (folder / "training.bin").write_bytes(b"not ours")
    path = hub.pull(str(folder))
    assert path == store / "models" / "my-model"
    shutil.rmtree(folder)
    assert {file.name for file in hub.verify("my-model").files} == {file.name for file in tiny_folder.iterdir()}
    assert sorted(os.listdir(store)) == ["models"]


def test_files_and_folders_without_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A .gguf is copied; an empty folder, an absent one and a folder named without ./ say what to do."""
    (tmp_path / "x" / "empty").mkdir(parents=True)
    (tmp_path / "x" / "A.gguf").write_bytes(GGUF)
    assert hub.pull(str(tmp_path / "x" / "A.gguf")).read_bytes() == GGUF
    assert hub.pull(str(tmp_path / "x"), name="b").read_bytes() == GGUF
    monkeypatch.chdir(tmp_path / "x")
    for source, message in (
        ("./empty", "neither .*safetensors nor"),
        ("./absent", "does not exist"),
        ("empty", "`./empty` is the folder"),
    ):
        with pytest.raises(ModelError, match=message):
            hub.pull(source)


def test_old_leftovers_are_cleaned(mirror: str, store: Path) -> None:
    """A workspace untouched for more than a day goes with the next pull, a younger one stays."""
    for name, age in (("tmp-old", 2 * store_module.DAY), ("tmp-young", 0)):
        (store / name).mkdir(parents=True)
        (store / name / "file").write_bytes(b"x")
        for path in (store / name / "file", store / name):
            os.utime(path, (time.time() - age,) * 2)
    hub.pull(f"{mirror}/Model.Q4_0.gguf")
    assert (store / "tmp-young").is_dir() and not (store / "tmp-old").exists()


def test_a_lock_is_handed_on(store: Path) -> None:
    """Many threads that take one lock in turn never hold it together, though each holder removes its file."""
    held, most = 0, 0

    def hold() -> None:
        nonlocal held, most
        for _ in range(20):
            with store_module.lock("name"):
                held += 1
                most = max(most, held)
                time.sleep(0.0005)
                held -= 1

    threads = [threading.Thread(target=hold) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1 and os.listdir(store) == []
