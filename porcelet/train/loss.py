"""The one loss. Pre-training, fine-tuning and GRPO differ in the weights of their samples, not in code.

    total = L_CE + mtp_weight · L_MTP + L_policy

    L_CE     = Σ w_t · -log p(t) / Σ w_t                                      t the tokens that carry a weight
    L_MTP    = the same for the prediction made one token earlier             DeepSeek-V3 report, eq. 24 and 25, depth 1
    L_policy = -Σ min(ρ_t A_t, clip(ρ_t, 1 - low, 1 + high) A_t) / n          n the tokens with an advantage
               ρ_t = p(t) / p_old(t)

L_policy is GRPO's objective (DeepSeekMath, eq. 3) without its KL term, averaged over all tokens at once instead of over
each answer first, and with separate clips (DAPO, eq. 8). Policy probabilities are those at the sampling temperature, as
tokens were drawn from that distribution. A term whose weights are all zero costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from porcelet.config import TrainConfig
from porcelet.kernels.loss import token_logprobs
from porcelet.models.attention import PackedView
from porcelet.models.transformer import Transformer
from porcelet.train.data import Packed

if TYPE_CHECKING:
    from jaxtyping import Float, Int

Parts = dict[str, Tensor]


def compute_loss(
    model: Transformer, batch: Packed, view: PackedView, config: TrainConfig
) -> tuple[Float[Tensor, ""], Parts]:
    """The loss to descend, and its detached parts for the log. `view.routing` receives every MoE layer's choices."""
    hidden = model(batch.tokens, batch.positions, view)
    total, parts = hidden.new_zeros(()), {}
    if batch.weights.any():
        total = parts["cross_entropy"] = cross_entropy(model, hidden, batch.targets, batch.weights)
        if config.mtp_weight and model.config.num_nextn_predict_layers:
            parts["mtp"] = mtp_loss(model, hidden, batch, view)
            total = total + config.mtp_weight * parts["mtp"]
    if batch.advantages.any():
        policy, extra = policy_loss(model, hidden / config.temperature, batch, config)
        parts |= {"policy": policy, **extra}
        total = total + policy
    return total, {name: part.detach() for name, part in parts.items()}


def cross_entropy(
    model: Transformer, hidden: Float[Tensor, "T D"], targets: Int[Tensor, "T"], weights: Float[Tensor, "T"]
) -> Float[Tensor, ""]:
    """The weighted mean of -log p(target). Only rows with a weight meet the head."""
    rows = weights.nonzero()[:, 0]
    logprobs = _logprobs(model, hidden[rows], targets[rows])
    return -(weights[rows] * logprobs).sum() / weights[rows].sum()


def mtp_loss(model: Transformer, hidden: Float[Tensor, "T D"], batch: Packed, view: PackedView) -> Float[Tensor, ""]:
    """Cross-entropy of the MTP layer: row i, which has read token i + 1 too, predicts token i + 2 of its sequence."""
    further = model.predict_further(hidden, batch.targets, batch.positions, view)
    targets, weights = batch.targets.roll(-1), batch.weights.roll(-1)
    weights[batch.offsets[1:] - 1] = 0.0  # the last row's next one belongs to another sequence
    return cross_entropy(model, further, targets, weights)


def policy_loss(
    model: Transformer, scaled: Float[Tensor, "T D"], batch: Packed, config: TrainConfig
) -> tuple[Float[Tensor, ""], Parts]:
    """The clipped policy gradient; `scaled` is the hidden state over the temperature.

    Also returns the share of clipped tokens and `mismatch`, the largest |log p - log p_old|. At the first update after
    a rollout both are the same model's, so `mismatch` measures how far sampler and trainer compute alike.
    """
    rows = batch.advantages.nonzero()[:, 0]
    logprobs = _logprobs(model, scaled[rows], batch.targets[rows])
    difference = logprobs - batch.old_logprobs[rows]
    advantages, ratio = batch.advantages[rows], difference.exp()
    clipped = ratio.clamp(1.0 - config.clip_low, 1.0 + config.clip_high)
    gain = torch.minimum(ratio * advantages, clipped * advantages)
    extra = {
        "clipped": (clipped * advantages < ratio * advantages).float().mean(),
        "mismatch": difference.detach().abs().max(),
    }
    return -gain.mean(), extra


def _logprobs(model: Transformer, hidden: Float[Tensor, "T D"], targets: Int[Tensor, "T"]) -> Float[Tensor, "T"]:
    head = model.lm_head.weight
    assert isinstance(head, Tensor), "a quantised model cannot be trained"
    return token_logprobs(hidden, head, targets)
