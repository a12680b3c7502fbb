"""Packed experts as jobs of a team: whoever takes them, the bits are the same."""

from __future__ import annotations

import pytest
import torch

from porcelet.kernels import cpu
from porcelet.kernels.experts import experts
from tests.kernels.cases import activations, packed_experts
from tests.kernels.test_cpu import HERE, NO_COMPILER
from tests.kernels.test_float import on

pytestmark = pytest.mark.skipif(not cpu.available() and NO_COMPILER, reason="no compiler, hence no native module")


@pytest.mark.parametrize("tokens", [1, 7, 70])
def test_bits_do_not_depend_on_who_takes_a_job(tokens: int) -> None:
    """One token and several blocks of them, on teams smaller and larger than the machine, again and again."""
    torch.manual_seed(tokens)
    weights = packed_experts(6, 2, 96, 64, 4), packed_experts(6, 1, 64, 96, 4)
    chosen = torch.rand(tokens, 6).topk(3).indices, torch.rand(tokens, 3)
    args = activations(tokens, 64), *weights, *chosen
    with torch.inference_mode():
        alone = on(HERE[-1], lambda: experts(*args))
        for threads in (2, 3, 7) * 5:
            assert torch.equal(on(HERE[-1], lambda: experts(*args), threads), alone)
