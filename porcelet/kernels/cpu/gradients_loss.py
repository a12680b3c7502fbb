"""Log-probabilities of given tokens, with a backward pass for training in float32.

Tokens go through the head a chunk at a time, so [T, V] never exists whole. The gradient of a token's log-probability is
g · (onehot - softmax), which the backward pass makes from the logits. As many chunks as fit into SAVED_BYTES keep
theirs for it: that spares a product with the head, often the largest matrix of a small model. The others' are computed
again, to the same bits. A head that takes no gradient, as under LoRA, needs no logits in the backward pass: forward
finishes everything but the factor g.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from porcelet.kernels.cpu.gradients import trains
from porcelet.kernels.cpu.target import Target, at_once, available, is_float
from porcelet.kernels.loss import token_logprobs

if TYPE_CHECKING:
    from jaxtyping import Float, Int

CHUNK_BYTES = 1 << 24  # logits of a chunk of tokens
SAVED_BYTES = 1 << 28  # logits that may wait for the backward pass


class _Logprobs(Function):
    """For a head that takes a gradient."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        logprobs, log_sums, chunk = hidden.new_empty(len(hidden)), hidden.new_empty(len(hidden)), _chunk(weight)
        num_saved = SAVED_BYTES // chunk.nbytes
        saved = hidden.new_empty(min(len(hidden), num_saved * len(chunk)), len(weight))
        for rows in _split(hidden, chunk):
            logits = saved[rows] if rows.stop <= len(saved) else chunk[: rows.stop - rows.start]
            torch.mm(hidden[rows], weight.T, out=logits)
            _measure(logits, targets[rows], log_sums[rows], logprobs[rows])
        ctx.save_for_backward(hidden, weight, targets, log_sums, saved)
        return logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, log_sums, saved = ctx.saved_tensors
        grad, chunk = grad.contiguous(), _chunk(weight)
        dhidden = hidden.new_empty(hidden.shape) if ctx.needs_input_grad[0] else None
        dweight = weight.new_zeros(weight.shape)
        for rows in _split(hidden, chunk):
            logits = dlogits = chunk[: rows.stop - rows.start]
            if rows.stop <= len(saved):
                logits = saved[rows]
            else:
                torch.mm(hidden[rows], weight.T, out=logits)
            _differentiate(logits, targets[rows], log_sums[rows], grad[rows], dlogits)
            dweight.addmm_(dlogits.T, hidden[rows])
            if dhidden is not None:
                torch.mm(dlogits, weight, out=dhidden[rows])
        return dhidden, dweight, None


class _LogprobsOfFrozenHead(Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        logprobs, log_sums, chunk = hidden.new_empty(len(hidden)), hidden.new_empty(len(hidden)), _chunk(weight)
        slope, ones = hidden.new_empty(hidden.shape), hidden.new_ones(len(chunk))  # slope: of each log-probability
        for rows in _split(hidden, chunk):
            logits = torch.mm(hidden[rows], weight.T, out=chunk[: rows.stop - rows.start])
            _measure(logits, targets[rows], log_sums[rows], logprobs[rows])
            _differentiate(logits, targets[rows], log_sums[rows], ones, logits)
            torch.mm(logits, weight, out=slope[rows])
        ctx.save_for_backward(slope)
        return logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (slope,) = ctx.saved_tensors
        return slope * grad[:, None], None, None


@token_logprobs.body("cpu_gradient", when=trains, available=available)
def token_logprobs_gradient(
    hidden: Float[Tensor, "T D"], weight: Float[Tensor, "V D"], targets: Int[Tensor, "T"]
) -> Float[Tensor, "T"]:
    """Two passes over the logits forward, one backward."""
    if weight.dtype != torch.float32:
        return token_logprobs.reference(hidden, weight, targets)
    _check(hidden, weight, targets)
    function = _Logprobs if weight.requires_grad else _LogprobsOfFrozenHead
    return function.apply(hidden, weight, targets.contiguous())  # type: ignore[no-untyped-call]


@token_logprobs.body("cpu_float", when=is_float, available=available)
def token_logprobs_float(
    hidden: Float[Tensor, "T D"], weight: Float[Tensor, "V D"], targets: Int[Tensor, "T"]
) -> Float[Tensor, "T"]:
    """The bits that training gets."""
    if weight.dtype != torch.float32:
        return token_logprobs.reference(hidden, weight, targets)
    _check(hidden, weight, targets)
    logprobs, log_sums, chunk = hidden.new_empty(len(hidden)), hidden.new_empty(len(hidden)), _chunk(weight)
    targets = targets.contiguous()
    for rows in _split(hidden, chunk):
        logits = torch.mm(hidden[rows], weight.T, out=chunk[: rows.stop - rows.start])
        _measure(logits, targets[rows], log_sums[rows], logprobs[rows])
    return logprobs


def _check(hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    """Native code does not look at what it is given."""
    assert hidden.dim() == 2 and targets.shape == (len(hidden),), "a target for every row"
    assert weight.shape == (len(weight), hidden.shape[1]), "a head as wide as the rows"
    assert targets.dtype == torch.int64 and targets.is_cpu and weight.is_cpu
    assert not targets.numel() or 0 <= targets.min() <= targets.max() < len(weight), (
        "a target is outside the vocabulary"
    )


def _chunk(weight: Float[Tensor, "V D"]) -> Float[Tensor, "chunk V"]:
    """Room for one chunk's logits."""
    return weight.new_empty(max(1, CHUNK_BYTES // (4 * len(weight))), len(weight))


def _split(hidden: Float[Tensor, "T D"], chunk: Float[Tensor, "chunk V"]) -> Iterator[slice]:
    for start in range(0, len(hidden), len(chunk)):
        yield slice(start, min(start + len(chunk), len(hidden)))


def _measure(logits: Tensor, targets: Tensor, log_sums: Tensor, logprobs: Tensor) -> None:
    """Fill a chunk's `log_sums` and `logprobs`."""

    def append(target: Target) -> None:
        addresses = logits.data_ptr(), targets.data_ptr(), log_sums.data_ptr(), logprobs.data_ptr()
        target.program.logprobs(*addresses, logits.shape[1])

    at_once(append, len(logits), logits.numel())


def _differentiate(logits: Tensor, targets: Tensor, log_sums: Tensor, grad: Tensor, dlogits: Tensor) -> None:
    """Fill a chunk's `dlogits`, which may be `logits`."""

    def append(target: Target) -> None:
        addresses = logits.data_ptr(), targets.data_ptr(), log_sums.data_ptr(), grad.data_ptr(), dlogits.data_ptr()
        target.program.logprobs_backward(*addresses, logits.shape[1])

    at_once(append, len(logits), logits.numel())
