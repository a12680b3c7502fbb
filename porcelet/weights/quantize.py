"""From stored formats to those that a model computes with: float32 and the kinds of `PackedWeight`.

GGUF's blocks are runs of neighbouring values with a scale, some with a minimum too. Packed weights have groups of 32,
w = scale · q + minimum with unsigned q and half-precision scale and minimum, or are symmetric and have no minima. The
blocks of 32 fit in without any loss, those of four bits into either:

    Q4_0  w = d · (q - 8)       symmetric, scale d
    Q5_0  w = d · (q - 16)      symmetric in 8 bits, scale d, with q + 112 in place of q
    Q8_0  w = d · q, q signed   symmetric, scale d, with q + 128 in place of q
    Q4_1  w = d · q + m         scale d, minimum m          Q5_1 the same with one bit more

Where they are to have minima, to stand in one stack with others, those are -8 d, -16 d and -128 d, exact in half but
for the largest scales.

The K-quants are super-blocks of 256 values that share a half d (and a half dmin), cut into groups with small integer
scales of their own:

    Q4_K, Q5_K  w = (d · sc) · q - (dmin · mn)    8 groups of 32, sc and mn of 6 bits: scale and minimum want 17 bits
                                                  and are rounded to half's 11; q is kept
    Q6_K        w = (d · sc) · q, q signed        16 groups of 16, sc of 8 bits: rounded like floats

Everything else is rounded, to 8 or 4 bits, each group of 32 between its own smallest and largest value. Tensors are
worked on in pieces of about `PIECE` values, so beside the result only a few megabytes are ever needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from porcelet.errors import ModelError
from porcelet.kernels.linear import (
    GROUP,
    TILE,
    PackedWeight,
    block_bytes,
    kind_with,
    pack,
    pack_bytes,
    packed_weight,
)
from porcelet.weights.gguf import GGUFTensor

if TYPE_CHECKING:
    from jaxtyping import Float, Float16, Shaped, UInt8

PLAIN_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
HALF_MAX = 65504.0
PIECE = 1 << 20  # values worked on at a time: few enough for the caches, enough to keep every core busy


def raw_bytes(tensor: GGUFTensor) -> UInt8[Tensor, "rows row_bytes"]:
    """The stored bytes, one row of the tensor a row, without a copy."""
    return torch.frombuffer(tensor.data, dtype=torch.uint8).view(prod(tensor.shape[:-1]), -1)


def plain(tensor: GGUFTensor) -> Tensor | None:
    """The tensor of a file's F32, F16 or BF16 entry, in that type and without a copy; None where blocks are stored."""
    dtype = PLAIN_TYPES.get(tensor.type.name)
    return None if dtype is None else torch.frombuffer(tensor.data, dtype=dtype).view(tensor.shape)


def dequantize(tensor: GGUFTensor) -> Tensor:
    """The values in float32, bit for bit those that ggml defines: every product and sum rounded, in its order.

    Memory beside the result: a few times `PIECE` floats.
    """
    values = plain(tensor)
    if values is not None:
        return values.float()
    read = _BLOCKS[tensor.type.name]
    rows = raw_bytes(tensor)
    weights = torch.empty(len(rows), tensor.shape[-1])
    for piece in _pieces(*weights.shape):
        _fill(weights[piece], *read(rows[piece]))
    return weights.view(tensor.shape)


def bits_of(tensor: object) -> int:
    """How many bits a packed weight needs to hold the tensor as well as it can: 4 for Q4_0, Q4_1 and Q4_K, else 8."""
    return 4 if isinstance(tensor, GGUFTensor) and tensor.type.name in FOUR_BITS else 8


def kind_of(tensor: object, bits: int | None = None) -> type[PackedWeight]:
    """The kind of packed weight that holds the tensor in so many bits, or in the fewest that hold it as well as can be:
    symmetric where the file's format is, and no value has to be rounded."""
    needed = bits_of(tensor)
    bits = bits or needed
    return kind_with(bits, isinstance(tensor, GGUFTensor) and tensor.type.name in SYMMETRIC and bits >= needed)


def to_packed(
    tensor: Tensor | GGUFTensor, bits: int, name: str = "", kind: type[PackedWeight] | None = None
) -> PackedWeight:
    """A [N, K] weight in 8 or 4 bits, of another than its own kind if that is named. Memory beside the result: a few
    times `PIECE` floats.

    Exact from Q4_0 and Q4_1, and in 8 bits from Q5_0, Q5_1 and Q8_0.

    From Q4_K, and in 8 bits from Q5_K, q is kept, and scale s and minimum m move to the nearest half: a value moves by
    at most (q |s| + |m|) / 2048. Where zero lies within the group that is 1.5 % of the format's own step for Q4_K and
    3 % for Q5_K. Small groups lose nothing: every half is a multiple of 2^-24, so s and m are too, and half holds all
    multiples of 2^-24 below 2^-13.

    From all others each value moves by at most half its group's new scale, and with 255 or 15 steps that
    scale <= (largest - smallest + |smallest| / 1024) / steps * (1 + 1/1024), or half's least step 2^-24 if that is
    more (and float32's rounding).

    Raises:
        ModelError: K is no multiple of 32, or a value or scale that half precision cannot hold.
    """
    if isinstance(tensor, GGUFTensor):
        name = name or tensor.name
    assert len(tensor.shape) == 2, (name, tensor.shape)
    N, K = tensor.shape
    if K % GROUP:
        raise ModelError(f"tensor {name!r}: rows of {K} values are not whole groups of {GROUP}; load it as float32")
    kind = kind or kind_of(tensor, bits)
    packed = torch.empty(-(-N // TILE), K // GROUP, block_bytes(kind), dtype=torch.uint8)
    make = _packer(tensor, kind, name)
    for piece in _pieces(N, K):
        packed[piece.start // TILE : -(-piece.stop // TILE)] = make(piece).packed
    return packed_weight(packed, (N, K))


def unpermute(rows: Shaped[Tensor, "N row"], num_heads: int) -> Shaped[Tensor, "N row"]:
    """Undo the order in which GGUF keeps the rows of llama's query and key projections.

    GGUF interleaves the two halves of every head for its form of RoPE; Hugging Face keeps [first half, second half].
    Only whole rows move, so `rows` may be floats as well as the raw bytes of quantised ones. A copy.
    """
    return rows.view(num_heads, -1, 2, rows.shape[1]).transpose(1, 2).reshape(rows.shape)


# ---- blocks ---------------------------------------------------------------------------------------------------------
# What a format's reader returns: q [rows, groups, width], int8 or uint8; scale and minimum [rows, groups], as halves
# where the file holds halves and as float32 products otherwise. w = scale · q + minimum; no minimum is none to add.
_Blocks = tuple[Tensor, Tensor, Tensor | None]


def _fill(weights: Float[Tensor, "rows K"], q: Tensor, scale: Tensor, minimum: Tensor | None) -> None:
    """The values, computed where they are to lie: a temporary beside them would leave holes in the heap."""
    grouped = weights.view(q.shape)  # [rows, groups, width]
    grouped.copy_(q).mul_(scale.float()[..., None])
    if minimum is not None:
        grouped += minimum.float()[..., None]


def _read_q4_0(rows: UInt8[Tensor, "rows row_bytes"]) -> _Blocks:
    blocks = _cut(rows, 18)
    return _nibbles(blocks[..., 2:]).view(torch.int8) - 8, _half(blocks[..., :2]), None


def _read_q4_1(rows: UInt8[Tensor, "rows row_bytes"]) -> _Blocks:
    blocks = _cut(rows, 20)
    return _nibbles(blocks[..., 4:]), _half(blocks[..., :2]), _half(blocks[..., 2:4])


def _read_q5_0(rows: UInt8[Tensor, "rows row_bytes"]) -> _Blocks:
    blocks = _cut(rows, 22)
    q = _nibbles(blocks[..., 6:]) | _bits(blocks[..., 2:6]) << 4
    return q.view(torch.int8) - 16, _half(blocks[..., :2]), None


def _read_q5_1(rows: UInt8[Tensor, "rows row_bytes"]) -> _Blocks:
    blocks = _cut(rows, 24)
    q = _nibbles(blocks[..., 8:]) | _bits(blocks[..., 4:8]) << 4
    return q, _half(blocks[..., :2]), _half(blocks[..., 2:4])


def _read_q8_0(rows: UInt8[Tensor, "rows row_bytes"]) -> _Blocks:
    blocks = _cut(rows, 34)
    return blocks[..., 2:].view(torch.int8), _half(blocks[..., :2]), None


def _read_q4_k(rows: UInt8[Tensor, "rows row_bytes"]) -> _Blocks:
    blocks = _cut(rows, 144)
    return _k_nibbles(blocks[..., 16:]).view(len(rows), -1, 32), *_k_scales(blocks)


def _read_q5_k(rows: UInt8[Tensor, "rows row_bytes"]) -> _Blocks:
    blocks = _cut(rows, 176)
    # Bit g of byte i is the high bit of value i of group g.
    high = blocks[..., None, 16:48] >> torch.arange(8, dtype=torch.uint8)[:, None] & 1  # [rows, blocks, 8, 32]
    q = _k_nibbles(blocks[..., 48:]) | high << 4
    return q.view(len(rows), -1, 32), *_k_scales(blocks)


def _read_q6_k(rows: UInt8[Tensor, "rows row_bytes"]) -> _Blocks:
    blocks = _cut(rows, 210)
    # Two halves of 128 values, each four runs of 32: two in the low nibbles of 64 bytes, two in the high ones; the
    # runs' upper two bits lie in one set of 32 bytes, run r's at bit 2 r.
    low = blocks[..., :128].unflatten(-1, (2, 64))
    low = torch.stack((low & 15, low >> 4), dim=-2).unflatten(-1, (2, 32)).flatten(-3, -2)  # [rows, blocks, 2, 4, 32]
    high = blocks[..., 128:192].unflatten(-1, (2, 1, 32)) >> torch.arange(0, 8, 2, dtype=torch.uint8)[:, None] & 3
    q = (low | high << 4).view(torch.int8) - 32
    scale = _half(blocks[..., 208:]).float()[..., None] * blocks[..., 192:208].view(torch.int8)  # [rows, blocks, 16]
    return q.view(len(rows), -1, 16), scale.flatten(1), None


def _k_nibbles(bytes_: UInt8[Tensor, "rows blocks 128"]) -> UInt8[Tensor, "rows blocks 8 32"]:
    """Four runs of 32 bytes: the low nibbles of a run are one group, the high ones the next."""
    runs = bytes_.unflatten(-1, (4, 32))
    return torch.stack((runs & 15, runs >> 4), dim=-2).flatten(-3, -2)


def _k_scales(
    blocks: UInt8[Tensor, "rows blocks block_bytes"],
) -> tuple[Float[Tensor, "rows groups"], Float[Tensor, "rows groups"]]:
    """d · sc and -dmin · mn of Q4_K and Q5_K, from two halves and 12 bytes with eight sc and eight mn of 6 bits.

    Groups 0 to 3 lie in the low 6 bits of bytes 0-3 (sc) and 4-7 (mn). Of groups 4 to 7 the low four bits lie in bytes
    8-11 (sc below, mn above), the high two in the top bits of bytes 0-3 (sc) and 4-7 (mn).
    """
    first, second, third = blocks[..., 4:16].split(4, dim=-1)
    scales = torch.cat((first & 63, third & 15 | first >> 6 << 4), dim=-1)
    minima = torch.cat((second & 63, third >> 4 | second >> 6 << 4), dim=-1)
    d, dmin = _half(blocks[..., :2]).float()[..., None], _half(blocks[..., 2:4]).float()[..., None]
    return (d * scales).flatten(1), (dmin * minima).neg_().flatten(1)


def _cut(rows: UInt8[Tensor, "rows row_bytes"], size: int) -> UInt8[Tensor, "rows blocks size"]:
    return rows.view(len(rows), -1, size)


def _nibbles(bytes_: UInt8[Tensor, "rows groups 16"]) -> UInt8[Tensor, "rows groups 32"]:
    """A block's first 16 values are the low halves of its bytes, the last 16 the high ones."""
    return torch.cat((bytes_ & 15, bytes_ >> 4), dim=-1)


def _bits(bytes_: UInt8[Tensor, "rows groups 4"]) -> UInt8[Tensor, "rows groups 32"]:
    """One bit a value, the first in the lowest bit of the first byte."""
    return (bytes_[..., None] >> torch.arange(8, dtype=torch.uint8) & 1).flatten(-2)


def _half(bytes_: UInt8[Tensor, "rows groups 2"]) -> Float16[Tensor, "rows groups"]:
    return bytes_.contiguous().view(torch.float16).squeeze(-1)


_BLOCKS: dict[str, Callable[[Tensor], _Blocks]] = {
    "Q4_0": _read_q4_0,
    "Q4_1": _read_q4_1,
    "Q5_0": _read_q5_0,
    "Q5_1": _read_q5_1,
    "Q8_0": _read_q8_0,
    "Q4_K": _read_q4_k,
    "Q5_K": _read_q5_k,
    "Q6_K": _read_q6_k,
}
# What makes a format's q unsigned. Q6_K is missing: its groups are not a packed weight's.
FOUR_BITS = ("Q4_0", "Q4_1", "Q4_K")
SYMMETRIC = ("Q4_0", "Q5_0", "Q8_0")
_SHIFTS = {"Q4_0": 8, "Q4_1": 0, "Q5_0": 16, "Q5_1": 0, "Q8_0": 128, "Q4_K": 0, "Q5_K": 0}


# ---- packed ---------------------------------------------------------------------------------------------------------
# q [rows, groups, 32] unsigned, scale and minimum [rows, groups] half; symmetric ones have no minimum.
_Groups = tuple[Tensor, Tensor, Tensor | None]


def _packer(tensor: Tensor | GGUFTensor, kind: type[PackedWeight], name: str) -> Callable[[slice], PackedWeight]:
    """What packs some rows of a tensor."""
    if isinstance(tensor, GGUFTensor) and kind.bits == 4 and tensor.type.name in ("Q4_0", "Q4_1"):
        stored, rows = tensor.type.name, raw_bytes(tensor)
        return lambda piece: pack_bytes(*_keep_bytes(stored, rows[piece], kind, name))
    read = _reader(tensor, kind, name)

    def packed(piece: slice) -> PackedWeight:
        q, scale, minimum = read(piece)
        return pack(q.flatten(1), scale, minimum, kind.bits)

    return packed


def _reader(tensor: Tensor | GGUFTensor, kind: type[PackedWeight], name: str) -> Callable[[slice], _Groups]:
    """What turns some rows of a tensor into groups."""
    values = plain(tensor) if isinstance(tensor, GGUFTensor) else tensor
    if values is not None:
        return lambda piece: _round(values[piece].float(), kind, name)
    assert isinstance(tensor, GGUFTensor)
    stored, rows = tensor.type.name, raw_bytes(tensor)
    if stored in _SHIFTS and kind.bits >= bits_of(tensor):
        return lambda piece: _keep(stored, rows[piece], kind, name)

    def rounded(piece: slice) -> _Groups:
        weights = torch.empty(piece.stop - piece.start, tensor.shape[-1])
        _fill(weights, *_BLOCKS[stored](rows[piece]))
        return _round(weights, kind, name)

    return rounded


def _pieces(num_rows: int, row_length: int) -> Iterator[slice]:
    """Slices of whole tiles, about `PIECE` values each."""
    step = max(1, PIECE // (TILE * max(row_length, 1))) * TILE
    for start in range(0, num_rows, step):
        yield slice(start, min(start + step, num_rows))


def _keep(stored: str, rows: UInt8[Tensor, "rows row_bytes"], kind: type[PackedWeight], name: str) -> _Groups:
    """Blocks with their q as they are; only scale and minimum are rounded where half cannot hold them."""
    q, scale, minimum = _BLOCKS[stored](rows)
    shift = 2 ** (kind.bits - 1) if kind.symmetric else _SHIFTS[stored]
    if minimum is None and not kind.symmetric:
        minimum = scale * -shift
    scale, minimum = scale.half(), None if minimum is None else minimum.half()
    _check_finite(scale, minimum, name)
    unsigned = q.view(torch.uint8) + shift  # wraps around: a signed byte's bits plus 128 are the shifted byte
    return unsigned, scale, minimum


def _keep_bytes(stored: str, rows: UInt8[Tensor, "rows row_bytes"], kind: type[PackedWeight], name: str) -> _Groups:
    """Q4_0's and Q4_1's bytes, which hold two values each just as ours do, [rows, groups, 16]."""
    blocks = _cut(rows, 20 if stored == "Q4_1" else 18)
    scale = _half(blocks[..., :2])
    minimum = None
    if not kind.symmetric:
        minimum = _half(blocks[..., 2:4]) if stored == "Q4_1" else scale * -_SHIFTS[stored]
    _check_finite(scale, minimum, name)
    return blocks[..., -GROUP // 2 :], scale, minimum


def _check_finite(scale: Tensor, minimum: Tensor | None, name: str) -> None:
    if not (scale.isfinite().all() and (minimum is None or minimum.isfinite().all())):
        raise ModelError(f"tensor {name!r}: a block's scale is too large or not a number; the file is damaged")


def _round(weights: Float[Tensor, "N K"], kind: type[PackedWeight], name: str) -> _Groups:
    assert not kind.symmetric, name  # `kind_of` gives what is rounded a minimum
    bits = kind.bits
    steps = 2**bits - 1
    grouped = weights.reshape(len(weights), -1, GROUP)  # [N, groups, 32]
    smallest, largest = grouped.aminmax(dim=-1)
    minimum = _nearest_half(smallest, torch.le, -torch.inf)
    scale = _nearest_half((largest - minimum.float()) / steps, torch.ge, torch.inf)
    # NaN fails both comparisons, so one test finds every value that half cannot hold.
    if not ((smallest >= -HALF_MAX) & (largest <= HALF_MAX)).all():
        raise ModelError(
            f"tensor {name!r}: holds values beyond ±{HALF_MAX:.0f} or not numbers; it cannot become int{bits}"
        )
    q = (grouped - minimum.float()[..., None]) / scale.float().clamp_min(2.0**-24)[..., None]
    return q.round_().clamp_(0, steps).to(torch.uint8), scale, minimum


def _nearest_half(
    values: Float[Tensor, "N groups"], holds: Callable[[Tensor, Tensor], Tensor], side: float
) -> Float16[Tensor, "N groups"]:
    """The nearest half on one `side` of each value: a group's range may only grow, or its ends would be cut off."""
    half = values.half()
    return torch.where(holds(half.float(), values), half, torch.nextafter(half, torch.full_like(half, side)))
