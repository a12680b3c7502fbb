"""Linear layers and experts on a GPU, by the products of matmul.py. Importing this registers the bodies and does not
import Triton.

Activations stay in half precision: weights in FP8 are widened in registers, and what packed weights are multiplied with
is not rounded further, other than by the definition, which is a little less exact. With an `FP8Operand` they are
rounded to FP8, once a token for all its experts, and between an expert's two products by the gate's own kernel.
Experts compute without asking the device how many tokens each has: rows are laid out for the most there can be, and
blocks without any end at once.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from porcelet.kernels.experts import ExpertWeight, PackedExperts, experts
from porcelet.kernels.linear import FP8_BLOCK, KINDS, TILE, FP8Operand, FP8Weight, PackedWeight, Weight, linear
from porcelet.kernels.pointwise import silu_mul
from porcelet.kernels.triton.device import available, serves

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from porcelet.kernels.triton.matmul import FP8Rows

FEW = 16  # rows that a block has, where experts have few tokens each
Stack = Tensor | FP8Weight | PackedExperts
PACKED = tuple(kind.__name__ for kind in KINDS)


@linear.body("triton", when=lambda key: serves(key, "FP8Weight", "FP8Operand", *PACKED), available=available)
def linear_triton(x: Float[Tensor, "T D"], weight: Weight) -> Float[Tensor, "T N"]:
    """Over the stored bytes. Half-precision weights are torch's own."""
    from porcelet.kernels.triton.matmul import multiply, quantize_rows
    from porcelet.kernels.triton.packed import multiply_packed

    if isinstance(weight, PackedWeight):
        return multiply_packed(x, weight.packed, weight.shape[0])
    assert isinstance(weight, FP8Weight)
    if isinstance(weight, FP8Operand):
        return multiply(quantize_rows(x, power_of_two=weight.power_of_two), weight, dtype=x.dtype)
    return multiply(x, weight, dtype=x.dtype)


@experts.body(
    "triton",
    when=lambda key: serves(key, "Tensor", "Parameter", "FP8Weight", "FP8Operand", "PackedExperts"),
    available=available,
)
def experts_triton(
    x: Float[Tensor, "T D"],
    gate_up: ExpertWeight,
    down: ExpertWeight,
    indices: Int[Tensor, "T A"],
    weights: Float[Tensor, "T A"],
) -> Float[Tensor, "T D"]:
    """Grouped products over all tokens' experts. A token's result does not depend on the batch: its experts' answers
    are added in the order of its choice."""
    from porcelet.kernels.triton.matmul import ALIGNED

    if len(x) == 0:
        return torch.zeros_like(x)
    first, second = _stacked(gate_up, x.dtype), _stacked(down, x.dtype)
    if first is None or second is None:
        return experts.reference(x, gate_up, down, indices, weights)
    E = gate_up.shape[0]
    aligned = FEW if indices.numel() < E * ALIGNED // 2 else ALIGNED
    places, owners = lay_out(indices, E, aligned)
    gate, up = _grouped(_spread(x, first, places, len(owners)), first, owners, aligned, x.dtype).chunk(2, dim=-1)
    answers = _grouped(_gated(gate, up, second), second, owners, aligned, x.dtype)[places]
    weighted = answers.view(*indices.shape, -1).float() * weights[..., None].float()
    return weighted.sum(1).to(x.dtype)


def _spread(
    x: Float[Tensor, "T D"], weight: Stack, places: Int[Tensor, "TA"], num_rows: int
) -> Float[Tensor, "R D"] | FP8Rows:
    """A token's row at each of its places, zeros between them."""
    each = len(places) // len(x)
    if not isinstance(weight, FP8Operand):
        rows = x.new_zeros(num_rows, x.shape[1])
        rows[places] = x.repeat_interleave(each, 0)
        return rows
    from porcelet.kernels.triton.matmul import FP8Rows, quantize_rows

    once, many = quantize_rows(x, power_of_two=weight.power_of_two), FP8Rows.empty(num_rows, x.shape[1], x.device)
    values = many.values.view(torch.uint8).zero_()
    values[places] = once.values.view(torch.uint8).repeat_interleave(each, 0)
    many.scale.zero_()
    many.scale[places] = once.scale.repeat_interleave(each, 0)
    return many


def _gated(gate: Float[Tensor, "R F"], up: Float[Tensor, "R F"], weight: Stack) -> Float[Tensor, "R F"] | FP8Rows:
    """silu(gate) · up, as the second product takes it."""
    if not isinstance(weight, FP8Operand):
        return silu_mul(gate, up)
    from porcelet.kernels.triton.rows import gate_quantized

    return gate_quantized(gate, up, power_of_two=weight.power_of_two)


def _grouped(
    rows: Float[Tensor, "R K"] | FP8Rows, weight: Stack, owners: Int[Tensor, "R"], aligned: int, dtype: torch.dtype
) -> Float[Tensor, "R N"]:
    """Each row by its expert's matrix."""
    from porcelet.kernels.triton.matmul import multiply_contiguous
    from porcelet.kernels.triton.packed import multiply_packed_contiguous

    if isinstance(weight, PackedExperts):
        assert isinstance(rows, Tensor)
        return multiply_packed_contiguous(rows, weight.packed.flatten(1, 2), weight.shape[1], owners, aligned=aligned)
    return multiply_contiguous(rows, weight, owners, aligned=aligned, dtype=dtype)


def _stacked(weight: ExpertWeight, dtype: torch.dtype) -> Stack | None:
    """A stack of one matrix an expert, [E, N, K]; None where its parts do not join at a border of blocks, and for
    another precision than the rows'."""
    if isinstance(weight, PackedExperts):
        parts, (_, rows, _) = weight.packed.shape[1], weight.shape
        return weight if parts == 1 or rows // parts % TILE == 0 else None
    if isinstance(weight, FP8Weight):
        if weight.shape[1] > 1 and weight.shape[2] % FP8_BLOCK:
            return None
        return replace(weight, values=weight.values.flatten(1, 2), scale=weight.scale.flatten(1, 2))
    assert isinstance(weight, Tensor)
    return weight if weight.dtype == dtype else None


def lay_out(indices: Int[Tensor, "T A"], num_experts: int, aligned: int) -> tuple[Int[Tensor, "TA"], Int[Tensor, "R"]]:
    """Where each assignment's row lies so that an expert's begin at multiples of `aligned`, and each row's expert, -1
    behind the last. Nothing is read back: R is the most that there can be."""
    flat = indices.flatten()
    most = min(len(flat) * aligned, -(-(len(flat) + num_experts * (aligned - 1)) // aligned) * aligned)
    counts = torch.zeros(num_experts, dtype=torch.int64, device=flat.device).scatter_add_(
        0, flat, torch.ones_like(flat)
    )
    ends = (-(-counts // aligned) * aligned).cumsum(0)
    order = flat.argsort(stable=True)
    sorted_experts = flat[order]
    begins = ends - -(-counts // aligned) * aligned
    within = torch.arange(len(flat), device=flat.device) - (counts.cumsum(0) - counts)[sorted_experts]
    places = torch.empty_like(flat).index_copy_(0, order, begins[sorted_experts] + within)
    rows = torch.arange(most, device=flat.device)
    owners = torch.searchsorted(ends, rows, right=True)
    return places, torch.where(owners < num_experts, owners, -1).int()
