"""From stored formats to the two that a model computes with: float32, and `Int8Weight`.

GGUF's 4- and 8-bit blocks are 32 neighbouring values with a half-precision scale (Q4_1: and a minimum). All three fit
into `Int8Weight`, w = scale · q + minimum with unsigned q, without any loss:

    Q4_0  w = d · (q - 8)       scale d, minimum -8 d       (exact in half: a multiplication by a power of two)
    Q4_1  w = d · q + m         scale d, minimum m
    Q8_0  w = d · q, q signed   scale d, minimum -128 d     with q + 128 in place of q

Everything else is rounded to 8 bits, each group of 32 between its own smallest and largest value.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from porcelet.errors import ModelError
from porcelet.kernels.linear import GROUP, Int8Weight, pack_int8
from porcelet.weights.gguf import GGUFTensor

if TYPE_CHECKING:
    from jaxtyping import Float, Float16, Shaped, UInt8

PLAIN_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
HALF_MAX = 65504.0


def raw_bytes(tensor: GGUFTensor) -> UInt8[Tensor, "rows row_bytes"]:
    """The stored bytes, one row of the tensor a row, without a copy."""
    rows = 1
    for size in tensor.shape[:-1]:
        rows *= size
    return torch.frombuffer(tensor.data, dtype=torch.uint8).view(rows, -1)


def plain(tensor: GGUFTensor) -> Tensor | None:
    """The tensor of a file's F32, F16 or BF16 entry, in that type and without a copy; None where blocks are stored."""
    dtype = PLAIN_TYPES.get(tensor.type.name)
    return None if dtype is None else torch.frombuffer(tensor.data, dtype=dtype).view(tensor.shape)


def dequantize(tensor: GGUFTensor) -> Tensor:
    """The values in float32, bit for bit those that ggml defines (one multiplication, one addition, each rounded)."""
    values = plain(tensor)
    if values is not None:
        return values.float()
    quants, scale, minimum = _BLOCKS[tensor.type.name](raw_bytes(tensor))
    weights = quants.float().mul_(scale.float()[..., None])  # [rows, groups, 32]
    if minimum is not None:
        weights += minimum.float()[..., None]
    return weights.view(tensor.shape)


def to_int8(tensor: Tensor | GGUFTensor, name: str = "") -> Int8Weight:
    """A [N, K] weight as an `Int8Weight`: exactly from Q4_0, Q4_1 and Q8_0, rounded from any float type.

    When it rounds, each value moves by at most half its group's scale, and
    scale <= (largest - smallest + |smallest| / 1024) / 255 * (1 + 1/1024), or half's least step 2^-24 if that is
    more (and float32's rounding).

    Raises:
        ModelError: K is no multiple of 32, or a value or scale that half precision cannot hold.
    """
    if isinstance(tensor, GGUFTensor):
        name = name or tensor.name
        values = plain(tensor)
        if values is None:
            return _repack(tensor, name)
        tensor = values
    assert tensor.dim() == 2, (name, tensor.shape)
    if tensor.shape[1] % GROUP:
        raise ModelError(
            f"tensor {name!r}: rows of {tensor.shape[1]} values are not whole groups of {GROUP}; load it as float32"
        )
    return _round(tensor.float(), name)


def unpermute(rows: Shaped[Tensor, "N row"], num_heads: int) -> Shaped[Tensor, "N row"]:
    """Undo the order in which GGUF keeps the rows of llama's query and key projections.

    GGUF interleaves the two halves of every head for its form of RoPE; Hugging Face keeps [first half, second half].
    Only whole rows move, so `rows` may be floats as well as the raw bytes of quantised ones. A copy.
    """
    return rows.view(num_heads, -1, 2, rows.shape[1]).transpose(1, 2).reshape(rows.shape)


# ---- exact ----------------------------------------------------------------------------------------------------------


def _repack(tensor: GGUFTensor, name: str) -> Int8Weight:
    assert len(tensor.shape) == 2, (name, tensor.shape)
    quants, scale, minimum = _BLOCKS[tensor.type.name](raw_bytes(tensor))
    shift = _SHIFTS[tensor.type.name]
    if minimum is None:
        minimum = scale * -shift
    if not (scale.isfinite().all() and minimum.isfinite().all()):
        raise ModelError(f"tensor {name!r}: a block's scale is too large or not a number; the file is damaged")
    unsigned = quants.view(torch.uint8) + shift  # wraps around: a signed byte's bits plus 128 are the shifted byte
    return pack_int8(unsigned.flatten(1), scale, minimum)


def _read_q4_0(rows: UInt8[Tensor, "rows row_bytes"]) -> _Blocks:
    blocks = rows.view(len(rows), -1, 18)
    return _nibbles(blocks[..., 2:]).view(torch.int8) - 8, _half(blocks[..., :2]), None


def _read_q4_1(rows: UInt8[Tensor, "rows row_bytes"]) -> _Blocks:
    blocks = rows.view(len(rows), -1, 20)
    return _nibbles(blocks[..., 4:]), _half(blocks[..., :2]), _half(blocks[..., 2:4])


def _read_q8_0(rows: UInt8[Tensor, "rows row_bytes"]) -> _Blocks:
    blocks = rows.view(len(rows), -1, 34)
    return blocks[..., 2:].view(torch.int8), _half(blocks[..., :2]), None


def _nibbles(bytes_: UInt8[Tensor, "rows groups 16"]) -> UInt8[Tensor, "rows groups 32"]:
    """A block's first 16 values are the low halves of its bytes, the last 16 the high ones."""
    return torch.cat((bytes_ & 15, bytes_ >> 4), dim=-1)


def _half(bytes_: UInt8[Tensor, "rows groups 2"]) -> Float16[Tensor, "rows groups"]:
    return bytes_.contiguous().view(torch.float16).squeeze(-1)


_Blocks = tuple[Tensor, Tensor, Tensor | None]  # values [rows, groups, 32], scale and minimum [rows, groups]
_BLOCKS: dict[str, Callable[[Tensor], _Blocks]] = {"Q4_0": _read_q4_0, "Q4_1": _read_q4_1, "Q8_0": _read_q8_0}
_SHIFTS = {"Q4_0": 8, "Q4_1": 0, "Q8_0": 128}  # what makes a format's values unsigned


# ---- rounded --------------------------------------------------------------------------------------------------------


def _round(weights: Float[Tensor, "N K"], name: str) -> Int8Weight:
    grouped = weights.reshape(len(weights), -1, GROUP)  # [N, groups, 32]
    smallest, largest = grouped.aminmax(dim=-1)
    minimum = _nearest_half(smallest, torch.le, -torch.inf)
    scale = _nearest_half((largest - minimum.float()) / 255, torch.ge, torch.inf)
    # NaN fails both comparisons, so one test finds every value that half cannot hold.
    if not ((smallest >= -HALF_MAX) & (largest <= HALF_MAX)).all():
        raise ModelError(f"tensor {name!r}: holds values beyond ±{HALF_MAX:.0f} or not numbers; it cannot become int8")
    steps = (grouped - minimum.float()[..., None]) / scale.float().clamp_min(2.0**-24)[..., None]
    return pack_int8(steps.round_().clamp_(0, 255).to(torch.uint8).flatten(1), scale, minimum)


def _nearest_half(
    values: Float[Tensor, "N groups"], holds: Callable[[Tensor, Tensor], Tensor], side: float
) -> Float16[Tensor, "N groups"]:
    """The nearest half on one `side` of each value: a group's range may only grow, or its ends would be cut off."""
    half = values.half()
    return torch.where(holds(half.float(), values), half, torch.nextafter(half, torch.full_like(half, side)))
