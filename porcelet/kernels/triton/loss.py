"""Log-probabilities of given tokens on a GPU. Importing this registers the body and does not import Triton.

[T, V] logits never exist whole: a chunk's come from torch's product, a kernel reads them once, and the backward pass
makes them again and turns them into their own gradients where they lie (as Liger's fused loss does, arXiv 2410.10989).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional

from porcelet.kernels import Key
from porcelet.kernels.loss import CHUNK, token_logprobs
from porcelet.kernels.triton.device import FLOATS, available, serves

if TYPE_CHECKING:
    from jaxtyping import Float, Int


def _is_served(key: Key) -> bool:
    return serves(key, "Tensor", "Parameter", dtypes=FLOATS, trained=True)


@token_logprobs.body("triton", when=_is_served, available=available)
def token_logprobs_triton(
    hidden: Float[Tensor, "T D"], weight: Float[Tensor, "V D"], targets: Int[Tensor, "T"]
) -> Float[Tensor, "T"]:
    """Chunks of tokens, forward and backward; the weight's gradient is summed in float32."""
    return _LogProbs.apply(hidden, weight, targets)  # type: ignore[no-untyped-call]


class _LogProbs(Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        from porcelet.kernels.triton.rows import logprobs

        pieces = [
            logprobs(functional.linear(h, weight), t)
            for h, t in zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True)
        ]
        ctx.save_for_backward(hidden, weight, targets, torch.cat([lse for _, lse in pieces]))
        return torch.cat([out for out, _ in pieces])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        from porcelet.kernels.triton.rows import logprobs_backward_

        hidden, weight, targets, lse = ctx.saved_tensors
        needs_hidden, needs_weight, _ = ctx.needs_input_grad
        hidden_grad = torch.empty_like(hidden) if needs_hidden else None
        weight_grad = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if needs_weight else None
        for start in range(0, len(hidden), CHUNK):
            own = slice(start, start + CHUNK)
            logits = functional.linear(hidden[own], weight)
            grads = logprobs_backward_(logits, targets[own], lse[own], grad[own].contiguous())
            if hidden_grad is not None:
                hidden_grad[own] = grads @ weight
            if weight_grad is not None:
                weight_grad += grads.T @ hidden[own]
        return hidden_grad, None if weight_grad is None else weight_grad.to(weight.dtype), None
