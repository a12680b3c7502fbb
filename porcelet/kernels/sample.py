"""Drawing tokens from logits, all requests of a step in one call."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from porcelet.kernels import op

if TYPE_CHECKING:
    from jaxtyping import Float, Int


@op
def sample(
    logits: Float[Tensor, "B V"],
    temperature: Float[Tensor, "B"],
    top_k: Int[Tensor, "B"],
    top_p: Float[Tensor, "B"],
    uniform: Float[Tensor, "B"],
) -> tuple[Int[Tensor, "B"], Float[Tensor, "B"]]:
    """Draw one token a row; returns tokens and their log-probability under the distribution they were drawn from.

    Temperature, then top-k, then top-p, then the draw by inverse cumulative probability at `uniform` in [0, 1), in
    float64 so that the sum over a large vocabulary stays exact enough. Rows of temperature 0 take the largest logit
    (the first of equals) and report its log-probability at temperature 1.
    """
    greedy = temperature == 0
    if bool(greedy.all()):
        tokens = logits.argmax(-1)
        return tokens, logits.gather(-1, tokens[:, None])[:, 0].float() - logits.float().logsumexp(-1)
    scaled = logits.double() / torch.where(greedy, 1.0, temperature)[:, None]
    best = scaled.argmax(-1)
    logprobs = scaled.log_softmax(-1)
    if bool(((top_k > 0) | (top_p < 1))[~greedy].any()):
        logprobs = torch.where(greedy[:, None], logprobs, _truncate(logprobs, top_k, top_p))
    cumulative = logprobs.exp().cumsum(-1)
    # The smallest index whose cumulative probability exceeds u · total has a probability above 0 itself.
    drawn = torch.searchsorted(cumulative, (uniform.double() * cumulative[:, -1])[:, None], right=True)[:, 0]
    last = (cumulative < cumulative[:, -1:]).sum(-1)  # the last index that can be drawn at all
    tokens = torch.where(greedy, best, torch.minimum(drawn, last))
    return tokens, logprobs.gather(-1, tokens[:, None])[:, 0].float()


def _truncate(logprobs: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Keep the top_k best (0: all), of these the fewest whose probability reaches top_p, and renormalise."""
    values, order = logprobs.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(values.shape[-1], device=values.device)
    limit = torch.where(top_k > 0, top_k, values.shape[-1])[:, None]
    values = values.masked_fill(rank >= limit, -torch.inf).log_softmax(-1)
    before = values.exp().cumsum(-1) - values.exp()
    values = values.masked_fill((before >= top_p.double()[:, None]) & (rank > 0), -torch.inf).log_softmax(-1)
    return torch.full_like(values, -torch.inf).scatter(-1, order, values)
