"""The GPU benchmark's cases, run small through Triton's interpreter with a made-up clock."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from benchmarks import gpu
from porcelet.errors import InputError

pytest.importorskip("triton")
NEEDS_NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="what is told where there is no GPU")


def clock(run: gpu.Run) -> float:
    """It runs, and takes a millisecond."""
    run()
    return 1e-3


@NEEDS_NO_GPU
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_every_case_runs_and_gives_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels and rivals compute; shares follow from bytes, operations and the device's own rates."""
    monkeypatch.setenv("PORCELET_KERNELS", "interpreted")
    torch.manual_seed(0)
    copy, rate = gpu.copy_bandwidth(clock, 1 << 12), gpu.product_rate(clock, 16)
    assert copy == pytest.approx(2 * 4096 / 1e-3 / 1e9) and rate == pytest.approx(2 * 16**3 / 1e-3 / 1e12)
    lines = {
        case.name: (case, gpu.line(case, clock, copy, rate)) for case in gpu.cases(torch.device("cpu"), small=True)
    }
    assert len(lines) == 23
    for case, found in lines.values():
        assert found["microseconds"] == 1000.0
        assert found["of_copy"] == pytest.approx(case.num_bytes / (2 * 4096), rel=1e-3)
        assert found["of_matmul"] == pytest.approx(case.operations / (2 * 16**3), rel=1e-3)
        assert found["times_faster_than"] == dict.fromkeys(case.rivals, 1.0)


@NEEDS_NO_GPU
def test_without_a_gpu_the_command_says_so() -> None:
    """No line, no trace, and what to do instead."""
    with pytest.raises(InputError, match="torch sees none"):
        next(gpu.measure(1.0))
    command = [sys.executable, "-m", "benchmarks.kernels", "--device", "cuda"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2 and not done.stdout
    assert "leave --device out" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.gpu
def test_the_kernels_are_measured() -> None:
    """The first lines on a GPU: the device, then times that are none of zero."""
    lines = gpu.measure(1.0)
    device, first = next(lines), next(lines)
    assert device["copy_gb_per_s"] > 100 and first["microseconds"] > 0
