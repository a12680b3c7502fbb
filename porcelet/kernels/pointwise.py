"""Norms, rotary embedding, gating, sums: ops that read and write each value about once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from porcelet.kernels import composed, op

if TYPE_CHECKING:
    from jaxtyping import Float, Int


@op
def rms_norm(x: Float[Tensor, "*rows W"], weight: Float[Tensor, "W"], eps: float) -> Float[Tensor, "*rows W"]:
    """x / sqrt(mean(x²) + eps) · weight over the last dimension, computed in fp32 (Zhang & Sennrich 2019)."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)


@op
def rope(
    x: Float[Tensor, "T heads R"], cos: Float[Tensor, "T half"], sin: Float[Tensor, "T half"], interleaved: bool
) -> Float[Tensor, "T heads R"]:
    """Rotate pairs of the last dimension by each token's angles (RoFormer, section 3.4).

    Pairs are (x0, x1), (x2, x3), ... if `interleaved`, else (x0, x_{R/2}), ...; interleaved pairs come out half-split,
    which leaves scores unchanged as long as queries and keys agree.
    """
    first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]  # [T, 1, R/2]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


@op
def silu_mul(gate: Float[Tensor, "*rows F"], up: Float[Tensor, "*rows F"]) -> Float[Tensor, "*rows F"]:
    """SwiGLU's gate: silu(gate) · up (Shazeer 2020)."""
    return functional.silu(gate) * up


@op
def rotary_angles(
    positions: Int[Tensor, "T"], frequencies: Float[Tensor, "half"], factor: float
) -> tuple[Float[Tensor, "T half"], Float[Tensor, "T half"]]:
    """cos and sin of position · frequency, times `factor`, in float32."""
    angle = positions[:, None].float() * frequencies
    cos, sin = angle.cos(), angle.sin()
    return (cos, sin) if factor == 1.0 else (cos * factor, sin * factor)


@op
def add(first: Float[Tensor, "T W"], second: Float[Tensor, "*T W"]) -> Float[Tensor, "T W"]:
    """first + second; `second` may be one row for all, a bias."""
    return first + second


@op
def concat(first: Float[Tensor, "*rows A"], second: Float[Tensor, "*rows B"]) -> Float[Tensor, "*rows AB"]:
    """The second's values behind the first's, row by row."""
    return torch.cat((first, second), dim=-1)


@op
def add_rms_norm(
    first: Float[Tensor, "T W"], second: Float[Tensor, "T W"], weight: Float[Tensor, "W"], eps: float
) -> tuple[Float[Tensor, "T W"], Float[Tensor, "T W"]]:
    """first + second, and that sum normed."""
    total = add(first, second)
    return total, rms_norm(total, weight, eps)


composed(add_rms_norm)
