"""Mixture of experts: which experts a token goes to, and what they compute.

Two gates: V3's (DeepSeek-V3 report, section 2.1.2) and V2's (DeepSeek-V2 paper, section 2.2), of which V2-Lite's is
the case of one group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from porcelet.kernels import op
from porcelet.kernels.linear import (
    GROUP,
    TILE,
    FP8Operand,
    FP8Weight,
    PackedWeight,
    block_bytes,
    packed_weight,
    round_activations,
)

if TYPE_CHECKING:
    from jaxtyping import Float, Int, UInt8

    from porcelet.kernels.cpu._native import Residency


@dataclass(frozen=True)
class Residence:
    """What brings a layer's experts from disk as they are chosen, and the layer's number there (weights/offload.py)."""

    residency: Residency
    layer: int


@dataclass(frozen=True)
class PackedExperts:
    """Packed weights of E experts, stacked: [E, rows, K]. The rows are those of `parts` matrices, each with tiles of
    its own: gate and up projections, or down alone. All blocks are of one kind. Experts that stay on disk
    have a residence; their `packed` is a mapped file, whose experts need not lie one behind the other."""

    packed: UInt8[Tensor, "E parts tiles groups block"]
    shape: tuple[int, int, int]
    residence: Residence | None = None
    requires_grad: ClassVar[bool] = False

    def __getitem__(self, expert: int) -> list[PackedWeight]:
        """The matrices of one expert."""
        _, rows, K = self.shape
        parts = self.packed[expert]
        return [packed_weight(part, (rows // len(parts), K)) for part in parts]

    def dequantize(self, expert: int) -> Float[Tensor, "rows K"]:
        """One expert's rows in float32."""
        return torch.cat([part.dequantize() for part in self[expert]])


def packed_shape(shape: tuple[int, int, int], parts: int, kind: type[PackedWeight]) -> tuple[int, int, int, int, int]:
    """Of `PackedExperts.packed`, for a stack [E, rows, K] of so many parts."""
    E, rows, K = shape
    return E, parts, -(-rows // parts // TILE), K // GROUP, block_bytes(kind)


ExpertWeight = Tensor | FP8Weight | PackedExperts


@op
def route(
    logits: Float[Tensor, "T E"],
    bias: Float[Tensor, "E"],
    num_groups: int,
    topk_group: int,
    top_k: int,
    normalize: bool,
    scale: float,
) -> tuple[Int[Tensor, "T A"], Float[Tensor, "T A"]]:
    """V3's gate: indices and weights of the A chosen experts of each token.

    Scores are sigmoids; the correction bias takes part in the choice only. A group's score is the sum of its two
    best, and experts outside the best `topk_group` groups are out (-inf, as in the published demo).
    """
    scores = logits.float().sigmoid()
    choice = scores + bias
    if num_groups > 1:
        grouped = choice.unflatten(-1, (num_groups, -1))  # [T, groups, E / groups]
        choice = _best_groups(grouped, grouped.topk(2, dim=-1).values.sum(-1), topk_group)
    indices = choice.topk(top_k, dim=-1).indices
    weights = scores.gather(-1, indices)
    if normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return indices, weights * scale


@op
def route_softmax(
    logits: Float[Tensor, "T E"], num_groups: int, topk_group: int, top_k: int, scale: float
) -> tuple[Int[Tensor, "T A"], Float[Tensor, "T A"]]:
    """V2's gate: indices and weights of the A chosen experts of each token.

    Scores are a softmax over all experts; a group's score is its best one's. The chosen scores are multiplied by
    `scale` (16 in V2, 1 in V2-Lite) and not renormalised.
    """
    scores = logits.float().softmax(-1)
    choice = scores
    if num_groups > 1:
        grouped = choice.unflatten(-1, (num_groups, -1))  # [T, groups, E / groups]
        choice = _best_groups(grouped, grouped.amax(-1), topk_group)
    indices = choice.topk(top_k, dim=-1).indices
    return indices, scores.gather(-1, indices) * scale


def _best_groups(
    grouped: Float[Tensor, "T groups members"], score: Float[Tensor, "T groups"], count: int
) -> Float[Tensor, "T E"]:
    """All experts side by side again, those outside the `count` best groups at -inf."""
    best = score.topk(count, dim=-1).indices
    kept = torch.zeros_like(score, dtype=torch.bool).scatter(-1, best, True)
    return grouped.masked_fill(~kept[..., None], -torch.inf).flatten(-2)


@op
def experts(
    x: Float[Tensor, "T D"],
    gate_up: ExpertWeight,
    down: ExpertWeight,
    indices: Int[Tensor, "T A"],
    weights: Float[Tensor, "T A"],
) -> Float[Tensor, "T D"]:
    """Σ over a token's experts of weight · down(silu(gate) · up); a loop over experts.

    `gate_up` [E, 2F, D] stacks the gate's F rows above the up projection's, `down` is [E, D, F]; in FP8, whose blocks
    must not straddle the two, they are [E, 2, F, D] and [E, 1, D, F]; what packed ones are multiplied with is rounded.
    Tokens are sorted by expert once, so every expert reads and writes one contiguous piece; an expert without tokens
    costs nothing.
    """
    top_k = indices.shape[1]
    order = indices.flatten().argsort(stable=True)  # [T·A], assignments in order of their expert
    token = order // top_k
    counts = torch.bincount(indices.flatten(), minlength=gate_up.shape[0]).tolist()
    pieces = []
    for expert, rows in enumerate(x[token].split(counts)):
        if len(rows):
            gate, up = _expert(rows, gate_up, expert).chunk(2, dim=-1)
            pieces.append(_expert(functional.silu(gate) * up, down, expert))
    if not pieces:
        return torch.zeros_like(x)
    weighted = torch.cat(pieces) * weights.flatten()[order, None].to(x.dtype)
    return torch.zeros_like(x).index_add(0, token, weighted)


def _expert(x: Tensor, weight: ExpertWeight, expert: int) -> Tensor:
    """x · weightᵀ of one expert."""
    if isinstance(weight, PackedExperts):
        return functional.linear(round_activations(x), weight.dequantize(expert))
    if isinstance(weight, FP8Operand):
        x = weight.round_activations(x)
    dense = weight[expert] if isinstance(weight, Tensor) else weight[expert].dequantize().flatten(0, 1)
    return functional.linear(x, dense)
