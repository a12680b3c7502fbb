"""Linear layers: x · Wᵀ for every weight format. The format is the weight's class; model code never asks for it.

`Int8Weight` stores groups of 32 input columns as unsigned bytes with a half-precision scale and minimum a group,
w = scale · q + minimum. That holds GGUF's Q4_0, Q4_1 and Q8_0 without any loss (weights/quantize.py). The bytes are
laid out once in the order in which the native body (kernels/cpu/linear.cpp) streams them; one layout serves one row
and many:

    packed [N/16 tiles, K/32 groups, 576 bytes]:  q [8 quads, 16 rows, 4 columns] | scale [16] half | minimum [16] half

A quad is four neighbouring columns of one row, what one VNNI instruction multiplies and sums into one of 16 lanes.
The last tile is filled up with zero rows.

`FP8Weight` is DeepSeek-V3's released form: e4m3 values with a float32 scale for every block of 128 · 128. It has no
native body yet: a call expands it to float32, which saves memory and costs time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from porcelet.kernels import op

if TYPE_CHECKING:
    from jaxtyping import Float, Float16, Int, UInt8

FP8_BLOCK = 128  # rows, and columns, that share one scale
GROUP = 32  # input columns that share a scale and a minimum
TILE = 16  # output rows that lie together, one a vector lane
BLOCK_BYTES = TILE * GROUP + 2 * TILE * 2


@dataclass(frozen=True)
class Int8Weight:
    """A packed [N, K] weight; see the module's docstring for the layout of `packed`."""

    packed: UInt8[Tensor, "tiles groups 576"]
    shape: tuple[int, int]
    requires_grad = False

    def dequantize(self) -> Float[Tensor, "N K"]:
        """The weight in float32: exactly scale · q + minimum, rounded once."""
        q, scale, minimum = unpack_int8(self)
        grouped = q.view(self.shape[0], -1, GROUP).double() * scale.double()[..., None] + minimum.double()[..., None]
        return grouped.view(self.shape).float()

    def rows(self, index: Int[Tensor, "T"]) -> Float[Tensor, "T K"]:
        """Some rows in float32, without touching the others."""
        blocks = self.packed[index // TILE]  # [T, groups, 576]
        lane = (index % TILE)[:, None, None, None]
        q = blocks[..., : TILE * GROUP].unflatten(-1, (GROUP // 4, TILE, 4))  # [T, groups, 8, 16, 4]
        q = q.gather(3, lane[..., None].expand(*q.shape[:3], 1, 4)).flatten(2)  # [T, groups, 32]
        halves = blocks[..., TILE * GROUP :].contiguous().view(torch.float16).unflatten(-1, (2, TILE))
        halves = halves.gather(3, lane.expand(*halves.shape[:3], 1)).double()  # [T, groups, 2, 1]
        return (q.double() * halves[:, :, 0] + halves[:, :, 1]).flatten(1).float()


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
        return FP8Weight(self.values[index], self.scale[index])

    def dequantize(self) -> Float[Tensor, "*stack N K"]:
        """The weight in float32: value · scale of its block, rounded once (DeepSeek-V3, README_WEIGHTS.md)."""
        weights = self.values.float()
        for row in range(self.scale.shape[-2]):
            scale = self.scale[..., row : row + 1, :].repeat_interleave(FP8_BLOCK, -1)[..., : weights.shape[-1]]
            weights[..., row * FP8_BLOCK : (row + 1) * FP8_BLOCK, :] *= scale
        return weights


Weight = Tensor | Int8Weight | FP8Weight
TableWeight = Tensor | Int8Weight  # weights/load.py expands an embedding in FP8


def pack_int8(
    q: UInt8[Tensor, "N K"], scale: Float16[Tensor, "N groups"], minimum: Float16[Tensor, "N groups"]
) -> Int8Weight:
    """Lay out a quantised weight. K must be a multiple of 32; N may be anything."""
    N, K = q.shape
    assert K % GROUP == 0 and scale.shape == minimum.shape == (N, K // GROUP), (q.shape, scale.shape, minimum.shape)
    fill = -N % TILE
    q, scale, minimum = (functional.pad(t, (0, 0, 0, fill)) for t in (q, scale, minimum))
    tiles, groups = (N + fill) // TILE, K // GROUP
    bytes_ = q.view(tiles, TILE, groups, GROUP // 4, 4).permute(0, 2, 3, 1, 4).reshape(tiles, groups, -1)
    halves = (
        torch.stack((scale, minimum)).view(2, tiles, TILE, groups).permute(1, 3, 0, 2).contiguous()
    )  # [tiles, groups, 2, 16]
    packed = torch.cat((bytes_, halves.view(torch.uint8).view(tiles, groups, -1)), dim=-1)
    return Int8Weight(packed, (N, K))


def unpack_int8(
    weight: Int8Weight,
) -> tuple[UInt8[Tensor, "N K"], Float16[Tensor, "N groups"], Float16[Tensor, "N groups"]]:
    """The inverse of `pack_int8`."""
    N, K = weight.shape
    tiles, groups, _ = weight.packed.shape
    q = (
        weight.packed[..., : TILE * GROUP]
        .view(tiles, groups, GROUP // 4, TILE, 4)
        .permute(0, 3, 1, 2, 4)
        .reshape(-1, K)[:N]
    )
    halves = weight.packed[..., TILE * GROUP :].contiguous().view(torch.float16).view(tiles, groups, 2, TILE)
    scale, minimum = halves.permute(2, 0, 3, 1).reshape(2, -1, groups)[:, :N]
    return q, scale, minimum


@op
def linear(x: Float[Tensor, "T D"], weight: Weight) -> Float[Tensor, "T N"]:
    """x · weightᵀ. Bodies that quantise x do so per token and group, so that a row's result never depends on the
    batch."""
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
def heads_linear(x: Float[Tensor, "T H I"], weight: Float[Tensor, "H O I"]) -> Float[Tensor, "T H O"]:
    """Every head's x · weightᵀ by its own matrix; `weight` may be a transposed view."""
    return torch.einsum("thi,hoi->tho", x, weight)


@op
def take_rows(x: Float[Tensor, "T D"], rows: Int[Tensor, "taken"]) -> Float[Tensor, "taken D"]:
    """Some rows of a batch. In a recorded step, what follows is computed for these alone."""
    return x[rows]
