"""In which precision a model is trained: float32, bfloat16, or FP8 emulated on any device.

Master weights, gradients, moments, routers and losses are always float32; what changes is how ops compute. As with
quantised weights the format is the weight's class: `apply` gives parameters a class, and the ops' bodies below answer
to it. No model code asks.

bfloat16: activations and matrix products; norms compute in float32 and round, the head's product and the loss are
float32 (a policy's log-probabilities need it).

fp8 (DeepSeek-V3 report, section 3.3): every product of the blocks' linear layers and experts, forward and both
backward ones, multiplies E4M3 values scaled a tile, 1·128 along the sum for activations and gradients, 128·128 for
weights, and adds in float32. Embedding, head, routers, norms and attention proper stay. Scales are powers of two, as
V3.1's (V3's were any float32), so that scaling is exact. Left out: the tensor cores' short accumulators, bfloat16
between layers, and FP8 in caches and communication. It is slower than float32: it shows what the precision costs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from porcelet.kernels import Key
from porcelet.kernels.experts import experts
from porcelet.kernels.linear import embedding, heads_linear, linear, round_to_e4m3
from porcelet.kernels.loss import token_logprobs
from porcelet.kernels.pointwise import add, rms_norm, silu_mul
from porcelet.models.experts import Gate
from porcelet.models.transformer import Transformer

if TYPE_CHECKING:
    from jaxtyping import Float, Int

TILE = 128


class BFloat16Parameter(nn.Parameter):
    """Float32 values that ops multiply in bfloat16."""


class FP8Parameter(nn.Parameter):
    """Float32 values that ops multiply in FP8."""


def apply(model: Transformer, dtype: str) -> Transformer:
    """The same model, whose ops compute in `dtype` ("float32", "bfloat16", "fp8") from now on.

    Its parameters are new objects, so an optimizer is made after this.
    """
    if dtype == "float32":
        return model
    made: dict[Tensor, nn.Parameter] = {}  # a tied embedding stays tied
    for module in model.modules() if dtype == "bfloat16" else model.model.layers.modules():
        if isinstance(module, Gate):
            continue
        for name, parameter in list(module.named_parameters(recurse=False)):
            if dtype == "bfloat16" or parameter.dim() > 1:
                kind = BFloat16Parameter if dtype == "bfloat16" else FP8Parameter
                setattr(module, name, made.setdefault(parameter, kind(parameter.data, parameter.requires_grad)))
    return model


# ---- bfloat16 -------------------------------------------------------------------------------------------------------


def _is_bfloat16(key: Key) -> bool:
    return key.format == "BFloat16Parameter"


@linear.body("bfloat16", when=_is_bfloat16)
def _linear_bfloat16(x: Tensor, weight: Any) -> Tensor:
    return functional.linear(x.bfloat16(), weight.bfloat16())


@heads_linear.body("bfloat16", when=lambda key: key.dtype == torch.bfloat16)
def _heads_linear_bfloat16(x: Tensor, weight: Any) -> Tensor:
    """Of the sampler's absorbed form, which takes slices of a parameter."""
    return heads_linear.reference(x, weight.bfloat16())


@embedding.body("bfloat16", when=_is_bfloat16)
def _embedding_bfloat16(tokens: Tensor, weight: Any) -> Tensor:
    return functional.embedding(tokens, weight).bfloat16()


@rms_norm.body("bfloat16", when=_is_bfloat16)
def _rms_norm_bfloat16(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return rms_norm.reference(x.float(), weight, eps).bfloat16()


@add.body("bfloat16", when=_is_bfloat16)
def _add_bfloat16(first: Tensor, second: Tensor) -> Tensor:
    """A bias."""
    return first + second.bfloat16()


@experts.body("bfloat16", when=_is_bfloat16)
def _experts_bfloat16(x: Tensor, gate_up: Any, down: Any, indices: Tensor, weights: Tensor) -> Tensor:
    return experts.reference(x.bfloat16(), gate_up.bfloat16(), down.bfloat16(), indices, weights)


@token_logprobs.body("bfloat16", when=_is_bfloat16)
def _token_logprobs_bfloat16(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """In float32, by the body that a plain parameter would meet."""
    return token_logprobs(hidden.float(), weight.view_as(weight), targets)


# ---- FP8 ------------------------------------------------------------------------------------------------------------


class _FP8Linear(torch.autograd.Function):
    """x · weightᵀ and its two backward products, each of two operands in FP8. Figure 6 of the report."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        x_low, weight_low = round_to_e4m3(x, (1, TILE)), round_to_e4m3(weight, (TILE, TILE))
        ctx.save_for_backward(x_low, weight_low)
        return x_low @ weight_low.T

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        """The kept activations are in FP8 already; for the weight's gradient, a sum over tokens, tiles turn."""
        (gradient,) = gradients
        x_low, weight_low = ctx.saved_tensors
        x_gradient = round_to_e4m3(gradient, (1, TILE)) @ weight_low
        return x_gradient, round_to_e4m3(gradient, (TILE, 1)).T @ round_to_e4m3(x_low, (TILE, 1))


def fp8_linear(x: Float[Tensor, "T D"], weight: Float[Tensor, "N D"]) -> Float[Tensor, "T N"]:
    """x · weightᵀ by FP8 operands, forward and backward."""
    return _FP8Linear.apply(x, weight)  # type: ignore[no-untyped-call]


def _is_fp8(key: Key) -> bool:
    return key.format == "FP8Parameter"


@linear.body("fp8", when=_is_fp8)
def _linear_fp8(x: Tensor, weight: Any) -> Tensor:
    return fp8_linear(x, weight)


@experts.body("fp8", when=_is_fp8)
def _experts_fp8(x: Tensor, gate_up: Any, down: Any, indices: Int[Tensor, "T A"], weights: Tensor) -> Tensor:
    """The definition's loop over experts; no block of a weight straddles gate and up projection."""
    order = indices.flatten().argsort(stable=True)
    token = order // indices.shape[1]
    counts = torch.bincount(indices.flatten(), minlength=len(gate_up)).tolist()
    pieces = [torch.zeros_like(x[:0])]
    for expert, rows in enumerate(x[token].split(counts)):
        if len(rows):
            gate, up = (fp8_linear(rows, half) for half in gate_up[expert].chunk(2))
            pieces.append(fp8_linear(silu_mul(gate, up), down[expert]))
    return torch.zeros_like(x).index_add(0, token, torch.cat(pieces) * weights.flatten()[order, None])
