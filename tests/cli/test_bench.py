"""`porcelet bench` where there is a GPU: what it measures, keeps and tells. Measurements are made up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from porcelet.cli import app, bench
from porcelet.kernels import cpu
from porcelet.kernels.triton import contest, device
from porcelet.plan import machine as machines
from porcelet.plan.machine import Machine

HELD = contest.Contest(
    {"gpu": "NVIDIA H200", "triton": "triton 3.9.0"},
    "2026-11-23",
    (
        contest.Outcome("latent_attention", "gluon", {"gluon": 1.5}, {"flash_mla": "RuntimeError: no such image"}),
        contest.Outcome("grouped_attention", "triton"),
    ),
)


@pytest.fixture(autouse=True)
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine whose costs are known; the folder that results go to."""
    costs = {"read": 3e10} | {f"product.{w}.{n}": 1e-11 for w in ("float32", "int8", "int4") for n in (1, 16, 512)}
    monkeypatch.setenv("PORCELET_HOME", str(tmp_path))
    monkeypatch.setattr(cpu, "available", lambda: True)
    monkeypatch.setattr(bench, "_measured", lambda now: Machine("EPYC", 2, "avx2", now.torch, now.date, costs))
    monkeypatch.setattr(machines, "check_current", lambda found, now: None)
    return tmp_path


def run(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["bench", *arguments], catch_exceptions=False)
    assert done.exit_code == 0
    return done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU would be measured")
def test_without_a_gpu_nothing_is_said_of_one(measured: Path) -> None:
    """Neither in lines nor in JSON, and there is no file."""
    assert "kernels by their speed" not in run() and "gpu" not in json.loads(run("--json"))
    assert not (measured / contest.FILE).exists()


def test_a_gpu_s_kernels_are_kept_and_told(measured: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What each task takes, how much faster it was, and what could not be measured; engines read it from the file."""
    monkeypatch.setattr(device, "available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(contest, "hold", lambda device, tell: HELD)
    lines = [" ".join(line.split()) for line in run().splitlines()]
    assert "NVIDIA H200, kernels by their speed over Triton's" in lines
    assert "latent_attention takes gluon gluon 1.50; flash_mla: RuntimeError: no such image" in lines
    assert "grouped_attention takes triton" in lines
    assert contest.load(measured / contest.FILE) == HELD
    assert json.loads(run("--json"))["gpu"]["outcomes"][0]["taken"] == "gluon"
