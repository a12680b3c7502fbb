"""Products with weights: linear layers in int8 and float32, absorbed MLA's matrix a head, routed experts and gates."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from porcelet.kernels.cpu.target import (
    WORTH_THREADS,
    Target,
    at_once,
    available,
    heads_of,
    indices_of,
    is_float,
    is_int8,
    is_plain_float,
    native,
    rows_of,
)
from porcelet.kernels.experts import ExpertWeight, experts, route, route_softmax
from porcelet.kernels.linear import GROUP, Int8Weight, Weight, heads_linear, linear
from porcelet.kernels.record import NotRecordable

if TYPE_CHECKING:
    from jaxtyping import Float, Int

if available():
    from porcelet.kernels.cpu import _native

LARGEST_BATCH = 64  # more tokens go to torch's GEMM, which packs its operands: that pays from about here


@native(linear, "cpu_int8", lambda key: is_int8(key) and is_float(key), work=lambda x: WORTH_THREADS)
def linear_int8(target: Target, x: Float[Tensor, "T D"], weight: Weight) -> Float[Tensor, "T N"]:
    """x · weightᵀ with x quantised to 16 bits a token and group of 32: within 1e-4 of the reference's largest value.

    The result is the same bit for bit whatever the instruction set, the number of threads and the other tokens. A token
    that holds NaN or infinity gets NaN in all its outputs.
    """
    assert isinstance(weight, Int8Weight) and x.dtype == torch.float32 and weight.packed.dtype == torch.uint8
    T, K = x.shape
    N = weight.shape[0]
    assert weight.shape[1] == K and K % GROUP == 0, (x.shape, weight.shape)
    assert x.is_cpu and weight.packed.is_cpu and weight.packed.is_contiguous()
    out, records = target.empty(T, N), target.empty(T, _native.linear_int8_record_bytes(K), dtype=torch.uint8)
    addresses = weight.packed.data_ptr(), records.data_ptr(), out.data_ptr()
    target.program.linear_int8(rows_of(target.dense(x)), *addresses, K, N)
    return out


def _linear_float(target: Target, x: Tensor, weight: Weight) -> Tensor:
    assert isinstance(weight, Tensor) and weight.is_cpu and weight.stride(-1) == 1
    if weight.dtype != torch.float32:
        raise NotRecordable(f"a linear layer's weight is in {weight.dtype}")
    (T, K), N = x.shape, len(weight)
    assert weight.shape == (N, K), (x.shape, weight.shape)
    out = target.empty(T, N)
    target.program.linear_float(rows_of(target.dense(x)), rows_of(weight), out.data_ptr(), K, N)
    return out


linear.instruction(when=is_plain_float, available=available)(_linear_float)


@linear.body("cpu_float", when=is_plain_float, available=available)
def linear_float(x: Float[Tensor, "T D"], weight: Weight) -> Float[Tensor, "T N"]:
    """x · weightᵀ from the parameter as it lies, up to 64 tokens, each with the same bits in every batch and on any
    number of threads. More tokens, and weights whose rows do not lie in one piece, go to torch."""
    assert isinstance(weight, Tensor)
    if len(x) > LARGEST_BATCH or weight.stride(-1) != 1 or weight.dtype != torch.float32:
        return linear.reference(x, weight)
    return at_once(_linear_float, len(x), x.numel() * len(weight), x, weight)


def _heads_linear(target: Target, x: Tensor, weight: Tensor) -> Tensor:
    """`weight` may be a slice of kv_b_proj, or that transposed."""
    T, heads, num_inputs = x.shape
    num_outputs = weight.shape[1]
    assert weight.shape == (heads, num_outputs, num_inputs) and weight.dtype == torch.float32, (x.shape, weight.shape)
    mixed = weight.stride(2) != 1
    stored = weight.transpose(1, 2) if mixed else weight
    assert stored.stride(2) == 1 and weight.is_cpu
    out = target.empty(T, heads, num_outputs)
    sizes = heads, num_inputs, num_outputs
    target.program.heads_linear(heads_of(target.dense(x)), heads_of(stored), out.data_ptr(), *sizes, mixed)
    return out


heads_linear.instruction(when=is_float, available=available)(_heads_linear)


@heads_linear.body("cpu_float", when=is_float, available=available)
def heads_linear_float(x: Float[Tensor, "T H I"], weight: Float[Tensor, "H O I"]) -> Float[Tensor, "T H O"]:
    """One matrix a head from where it lies; up to 64 tokens, each with the same bits in every batch."""
    if len(x) > LARGEST_BATCH or 1 not in weight.stride()[1:]:
        return heads_linear.reference(x, weight)
    return at_once(_heads_linear, len(x), x.numel() * weight.shape[1], x, weight)


def _experts(
    target: Target, x: Tensor, gate_up: ExpertWeight, down: ExpertWeight, indices: Tensor, weights: Tensor
) -> Tensor:
    assert isinstance(gate_up, Tensor) and isinstance(down, Tensor)
    (T, D), (E, _, F), A = x.shape, down.shape, indices.shape[1]
    assert gate_up.shape == (E, 2 * F, D) and down.shape == (E, D, F) and weights.shape == indices.shape == (T, A)
    for tensor in (gate_up, down, weights):
        assert tensor.is_contiguous() and tensor.dtype == torch.float32
    out, hidden = target.empty(T, D), target.empty(T * A, F)
    starts, order = target.empty(E + 1, dtype=torch.int64), target.empty(T * A, dtype=torch.int64)
    target.program.experts_float(
        rows_of(target.dense(x)),
        (gate_up.data_ptr(), down.data_ptr()),
        (indices_of(indices), weights.data_ptr()),
        (starts.data_ptr(), order.data_ptr(), hidden.data_ptr()),
        out.data_ptr(),
        (D, F, E, A),
    )
    return out


experts.instruction(when=is_plain_float, available=available)(_experts)


@experts.body("cpu_float", when=is_plain_float, available=available)
def experts_float(
    x: Float[Tensor, "T D"],
    gate_up: ExpertWeight,
    down: ExpertWeight,
    indices: Int[Tensor, "T A"],
    weights: Float[Tensor, "T A"],
) -> Float[Tensor, "T D"]:
    """All experts of up to 64 tokens in one parallel region. A token's experts are summed in ascending order: so it
    has the same bits in every batch."""
    assert isinstance(gate_up, Tensor) and isinstance(down, Tensor)
    if len(x) > LARGEST_BATCH or not (gate_up.is_contiguous() and down.is_contiguous()):
        return experts.reference(x, gate_up, down, indices, weights)
    assert all(0 <= expert < len(down) for expert in indices.flatten().tolist())
    work = indices.numel() * down[0].numel() * 3
    return at_once(_experts, len(x), work, x, gate_up, down, indices.contiguous(), weights.contiguous())


@route.instruction(when=is_float, available=available)
def _route_biased(
    target: Target,
    logits: Tensor,
    bias: Tensor,
    num_groups: int,
    topk_group: int,
    top_k: int,
    normalize: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    if bias.dtype != torch.float32:
        raise NotRecordable(f"a gate's bias is in {bias.dtype}")
    assert bias.is_contiguous() and bias.shape == logits.shape[1:]
    return _route(target, logits, bias.data_ptr(), num_groups, topk_group, top_k, normalize, scale)


@route.body("cpu_float", when=is_float, available=available)
def route_float(
    logits: Float[Tensor, "T E"],
    bias: Float[Tensor, "E"],
    num_groups: int,
    topk_group: int,
    top_k: int,
    normalize: bool,
    scale: float,
) -> tuple[Int[Tensor, "T A"], Float[Tensor, "T A"]]:
    """One pass a token. Of equal scores the lower index is taken, where torch leaves it open."""
    sizes = num_groups, topk_group, top_k
    if bias.dtype != torch.float32:
        return route.reference(logits, bias, *sizes, normalize, scale)
    return at_once(_route_biased, len(logits), 16 * logits.numel(), logits, bias, *sizes, normalize, scale)


@native(route_softmax, "cpu_float", is_float, work=lambda logits: 16 * logits.numel())
def route_softmax_float(
    target: Target, logits: Float[Tensor, "T E"], num_groups: int, topk_group: int, top_k: int, scale: float
) -> tuple[Int[Tensor, "T A"], Float[Tensor, "T A"]]:
    """As `route_float`."""
    return _route(target, logits, 0, num_groups, topk_group, top_k, False, scale)


def _route(
    target: Target,
    logits: Tensor,
    bias: int,
    num_groups: int,
    topk_group: int,
    top_k: int,
    normalize: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    T, E = logits.shape
    assert 0 < top_k <= E and 0 < topk_group <= num_groups and E % num_groups == 0
    assert num_groups == 1 or not bias or 2 * num_groups <= E  # V3's groups are scored by their two best
    assert logits.is_contiguous()
    indices, weights = target.empty(T, top_k, dtype=torch.int64), target.empty(T, top_k)
    addresses = indices.data_ptr(), weights.data_ptr(), target.empty(T, 2 * E + num_groups).data_ptr()
    sizes = E, num_groups, topk_group, top_k
    target.program.route(logits.data_ptr(), bias, *addresses, sizes, normalize, scale)
    return indices, weights
