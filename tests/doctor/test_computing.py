"""What computes: each finding with the fault it is there for."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path

import pytest
import torch

from porcelet.doctor import Finding, computing
from porcelet.errors import InputError
from porcelet.kernels import cpu
from porcelet.kernels.generations import GENERATIONS, generation_of
from porcelet.kernels.triton import contest


def test_without_the_native_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """It says that torch computes, why, and how to get the library; porcelet works, so it is a note."""
    monkeypatch.setattr(cpu, "available", lambda: False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    found = computing.native_library()
    assert found.state == "note" and "torch computes everything" in found.cause
    assert "no g++" in found.cause and found.remedy.startswith("install g++")
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/g++")
    assert "--force-reinstall" in computing.native_library().remedy and "g++" not in computing.native_library().remedy
    assert computing.instruction_set().state == "ok"


@pytest.mark.skipif(not cpu.available(), reason="no native module")
def test_instruction_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    """The best there is by itself; a lesser one by the environment is a note, one that is lacking a problem."""
    assert cpu.isas()[-1] == "scalar" and cpu.isa() == cpu.isas()[0]
    assert computing.instruction_set().cause.startswith(cpu.isas()[0])
    monkeypatch.setattr(cpu, "isas", lambda: ["better", "scalar"])
    monkeypatch.setenv("PORCELET_ISA", "scalar")
    assert computing.instruction_set().state == "note" and "better" in computing.instruction_set().cause
    monkeypatch.setenv("PORCELET_ISA", "avx1024")
    with pytest.raises(InputError):
        cpu.isa()
    assert computing.instruction_set() == Finding(
        "instruction_set", "problem", computing.instruction_set().cause, "unset PORCELET_ISA"
    )
    monkeypatch.setenv("PORCELET_KERNELS", "reference")
    assert computing.native_library().remedy == "unset PORCELET_KERNELS"


def test_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """None is well; one that is too old, or without Triton, is a note; what runs on a good one is told."""
    monkeypatch.setenv("PORCELET_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert computing.gpu().state == "ok" and "torch sees none" in computing.gpu().cause
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *device: "Tesla T4")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert computing.gpu().cause.startswith("Tesla T4: the GPU is none of NVIDIA's; porcelet computes on the processor")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    old = computing.gpu()
    assert (
        old.state == "note" and old.cause.startswith("Tesla T4: the GPU is Turing (sm_75): nothing") and not old.remedy
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(computing, "find_spec", lambda name: None)
    assert computing.gpu().state == "note" and computing.gpu().remedy == "pip install 'porcelet[gpu]'"
    monkeypatch.setattr(computing, "find_spec", lambda name: name)
    good = computing.gpu()
    assert good.state == "ok" and "FP8 is multiplied widened to half precision; device=cuda" in good.cause
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    unmeasured = computing.gpu()
    assert unmeasured.state == "note" and unmeasured.remedy == "porcelet bench"
    assert unmeasured.cause.endswith("with Triton's kernels, not measured beside gluon")


def test_measured_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Which kernels are taken; a measurement that no longer holds is a note, a broken one a problem."""
    monkeypatch.setenv("PORCELET_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *device: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(computing, "find_spec", lambda name: name)
    device, path = torch.device("cuda"), tmp_path / contest.FILE
    held = contest.Contest(
        contest.conditions(device), "2026-11-23", (contest.Outcome("latent_attention", "gluon", {"gluon": 1.5}),)
    )
    contest.save(held, path)
    taken = computing.gpu()
    assert taken.state == "ok" and taken.cause.endswith("latent_attention by gluon, as measured on 2026-11-23")
    contest.save(dataclasses.replace(held, conditions=held.conditions | {"triton": "triton 3.0"}), path)
    stale = computing.gpu()
    assert stale.state == "note" and "measured with another triton" in stale.cause and stale.remedy == "porcelet bench"
    path.write_text("?", encoding="utf-8")
    assert computing.gpu().state == "problem"


def test_generations_of_gpus() -> None:
    """Each is listed once; an unknown one is served as the nearest older one is, and named by its own number."""
    assert [one.arch for one in GENERATIONS] == sorted({one.arch for one in GENERATIONS})
    assert [one.arch for one in GENERATIONS if not one.is_served] == [70, 75]
    assert generation_of(90) is next(one for one in GENERATIONS if one.name == "Hopper")
    later = generation_of(130)
    assert later.arch == 130 and later.is_served and later.shared_kib == generation_of(121).shared_kib
    assert not generation_of(60).is_served
    page = (Path(__file__).parent.parent.parent / "docs/kernels.md").read_text(encoding="utf-8")
    for one in GENERATIONS:
        fp8 = "by its own instructions" if one.multiplies_fp8 else "widened"
        loads = "tensor memory accelerator" if one.has_tensor_memory_accelerator else "asynchronous copies"
        row = f"| {one.name}, sm_{one.arch} | {one.cards} | {loads} | {fp8} | {one.shared_kib} KiB |"
        assert (row in page) == one.is_served


def test_two_openmp_runtimes(monkeypatch: pytest.MonkeyPatch) -> None:
    """One is as it should be, and named; a second is a problem."""
    assert computing.openmp().state == "ok" and "omp" in computing.openmp().cause
    monkeypatch.setattr(computing, "openmp_runtimes", lambda: {"/a/libgomp.so.1", "/b/libiomp5.so"})
    assert computing.openmp().state == "problem" and "/b/libiomp5.so" in computing.openmp().cause


def test_more_threads_than_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Affinity and the container's share of time both count; more threads than that are a problem."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(computing, "usable_cores", lambda: 1.5)
    assert computing.threads() == Finding("threads", "problem", computing.threads().cause, "set OMP_NUM_THREADS=1")
    monkeypatch.setattr(computing, "usable_cores", lambda: 8.0)
    assert computing.threads().state == "ok"
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert computing.threads().state == "note" and "4 of 8" in computing.threads().cause


@pytest.mark.parametrize(("quota", "cores"), [("50000 100000", 0.5), ("max 100000", 3), (None, 3), ("odd", 3)])
def test_usable_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: str | None, cores: float) -> None:
    """Three processors of the affinity, or what a container's quota leaves of them."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 5})
    if quota is not None:
        (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
        (tmp_path / "sys/fs/cgroup/cpu.max").write_text(f"{quota}\n")
    assert computing.usable_cores(tmp_path) == cores


def test_a_torch_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    """The version that the package asks for is named, with the command that gets it."""
    assert computing.torch_version().state == "ok"
    monkeypatch.setattr(torch, "__version__", "1.13.1+cpu")
    found = computing.torch_version()
    assert found.state == "problem" and "1.13.1" in found.cause and "pip install 'torch>=" in found.remedy
