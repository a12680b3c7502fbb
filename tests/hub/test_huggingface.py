"""Pulls from a hub on this machine; its cache is filled and read by the real huggingface_hub."""

from __future__ import annotations

import json
import os
import shutil
import threading
from pathlib import Path

import pytest
from huggingface_hub import constants, snapshot_download

from porcelet import hub
from porcelet.errors import CapacityError, InputError, ModelError
from porcelet.hub.sources import default_name
from tests.hub.conftest import pulled
from tests.hub.server import COMMIT, Answer, Server, serve

REPOSITORY = "owner/Tiny-Model"
SOURCE = f"hf:{REPOSITORY}"
GGUF = b"GGUF" + bytes(range(256)) * 20


def flipped(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


@pytest.fixture
def repository(server: Server, tiny: dict[str, bytes]) -> Server:
    """The server with one repository: a model, and files that must never be asked for."""
    never = {"modeling.py": b"raise SystemExit", "pytorch_model.bin": b"pickle", "consolidated.safetensors": b"twice"}
    server.repositories[REPOSITORY] = tiny | never | {"onnx/model.onnx": b"other"}
    return server


def test_a_repository_becomes_a_model(repository: Server, store: Path, tiny: dict[str, bytes]) -> None:
    """The files that we read, and only these, end in one folder with a manifest; a second pull asks nothing."""
    path = hub.pull(SOURCE)
    assert path == store / "models" / "tiny-model" == hub.resolve(SOURCE) == hub.resolve("tiny-model")
    assert {file.name: file.read_bytes() for file in path.iterdir() if file.name != "manifest.json"} == tiny
    model = hub.verify("tiny-model")
    assert (model.source, model.revision) == (SOURCE, COMMIT)
    assert {file.name for file in model.files} == set(tiny)
    assert os.listdir(store / "downloads") == []
    asked = len(repository.requests)
    assert hub.pull(SOURCE) == path and len(repository.requests) == asked
    assert not any(name in path for _, path, _ in repository.requests for name in (".py", ".bin", "consolidated"))


def test_the_cache_is_used_without_network_or_copy(
    repository: Server, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What huggingface_hub has cached needs no request, online or offline, and shares its bytes on the disk."""
    snapshot_download(REPOSITORY, endpoint=repository.url)
    asked = len(repository.requests)
    weights = hub.pull(SOURCE) / "model.safetensors"
    assert len(repository.requests) == asked
    (cached,) = Path(constants.HF_HUB_CACHE).rglob("snapshots/*/model.safetensors")
    assert weights.samefile(cached) and not weights.is_symlink()
    hub.remove("tiny-model")
    assert cached.is_file()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert hub.pull(SOURCE) == hub.pull(f"{SOURCE}@main") == store / "models" / "tiny-model"
    assert len(repository.requests) == asked


def test_a_cache_on_another_disk_is_linked_by_name(
    repository: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where no hard link is possible a symbolic one is made and said; a cleared cache makes the model absent."""
    snapshot_download(REPOSITORY, endpoint=repository.url)

    def other_disk(source: Path, target: Path) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", other_disk)
    caplog.set_level("INFO")
    path = hub.pull(SOURCE)
    assert (path / "model.safetensors").is_symlink() and "clearing that cache breaks the model" in caplog.text
    shutil.rmtree(constants.HF_HUB_CACHE)
    assert pulled() == []
    with pytest.raises(
        ModelError, match=rf"a link to .*is gone or cut; run `porcelet pull {SOURCE} --name tiny-model`"
    ):
        hub.resolve("tiny-model")
    assert (hub.pull(SOURCE) / "model.safetensors").is_file()


def test_what_the_cache_lacks_is_fetched(repository: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a repository cached in part, only the rest is fetched; offline that is an error with its reason."""
    snapshot_download(REPOSITORY, endpoint=repository.url, allow_patterns=["config.json", "model.safetensors"])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="not whole in the cache .* HF_HUB_OFFLINE"):
        hub.pull(SOURCE)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    before = len(repository.ranges("model.safetensors"))
    hub.pull(SOURCE)
    assert len(repository.ranges("model.safetensors")) == before == 1
    assert repository.ranges("tokenizer.json") == [""]


def test_a_damaged_cache_is_noticed(repository: Server, store: Path) -> None:
    """A cached file whose bytes are not those of its name is refused."""
    snapshot_download(REPOSITORY, endpoint=repository.url)
    (cached,) = Path(constants.HF_HUB_CACHE).rglob("snapshots/*/model.safetensors")
    blob = cached.resolve()
    blob.write_bytes(flipped(blob.read_bytes()))
    with pytest.raises(ModelError, match=r"has SHA-256 .*delete it and pull again"):
        hub.pull(SOURCE)
    assert pulled() == []


def test_a_shard_that_breaks_off_is_resumed(repository: Server, tiny: dict[str, bytes]) -> None:
    """Connections that end early are continued by Range requests until the file is whole."""
    repository.cuts["model.safetensors"] = [20_000, 15_000]
    hub.pull(SOURCE)
    assert repository.ranges("model.safetensors") == ["", "bytes=20000-", "bytes=35000-"]
    assert (hub.resolve(SOURCE) / "model.safetensors").read_bytes() == tiny["model.safetensors"]


def test_wrong_bytes_leave_nothing(repository: Server, tiny: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """A flipped byte contradicts the hub's SHA-256: an error, nothing visible, and the next pull is whole."""
    promised = Answer.entry
    repository.repositories[REPOSITORY]["model.safetensors"] = flipped(tiny["model.safetensors"])
    with monkeypatch.context() as patch:
        patch.setattr(Answer, "entry", lambda self, path, _: promised(self, path, tiny.get(path, b"")))
        with pytest.raises(ModelError, match=r"model\.safetensors has SHA-256 .*pull again"):
            hub.pull(SOURCE)
    assert pulled() == []
    repository.repositories[REPOSITORY]["model.safetensors"] = tiny["model.safetensors"]
    assert (hub.pull(SOURCE) / "model.safetensors").read_bytes() == tiny["model.safetensors"]


def test_an_unknown_architecture_costs_one_file(repository: Server, tiny: dict[str, bytes], store: Path) -> None:
    """A model that we cannot run is refused after config.json, before its weights are asked for."""
    config = json.loads(tiny["config.json"]) | {"model_type": "mamba"}
    repository.repositories[REPOSITORY]["config.json"] = json.dumps(config).encode()
    with pytest.raises(ModelError, match="config.json: model_type 'mamba' is not supported"):
        hub.pull(SOURCE)
    assert repository.ranges("model.safetensors") == [] and os.listdir(store / "downloads") == []


def test_one_gguf_of_several_must_be_named(server: Server, store: Path) -> None:
    """A repository of several GGUF files lists them; a named one is fetched alone, under its own name."""
    server.repositories["owner/many"] = {"A-Q4_0.gguf": GGUF, "A-Q8_0.gguf": GGUF + b"8", "config.json": b"{}"}
    with pytest.raises(InputError, match=r"A-Q4_0\.gguf.*A-Q8_0\.gguf"):
        hub.pull("hf:owner/many")
    with pytest.raises(InputError, match=r"has no B\.gguf; .*A-Q4_0\.gguf, A-Q8_0\.gguf"):
        hub.pull("hf:owner/many:B.gguf")
    path = hub.pull("hf:owner/many:A-Q8_0.gguf")
    assert path == store / "models" / "a-q8_0" / "A-Q8_0.gguf" and path.read_bytes() == GGUF + b"8"
    assert server.ranges("A-Q4_0.gguf") == []
    server.repositories["owner/pickled"] = {"pytorch_model.bin": b"", "config.json": b"{}"}
    with pytest.raises(ModelError, match="neither .*safetensors nor"):
        hub.pull("hf:owner/pickled")


def test_shards_are_found_through_the_index(repository: Server, tiny: dict[str, bytes]) -> None:
    """The index decides which shards are fetched; one that leads out of the folder, or is absent, is refused."""
    files = repository.repositories[REPOSITORY]
    files["shard.safetensors"] = files.pop("model.safetensors")
    for shard, message in (("../shard.safetensors", "not a safetensors file beside it"), ("no.safetensors", "has no")):
        files["model.safetensors.index.json"] = json.dumps({"weight_map": {"a": shard}}).encode()
        with pytest.raises(ModelError, match=message):
            hub.pull(SOURCE)
    files["model.safetensors.index.json"] = json.dumps({"weight_map": {"a": "shard.safetensors"}}).encode()
    assert (hub.pull(SOURCE) / "shard.safetensors").read_bytes() == tiny["model.safetensors"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("hf:owner/absent", "does not exist or is private.*HF_TOKEN"),
        (f"{SOURCE}@v9", "no revision 'v9'"),
    ],
)
def test_what_is_not_there_is_named(repository: Server, source: str, message: str) -> None:
    """No such repository, no such revision."""
    with pytest.raises(ModelError, match=message):
        hub.pull(source)


def test_a_private_repository_needs_the_token(repository: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without HF_TOKEN the error says so; with it the pull works."""
    repository.token = "secret"
    with pytest.raises(ModelError, match="set HF_TOKEN"):
        hub.pull(SOURCE)
    monkeypatch.setenv("HF_TOKEN", "secret")
    hub.pull(SOURCE)
    assert "secret" not in (hub.resolve(SOURCE) / "manifest.json").read_text()


def test_the_token_stays_with_the_hub(repository: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the hub sends us to another server for a large file, the token does not come along."""
    repository.token = "secret"
    monkeypatch.setenv("HF_TOKEN", "secret")
    with serve() as other:
        other.files["weights"] = repository.repositories[REPOSITORY]["model.safetensors"]
        repository.moved["model.safetensors"] = f"{other.url}/files/weights"
        hub.pull(SOURCE)
        assert [path for _, path, _ in other.requests] == ["/files/weights"]
        assert repository.tokens == {"Bearer secret"} and other.tokens == {""}


def test_no_hub_is_an_error_within_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A refused connection is one line; so is a server that is no hub."""
    with serve() as other:
        monkeypatch.setattr(constants, "ENDPOINT", other.url + "/files")
        with pytest.raises(ModelError, match="does not exist or is private"):
            hub.pull(SOURCE)
    monkeypatch.setattr(constants, "ENDPOINT", other.url)
    with pytest.raises(ModelError, match="cannot be reached: .*check the network"):
        hub.pull(SOURCE)


def test_pulls_at_once_fetch_once(repository: Server) -> None:
    """Three pulls of one model end in one folder, fetched by the first."""
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(hub.pull(SOURCE))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [hub.resolve(SOURCE)] * 3
    assert repository.ranges("model.safetensors") == [""]


def test_the_disk_is_compared_first(repository: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too little space is an error before the weights are asked for."""
    free = shutil._ntuple_diskusage(10**9, 10**9 - 50_000, 50_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    with pytest.raises(CapacityError, match="PORCELET_HOME"):
        hub.pull(SOURCE)
    assert repository.ranges("model.safetensors") == []


def test_names_of_the_hub_stay_in_the_folder(repository: Server, store: Path, tiny: dict[str, bytes]) -> None:
    """A hub whose file names lead elsewhere, or whose answer is no listing, writes nothing there."""
    files = repository.repositories[REPOSITORY]
    files |= {"LICENSE/../../../../escaped": b"x", "/LICENSE": b"x", "LICENSE/x": b"x", "../a.gguf": GGUF}
    path = hub.pull(SOURCE)
    assert {file.name for file in path.iterdir()} == {*tiny, "manifest.json"}
    assert not list(store.parent.rglob("escaped"))


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("hf:Owner/Name.v1", "name.v1"),
        ("hf:owner/name@refs/pr/1", "name"),
        ("hf:owner/name@v1:sub/File.Q4_K_M.gguf", "file.q4_k_m"),
        ("https://example.org/a/My Model.gguf?key=x/y#sha256=0", "my-model"),
        ("https://example.org/a/b/", "b"),
        ("/some/where/R1/", "r1"),
    ],
)
def test_names_follow_the_source(source: str, name: str) -> None:
    """The last part of a source in lower case, without revision, query, ending and what a name cannot hold."""
    assert default_name(source) == name


@pytest.mark.parametrize(
    "source", ["hf:", "hf:name", "hf:a/b/c", "hf:a/..", "hf:a/b:c.bin", "hf:a/b@", "hf:a/b--c", "hf:a/b?x"]
)
def test_other_forms_are_refused(source: str) -> None:
    """Anything but hf:owner/name[@revision][:file.gguf] is an InputError."""
    with pytest.raises(InputError, match="hf:owner/name"):
        hub.pull(source)
