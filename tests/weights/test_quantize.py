"""Dequantising and repacking, against the `gguf` library and against each other."""

from __future__ import annotations

import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize as library_dequantize
from hypothesis import given, settings
from hypothesis import strategies as st

from porcelet.errors import ModelError
from porcelet.kernels.linear import GROUP, Int8Weight, SymmetricInt8Weight, kind_with
from porcelet.weights import gguf, quantize
from porcelet.weights.gguf import GGUFTensor
from tests.weights import tiny_gguf

TYPES = {kind.name: kind for kind in gguf.TYPES.values()}
EXACT = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]
K_QUANTS = ["Q4_K", "Q5_K", "Q6_K"]


def stored(type_name: str, raw: bytes, shape: tuple[int, ...]) -> GGUFTensor:
    return GGUFTensor("t", TYPES[type_name], shape, memoryview(bytearray(raw)))


def random_blocks(type_name: str, num_blocks: int, seed: int) -> bytes:
    """Blocks of random bytes; their half-precision scales are zeros, subnormals and any numbers below 512, signed."""
    random = numpy.random.default_rng(seed)
    blocks = random.integers(0, 256, (num_blocks, TYPES[type_name].size), numpy.uint8)
    for place in tiny_gguf.HALVES[type_name]:
        bits = random.integers(0, random.choice([1, 0x400, 0x2000, 0x6000], num_blocks)).astype(numpy.uint16)
        bits |= random.choice([0, 0x8000], num_blocks).astype(numpy.uint16)
        blocks[:, place : place + 2] = bits.astype("<u2")[:, None].view(numpy.uint8)
    return blocks.tobytes()


def same_bits(found: torch.Tensor, expected: numpy.ndarray) -> bool:
    return torch.equal(found.view(torch.int32), torch.from_numpy(expected).view(torch.int32))


@pytest.mark.parametrize("type_name", ["F32", "F16", "BF16", *EXACT])
def test_dequantize_equals_the_library(tmp_path: Path, type_name: str) -> None:
    """Every value is bit for bit the library's."""
    raw = tiny_gguf.write(tmp_path / "tiny.gguf", type_name)["blk.0.ffn_down.weight"]
    found = quantize.dequantize(gguf.read(tmp_path / "tiny.gguf").tensors["blk.0.ffn_down.weight"])
    assert same_bits(found, library_dequantize(raw, GGMLQuantizationType[type_name]))


@pytest.mark.parametrize("type_name", [*EXACT, *K_QUANTS])
@given(seed=st.integers(0, 2**32))
@settings(max_examples=30, deadline=None)
def test_any_block_dequantizes_as_in_the_library(type_name: str, seed: int) -> None:
    """Random bits, in a tensor of three dimensions: dequantize equals the library's bit for bit."""
    raw = random_blocks(type_name, 2 * 5 * 3, seed)
    found = quantize.dequantize(stored(type_name, raw, (2, 5, 3 * TYPES[type_name].block)))
    rows = numpy.frombuffer(raw, numpy.uint8).reshape(2, 5, -1)
    assert same_bits(found, library_dequantize(rows, GGMLQuantizationType[type_name]))


@pytest.mark.parametrize("type_name", K_QUANTS)
@given(seed=st.integers(0, 2**32))
@settings(max_examples=5, deadline=None)
def test_k_quants_equal_the_layout_written_out(type_name: str, seed: int) -> None:
    """Random bits: dequantize equals one value after another, computed from ggml's block layout in plain Python."""
    raw = random_blocks(type_name, 4, seed)
    found = quantize.dequantize(stored(type_name, raw, (2, 512)))
    size = TYPES[type_name].size
    expected = [value for start in range(0, len(raw), size) for value in SCALAR[type_name](raw[start : start + size])]
    assert same_bits(found, numpy.array(expected, numpy.float32).reshape(2, 512))


@pytest.mark.parametrize("type_name", EXACT)
@given(seed=st.integers(0, 2**32))
@settings(max_examples=30, deadline=None)
def test_blocks_of_32_repack_without_loss(type_name: str, seed: int) -> None:
    """Random bits: packed weights hold exactly the values of the blocks, in 8 bits and where it has 4, in those."""
    tensor = stored(type_name, random_blocks(type_name, 3 * 20, seed), (20, 3 * GROUP))
    assert quantize.bits_of(tensor) == (4 if type_name.startswith("Q4") else 8)
    for bits in {8, quantize.bits_of(tensor)}:
        packed = quantize.to_packed(tensor, bits)
        assert packed.symmetric == type_name.endswith("_0")
        assert torch.equal(packed.dequantize(), quantize.dequantize(tensor))
        with_minima = quantize.to_packed(tensor, bits, kind=kind_with(bits, False))
        assert torch.equal(with_minima.dequantize(), quantize.dequantize(tensor))


@pytest.mark.parametrize("type_name", ["Q4_K", "Q5_K"])
@given(seed=st.integers(0, 2**32))
@settings(max_examples=30, deadline=None)
def test_k_quants_repack_within_their_bound(type_name: str, seed: int) -> None:
    """Scales of every size: q is kept, a value moves as little as `to_packed` promises, in small groups not at all."""
    raw = random_blocks(type_name, 3 * 20, seed)
    tensor = stored(type_name, raw, (20, 3 * 256))
    packed = quantize.to_packed(tensor, quantize.bits_of(tensor))
    q, scale, minimum = (part.double() for part in parts_of_k(type_name, raw))  # [20 * 24, 32], twice [20 * 24, 1]
    found, exact = packed.dequantize().view(-1, GROUP), quantize.dequantize(tensor).view(-1, GROUP)
    bound = (q * scale.abs() + minimum.abs()) / 2048
    assert ((found.double() - exact.double()).abs() <= bound + found.double().abs() * 2.0**-23).all()
    assert torch.equal(packed.unpack()[0].view(-1, GROUP), q.to(torch.uint8))
    small = (torch.maximum(scale.abs(), minimum.abs()) < 2.0**-13)[:, 0]
    assert small.any()
    assert torch.equal(found[small], exact[small])


@given(seed=st.integers(0, 2**32))
@settings(max_examples=20, deadline=None)
def test_q6_k_is_rounded_like_its_floats(seed: int) -> None:
    """Q6_K packed is the float32 values packed, bit for bit; the bound of rounding is tested there."""
    random = numpy.random.default_rng(seed)
    blocks = random.integers(0, 256, (18, 210), numpy.uint8)
    blocks[:, 208:] = random.uniform(-4, 4, 18).astype("<f2")[:, None].view(numpy.uint8)
    tensor = stored("Q6_K", blocks.tobytes(), (9, 512))
    for bits in (4, 8):
        rounded = quantize.to_packed(quantize.dequantize(tensor), bits)
        assert torch.equal(quantize.to_packed(tensor, bits).packed, rounded.packed)


@pytest.mark.parametrize("type_name", ["F32", "Q4_1", "Q4_K", "Q6_K"])
def test_pieces_make_the_whole(monkeypatch: pytest.MonkeyPatch, type_name: str) -> None:
    """In pieces of a tile, the last of them not full, the results are those of one piece."""
    random = numpy.random.default_rng(0)
    raw = {
        "F32": lambda: random.standard_normal((37, 512)).astype("<f4").tobytes(),
        "Q4_1": lambda: random_blocks("Q4_1", 37 * 16, 0),
    }.get(type_name, lambda: tiny_gguf.random_blocks(random, (37, 512), type_name).tobytes())
    tensor = stored(type_name, raw(), (37, 512))
    whole = quantize.dequantize(tensor), *(quantize.to_packed(tensor, bits).packed for bits in (8, 4))
    monkeypatch.setattr(quantize, "PIECE", 1)
    assert torch.equal(quantize.dequantize(tensor), whole[0])
    for bits, packed in zip((8, 4), whole[1:], strict=True):
        assert torch.equal(quantize.to_packed(tensor, bits).packed, packed)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_little_memory_beside_the_result() -> None:
    """Unpacking 17 million values needs less than 48 MB beside the result, as the system counts a process's peak."""
    subprocess.run([sys.executable, "-c", PEAK_MEMORY], check=True)


PEAK_MEMORY = """
import torch
from porcelet.weights import gguf, quantize

def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

def tensor(name, num_rows):
    kind = next(kind for kind in gguf.TYPES.values() if kind.name == name)
    raw = bytearray(num_rows * 4096 // kind.block * kind.size)
    return gguf.GGUFTensor("t", kind, (num_rows, 4096), memoryview(raw))

for name in ("Q4_K", "Q6_K"):
    to_int8 = lambda tensor: quantize.to_packed(tensor, 8)
    for work, width in ((quantize.dequantize, 4), (to_int8, 1.125)):
        work(tensor(name, 16))  # what libraries allocate once
        big = tensor(name, 4096)
        open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
        before = status("VmRSS")
        work(big)
        extra = status("VmHWM") - before - 4096 * 4096 * width
        assert -2**23 < extra < 48 * 2**20, (name, work, extra)
"""


# ---- K-quants one value at a time, from the block structures of ggml ------------------------------------------------


def scale_and_minimum(group: int, packed: bytes) -> tuple[int, int]:
    """The 6-bit scale and minimum of one of eight groups, from Q4_K's and Q5_K's 12 bytes."""
    if group < 4:
        return packed[group] % 64, packed[group + 4] % 64
    low = packed[group + 4]
    return low % 16 + packed[group - 4] // 64 * 16, low // 16 + packed[group] // 64 * 16


def k_groups(block: bytes) -> Iterator[tuple[numpy.float32, numpy.float32]]:
    """d · sc and dmin · mn of the eight groups, each product rounded to float32."""
    d, dmin = (numpy.float32(value) for value in struct.unpack_from("<ee", block))
    for group in range(8):
        scale, minimum = scale_and_minimum(group, block[4:16])
        yield d * numpy.float32(scale), dmin * numpy.float32(minimum)


def q_of_k(type_name: str, block: bytes, group: int, i: int) -> int:
    nibbles = block[16:] if type_name == "Q4_K" else block[48:]
    byte = nibbles[32 * (group // 2) + i]
    q = byte // 16 if group % 2 else byte % 16
    return q if type_name == "Q4_K" else q + 16 * (block[16 + i] >> group & 1)


def scalar_k(type_name: str, block: bytes) -> list[numpy.float32]:
    return [
        scale * numpy.float32(q_of_k(type_name, block, group, i)) - minimum
        for group, (scale, minimum) in enumerate(k_groups(block))
        for i in range(32)
    ]


def scalar_q6_k(block: bytes) -> list[numpy.float32]:
    d = numpy.float32(struct.unpack_from("<e", block, 208)[0])
    scales = struct.unpack_from("16b", block, 192)
    values = []
    for i in range(256):
        half, run, place = i // 128, i // 32 % 4, i % 32
        byte = block[64 * half + 32 * (run % 2) + place]
        low = byte // 16 if run >= 2 else byte % 16
        high = block[128 + 32 * half + place] >> 2 * run & 3
        values.append(d * numpy.float32(scales[i // 16]) * numpy.float32(low + 16 * high - 32))
    return values


def parts_of_k(type_name: str, raw: bytes) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q [groups, 32], scale and (negative) minimum [groups, 1] of Q4_K or Q5_K blocks."""
    size = TYPES[type_name].size
    blocks = [raw[start : start + size] for start in range(0, len(raw), size)]
    q = [[q_of_k(type_name, block, group, i) for i in range(32)] for block in blocks for group in range(8)]
    groups = numpy.array([group for block in blocks for group in k_groups(block)])
    return torch.tensor(q), torch.from_numpy(groups[:, :1]), -torch.from_numpy(groups[:, 1:])


SCALAR = {"Q4_K": partial(scalar_k, "Q4_K"), "Q5_K": partial(scalar_k, "Q5_K"), "Q6_K": scalar_q6_k}


# ---- edges of half precision, rounding ------------------------------------------------------------------------------


@pytest.mark.parametrize(("type_name", "largest"), [("Q4_0", 8188.0), ("Q5_0", 4094.0), ("Q8_0", 511.75)])
def test_a_scale_whose_minimum_leaves_half_precision_is_refused(type_name: str, largest: float) -> None:
    """With minima the largest scale that fits is exact and the next one a ModelError; without, infinity and NaN are."""
    values = numpy.array([largest], numpy.float16)
    for scale, fits in (
        (values, True),
        (numpy.nextafter(values, values * 2), False),
        (values * numpy.inf, False),
        (values * numpy.nan, False),
    ):
        raw = scale.astype("<f2").tobytes() + bytes(range(TYPES[type_name].size - 2))
        tensor = stored(type_name, raw, (1, GROUP))
        for kind in (Int8Weight, SymmetricInt8Weight):
            if fits or (kind.symmetric and numpy.isfinite(scale).all()):
                packed = quantize.to_packed(tensor, 8, kind=kind)
                assert torch.equal(packed.dequantize(), quantize.dequantize(tensor))
            else:
                with pytest.raises(ModelError, match="'t'.*scale"):
                    quantize.to_packed(tensor, 8, kind=kind)


@pytest.mark.parametrize("bits", [8, 4])
@given(
    exponent=st.floats(-30, 12),  # the largest of 320 draws and the offset stay below half's 65504
    offset=st.floats(-3, 3),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=100, deadline=None)
def test_rounding_moves_a_value_by_half_a_step_at_most(bits: int, exponent: float, offset: float, seed: int) -> None:
    """The two bounds of `to_packed`'s docstring, on values of every size and place."""
    weights = (torch.randn(5, 2 * GROUP, generator=torch.Generator().manual_seed(seed)) + offset) * 2.0**exponent
    packed, steps = quantize.to_packed(weights, bits, "w"), 2**bits - 1
    scale = packed.unpack()[1].float()
    smallest, largest = weights.view(5, 2, GROUP).aminmax(dim=-1)
    slack = 1 + 2.0**-18
    bound = (largest - smallest + smallest.abs() / 1024) / steps * (1 + 1 / 1024)
    # half's own step below its normal range is 2^-24: the minimum may lie that much lower, the scale that much higher.
    assert (scale <= (bound + 2.0**-24 / steps + 2.0**-24) * slack).all()
    # A value is put together in float32, which rounds it by up to 2^-23 of the largest one.
    rounding = 2.0**-23 * weights.abs().view(5, 2, GROUP).amax(dim=-1, keepdim=True) + 1e-12
    assert ((packed.dequantize() - weights).abs().view(5, 2, GROUP) <= scale[..., None] / 2 * slack + rounding).all()


def test_constant_groups_and_zeros_are_kept() -> None:
    """A group of equal values that half precision holds comes back exactly."""
    weights = torch.tensor([[0.0], [0.5], [-3.0]]).expand(3, GROUP).contiguous()
    for bits in (8, 4):
        assert torch.equal(quantize.to_packed(weights, bits).dequantize(), weights)


@pytest.mark.parametrize("value", [7e4, -7e4, torch.inf, torch.nan])
def test_values_beyond_half_precision_are_refused(value: float) -> None:
    """One value that int8 cannot hold names the tensor."""
    weights = torch.ones(2, GROUP)
    weights[1, 3] = value
    with pytest.raises(ModelError, match="'w'"):
        quantize.to_packed(weights, 8, "w")


def test_rows_must_be_whole_groups() -> None:
    """A width that is no multiple of 32 is refused with the width."""
    with pytest.raises(ModelError, match="rows of 40"):
        quantize.to_packed(torch.ones(2, 40), 8, "w")


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
