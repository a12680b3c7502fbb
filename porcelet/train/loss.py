"""The one loss. Pre-training, fine-tuning and GRPO differ in the weights of their samples, not in code.

    total = L_CE + mtp_weight · L_MTP + L_policy

    L_CE     = Σ w_t · -log p(t) / Σ w_t                                      t the tokens that carry a weight
    L_MTP    = the same for the prediction made one token earlier             DeepSeek-V3 report, eq. 24 and 25, depth 1
    L_policy = -Σ min(ρ_t A_t, clip(ρ_t, 1 - low, 1 + high) A_t) / n          n the tokens with an advantage
               ρ_t = p(t) / p_old(t)

L_policy is GRPO's objective (DeepSeekMath, eq. 3) without its KL term, averaged over all tokens at once instead of over
each answer first, and with separate clips (DAPO, eq. 8). Policy probabilities are those at the sampling temperature, as
tokens were drawn from that distribution. A term whose weights are all zero costs nothing.

A step may go through the model in several passes. Each divides by the `Totals` of the whole step, so that the passes'
losses, parts and gradients add up to the step's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from porcelet.config import TrainConfig
from porcelet.kernels.loss import token_logprobs
from porcelet.models.attention import PackedView
from porcelet.models.transformer import Transformer
from porcelet.train.packing import Packed
from porcelet.types import Sample

if TYPE_CHECKING:
    from jaxtyping import Float, Int

Parts = dict[str, Tensor]
MAXIMA = ("mismatch",)  # parts whose largest value over the passes is the step's; the others' sum is


@dataclass(frozen=True)
class Totals:
    """What a step's means divide by."""

    weight: float
    further_weight: float
    num_policy_tokens: int

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> Totals:
        return cls(
            weight=sum(sum(sample.weights) for sample in samples),
            further_weight=sum(sum(sample.weights[2:]) for sample in samples),
            num_policy_tokens=sum(sum(a != 0 for a in sample.advantages) for sample in samples),
        )


def compute_loss(
    model: Transformer, batch: Packed, view: PackedView, config: TrainConfig, totals: Totals
) -> tuple[Float[Tensor, ""], Parts]:
    """The loss to descend, and its detached parts for the log. `view.routing` receives every MoE layer's choices."""
    hidden = model(batch.tokens, batch.positions, view)
    total, parts = hidden.new_zeros(()), {}
    if totals.weight:
        total = parts["cross_entropy"] = cross_entropy(model, hidden, batch, totals.weight)
        if config.mtp_weight and model.config.num_nextn_predict_layers and totals.further_weight:
            parts["mtp"] = mtp_loss(model, hidden, batch, view, totals.further_weight)
            total = total + config.mtp_weight * parts["mtp"]
    if totals.num_policy_tokens:
        policy, extra = policy_loss(model, hidden / config.policy.temperature, batch, config, totals)
        parts |= {"policy": policy, **extra}
        total = total + policy
    return total, {name: part.detach() for name, part in parts.items()}


def cross_entropy(model: Transformer, hidden: Float[Tensor, "T D"], batch: Packed, total: float) -> Float[Tensor, ""]:
    """Σ weight · -log p(target) / total. Only rows with a weight meet the head."""
    chosen = batch.weights.nonzero()[:, 0]
    logprobs = _logprobs(model, hidden[batch.rows[chosen]], batch.targets[chosen])
    return -(batch.weights[chosen] * logprobs).sum() / total


def mtp_loss(
    model: Transformer, hidden: Float[Tensor, "T D"], batch: Packed, view: PackedView, total: float
) -> Float[Tensor, ""]:
    """Cross-entropy of the MTP layer: a row that has read one token more predicts the one after it."""
    ahead = batch.further
    own = PackedView(ahead.segments, view.routing)
    further = model.predict_further(hidden[ahead.rows], ahead.tokens, ahead.positions, own)
    chosen = ahead.weights.nonzero()[:, 0]
    logprobs = _logprobs(model, further[chosen], ahead.targets[chosen])
    return -(ahead.weights[chosen] * logprobs).sum() / total


def policy_loss(
    model: Transformer, scaled: Float[Tensor, "T D"], batch: Packed, config: TrainConfig, totals: Totals
) -> tuple[Float[Tensor, ""], Parts]:
    """The clipped policy gradient; `scaled` is the hidden state over the temperature.

    Also returns the share of clipped tokens and `mismatch`, the largest |log p - log p_old|. At the first update after
    a rollout both are the same model's, so `mismatch` measures how far sampler and trainer compute alike.
    """
    chosen = batch.advantages.nonzero()[:, 0]
    logprobs = _logprobs(model, scaled[batch.rows[chosen]], batch.targets[chosen])
    difference = logprobs - batch.old_logprobs[chosen]
    advantages, ratio = batch.advantages[chosen], difference.exp()
    clipped = ratio.clamp(1.0 - config.policy.clip_low, 1.0 + config.policy.clip_high)
    gain = torch.minimum(ratio * advantages, clipped * advantages)
    extra = {
        "clipped": (clipped * advantages < ratio * advantages).float().sum() / totals.num_policy_tokens,
        "mismatch": difference.detach().abs().max() if len(chosen) else scaled.new_zeros(()),
    }
    return -gain.sum() / totals.num_policy_tokens, extra


def join_parts(parts: Sequence[Parts]) -> dict[str, float]:
    """The parts of a step from those of its passes."""
    names = dict.fromkeys(name for part in parts for name in part)
    return {
        name: (max if name in MAXIMA else sum)(float(part[name]) for part in parts if name in part) for name in names
    }


def _logprobs(model: Transformer, hidden: Float[Tensor, "N D"], targets: Int[Tensor, "N"]) -> Float[Tensor, "N"]:
    head = model.lm_head.weight
    assert isinstance(head, Tensor), "a quantised model cannot be trained"
    return token_logprobs(hidden, head, targets)
