"""The small modules every architecture is made of. Each holds parameters under the checkpoint's names and calls one
op."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

import porcelet.kernels.cpu  # noqa: F401  registers the native bodies
import porcelet.kernels.triton  # noqa: F401  registers the bodies for GPUs
from porcelet.kernels.linear import TableWeight, Weight, embedding, linear
from porcelet.kernels.pointwise import add, add_rms_norm, rms_norm, silu_mul

if TYPE_CHECKING:
    from jaxtyping import Float, Int


class Linear(nn.Module):
    """x · weightᵀ + bias. `weight` is a parameter [out, in], or a quantised weight once a loader has put one there."""

    weight: Weight

    def __init__(self, num_inputs: int, num_outputs: int, *, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_outputs, num_inputs))
        self.bias = nn.Parameter(torch.empty(num_outputs)) if bias else None

    def forward(self, x: Float[Tensor, "T num_inputs"]) -> Float[Tensor, "T num_outputs"]:
        out = linear(x, self.weight)
        return out if self.bias is None else add(out, self.bias)


class Embedding(nn.Module):
    """Rows of `weight` [V, D]; those of a packed table in `dtype`."""

    weight: TableWeight
    dtype = torch.float32

    def __init__(self, num_rows: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_rows, width))

    def forward(self, tokens: Int[Tensor, "T"]) -> Float[Tensor, "T D"]:
        rows = embedding(tokens, self.weight)
        return rows if isinstance(self.weight, Tensor) else rows.to(self.dtype)


class RMSNorm(nn.Module):
    """RMSNorm with a learned scale."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Float[Tensor, "*rows W"]) -> Float[Tensor, "*rows W"]:
        return rms_norm(x, self.weight, self.eps)

    def of_sum(
        self, first: Float[Tensor, "T W"], second: Float[Tensor, "T W"]
    ) -> tuple[Float[Tensor, "T W"], Float[Tensor, "T W"]]:
        """first + second, and that sum normed."""
        return add_rms_norm(first, second, self.weight, self.eps)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) · up(x))."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = Linear(width, hidden)
        self.up_proj = Linear(width, hidden)
        self.down_proj = Linear(hidden, width)

    def forward(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        return self.down_proj(silu_mul(self.gate_proj(x), self.up_proj(x)))
