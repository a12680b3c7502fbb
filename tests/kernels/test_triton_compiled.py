"""The Triton kernels compile to machine code for each architecture, within its registers and shared memory. No GPU
takes part."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable

import pytest

pytest.importorskip("triton")
from benchmarks import compiled  # noqa: E402

SHARED = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
MOST_SPILLED = 640  # bytes a thread; what Triton 3.6 and 3.9 leave over where 64 rows of 512 sums fill the registers


def check(archs: Iterable[int], *names: str, most_spilled: int = MOST_SPILLED) -> None:
    """In a process of its own, since this one may interpret kernels."""
    command = [sys.executable, "-m", "benchmarks.compiled", "--arch", *map(str, archs), "--case", *names]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert {line["arch"] for line in lines} == set(archs)
    for line in lines:
        assert line["registers"] <= 255 and line["shared"] <= SHARED[line["arch"]], line
        assert line["spilled"] <= most_spilled, line


def test_decoding_fits() -> None:
    """MLA of 128 heads, the widest tile there is, compiles for Ampere, Hopper and Blackwell."""
    check([80, 90, 100], "mla_128")


def test_warps_of_different_tasks_fit() -> None:
    """The Gluon kernels for Hopper: a group's sums stay in registers; attention's addresses do not all."""
    check([90], "mla_hopper_16", "mla_hopper_128_drafts", most_spilled=200)
    check([90], "fp8_hopper_4096", "fp8_hopper_1", most_spilled=0)


def test_products_and_rows_fit() -> None:
    """One of each other kind compiles for Ampere, without a byte spilled."""
    check([80], "fp8_1", "int4_1", "experts_masked", "norm", "gate", "rope", "logprobs", "choose", most_spilled=0)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_case_fits() -> None:
    """Every kernel in every kind that it is launched in; for consumer cards, too."""
    check(SHARED, *compiled.CASES)
