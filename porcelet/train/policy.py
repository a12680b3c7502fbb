"""The policy's loss: GRPO and its family. Members differ in three choices, and a table holds them.

    L = -Σ_t w_t · (c_t · min(ρ_t A_t, clip(ρ_t, 1 - low, 1 + high) A_t) - β · KL_t)

              advantage       ratio ρ_t over   weight w_t of a token
    grpo      (r - mean)/std  the token        1 / (answers · |o|)           DeepSeekMath (2402.03300), eq. 3
    dr_grpo   r - mean        the token        1 / (answers · max tokens)    Dr. GRPO (2503.20783)
    dapo      (r - mean)/std  the token        1 / tokens of all answers     DAPO (2503.14476), eq. 8
    gspo      (r - mean)/std  answer, mean     1 / (answers · |o|)           GSPO (2507.18071), eq. 5 to 7
    rloo      leave one out   answer, product  1 / (answers · |o|)           RLOO (2402.14740)

ρ is p / p_old: of the token, the geometric mean over the answer, or the whole answer's. |o| is the answer's length; an
answer's |o| equal terms of weight 1 / |o| are its one term. Answers without a signal count, as in the papers, but are
not computed. KL is k3, r - log r - 1 with r = p_ref / p (DeepSeekMath, eq. 4), or V3.2's unbiased p / p_old times that.
c_t = min(p_old / p_sampler, C) corrects for a sampler that computes unlike the trainer (truncated importance
sampling), and is 1 otherwise.

On-policy distillation is this loss too: with log p_teacher - log p_old as each token's advantage, the gradient is that
of the reverse KL to the teacher, token by token, on the student's own answers. Left out: RLOO's KL as a part of the
reward, GSPO's token-level variant, and process rewards.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from porcelet.config import PolicyConfig
from porcelet.train.packing import Packed

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from porcelet.train.loss import Totals


@dataclass(frozen=True)
class Member:
    """A row of the table."""

    advantage: str  # a name of train/advantages.py
    ratio: str  # token | mean | product
    mean: str  # answer | budget | token


FAMILY = {
    "grpo": Member("standardised", "token", "answer"),
    "dr_grpo": Member("centred", "token", "budget"),
    "dapo": Member("standardised", "token", "token"),
    "gspo": Member("standardised", "mean", "answer"),
    "rloo": Member("leave_one_out", "product", "answer"),
}


@dataclass(frozen=True)
class Drawn:
    """The M predictions of a batch that are drawn tokens."""

    chosen: Int[Tensor, "M"]  # among the batch's
    answers: Int[Tensor, "M"]
    num_answers: int
    lengths: Float[Tensor, "M"]
    advantages: Float[Tensor, "M"]
    old: Float[Tensor, "M"]
    sampler: Float[Tensor, "M"]
    reference: Float[Tensor, "M"]

    @classmethod
    def of(cls, batch: Packed) -> Drawn:
        chosen = batch.num_drawn.nonzero()[:, 0]
        answers = batch.samples[chosen]
        return cls(
            chosen=chosen,
            answers=answers,
            num_answers=int(answers.max()) + 1 if len(answers) else 0,
            lengths=batch.num_drawn[chosen].float(),
            advantages=batch.advantages[chosen],
            old=batch.old_logprobs[chosen],
            sampler=batch.sampler_logprobs[chosen],
            reference=batch.reference_logprobs[chosen],
        )

    def summed(self, values: Float[Tensor, "M"]) -> Float[Tensor, "M"]:
        """Each token's entry becomes the sum over its answer."""
        return values.new_zeros(self.num_answers).index_add(0, self.answers, values)[self.answers]


def policy_loss(
    logprobs: Float[Tensor, "M"], drawn: Drawn, config: PolicyConfig, totals: Totals
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """The loss of some of a step's answers, given their tokens' log-probabilities; and what is to log about it.

    All is additive over the passes of a step, but for `mismatch`, which has a largest value.
    """
    low, high = 1.0 - config.clip_low, 1.0 + config.clip_high
    change, off, advantages = logprobs - drawn.old, logprobs - drawn.sampler, drawn.advantages
    ratio = _exponent(change, drawn, FAMILY[config.loss].ratio).exp()
    gain = torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)
    metrics = _shares(ratio, advantages, low, high) | {"ratio": ratio, "entropy": -logprobs}
    metrics["mismatch_kl"] = off.exp() - off - 1.0
    if config.importance_cap:
        metrics["importance"] = trust = (drawn.old - drawn.sampler).exp().clamp(max=config.importance_cap)
        gain = gain * trust
    if config.off_policy_limit:
        gain = gain * _is_near(off.detach(), drawn, config.off_policy_limit)
    if config.kl_weight:
        metrics["kl"] = divergence = _divergence(logprobs, change, drawn, config.kl_estimator)
        gain = gain - config.kl_weight * divergence
    means = {name: value.detach().sum() / totals.num_computed_tokens for name, value in metrics.items()}
    worst = off.detach().abs().max() if len(off) else off.new_zeros(())
    return -(_weights(drawn, config, totals) * gain).sum(), means | {"mismatch": worst}


def _weights(drawn: Drawn, config: PolicyConfig, totals: Totals) -> Float[Tensor, "M"]:
    """w_t of the table."""
    match FAMILY[config.loss].mean:
        case "token":
            return torch.full_like(drawn.lengths, 1.0 / totals.num_policy_tokens)
        case "budget":
            return torch.full_like(drawn.lengths, 1.0 / (totals.num_answers * config.max_new_tokens))
    return 1.0 / (totals.num_answers * drawn.lengths)


def _exponent(change: Float[Tensor, "M"], drawn: Drawn, ratio: str) -> Float[Tensor, "M"]:
    """log ρ_t from log p - log p_old."""
    match ratio:
        case "mean":
            return drawn.summed(change) / drawn.lengths
        case "product":
            return drawn.summed(change)
    return change


def _is_near(off: Float[Tensor, "M"], drawn: Drawn, limit: float) -> Float[Tensor, "M"]:
    """0 for bad answers whose tokens have become less likely by more than `limit` on average, 1 for all others."""
    distance = -drawn.summed(off) / drawn.lengths
    return ((drawn.advantages >= 0) | (distance <= limit)).float()


def _divergence(
    logprobs: Float[Tensor, "M"], change: Float[Tensor, "M"], drawn: Drawn, estimator: str
) -> Float[Tensor, "M"]:
    """An estimate of KL(p, p_ref) from a drawn token alone, never negative."""
    off = drawn.reference - logprobs
    estimate = off.exp() - off - 1.0
    return change.exp() * estimate if estimator == "unbiased" else estimate


def _shares(ratio: Float[Tensor, "M"], advantages: Float[Tensor, "M"], low: float, high: float) -> dict[str, Tensor]:
    """Which tokens the clip stops, under TRL's names."""
    below, above = (ratio < low) & (advantages < 0), (ratio > high) & (advantages > 0)
    names = ("clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean")
    return {name: value.float() for name, value in zip(names, (below, above, below | above), strict=True)}
