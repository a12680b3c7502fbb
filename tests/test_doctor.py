"""Each finding of `porcelet.doctor`, with the fault it is there for."""

from __future__ import annotations

import os
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from porcelet import doctor, hub
from porcelet.doctor import Finding
from porcelet.errors import InputError
from porcelet.kernels import cpu
from porcelet.weights import memory
from porcelet.weights.load import load
from porcelet.weights.offload import Offload
from tests.tiny_model import save_tiny_model
from tests.weights import tiny_gguf


class Disk(NamedTuple):
    free: int


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A store of our own, empty, and no variable that changes how porcelet computes."""
    for name in doctor.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PORCELET_HOME", str(tmp_path / "store"))
    yield tmp_path / "store"


def by_code() -> dict[str, Finding]:
    return {finding.code: finding for finding in doctor.examine()}


def add_model(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "tiny")
    hub.pull(str(tmp_path / "tiny"), lambda done, total: None)


def test_every_state_but_ok_says_what_to_do(home: Path) -> None:
    """All is looked at once, the default model is missed, and what is no problem needs no exit code."""
    found = by_code()
    assert {"torch", "native_library", "openmp", "threads", "store", "disk", "environment", "port"} <= set(found)
    assert found["default_model"].remedy == "run `porcelet pull`" and not home.exists()
    assert all(finding.remedy for finding in found.values() if finding.state != "ok"), found
    assert found["network"].cause.startswith("not asked for")


def test_without_the_native_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """It says that torch computes, why, and how to get the library; porcelet works, so it is a note."""
    monkeypatch.setattr(cpu, "available", lambda: False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    found = doctor.native_library()
    assert found.state == "note" and "torch computes everything" in found.cause
    assert "no g++" in found.cause and found.remedy.startswith("install g++")
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/g++")
    assert "--force-reinstall" in doctor.native_library().remedy and "g++" not in doctor.native_library().remedy
    assert doctor.instruction_set().state == "ok"


def test_a_native_library_that_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is a problem, and the findings that do not need the library are there nevertheless."""
    monkeypatch.delattr("porcelet.kernels.cpu")
    monkeypatch.setitem(sys.modules, "porcelet.kernels.cpu", None)
    found = by_code()
    assert found["native_library"].state == "problem" and "does not load" in found["native_library"].cause
    assert "threads" in found and "instruction_set" not in found


@pytest.mark.skipif(not cpu.available(), reason="no native module")
def test_instruction_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    """The best there is by itself; a lesser one by the environment is a note, one that is lacking a problem."""
    assert cpu.isas()[-1] == "scalar" and cpu.isa() == cpu.isas()[0]
    assert doctor.instruction_set().cause.startswith(cpu.isas()[0])
    monkeypatch.setattr(cpu, "isas", lambda: ["better", "scalar"])
    monkeypatch.setenv("PORCELET_ISA", "scalar")
    assert doctor.instruction_set().state == "note" and "better" in doctor.instruction_set().cause
    monkeypatch.setenv("PORCELET_ISA", "avx1024")
    with pytest.raises(InputError):
        cpu.isa()
    assert doctor.instruction_set() == Finding(
        "instruction_set", "problem", doctor.instruction_set().cause, "unset PORCELET_ISA"
    )
    monkeypatch.setenv("PORCELET_KERNELS", "reference")
    assert doctor.native_library().remedy == "unset PORCELET_KERNELS"


def test_two_openmp_runtimes(monkeypatch: pytest.MonkeyPatch) -> None:
    """One is as it should be, and named; a second is a problem."""
    assert doctor.openmp().state == "ok" and "omp" in doctor.openmp().cause
    monkeypatch.setattr(doctor, "openmp_runtimes", lambda: {"/a/libgomp.so.1", "/b/libiomp5.so"})
    assert doctor.openmp().state == "problem" and "/b/libiomp5.so" in doctor.openmp().cause


def test_more_threads_than_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Affinity and the container's share of time both count; more threads than that are a problem."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(doctor, "usable_cores", lambda: 1.5)
    assert doctor.threads() == Finding("threads", "problem", doctor.threads().cause, "set OMP_NUM_THREADS=1")
    monkeypatch.setattr(doctor, "usable_cores", lambda: 8.0)
    assert doctor.threads().state == "ok"
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert doctor.threads().state == "note" and "4 of 8" in doctor.threads().cause


@pytest.mark.parametrize(("quota", "cores"), [("50000 100000", 0.5), ("max 100000", 3), (None, 3), ("odd", 3)])
def test_usable_cores(monkeypatch: pytest.MonkeyPatch, quota: str | None, cores: float) -> None:
    """Three processors of the affinity, or what a container's quota leaves of them."""

    def read(path: Path, encoding: str) -> str:
        if quota is None:
            raise FileNotFoundError(path)
        return quota

    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 5})
    monkeypatch.setattr(Path, "read_text", read)
    assert doctor.usable_cores() == cores


def test_a_torch_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    """The version that the package asks for is named, with the command that gets it."""
    assert doctor.torch_version().state == "ok"
    monkeypatch.setattr(torch, "__version__", "1.13.1+cpu")
    found = doctor.torch_version()
    assert found.state == "problem" and "1.13.1" in found.cause and "pip install 'torch>=" in found.remedy


def test_memory_of_the_models(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model fits; it fits without its cache; it does not fit at all."""
    add_model(tmp_path)
    monkeypatch.setattr(hub, "DEFAULT_MODEL", "tiny")
    tiny = next(finding for finding in doctor.model_memory() if "tiny" in finding.cause)
    assert tiny.state == "ok" and "float32" in tiny.cause
    monkeypatch.setattr(memory, "available_memory", lambda: 1_000_000)
    assert [finding.state for finding in doctor.model_memory() if "tiny" in finding.cause] == ["note"]
    monkeypatch.setattr(memory, "available_memory", lambda: 1000)
    scarce = next(finding for finding in doctor.model_memory() if "tiny" in finding.cause)
    assert scarce.state == "problem" and "memory" in scarce.remedy
    weights = home / "models" / "tiny" / "model.safetensors"
    weights.write_bytes(b"\xff" * weights.stat().st_size)
    assert "problem" in [finding.state for finding in doctor.model_memory() if finding.code == "model"]


@pytest.mark.skipif(not cpu.available(), reason="no compiler, hence no native module")
def test_experts_on_disk(home: Path, tmp_path: Path) -> None:
    """A file of experts is told of with its model; without that, or damaged, with what to do."""
    assert not list(doctor.kept_experts())
    model = tmp_path / "moe.gguf"
    tiny_gguf.write(model, "Q4_0", architecture="deepseek2")
    load(model, "stored", offload=Offload(home / "experts", 1 << 20))
    [there] = doctor.kept_experts()
    assert there.state == "ok" and str(model) in there.cause
    model.unlink()
    [gone] = doctor.kept_experts()
    assert gone.state == "note" and "is gone or has changed" in gone.cause and gone.remedy
    [file] = (home / "experts").iterdir()
    file.write_bytes(b"{}")
    [damaged] = doctor.kept_experts()
    assert damaged.state == "note" and "delete it" in damaged.remedy


def test_a_small_disk(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for the default model is needed as long as it is to be fetched; after that little room is a note."""
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Disk(10_000_000))
    assert doctor.disk().state == "problem" and "PORCELET_HOME" in doctor.disk().remedy
    monkeypatch.setattr(doctor.hub, "list_models", lambda: [_Named(hub.DEFAULT_MODEL)])
    assert doctor.disk().state == "note"
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Disk(10**12))
    assert doctor.disk().state == "ok"


class _Named(NamedTuple):
    name: str


def test_a_store_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder below a file can never be made, and nothing is left where one can."""
    assert doctor.store().state == "ok" and not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    monkeypatch.setenv("PORCELET_HOME", str(tmp_path / "file" / "store"))
    assert doctor.store().state == "problem" and str(tmp_path / "file" / "store") in doctor.store().cause


def test_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is set is shown; a misspelt name gets the near one; a value that cannot be used is a problem."""
    assert "PORCELET_HOME=" in doctor.environment().cause
    monkeypatch.setenv("PORCELET_ACTIVATIONS", "4")
    assert doctor.environment().state == "problem"
    monkeypatch.setenv("PORCELET_ISAS", "avx2")
    found = doctor.environment()
    assert found.state == "note" and "PORCELET_ISAS" in found.cause and "PORCELET_ISA?" in found.remedy


def test_a_taken_port(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody who listens there is a note: it may be our own server."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        monkeypatch.setattr(doctor, "PORT", listener.getsockname()[1])
        assert doctor.port().state == "note" and "--port" in doctor.port().remedy
    assert doctor.port().state == "ok"


def test_the_network_is_asked_only_on_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    """No connection without --network or with HF_HUB_OFFLINE; a hub that does not answer is a problem."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    assert doctor.hub_access(False).state == "ok"
    refused = doctor.hub_access(True)
    assert refused.state == "problem" and "127.0.0.1:9 cannot be reached" in refused.cause and refused.remedy
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in doctor.hub_access(True).cause
