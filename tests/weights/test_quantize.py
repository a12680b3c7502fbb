"""Dequantising and repacking, against the `gguf` library and against each other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize as library_dequantize
from hypothesis import given, settings
from hypothesis import strategies as st

from porcelet.errors import ModelError
from porcelet.kernels.linear import GROUP, unpack_int8
from porcelet.weights import gguf, quantize
from porcelet.weights.gguf import GGUFTensor
from tests.weights import tiny_gguf

TYPES = {kind.name: kind for kind in gguf.TYPES.values()}
BLOCKS = ["Q4_0", "Q4_1", "Q8_0"]


def stored(type_name: str, raw: bytes, shape: tuple[int, ...]) -> GGUFTensor:
    return GGUFTensor("t", TYPES[type_name], shape, memoryview(bytearray(raw)))


def random_blocks(type_name: str, num_blocks: int, seed: int) -> bytes:
    """Blocks of random bytes whose half-precision scales are any finite numbers below 512, subnormals included."""
    random = numpy.random.default_rng(seed)
    blocks = random.integers(0, 256, (num_blocks, TYPES[type_name].size), numpy.uint8)
    num_halves = 2 if type_name == "Q4_1" else 1
    bits = random.integers(0, 0x6000, (num_blocks, num_halves), numpy.uint16) | random.choice(
        [0, 0x8000], (num_blocks, num_halves)
    )
    blocks[:, : 2 * num_halves] = bits.astype("<u2").view(numpy.uint8)
    return blocks.tobytes()


@pytest.mark.parametrize("type_name", ["F32", "F16", "BF16", *BLOCKS])
def test_dequantize_equals_the_library(tmp_path: Path, type_name: str) -> None:
    """Every value is bit for bit the library's."""
    raw = tiny_gguf.write(tmp_path / "tiny.gguf", type_name)["blk.0.ffn_down.weight"]
    found = quantize.dequantize(gguf.read(tmp_path / "tiny.gguf").tensors["blk.0.ffn_down.weight"])
    expected = library_dequantize(raw, GGMLQuantizationType[type_name])
    assert torch.equal(found, torch.from_numpy(expected))


@pytest.mark.parametrize("type_name", BLOCKS)
@given(seed=st.integers(0, 2**32))
@settings(max_examples=30, deadline=None)
def test_any_block_dequantizes_as_in_the_library_and_repacks_without_loss(type_name: str, seed: int) -> None:
    """Random bits: dequantize equals the library's bit for bit, and Int8Weight holds exactly the same values."""
    raw = random_blocks(type_name, 3 * 20, seed)
    tensor = stored(type_name, raw, (20, 3 * GROUP))
    rows = numpy.frombuffer(raw, numpy.uint8).reshape(20, -1)
    expected = torch.from_numpy(library_dequantize(rows, GGMLQuantizationType[type_name]))
    assert torch.equal(quantize.dequantize(tensor).view(torch.int32), expected.view(torch.int32))
    assert torch.equal(quantize.to_int8(tensor).dequantize(), expected)


@pytest.mark.parametrize(("type_name", "largest"), [("Q4_0", 8188.0), ("Q8_0", 511.75)])
def test_a_scale_whose_minimum_leaves_half_precision_is_refused(type_name: str, largest: float) -> None:
    """The largest scale that fits is exact; the next one, infinity and NaN are ModelErrors."""
    values = numpy.array([largest], numpy.float16)
    for scale, fits in (
        (values, True),
        (numpy.nextafter(values, values * 2), False),
        (values * numpy.inf, False),
        (values * numpy.nan, False),
    ):
        raw = scale.astype("<f2").tobytes() + bytes(range(TYPES[type_name].size - 2))
        tensor = stored(type_name, raw, (1, GROUP))
        if fits:
            assert torch.equal(quantize.to_int8(tensor).dequantize(), quantize.dequantize(tensor))
        else:
            with pytest.raises(ModelError, match="'t'.*scale"):
                quantize.to_int8(tensor)


@given(
    exponent=st.floats(-30, 12),  # the largest of 320 draws and the offset stay below half's 65504
    offset=st.floats(-3, 3),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=100, deadline=None)
def test_rounding_moves_a_value_by_half_a_step_at_most(exponent: float, offset: float, seed: int) -> None:
    """The two bounds of `to_int8`'s docstring, on values of every size and place."""
    weights = (torch.randn(5, 2 * GROUP, generator=torch.Generator().manual_seed(seed)) + offset) * 2.0**exponent
    packed = quantize.to_int8(weights, "w")
    scale = unpack_int8(packed)[1].float()
    smallest, largest = weights.view(5, 2, GROUP).aminmax(dim=-1)
    slack = 1 + 2.0**-18
    bound = (largest - smallest + smallest.abs() / 1024) / 255 * (1 + 1 / 1024)
    # half's own step below its normal range is 2^-24: the minimum may lie that much lower, the scale that much higher.
    assert (scale <= (bound + 2.0**-24 / 255 + 2.0**-24) * slack).all()
    assert ((packed.dequantize() - weights).abs().view(5, 2, GROUP) <= scale[..., None] / 2 * slack + 1e-12).all()


def test_constant_groups_and_zeros_are_kept() -> None:
    """A group of equal values that half precision holds comes back exactly."""
    weights = torch.tensor([[0.0], [0.5], [-3.0]]).expand(3, GROUP).contiguous()
    assert torch.equal(quantize.to_int8(weights).dequantize(), weights)


@pytest.mark.parametrize("value", [7e4, -7e4, torch.inf, torch.nan])
def test_values_beyond_half_precision_are_refused(value: float) -> None:
    """One value that int8 cannot hold names the tensor."""
    weights = torch.ones(2, GROUP)
    weights[1, 3] = value
    with pytest.raises(ModelError, match="'w'"):
        quantize.to_int8(weights, "w")


def test_rows_must_be_whole_groups() -> None:
    """A width that is no multiple of 32 is refused with the width."""
    with pytest.raises(ModelError, match="rows of 40"):
        quantize.to_int8(torch.ones(2, 40), "w")


@pytest.mark.parametrize("type_name", ["F32", "Q4_1"])
def test_unpermute_undoes_the_converter(type_name: str) -> None:
    """The permutation of llama.cpp's converter, written out row by row, is undone on floats and on raw rows alike."""
    heads, width = 3, 8
    plain = torch.arange(heads * width * GROUP, dtype=torch.float32).view(heads * width, GROUP)
    rows = plain if type_name == "F32" else torch.randint(0, 256, (heads * width, 20), dtype=torch.uint8)
    permuted = torch.empty_like(rows)
    for head in range(heads):
        for row in range(width):  # pair i of the two halves becomes rows 2i and 2i + 1
            half, pair = divmod(row, width // 2)
            permuted[head * width + 2 * pair + half] = rows[head * width + row]
    assert torch.equal(quantize.unpermute(permuted, heads), rows)
    assert not torch.equal(permuted, rows)


def test_unpermute_commutes_with_dequantize(tmp_path: Path) -> None:
    """Moving quantised rows and moving their values is the same."""
    tiny_gguf.write(tmp_path / "tiny.gguf")
    tensor = gguf.read(tmp_path / "tiny.gguf").tensors["blk.0.attn_q.weight"]
    rows = quantize.unpermute(quantize.raw_bytes(tensor), tiny_gguf.HEADS)
    moved = replace(tensor, data=rows.numpy().data.cast("B"))
    expected = quantize.unpermute(quantize.dequantize(tensor), tiny_gguf.HEADS)
    assert torch.equal(quantize.dequantize(moved), expected)
