"""Rotary frequencies: one a pair of dimensions, stretched as the checkpoint says.

The arithmetic is float32 in the order of the models' own code, because it was part of their training: at position
160,000 one unit in the last place of a frequency is a hundredth of a radian. Sources: RoFormer, section 3.4; YaRN
(Peng et al. 2023), section 3.2; Llama 3.1's published code.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from porcelet.config import ModelConfig, RopeScaling
from porcelet.kernels.pointwise import rotary_angles

if TYPE_CHECKING:
    from jaxtyping import Float, Int

Angles = tuple[Tensor, Tensor]  # cos and sin [T, R/2] of every token's position


def angles(config: ModelConfig, positions: Int[Tensor, "T"], dtype: torch.dtype) -> Angles:
    """cos and sin of position · frequency, [T, R/2] each."""
    factor = config.rope_scaling.angle_factor if config.rope_scaling else 1.0
    cos, sin = rotary_angles(positions, frequencies(config, positions.device), factor)
    return cos.to(dtype), sin.to(dtype)


@lru_cache(maxsize=16)
def frequencies(config: ModelConfig, device: torch.device) -> Float[Tensor, "half"]:
    """Radians a token for each of the R/2 pairs, in float32."""
    width = config.rope_dim
    with torch.inference_mode(False):  # a cached tensor must serve training too
        powers = config.rope_theta ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
        plain = 1.0 / powers
        scaling = config.rope_scaling
        if scaling is not None:
            plain = _SCALED[scaling.kind](plain, powers, config.rope_theta, scaling)
        return plain.to(device)


def _linear(plain: Tensor, powers: Tensor, theta: float, scaling: RopeScaling) -> Tensor:
    return plain / scaling.factor


def _yarn(plain: Tensor, powers: Tensor, theta: float, scaling: RopeScaling) -> Tensor:
    """Frequencies that turn often enough in the original context stay, slow ones are divided, a ramp lies between."""
    width, context = 2 * len(plain), scaling.original_max_position_embeddings

    def pair_turning(turns: float) -> float:
        return width * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_turning(scaling.beta_fast), pair_turning(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    ramp = (torch.arange(len(plain), dtype=torch.float32) - low) / (high - low if high != low else 0.001)
    kept = 1 - ramp.clamp(0, 1)
    return 1.0 / (scaling.factor * powers) * (1 - kept) + plain * kept


def _llama3(plain: Tensor, powers: Tensor, theta: float, scaling: RopeScaling) -> Tensor:
    """Long wavelengths are divided, short ones stay, those between are blended."""
    low, high, context = scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_max_position_embeddings
    wavelength = 2 * math.pi / plain
    divided = torch.where(wavelength > context / low, plain / scaling.factor, plain)
    share = (context / wavelength - low) / (high - low)
    blended = (1 - share) * divided / scaling.factor + share * divided
    between = ~(wavelength < context / high) & ~(wavelength > context / low)
    return torch.where(between, blended, divided)


_SCALED = {"linear": _linear, "yarn": _yarn, "llama3": _llama3}
