"""How experts are kept equally busy: V3's rule on biases, the sequence-wise loss beside it, and how far they are off.

V3 (report, section 2.1.2) moves a bias an expert after each step by the sign of its load's error, which no gradient
sees. A loss an order weaker keeps single sequences from extremes, with what the gate would choose without the biases:

    L = α Σ_i f_i P_i         f_i = E / (A · T) · tokens of the sequence that choose expert i
                              P_i = mean over the sequence's tokens of score i / sum of scores     eq. 17 to 20

V2's expert-level loss (paper, section 2.2.3, eq. 23 to 25) is the same formula with softmax scores and the choices as
they are. Only P has a gradient, so the loss reaches the gate and what lies before it, never the experts.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from porcelet.config import ModelConfig
from porcelet.kernels.attention import Segments
from porcelet.models.attention import PackedView
from porcelet.models.experts import Gate
from porcelet.models.transformer import Transformer

if TYPE_CHECKING:
    from jaxtyping import Float, Int


def expert_loads(routing: Sequence[Int[Tensor, "T A"]], num_experts: int) -> list[Float[Tensor, "E"]]:
    """How many tokens went to each expert, a layer; `routing` holds the MoE layers' choices in order."""
    return [torch.bincount(indices.flatten(), minlength=num_experts).float() for indices in routing]


def max_violations(loads: Sequence[Float[Tensor, "E"]]) -> list[float]:
    """MaxVio = max load / mean load - 1 of each layer (Wang et al. 2024, arXiv 2408.15664, eq. 4)."""
    return [float(load.max() / load.mean()) - 1.0 for load in loads]


def balance_metrics(loads: Sequence[Float[Tensor, "E"]]) -> dict[str, float]:
    """For the log: the worst layer's MaxVio and the mean over layers, which is what the paper reports."""
    violations = max_violations(loads)
    return {"max_violation": max(violations, default=0.0), "mean_violation": statistics.fmean(violations or [0.0])}


@torch.no_grad()
def move_biases(model: Transformer, loads: Sequence[Float[Tensor, "E"]], speed: float) -> None:
    """b_i += speed · sign(mean load - load_i), layer by layer; the MTP layer's comes last, if it ran at all.

    A gate without biases, as V2's, stays as it is.
    """
    gates = [module for module in model.modules() if isinstance(module, Gate)]
    for gate, load in zip(gates, loads, strict=False):
        if gate.config.has_gate_bias:
            gate.e_score_correction_bias += speed * (load.mean() - load).sign()


def sequence_balance(view: PackedView, config: ModelConfig, num_rows: int) -> Float[Tensor, ""]:
    """Σ over MoE layers of the mean of L / α over sequences, each weighed by its length.

    `num_rows` is what the mean divides by: the rows of all samples of a step, so that the terms of its passes add up.
    A segment is a sequence. One behind a shared prefix counts its own rows only, and the prefix once for all.
    """
    assert view.gate_logits is not None, "the view was not asked to keep them"
    terms = [
        _layer_balance(logits, indices, segments, config)
        for (logits, segments), indices in zip(view.gate_logits, view.routing, strict=True)
    ]
    return torch.stack(terms).sum() / num_rows


def _layer_balance(
    logits: Float[Tensor, "T E"], indices: Int[Tensor, "T A"], segments: Segments, config: ModelConfig
) -> Float[Tensor, ""]:
    """Σ over sequences of T · Σ_i f_i P_i."""
    num_experts, top_k = config.n_routed_experts, config.num_experts_per_tok
    if config.has_gate_bias:
        scores, indices = logits.sigmoid(), logits.topk(top_k, dim=-1).indices
        scores = scores / scores.sum(-1, keepdim=True)
    else:
        scores = logits.softmax(-1)
    lengths = torch.tensor(segments.lengths, device=logits.device)
    sequence = torch.arange(len(lengths), device=logits.device).repeat_interleave(lengths)  # [T], of each row
    empty = logits.new_zeros(len(lengths), num_experts)
    chosen = empty.index_add(0, sequence, torch.zeros_like(logits).scatter(-1, indices, 1.0))  # [B, E] tokens
    mass = empty.index_add(0, sequence, scores)  # [B, E], Σ over the sequence's tokens
    products = (chosen * mass).sum(-1) / lengths.clamp_min(1)  # [B], T · Σ f P · A / E
    return products.sum() * num_experts / top_k
