"""The GPU benchmark's cases, run small through Triton's interpreter with a made-up clock."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from math import prod

import pytest
import torch

from benchmarks import gpu
from porcelet.errors import InputError
from porcelet.kernels.linear import FP8Weight
from porcelet.models.layers import Linear
from tests.engine.test_gpu import again, take_bodies

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
    take_bodies("interpreted", monkeypatch)
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


def test_a_slice_of_v3_is_measured_beside_its_floor(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a small shape, its graph a function: a step over random FP8 weights runs, and floors are of all its parts."""
    take_bodies("reference", monkeypatch)
    sizes = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    parts = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
    experts = {"n_routed_experts": 16, "moe_intermediate_size": 32, "num_experts_per_tok": 4}
    config = dataclasses.replace(gpu.SLICE, **sizes, **parts, **experts, head_dim=24, num_key_value_heads=4)
    cpu, shape = torch.device("cpu"), {"config": config, "batch": 3, "length": 70}
    found = gpu.slice_line(cpu, clock, lambda run: 8e-4, 1e-6, 5e-9, **shape, dtype=torch.float32, capture=again)
    assert found["replay_over_kernels"] == 1.25 and found["slice"] == "2 layers of V3, b3 s_k70"
    bytes_of, operations = map(sum, zip(*gpu.floors(config, 3, 70), strict=True))
    assert 0 < found["kernels_over_floor"] < 8e-4 / max(bytes_of / 1e3, operations / 5e3)
    model = gpu.random_fp8(config, cpu, torch.float32)
    linear = [module.weight for module in model.modules() if isinstance(module, Linear)]
    stored = sum(prod(w.shape) * (1 if isinstance(w, FP8Weight) else 2) for w in linear)
    experts_read = 16 * (1 - (1 - 4 / 16) ** 3) * 3 * 64 * 32
    cached, gate = 2 * 2 * 3 * 70 * (32 + 8), 4 * 16 * 64
    assert bytes_of == stored + experts_read + cached + gate


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
