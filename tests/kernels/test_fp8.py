"""The native bodies on FP8 weights: every byte, bit for bit what the float bodies give with the expanded weight."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from porcelet.kernels import Key, cpu
from porcelet.kernels.experts import experts
from porcelet.kernels.linear import FP8_BLOCK, FP8Weight, linear
from porcelet.kernels.record import Tape
from tests.kernels.cases import fp8_weight
from tests.kernels.test_cpu import HERE, NO_COMPILER
from tests.kernels.test_float import assert_within_rounding, make_experts, normal, on

pytestmark = pytest.mark.skipif(not cpu.available() and NO_COMPILER, reason="no compiler, hence no native module")

SHAPES = [(1, 1), (3, 17), (130, 127), (129, 128), (257, 129), (37, 300), (700, 576)]  # N, K
TOKENS = (1, 2, 3, 4, 6, 7, 13, 64, 90)


def make_stacks(E: int, D: int, F: int) -> tuple[FP8Weight, FP8Weight]:
    torch.manual_seed(E)
    return fp8_weight(E, 2, F, D), fp8_weight(E, 1, D, F)


@pytest.mark.parametrize("isa", HERE)
def test_every_byte_is_read_as_torch_reads_it(isa: str) -> None:
    """All 256 of them, subnormals, zeros and NaN, in the vectors of a row and in what is left of it; few tokens and
    many."""
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)[:, None].expand(256, 19).contiguous()
    weight = FP8Weight(values, torch.tensor([[2.0], [-0.37]]))
    for T, column in itertools.product((1, 8), (0, 18)):
        x = torch.zeros(T, 19)
        x[:, column] = 1.0
        out = on(isa, lambda x=x: cpu.linear_fp8(x, weight))
        torch.testing.assert_close(out, linear.reference(x, weight), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize(("N", "K"), SHAPES)
def test_linear_has_the_bits_of_the_expanded_weight(isa: str, N: int, K: int) -> None:
    """Any number of tokens, on any number of threads and from slices gives what the float body gives with the weight
    in float32, a token at a time; and that is as near the exact product as its rounding allows."""
    torch.manual_seed(N)
    weight, x = fp8_weight(N, K), normal(90, K + 3)[:, 1:-2]
    dense = weight.dequantize()
    alone = torch.cat([on(isa, lambda t=t: cpu.linear_float(x[t : t + 1], dense)) for t in range(90)])
    for T, threads in itertools.product(TOKENS, (1, 2, 3)):
        for rows in (slice(T), slice(90 - T, 90)):
            out = on(isa, lambda rows=rows: cpu.linear_fp8(x[rows], weight), threads)
            assert torch.equal(out, alone[rows]), (T, threads)
    exact, magnitude = x.double() @ dense.double().T, x.double().abs() @ dense.double().abs().T
    assert_within_rounding(alone, exact, magnitude, K)


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize(("D", "F"), [(1, 1), (33, 21), (129, 130), (70, 257)])
def test_experts_have_the_bits_of_the_expanded_stacks(isa: str, D: int, F: int) -> None:
    """Odd widths, blocks cut short, few tokens and many, on any number of threads; an empty batch too."""
    gate_up, down = make_stacks(6, D, F)
    dense = gate_up.dequantize().flatten(1, 2), down.dequantize().flatten(1, 2)
    for T, threads in itertools.product((0, 1, 7, 40), (1, 2, 3)):
        x, _, _, indices, weights = make_experts(T, D, F)
        expected = on(isa, lambda args=(x, *dense, indices, weights): cpu.experts_float(*args))
        out = on(isa, lambda args=(x, gate_up, down, indices, weights): cpu.experts_fp8(*args), threads)
        assert torch.equal(out, expected), (T, threads)


def test_experts_of_many_tokens_stay_with_their_token() -> None:
    """Beyond the float body's 64 tokens a token still has the bits that it has alone."""
    gate_up, down = make_stacks(6, 140, 67)
    x, _, _, indices, weights = make_experts(150, 140, 67)
    whole = cpu.experts_fp8(x, gate_up, down, indices, weights)
    for t in range(0, 150, 31):
        own = slice(t, t + 1)
        assert torch.equal(cpu.experts_fp8(x[own], gate_up, down, indices[own], weights[own]), whole[own])
    exact = experts.reference(x, gate_up, down, indices, weights)
    assert (whole - exact).abs().max() <= 2e-5 * exact.abs().max()


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("T", [2, 9])
def test_nan_spoils_its_token_and_its_rows_only(isa: str, T: int) -> None:
    """A bad activation spoils its token, a NaN byte its row, a NaN scale the rows of its block."""
    weight, x = fp8_weight(260, 200), normal(T, 200)
    weight.values.view(torch.uint8)[5, 199] = 0xFF
    weight.scale[1, 0] = torch.nan
    x[1, 30] = torch.inf
    out: Tensor = on(isa, lambda: cpu.linear_fp8(x, weight))
    spoilt = torch.zeros(T, 260, dtype=torch.bool)
    spoilt[:, 5] = spoilt[:, FP8_BLOCK : 2 * FP8_BLOCK] = True
    assert out[spoilt].isnan().all() and out[0, ~spoilt[0]].isfinite().all() and not out[1].isfinite().any()


def test_a_recorded_step_reads_the_bytes() -> None:
    """Linear layers and experts of one recording give the eager bodies' bits, for any number of rows."""
    weight, (gate_up, down) = fp8_weight(140, 33), make_stacks(6, 140, 21)
    x, chosen, shares = torch.zeros(40, 33), torch.zeros(40, 3, dtype=torch.int64), torch.zeros(40, 3)
    with torch.inference_mode(), Tape(cpu.new_program(), 40, 1) as tape:
        out = experts(linear(x, weight), gate_up, down, chosen, shares)
    assert len(tape.program) == 2
    for rows, threads in ((1, 1), (40, 2), (7, 3)):
        _, _, _, indices, weights = make_experts(rows)
        x[:rows], chosen[:rows], shares[:rows] = normal(rows, 33), indices, weights
        tape.program.run(rows, 0, threads)
        expected = experts(linear(x[:rows], weight), gate_up, down, indices, weights)
        assert torch.equal(out[:rows], expected)


def test_fp8_is_native_without_gradients_alone() -> None:
    """Inference in float32 reads the bytes; training through such a weight, and other types, expand it."""
    for an_op in (linear, experts):
        assert an_op.chosen(Key("cpu", "FP8Weight", torch.float32, False)) == "cpu_fp8"
        for key in (Key("cpu", "FP8Weight", torch.float32, True), Key("cpu", "FP8Weight", torch.bfloat16, False)):
            assert an_op.chosen(key) != "cpu_fp8"


def test_wrong_shapes_assert() -> None:
    """What the caller got wrong never reaches the addresses."""
    gate_up, down = make_stacks(6, 12, 10)
    x, _, _, indices, weights = make_experts(2, 12, 10)
    for bad in (-1, 6):
        wrong = indices.clone()
        wrong[1, 1] = bad
        with pytest.raises(AssertionError):
            cpu.experts_fp8(x, gate_up, down, wrong, weights)
    with pytest.raises(AssertionError):
        cpu.linear_fp8(x, fp8_weight(5, 13))
    with pytest.raises(AssertionError):
        cpu.linear_fp8(x, fp8_weight(3, 5, 12))
