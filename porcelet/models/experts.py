"""DeepSeekMoE: many small routed experts and shared ones.

DeepSeek-V2 paper, section 2.2; V3 report, section 2.1.2. V3 balances its experts by a bias instead of a loss: a buffer
that the trainer moves after each step; it takes part in the choice of experts only, so no gradient reaches it. Routed
experts are stacked, as one table in weights/load.py says.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from porcelet.config import ModelConfig
from porcelet.kernels.experts import ExpertWeight, PackedExperts, experts, route, route_softmax
from porcelet.kernels.linear import linear
from porcelet.kernels.pointwise import add
from porcelet.models.attention import PackedView, View
from porcelet.models.layers import MLP

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from porcelet.kernels.cpu._native import Residency


class Gate(nn.Module):
    """Scores tokens against experts in fp32 and chooses."""

    e_score_correction_bias: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        if config.has_gate_bias:
            self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts))

    def forward(self, x: Float[Tensor, "T D"], view: View) -> tuple[Int[Tensor, "T A"], Float[Tensor, "T A"]]:
        c = self.config
        logits = linear(x.float(), self.weight.float())
        if isinstance(view, PackedView) and view.gate_logits is not None:
            view.gate_logits.append((logits, view.segments))
        groups, active, scale = (c.n_group, c.topk_group), c.num_experts_per_tok, c.routed_scaling_factor
        if c.topk_method == "noaux_tc":
            return route(logits, self.e_score_correction_bias, *groups, active, c.norm_topk_prob, scale)
        return route_softmax(logits, *(groups if c.topk_method == "group_limited_greedy" else (1, 1)), active, scale)


class Experts(nn.Module):
    """The routed experts' weights, stacked over experts: [E, 2F, D] and [E, D, F]."""

    gate_up_proj: ExpertWeight
    down_proj: ExpertWeight

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        num_experts, width, hidden = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * hidden, width))
        self.down_proj = nn.Parameter(torch.empty(num_experts, width, hidden))

    def forward(self, x: Tensor, indices: Tensor, weights: Tensor) -> Float[Tensor, "T D"]:
        return experts(x, self.gate_up_proj, self.down_proj, indices, weights)


class MoE(nn.Module):
    """Routed experts plus the shared ones, which are one MLP of n_shared_experts times their width; there may be
    none."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = Gate(config)
        self.experts = Experts(config)
        shared_width = config.n_shared_experts * config.moe_intermediate_size
        self.shared_experts = MLP(config.hidden_size, shared_width) if shared_width else None

    def forward(self, x: Float[Tensor, "T D"], view: View) -> Float[Tensor, "T D"]:
        indices, weights = self.gate(x, view)
        view.routing.append(indices)
        routed: Tensor = self.experts(x, indices, weights)
        return add(routed, self.shared_experts(x)) if self.shared_experts else routed


def residency_of(model: nn.Module) -> Residency | None:
    """What looks after a model's experts that stay on disk; None if all are in memory."""
    stacks = (module.down_proj for module in model.modules() if isinstance(module, Experts))
    residences = (stack.residence for stack in stacks if isinstance(stack, PackedExperts))
    return next((residence.residency for residence in residences if residence), None)
