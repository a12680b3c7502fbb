"""Norms, rotations, gates and routers with a backward pass, for training in float32.

Forward is the body that inference takes. Backward recomputes what is cheap instead of saving it, in one pass over the
rows. No result depends on the number of threads. Of other dtypes nothing is known here: they keep the definition.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from porcelet.kernels import Key
from porcelet.kernels.cpu.matrices import route_float, route_softmax_float
from porcelet.kernels.cpu.pointwise import knows_norm, rms_norm_float, rope_float, silu_mul_float
from porcelet.kernels.cpu.target import Target, at_once, available, heads_of, num_heads, rows_of
from porcelet.kernels.experts import route, route_softmax
from porcelet.kernels.pointwise import rms_norm, rope, silu_mul

if TYPE_CHECKING:
    from jaxtyping import Float, Int

NORM_BLOCK = 64  # heads whose part in the weight's gradient is added up before it meets the others'


def trains(key: Key) -> bool:
    return key.device == "cpu" and key.needs_grad and key.dtype == torch.float32


def trains_plain(key: Key) -> bool:
    return trains(key) and key.format in ("Tensor", "Parameter")


class _RmsNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return rms_norm_float(x, weight, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dx, dweight = at_once(_rms_norm_backward, len(x), x.numel(), x, weight, grad, ctx.eps)
        return dx, dweight, None


def _rms_norm_backward(target: Target, x: Tensor, weight: Tensor, grad: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    heads, width = num_heads(x), x.shape[-1]
    dx, dweight = target.empty(*x.shape), target.empty(width)
    partial = target.empty(-(-len(x) * heads // NORM_BLOCK), width)
    out = dx.data_ptr(), dweight.data_ptr(), partial.data_ptr()
    inputs = heads_of(target.dense(x)), heads_of(target.dense(grad)), weight.data_ptr()
    target.program.rms_norm_backward(*inputs, out, heads, width, NORM_BLOCK, eps)
    return dx, dweight


@rms_norm.body("cpu_gradient", when=trains, available=available)
def rms_norm_gradient(x: Float[Tensor, "*rows W"], weight: Float[Tensor, "W"], eps: float) -> Float[Tensor, "*rows W"]:
    """Saves its inputs alone: the backward pass reads a row once for both its sums."""
    if not knows_norm(x, weight):
        return rms_norm.reference(x, weight, eps)
    return _RmsNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]


class _Rope(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return rope_float(x, cos, sin, interleaved)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        dx = at_once(_rope_backward, len(grad), grad.numel(), grad, cos, sin, ctx.interleaved)
        return dx, None, None, None


def _rope_backward(target: Target, grad: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    T, heads, R = grad.shape
    dx = target.empty(T, heads, R)
    addresses = cos.data_ptr(), sin.data_ptr(), dx.data_ptr()
    target.program.rope_backward(heads_of(target.dense(grad)), *addresses, heads, R // 2, interleaved)
    return dx


@rope.body("cpu_gradient", when=trains, available=available)
def rope_gradient(
    x: Float[Tensor, "T heads R"], cos: Float[Tensor, "T half"], sin: Float[Tensor, "T half"], interleaved: bool
) -> Float[Tensor, "T heads R"]:
    """Turns the gradient back by the same angles, which have no gradient themselves."""
    if cos.requires_grad or sin.requires_grad:
        return rope.reference(x, cos, sin, interleaved)
    return _Rope.apply(x, cos, sin, interleaved)  # type: ignore[no-untyped-call]


class _SiluMul(Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return silu_mul_float(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return at_once(_silu_mul_backward, len(grad), grad.numel(), gate, up, grad)


def _silu_mul_backward(target: Target, gate: Tensor, up: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    dgate, dup = target.empty(*gate.shape), target.empty(*gate.shape)
    inputs = rows_of(target.dense(gate)), rows_of(target.dense(up)), rows_of(target.dense(grad))
    target.program.silu_mul_backward(*inputs, dgate.data_ptr(), dup.data_ptr(), gate.shape[1])
    return dgate, dup


@silu_mul.body("cpu_gradient", when=trains, available=available)
def silu_mul_gradient(gate: Float[Tensor, "*rows F"], up: Float[Tensor, "*rows F"]) -> Float[Tensor, "*rows F"]:
    """Computes the sigmoid again."""
    if gate.dim() != 2 or gate.shape != up.shape or up.dtype != torch.float32:
        return silu_mul.reference(gate, up)
    return _SiluMul.apply(gate, up)  # type: ignore[no-untyped-call]


class _Route(Function):
    """Both gates; only the weights have a gradient, as the choice is a step function. `bias` is None for V2's."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, bias: Tensor | None, sizes: tuple[int, int, int], normalize: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        if bias is None:
            indices, weights = route_softmax_float(logits, *sizes, scale)
        else:
            indices, weights = route_float(logits, bias, *sizes, normalize, scale)
        ctx.save_for_backward(logits, indices, weights)
        ctx.how = bias is None, normalize, scale
        ctx.mark_non_differentiable(indices)
        return indices, weights

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, indices, weights = ctx.saved_tensors
        dlogits = torch.empty_like(logits)
        chosen = indices.data_ptr(), weights.data_ptr(), (grad := grad.contiguous()).data_ptr()

        def append(target: Target) -> None:
            sizes = logits.shape[1], indices.shape[1]
            target.program.route_backward(logits.data_ptr(), chosen, dlogits.data_ptr(), *sizes, *ctx.how)

        at_once(append, len(logits), 16 * logits.numel())
        return dlogits, None, None, None, None


@route.body("cpu_gradient", when=trains, available=available)
def route_gradient(
    logits: Float[Tensor, "T E"],
    bias: Float[Tensor, "E"],
    num_groups: int,
    topk_group: int,
    top_k: int,
    normalize: bool,
    scale: float,
) -> tuple[Int[Tensor, "T A"], Float[Tensor, "T A"]]:
    """The gradient goes through the chosen scores and their normalisation only."""
    sizes = num_groups, topk_group, top_k
    if bias.dtype != torch.float32:
        return route.reference(logits, bias, *sizes, normalize, scale)
    return _Route.apply(logits.contiguous(), bias, sizes, normalize, scale)  # type: ignore[no-untyped-call]


@route_softmax.body("cpu_gradient", when=trains, available=available)
def route_softmax_gradient(
    logits: Float[Tensor, "T E"], num_groups: int, topk_group: int, top_k: int, scale: float
) -> tuple[Int[Tensor, "T A"], Float[Tensor, "T A"]]:
    """As `route_gradient`; the softmax ties all experts' logits together."""
    sizes = num_groups, topk_group, top_k
    return _Route.apply(logits.contiguous(), None, sizes, False, scale)  # type: ignore[no-untyped-call]
