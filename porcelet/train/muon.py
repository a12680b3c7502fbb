"""Muon: momentum whose matrices are replaced by the nearest orthogonal ones (Jordan et al. 2024).

    M ← μ M + G,   U = orthogonalize(G + μ M)            Nesterov's momentum
    W ← W - rate · (0.2 · sqrt(max(rows, columns)) · U + weight decay · W)

The factor gives an update the root mean square 0.2 that AdamW's has, whatever the shape, so that both share one rate
and one decay ("Muon is scalable for LLM training", Liu et al. 2025, section 2.2). Everything is float32. The iteration
runs on a stack of matrices at once: an expert's two or three matrices are matrices of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float

Coefficients = tuple[float, float, float]
QUINTIC: tuple[Coefficients, ...] = ((3.4445, -4.7750, 2.0315),) * 5  # Jordan's: steep at 0, within 0.68..1.13 near 1
UPDATE_RMS = 0.2
FLOOR = 1e-7  # of a norm that divides: a matrix of zeros, as an expert without tokens has, stays one


def orthogonalize(
    matrices: Float[Tensor, "count rows columns"], steps: Sequence[Coefficients] = QUINTIC
) -> Float[Tensor, "count rows columns"]:
    """About U·Vᵀ of each matrix U·S·Vᵀ, by Newton-Schulz: X ← aX + b(XXᵀ)X + c(XXᵀ)²X from X / |X|.

    Jordan's coefficients bring singular values above a thousandth of |X| near 1 in five steps and let them swing about
    it; (2, -1.5, 0.5) in the place of the last ones settle them on 1.
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices  # the products with the short side are the cheap ones
    x = x / x.flatten(1).norm(dim=1).clamp_min(FLOOR)[:, None, None]
    for a, b, c in steps:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def muon_step(
    parameter: Tensor,
    gradient: Tensor,
    momentum: Tensor,
    *,
    num_matrices: int,
    rate: float,
    decay: float,
    friction: float,
    excess: float,
) -> None:
    """Move a parameter [..., rows, columns], whose rows are those of `num_matrices` matrices, in place.

    `friction` is μ; the gradient is divided by `excess` first.
    """
    momentum.mul_(friction).add_(gradient, alpha=1.0 / excess)
    direction = torch.add(momentum * friction, gradient, alpha=1.0 / excess)
    stack = direction.reshape(-1, parameter.shape[-2] // num_matrices, parameter.shape[-1])
    size = UPDATE_RMS * max(stack.shape[-2:]) ** 0.5
    parameter.mul_(1.0 - rate * decay).add_(orthogonalize(stack).reshape(parameter.shape), alpha=-rate * size)
