"""Mixture of experts: which experts a token goes to, and what they compute (DeepSeek-V3 report, section 2.1.2)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from porcelet.kernels import op

if TYPE_CHECKING:
    from jaxtyping import Float, Int


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
        best = grouped.topk(2, dim=-1).values.sum(-1).topk(topk_group, dim=-1).indices
        kept = torch.zeros_like(grouped[..., 0], dtype=torch.bool).scatter(-1, best, True)
        choice = grouped.masked_fill(~kept[..., None], -torch.inf).flatten(-2)
    indices = choice.topk(top_k, dim=-1).indices
    weights = scores.gather(-1, indices)
    if normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return indices, weights * scale


@op
def experts(
    x: Float[Tensor, "T D"],
    gate_up: Float[Tensor, "E F2 D"],
    down: Float[Tensor, "E D F"],
    indices: Int[Tensor, "T A"],
    weights: Float[Tensor, "T A"],
) -> Float[Tensor, "T D"]:
    """Σ over a token's experts of weight · down(silu(gate) · up); a loop over experts.

    `gate_up` stacks the gate's F rows above the up projection's. Tokens are sorted by expert once, so every expert
    reads and writes one contiguous piece; an expert without tokens costs nothing.
    """
    top_k = indices.shape[1]
    order = indices.flatten().argsort(stable=True)  # [T·A], assignments in order of their expert
    token = order // top_k
    counts = torch.bincount(indices.flatten(), minlength=len(gate_up)).tolist()
    pieces = []
    for expert, rows in enumerate(x[token].split(counts)):
        if len(rows):
            gate, up = functional.linear(rows, gate_up[expert]).chunk(2, dim=-1)
            pieces.append(functional.linear(functional.silu(gate) * up, down[expert]))
    if not pieces:
        return torch.zeros_like(x)
    weighted = torch.cat(pieces) * weights.flatten()[order, None].to(x.dtype)
    return torch.zeros_like(x).index_add(0, token, weighted)
