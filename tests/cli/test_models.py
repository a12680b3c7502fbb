"""The commands of the model store as a user meets them: real processes, a hub on this machine."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from porcelet.errors import InputError, ModelError, PorceletError
from porcelet.kernels import cpu
from porcelet.weights.header import read_config
from porcelet.weights.load import load
from porcelet.weights.offload import Offload
from tests.hub.server import COMMIT, Server, serve
from tests.tiny_model import save_tiny_model
from tests.weights import tiny_gguf

SOURCE = "hf:owner/tiny"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny_model(tmp_path_factory.mktemp("model"))
    (folder / "README.md").write_text("---\nlanguage:\n- en\nlicense: mit\n---\n# A model\n")
    return folder


@pytest.fixture
def server(folder: Path) -> Iterator[Server]:
    with serve() as running:
        running.repositories["owner/tiny"] = {path.name: path.read_bytes() for path in folder.iterdir()}
        yield running


@pytest.fixture
def environment(tmp_path: Path, server: Server) -> dict[str, str]:
    own = {"PORCELET_HOME": str(tmp_path / "store"), "HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": server.url}
    return {name: value for name, value in os.environ.items() if not name.startswith("HF_")} | own


def porcelet(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "porcelet", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=60)


def test_a_model_comes_and_goes(environment: dict[str, str], server: Server, tmp_path: Path) -> None:
    """pull, list, show, verify and rm of one model, as JSON; the hub hears of nothing but the model."""
    pulled = porcelet(environment, "pull", SOURCE, "--json")
    assert pulled.returncode == 0 and pulled.stderr == "", pulled.stderr
    entry = json.loads(pulled.stdout)
    assert (entry["name"], entry["source"], entry["revision"]) == ("tiny", SOURCE, COMMIT)
    listed = json.loads(porcelet(environment, "list", "--json").stdout)
    assert listed[0] == entry and [other["source"] for other in listed[1:]] == ["package"]
    assert json.loads(porcelet(environment, "verify", "tiny", "--json").stdout) == entry
    assert all("owner/tiny" in path for _, path, _ in server.requests)
    weights = Path(entry["path"]) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"?\0\0\0")
    damaged = porcelet(environment, "verify", "tiny", "--json")
    assert damaged.returncode == ModelError.exit_code and damaged.stdout == ""
    error = json.loads(damaged.stderr)["error"]
    assert (error["kind"], error["exit_code"]) == ("model_error", 3) and "porcelet rm tiny" in error["message"]
    assert porcelet(environment, "rm", "tiny").stdout == "tiny removed\n"
    assert "tiny" not in porcelet(environment, "list").stdout


@pytest.mark.skipif(not cpu.available(), reason="no compiler, hence no native module")
def test_experts_on_disk_go_with_their_model(environment: dict[str, str], tmp_path: Path) -> None:
    """list counts them, verify reads them and names what is damaged, rm takes them along."""
    (tmp_path / "moe").mkdir()
    tiny_gguf.write(tmp_path / "moe" / "moe.gguf", "Q4_0", architecture="deepseek2")
    pulled = porcelet(environment, "pull", str(tmp_path / "moe"), "--json")
    assert pulled.returncode == 0, pulled.stderr
    path, folder = Path(json.loads(pulled.stdout)["path"]), tmp_path / "store" / "experts"
    load(path, "stored", offload=Offload(folder, 1 << 20))
    [file] = folder.iterdir()
    assert json.loads(porcelet(environment, "list", "--json").stdout)[0]["expert_files"] == {
        str(file): file.stat().st_size
    }
    assert "of experts on disk" in porcelet(environment, "list").stdout
    verified = porcelet(environment, "verify", "moe").stdout
    assert f"8 experts  {file}\n" in verified and verified.endswith("moe is intact\n")
    content = file.read_bytes()
    file.write_bytes(content[:8192] + bytes([content[8192] ^ 1]) + content[8193:])
    damaged = porcelet(environment, "verify", "moe")
    assert damaged.returncode == ModelError.exit_code and "is damaged; delete it" in damaged.stderr
    assert porcelet(environment, "rm", "moe").stdout == "moe removed, and its experts on disk\n"
    assert not list(folder.iterdir())


def test_show_counts_what_is_in_the_file(environment: dict[str, str], folder: Path) -> None:
    """Parameters are exactly the numbers in the weights; memory follows from them and from the context."""
    facts = json.loads(porcelet(environment, "show", str(folder), "--context", "1000", "--json").stdout)
    tensors = load_file(folder / "model.safetensors")
    count = sum(math.prod(tensor.shape) for tensor in tensors.values())
    assert facts["parameters"] == facts["active_parameters"] == count
    assert facts["stored_types"] == {"F32": len(tensors)} and facts["license"] == "mit"
    assert facts["architecture"] == "llama" and facts["layers"] == 1
    assert facts["cache_bytes_per_token_16bit"] == 2 * 2 * 16  # keys and values of one head of 16 in two bytes
    memory = facts["memory"]
    assert memory["weights_float32"] == 4 * count and memory["weights_int8"] == read_config(folder).packed_bytes(8)
    assert memory["weights_as_stored"] == (folder / "model.safetensors").stat().st_size
    assert memory["cache_32bit"] == 2 * memory["cache_16bit"] == 1000 * facts["cache_bytes_per_token_32bit"]
    text = porcelet(environment, "show", str(folder)).stdout
    assert f"({count:,})" in text and "cache for 4,096 tokens" in text


def test_show_needs_no_torch(folder: Path) -> None:
    """The facts of a model are read without torch."""
    program = (
        "import sys; from pathlib import Path; from porcelet.cli.models import describe; "
        f"describe(Path({str(folder)!r})); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("pull", "hf:owner/absent"), ModelError.exit_code, "HF_TOKEN"),
        (("pull", "hf:nobody"), InputError.exit_code, "hf:owner/name"),
        (("pull", "http://example.org/a.gguf"), InputError.exit_code, "not https"),
        (("pull", "./nowhere"), ModelError.exit_code, "does not exist"),
        (("show", "nowhere"), ModelError.exit_code, "neither a file"),
        (("rm", "nowhere"), ModelError.exit_code, "neither a file"),
    ],
    ids=lambda value: value[1] if isinstance(value, tuple) else None,
)
def test_mistakes_get_one_line(
    environment: dict[str, str], arguments: tuple[str, ...], code: int, message: str
) -> None:
    """A likely mistake ends with its exit code and one line on standard error."""
    done = porcelet(environment, *arguments)
    assert (done.returncode, done.stdout) == (code, "")
    assert message in done.stderr and done.stderr.count("\n") == 1


def test_an_interrupted_pull_says_how_to_go_on(environment: dict[str, str], server: Server, tmp_path: Path) -> None:
    """Ctrl-C ends with 130 and one line; the same command then fetches the rest alone."""
    server.stall.clear()
    server.cuts["model.safetensors"] = [20_000]
    command = [sys.executable, "-m", "porcelet", "pull", SOURCE]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    while not list(tmp_path.glob("store/downloads/*/model.safetensors.part")):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=20)
    server.stall.set()
    assert process.returncode == 130 and "the same pull goes on from here" in stderr and stderr.count("\n") == 1
    assert porcelet(environment, "pull", SOURCE).returncode == 0
    assert server.ranges("model.safetensors")[-1].startswith("bytes=")


def test_offline_means_offline(environment: dict[str, str], server: Server) -> None:
    """With HF_HUB_OFFLINE and an empty cache a pull fails without a request."""
    done = porcelet(environment | {"HF_HUB_OFFLINE": "1"}, "pull", SOURCE)
    assert done.returncode == ModelError.exit_code and "HF_HUB_OFFLINE" in done.stderr
    assert server.requests == []


def test_exit_codes_are_in_the_help(environment: dict[str, str]) -> None:
    """`porcelet --help` names the exit code of every class of error."""
    text = " ".join(porcelet(environment, "--help").stdout.partition("Exit codes:")[2].split())
    for error in (PorceletError, *PorceletError.__subclasses__()):
        assert f" {error.exit_code} " in f" {text}", error
