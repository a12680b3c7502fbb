"""Log-probabilities of given tokens, the one quantity that cross-entropy and policy gradients need from the head."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from porcelet.kernels import op

if TYPE_CHECKING:
    from jaxtyping import Float, Int

CHUNK = 2048  # tokens whose logits exist at the same time


@op
def token_logprobs(
    hidden: Float[Tensor, "T D"], weight: Float[Tensor, "V D"], targets: Int[Tensor, "T"]
) -> Float[Tensor, "T"]:
    """log softmax(hidden · weightᵀ)[targets], in fp32."""
    logits = functional.linear(hidden, weight).float()
    return logits.gather(-1, targets[:, None])[:, 0] - logits.logsumexp(-1)


@token_logprobs.body("chunked", when=lambda key: True)
def _token_logprobs_chunked(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The same in chunks of tokens; the backward pass recomputes a chunk's logits, so [T, V] never exists whole."""
    if len(hidden) <= CHUNK:
        return token_logprobs.reference(hidden, weight, targets)
    pieces = [
        checkpoint(token_logprobs.reference, h, weight, t, use_reentrant=False, preserve_rng_state=False)
        for h, t in zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True)
    ]
    return torch.cat(pieces)
