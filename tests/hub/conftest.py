"""An empty store and an empty Hugging Face cache for every test, and a small real model to pull."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from porcelet import hub
from porcelet.hub import download
from tests.hub.server import Server, serve
from tests.tiny_model import save_tiny_model


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A private certificate authority and a certificate of this machine, made by openssl."""
    folder = tmp_path_factory.mktemp("ca")
    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-x509", "-days", "2"]
    ca = [*key, "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=Private authority"]
    leaf = [*key, "-CA", "ca.pem", "-CAkey", "ca.key", "-keyout", "leaf.key", "-out", "leaf.pem", "-subj", "/CN=leaf"]
    names = ["-addext", "subjectAltName=IP:127.0.0.1", "-addext", "basicConstraints=critical,CA:FALSE"]
    for arguments in (ca, [*leaf, *names]):
        subprocess.run(["openssl", "req", *arguments], cwd=folder, check=True, capture_output=True)
    return {name: folder / name for name in ("ca.pem", "leaf.pem", "leaf.key")}


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, authority: dict[str, Path]) -> Path:
    monkeypatch.setenv("PORCELET_HOME", str(tmp_path / "store"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "hf" / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    monkeypatch.setenv("SSL_CERT_FILE", str(authority["ca.pem"]))  # loading a system's takes longer than most tests
    monkeypatch.setattr(download, "RETRY_SECONDS", 0.01)
    return tmp_path / "store"


def pulled() -> list[hub.StoredModel]:
    """What is listed but for the package's own models."""
    return [model for model in hub.list_models() if model.name not in hub.PACKAGED]


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny_model(tmp_path_factory.mktemp("tiny"))
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    (folder / "LICENSE").write_text("The licence\n")
    return folder


@pytest.fixture(scope="session")
def tiny(tiny_folder: Path) -> dict[str, bytes]:
    """The files of a model folder."""
    return {path.name: path.read_bytes() for path in tiny_folder.iterdir()}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server that is the hub, too."""
    with serve() as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        template = running.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield running
