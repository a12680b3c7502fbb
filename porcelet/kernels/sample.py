"""Drawing tokens from logits, all requests of a step in one call.

The order of ARCHITECTURE's sampler: `allow` → (bias) → `penalize` → `sample`: temperature → min-p → top-k → top-p →
draw. Draws do not see each other, so their results do not depend on what shares the batch; what no draw asks for costs
nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from porcelet.kernels import op

if TYPE_CHECKING:
    from jaxtyping import Float, Int, UInt8


@op
def sample(
    logits: Float[Tensor, "rows V"],
    rows: Int[Tensor, "B"],
    temperature: Float[Tensor, "B"],
    top_k: Int[Tensor, "B"],
    top_p: Float[Tensor, "B"],
    min_p: Float[Tensor, "B"],
    uniform: Float[Tensor, "B"],
) -> tuple[Int[Tensor, "B"], Float[Tensor, "B"]]:
    """Draw B tokens, each from one of `rows`; returns them and their log-probability under the distribution they were
    drawn from. Draws may share a row.

    Temperature, then min-p, top-k and top-p (0, 0 and 1: off), then the draw by inverse cumulative probability at
    `uniform` in [0, 1), in float64 so that the sum over a large vocabulary stays exact enough. Draws at temperature 0
    take the largest logit (the first of equals) and report its log-probability at temperature 1. A row with a NaN or
    an infinite best logit gives some token whose log-probability is not finite.
    """
    logits = logits[rows]
    drawn = temperature.nonzero()[:, 0]
    if len(drawn) == len(temperature):
        return _draw(logits, temperature, top_k, top_p, min_p, uniform)
    tokens = logits.argmax(-1)
    logprobs = logits.gather(-1, tokens[:, None])[:, 0] - logits.logsumexp(-1)
    if len(drawn):
        columns = (column[drawn] for column in (logits, temperature, top_k, top_p, min_p, uniform))
        tokens[drawn], logprobs[drawn] = _draw(*columns)
    return tokens, logprobs


@op
def allow(logits: Float[Tensor, "B V"], masks: UInt8[Tensor, "B bytes"]) -> Float[Tensor, "B V"]:
    """Logits with -inf where a token is not allowed: bit t % 8, from the low end, of byte t // 8 is its token's."""
    bits = masks[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=masks.device) & 1  # [B, bytes, 8]
    allowed = bits.flatten(1)[:, : logits.shape[1]].bool()
    return logits.masked_fill(~allowed, -torch.inf)


@op
def penalize(
    logits: Float[Tensor, "B V"],
    rows: Int[Tensor, "T"],
    tokens: Int[Tensor, "T"],
    generated: Int[Tensor, "T"],
    repetition: Float[Tensor, "B"],
    presence: Float[Tensor, "B"],
    frequency: Float[Tensor, "B"],
) -> Float[Tensor, "B V"]:
    """Logits less what the tokens that a row has already cost it there.

    `rows`, `tokens` and `generated` (1 drawn, 0 of the prompt) list the rows' tokens in any order. First the
    repetition penalty on all of them (CTRL, arXiv 1909.05858, section 4.1, with HF's rule for negative logits:
    multiplied, not divided), then frequency and presence penalties (OpenAI) on the drawn ones.
    """
    width = logits.shape[-1]
    places, entries = (rows * width + tokens).unique(return_inverse=True)
    counts = torch.zeros(len(places), dtype=logits.dtype, device=logits.device)
    counts.index_add_(0, entries, generated.to(logits.dtype))
    row = places // width
    scores = logits.flatten()[places]
    scores = torch.where(scores < 0, scores * repetition[row], scores / repetition[row])
    scores = scores - frequency[row] * counts - presence[row] * (counts > 0)
    return logits.flatten().index_copy(0, places, scores).view_as(logits)


def _draw(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniform: Tensor
) -> tuple[Tensor, Tensor]:
    scores = logits.double() / temperature[:, None]
    logprobs = _truncate(scores, top_k, top_p, min_p).log_softmax(-1)
    cumulative = logprobs.exp().cumsum(-1)
    # The smallest index whose cumulative probability exceeds u · total has a probability above 0 itself.
    drawn = torch.searchsorted(cumulative, (uniform.double() * cumulative[:, -1])[:, None], right=True)[:, 0]
    last = (cumulative < cumulative[:, -1:]).sum(-1)  # the last index that can be drawn at all
    tokens = torch.minimum(drawn, last)
    return tokens, logprobs.gather(-1, tokens[:, None])[:, 0].to(logits.dtype)


def _truncate(scores: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Scores with -inf where min-p, top-k or top-p cut; only rows that ask for one of the latter are sorted."""
    if bool((min_p > 0).any()):
        # p >= min_p · best p, without the softmax. As a difference, so that min_p 1 keeps exactly the best.
        distance = scores - scores.amax(-1, keepdim=True)
        scores = scores.masked_fill(distance < min_p.double().log()[:, None], -torch.inf)
    asking = ((top_k > 0) | (top_p < 1)).nonzero()[:, 0]
    if len(asking):
        cut = _keep_best(scores[asking], top_k[asking], top_p[asking])
        scores = cut if len(asking) == len(scores) else scores.index_copy(0, asking, cut)
    return scores


def _keep_best(scores: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Keep the top_k best (0: all), of these the fewest whose probability reaches top_p."""
    values, order = scores.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(values.shape[-1], device=values.device)
    limit = torch.where(top_k > 0, top_k, values.shape[-1])[:, None]
    values = values.masked_fill(rank >= limit, -torch.inf)
    probabilities = values.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    values = values.masked_fill((before >= top_p.double()[:, None]) & (rank > 0), -torch.inf)
    return torch.full_like(values, -torch.inf).scatter(-1, order, values)
