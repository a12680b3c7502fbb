"""MLA's cache row in 8 bits, as FlashMLA keeps it: 656 bytes a token.

512 latents as e4m3 numbers, one float32 scale for each 128 of them, 64 rotary values in bfloat16, one after the other.
A scale is a power of two, so that multiplying by it rounds nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from porcelet.errors import InputError

if TYPE_CHECKING:
    from jaxtyping import Float, UInt8

LATENT, ROPE, GROUP = 512, 64, 128
SCALES = LATENT // GROUP
BYTES = LATENT + 4 * SCALES + 2 * ROPE
HIGHEST = 448.0  # of e4m3


def to_latent8(values: Float[Tensor, "*rows 576"]) -> UInt8[Tensor, "*rows 656"]:
    """Latents and rotary keys as the cache holds them. Raises InputError for rows of another width."""
    if values.shape[-1] != LATENT + ROPE:
        raise InputError(f"a row of {values.shape[-1]} values has no 8-bit form; it takes {LATENT} + {ROPE}")
    latent, rope = values.float().split((LATENT, ROPE), dim=-1)
    groups = latent.unflatten(-1, (SCALES, GROUP))
    scales = torch.exp2((groups.abs().amax(-1) / HIGHEST).clamp_min(1e-4).log2().ceil())
    quantized = (groups / scales[..., None]).to(torch.float8_e4m3fn).flatten(-2)
    parts = quantized, scales.contiguous(), rope.to(torch.bfloat16).contiguous()
    return torch.cat([part.view(torch.uint8) for part in parts], dim=-1)


def from_latent8(rows: UInt8[Tensor, "*rows 656"]) -> Float[Tensor, "*rows 576"]:
    """The float32 values that cached rows stand for."""
    latent, scales, rope = parts_of(rows.contiguous())
    values = latent.view(torch.float8_e4m3fn).float().unflatten(-1, (SCALES, GROUP)) * scales[..., None]
    return torch.cat((values.flatten(-2), rope.float()), dim=-1)


def parts_of(rows: UInt8[Tensor, "*rows 656"]) -> tuple[Tensor, Tensor, Tensor]:
    """Views of the e4m3 bytes, the scales and the rotary values, where they lie."""
    if rows.dtype != torch.uint8 or rows.shape[-1] != BYTES:
        raise InputError(f"rows of {rows.shape[-1]} × {rows.dtype} are no 8-bit latents; they have {BYTES} bytes")
    first, second = LATENT, LATENT + 4 * SCALES
    return (
        rows[..., :first],
        rows.view(torch.float32)[..., first // 4 : second // 4],
        rows.view(torch.bfloat16)[..., second // 2 :],
    )
