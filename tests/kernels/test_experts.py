"""Packed experts as jobs of a team: whoever takes them, the bits are the same."""

from __future__ import annotations

import pytest
import torch

from porcelet.kernels import Key, cpu
from porcelet.kernels.cpu.target import AtOnce
from porcelet.kernels.experts import experts
from porcelet.kernels.linear import Int4Weight
from tests.kernels.cases import activations, packed_experts
from tests.kernels.test_cpu import HERE, NO_COMPILER
from tests.kernels.test_float import on

pytestmark = pytest.mark.skipif(not cpu.available() and NO_COMPILER, reason="no compiler, hence no native module")


@pytest.mark.parametrize("tokens", [1, 7, 70])
def test_bits_do_not_depend_on_who_takes_a_job(tokens: int) -> None:
    """One token and several blocks of them, on teams smaller and larger than the machine, again and again."""
    torch.manual_seed(tokens)
    weights = packed_experts(6, 2, 96, 64, Int4Weight), packed_experts(6, 1, 64, 96, Int4Weight)
    chosen = torch.rand(tokens, 6).topk(3).indices, torch.rand(tokens, 3)
    args = activations(tokens, 64), *weights, *chosen
    with torch.inference_mode():
        alone = on(HERE[-1], lambda: experts(*args))
        for threads in (2, 3, 7) * 5:
            assert torch.equal(on(HERE[-1], lambda: experts(*args), threads), alone)


def test_a_packed_layer_meets_four_times() -> None:
    """A team of two meets when x is rounded, when jobs are laid out, when hidden rows are ready and at the end."""
    weights = packed_experts(6, 2, 96, 64, Int4Weight), packed_experts(6, 1, 64, 96, Int4Weight)
    args = activations(3, 64), *weights, torch.arange(6).view(3, 2), torch.rand(3, 2)  # which the program reads later
    target = AtOnce()
    instruction = experts.instruction_for(Key("cpu", "PackedExperts", torch.float32, needs_grad=False))
    assert instruction is not None
    instruction(target, *args)
    assert target.program.run(3, 0, 2) == 4
    assert target.program.run(3, 0, 1) == 0
