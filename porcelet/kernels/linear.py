"""Linear layers: x · Wᵀ for every weight format. The format is the weight's class; model code never asks for it.

`Int8Weight` and `Int4Weight` store groups of 32 input columns as unsigned numbers of 8 or 4 bits with a half-precision
scale and minimum a group, w = scale · q + minimum. The symmetric kinds have no minima, w = scale · (q - 128) or
scale · (q - 8). Eight bits hold GGUF's Q5_0, Q5_1 and Q8_0 without any loss, four hold Q4_0 and Q4_1
(weights/quantize.py). They are laid out once in the order in which the native body (kernels/cpu/linear.cpp) streams
them; one layout serves one row and many:

    packed [N/16 tiles, K/32 groups, bytes of a block]:  q in lines of 64 bytes | scale [16] half | minimum [16] half
    a block:  8 bits 576 bytes, symmetric 544;  4 bits 320, symmetric 288
    a line in 8 bits:  [16 rows, 4 columns], quad i in line i of 8
    a line in 4 bits:  the same, quads i and i + 4 in the low and high halves of line i of 4

A quad is four neighbouring columns of one row, what one VNNI instruction multiplies and sums into one of 16 lanes.
The last tile is filled up with zero rows.

What such a weight is multiplied with is rounded too, `round_activations` says how: that is part of the definition, so
every body on a CPU gives the same result up to the order of float sums. Bodies for GPUs (kernels/triton/packed.py) take
activations in half precision as they are, which is closer to no rounding at all.

`FP8Weight` is DeepSeek-V3's released form: e4m3 values with a float32 scale for every block of 128 · 128. The native
body (kernels/cpu/fp8.cpp) reads it as it is; where there is none, and for training, a call expands it to float32.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from porcelet.errors import InputError
from porcelet.kernels import op

if TYPE_CHECKING:
    from jaxtyping import Float, Float16, Int, UInt8

FP8_BLOCK = 128  # rows, and columns, that share one scale
E4M3_MAX = 448.0
SMALLEST = 1e-30  # the least amax that divides: gradients may be tiny, and zeros stay zeros
SMALLEST_ACTIVATION = 1e-4  # of what an `FP8Operand` is multiplied with
GROUP = 32  # input columns that share a scale and a minimum
TILE = 16  # output rows that lie together, one a vector lane
QUADS = GROUP // 4
WIDE_FROM = 1.25


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A packed [N, K] weight; see the module's docstring for the layout of `packed`."""

    packed: UInt8[Tensor, "tiles groups block"]
    shape: tuple[int, int]
    bits: ClassVar[int]
    symmetric: ClassVar[bool] = False
    requires_grad: ClassVar[bool] = False

    def dequantize(self) -> Float[Tensor, "N K"]:
        """The weight in float32: exactly scale · q + minimum, rounded once."""
        q, scale, minimum = self.unpack()
        scales = scale.double()[..., None]
        lowest = -(2 ** (self.bits - 1)) * scales if minimum is None else minimum.double()[..., None]
        return (q.view(*scale.shape, GROUP).double() * scales + lowest).view(self.shape).float()

    def rows(self, index: Int[Tensor, "T"]) -> Float[Tensor, "T K"]:
        """Some rows in float32, without touching the others."""
        tiles = type(self)(self.packed[index // TILE], (len(index) * TILE, self.shape[1]))  # a tile each
        return tiles.dequantize()[torch.arange(len(index), device=index.device) * TILE + index % TILE]

    def unpack(self) -> tuple[UInt8[Tensor, "N K"], Float16[Tensor, "N groups"], Float16[Tensor, "N groups"] | None]:
        """q, scale and minimum: the inverse of `pack`."""
        N, K = self.shape
        tiles, groups, _ = self.packed.shape
        values = self.bits * TILE * 4
        lines = self.packed[..., :values].view(tiles, groups, self.bits, TILE, 4)
        if self.bits == 4:
            lines = torch.cat((lines & 15, lines >> 4), dim=2)
        q = lines.permute(0, 3, 1, 2, 4).reshape(tiles * TILE, K)[:N]
        parts = 1 if self.symmetric else 2
        halves = self.packed[..., values:].contiguous().view(torch.float16).view(tiles, groups, parts, TILE)
        scale, *minima = halves.permute(2, 0, 3, 1).reshape(parts, tiles * TILE, groups)[:, :N]
        return q, scale, minima[0] if minima else None


class Int8Weight(PackedWeight):
    """Eight bits: 9 bytes for 8 values."""

    bits = 8


class Int4Weight(PackedWeight):
    """Four bits: 5 bytes for 8 values."""

    bits = 4


class SymmetricInt8Weight(PackedWeight):
    """Eight bits around zero: 8.5 bits a value."""

    bits, symmetric = 8, True


class SymmetricInt4Weight(PackedWeight):
    """Four bits around zero: 4.5 bits a value."""

    bits, symmetric = 4, True


KINDS: tuple[type[PackedWeight], ...] = (Int4Weight, SymmetricInt4Weight, Int8Weight, SymmetricInt8Weight)


@dataclass(frozen=True)
class PackedHeads:
    """One packed [O, I] weight a head."""

    packed: UInt8[Tensor, "H tiles groups block"]
    shape: tuple[int, int, int]  # H, O, I
    requires_grad: ClassVar[bool] = False

    def __getitem__(self, head: int) -> PackedWeight:
        return packed_weight(self.packed[head], self.shape[1:])

    def dequantize(self) -> Float[Tensor, "H O I"]:
        """All weights in float32: exactly scale · q + minimum, rounded once."""
        return torch.stack([self[head].dequantize() for head in range(self.shape[0])])


@dataclass(frozen=True)
class FP8Weight:
    """A [..., N, K] weight of float8_e4m3fn with its scales [..., N/128, K/128], rounded up at the edges."""

    values: Tensor
    scale: Float[Tensor, "*stack rows columns"]
    requires_grad = False

    def __post_init__(self) -> None:
        blocks = tuple(-(-size // FP8_BLOCK) for size in self.values.shape[-2:])
        assert self.scale.shape == (*self.values.shape[:-2], *blocks), (self.values.shape, self.scale.shape)

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    def __getitem__(self, index: int) -> FP8Weight:
        """One weight of a stack."""
        return replace(self, values=self.values[index], scale=self.scale[index])

    def dequantize(self) -> Float[Tensor, "*stack N K"]:
        """The weight in float32: value · scale of its block, rounded once (DeepSeek-V3, README_WEIGHTS.md)."""
        weights = self.values.float()
        for row in range(self.scale.shape[-2]):
            scale = self.scale[..., row : row + 1, :].repeat_interleave(FP8_BLOCK, -1)[..., : weights.shape[-1]]
            weights[..., row * FP8_BLOCK : (row + 1) * FP8_BLOCK, :] *= scale
        return weights


@dataclass(frozen=True, eq=False)
class FP8Operand(FP8Weight):
    """An FP8 weight whose products round activations to FP8 as well, with a scale for a token's 128 columns: as
    DeepSeek-V3 itself computes (report, section 3.3.2). For GPUs that multiply FP8."""

    power_of_two: bool = False  # of the scales, as V3.1's are

    def round_activations(self, x: Float[Tensor, "T K"]) -> Float[Tensor, "T K"]:
        """What the weight is multiplied with."""
        rounded = round_to_e4m3(x, (1, FP8_BLOCK), power_of_two=self.power_of_two, smallest=SMALLEST_ACTIVATION)
        return rounded.to(x.dtype)


Weight = Tensor | PackedWeight | FP8Weight
HeadsWeight = Tensor | PackedHeads
TableWeight = Tensor | PackedWeight  # weights/load.py expands an embedding in FP8


def kind_with(bits: int, symmetric: bool) -> type[PackedWeight]:
    """The kind of packed weight with so many bits."""
    return next(kind for kind in KINDS if (kind.bits, kind.symmetric) == (bits, symmetric))


def block_bytes(kind: type[PackedWeight]) -> int:
    """Bytes of one group of one tile."""
    return TILE * (GROUP * kind.bits // 8 + (2 if kind.symmetric else 4))


def kind_of_block(num_bytes: int) -> type[PackedWeight]:
    """The kind whose blocks have that size."""
    return next(kind for kind in KINDS if block_bytes(kind) == num_bytes)


def pack(
    q: UInt8[Tensor, "N K"],
    scale: Float16[Tensor, "N groups"],
    minimum: Float16[Tensor, "N groups"] | None,
    bits: int = 8,
) -> PackedWeight:
    """Lay out a quantised weight of 8 bits, or of 4 (q < 16); without minima it is symmetric. K must be a multiple of
    32; N may be anything."""
    N, K = q.shape
    assert K % GROUP == 0, q.shape
    grouped = q.view(N, K // GROUP, GROUP)
    if bits == 4:
        low, high = grouped.chunk(2, dim=2)
        grouped = low | high << 4
    return pack_bytes(grouped, scale, minimum)


def pack_bytes(
    grouped: UInt8[Tensor, "N groups size"],
    scale: Float16[Tensor, "N groups"],
    minimum: Float16[Tensor, "N groups"] | None,
) -> PackedWeight:
    """Lay out a quantised weight whose groups are 32 bytes already, or in four bits 16: column i of a group in the low
    half of byte i, column i + 16 in the high one, as GGUF has it."""
    N, groups, size = grouped.shape
    parts = [scale] if minimum is None else [scale, minimum]
    assert all(part.shape == (N, groups) for part in parts), (grouped.shape, [part.shape for part in parts])
    fill, tiles, values = -N % TILE, -(-N // TILE), size * TILE
    grouped = functional.pad(grouped, (0, 0, 0, 0, 0, fill)) if fill else grouped
    packed = torch.empty(tiles, groups, values + len(parts) * TILE * 2, dtype=torch.uint8)
    lines = packed[..., :values].view(tiles, groups, size // 4, TILE, 4)
    lines.copy_(grouped.view(tiles, TILE, groups, size // 4, 4).permute(0, 2, 3, 1, 4))
    # [parts, tiles, 16, groups] to [tiles, groups, parts, 16]
    halves = torch.stack([functional.pad(part, (0, 0, 0, fill)) for part in parts]).view(-1, tiles, TILE, groups)
    packed[..., values:] = halves.permute(1, 3, 0, 2).contiguous().view(torch.uint8).view(tiles, groups, -1)
    return packed_weight(packed, (N, groups * GROUP))


def packed_weight(packed: UInt8[Tensor, "tiles groups block"], shape: tuple[int, int]) -> PackedWeight:
    """The weight whose layout `packed` is; the size of a block tells which."""
    return kind_of_block(packed.shape[-1])(packed, shape)


def wide_from() -> float:
    """A group of activations is rounded to 16 bits if its largest exceeds this many times the mean of its token's
    groups' largest, else to 8. PORCELET_ACTIVATIONS=16 rounds all to 16: slower, and within 1e-4 of no rounding."""
    bits = os.environ.get("PORCELET_ACTIVATIONS", "8")
    if bits not in ("8", "16"):
        raise InputError(f"PORCELET_ACTIVATIONS is {bits!r}; it must be 8 or 16")
    return WIDE_FROM if bits == "8" else 0.0


def round_activations(x: Float[Tensor, "T K"]) -> Float[Tensor, "T K"]:
    """What a packed weight is multiplied with. Each group of 32 of a token is rounded to whole multiples of its largest
    magnitude over 127, or over 127 · 256 where that is far above the token's other groups' (`wide_from`). So a token's
    values never depend on the batch, and the few outliers that transformers have cost no precision beside them."""
    grouped = x.unflatten(-1, (-1, GROUP))
    largest = grouped.abs().amax(-1, keepdim=True)  # [T, groups, 1]
    wide = largest > wide_from() * largest.mean(1, keepdim=True)
    top = torch.where(wide, 127.0 * 256, 127.0).to(x.dtype)
    # Groups below 2^15 times the smallest normal number count as zero: their reciprocal would overflow.
    reciprocal = torch.where(largest < 2**15 * torch.finfo(torch.float32).tiny, 0.0, top / largest)
    return ((grouped * reciprocal).round() * (largest / top)).flatten(1)


def round_to_e4m3(
    x: Float[Tensor, "rows columns"], tile: tuple[int, int], *, power_of_two: bool = True, smallest: float = SMALLEST
) -> Float[Tensor, "rows columns"]:
    """What is left of `x` in E4M3 with one scale a tile: in float32 again, after rounding.

    The scale is the tile's largest magnitude, at least `smallest`, / 448, rounded up to a power of two or as it is.
    Tiles at the edges are smaller.
    """
    rows, columns = x.shape
    tall, wide = tile
    padded = functional.pad(x.float(), (0, -columns % wide, 0, -rows % tall))
    tiles = padded.unflatten(0, (-1, tall)).unflatten(2, (-1, wide))  # [rows/tall, tall, columns/wide, wide]
    scale = tiles.abs().amax(dim=(1, 3), keepdim=True).clamp_min(smallest) / E4M3_MAX
    if power_of_two:
        scale = torch.exp2(torch.ceil(torch.log2(scale)))
    rounded = (tiles / scale).to(torch.float8_e4m3fn).float() * scale
    return rounded.flatten(2).flatten(0, 1)[:rows, :columns]


@op
def linear(x: Float[Tensor, "T D"], weight: Weight) -> Float[Tensor, "T N"]:
    """x · weightᵀ, with x rounded for a packed weight and an `FP8Operand`: per token and group, so that a row's result
    never depends on the batch."""
    if isinstance(weight, PackedWeight):
        return functional.linear(round_activations(x), weight.dequantize())
    if isinstance(weight, FP8Operand):
        x = weight.round_activations(x)
    return functional.linear(x, weight if isinstance(weight, Tensor) else weight.dequantize())


@linear.body("expanded", when=lambda key: key.format == "FP8Weight")
def _linear_expanded(x: Tensor, weight: Weight) -> Tensor:
    """By the body that the float weight would meet, so that both give the same bits."""
    assert isinstance(weight, FP8Weight)
    return linear(x, weight.dequantize())


@op
def embedding(tokens: Int[Tensor, "T"], weight: TableWeight) -> Float[Tensor, "T D"]:
    """Rows of the embedding table."""
    return functional.embedding(tokens, weight) if isinstance(weight, Tensor) else weight.rows(tokens)


@op
def heads_linear(x: Float[Tensor, "T H I"], weight: HeadsWeight) -> Float[Tensor, "T H O"]:
    """Every head's x · weightᵀ by its own matrix, [H, O, I]; a tensor may be a transposed view."""
    if isinstance(weight, PackedHeads):
        return torch.stack([linear.reference(x[:, head], weight[head]) for head in range(x.shape[1])], dim=1)
    return torch.einsum("thi,hoi->tho", x, weight)


@op
def take_rows(x: Float[Tensor, "T D"], rows: Int[Tensor, "taken"]) -> Float[Tensor, "taken D"]:
    """Some rows of a batch. In a recorded step, what follows is computed for these alone."""
    return x[rows]
