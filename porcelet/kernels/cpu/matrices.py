"""Products with weights, packed or in float32: linear layers, absorbed MLA's matrix a head, routed experts, gates."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from porcelet.kernels.cpu.target import (
    WORTH_THREADS,
    Target,
    at_once,
    available,
    fp8_of,
    heads_of,
    indices_of,
    is_float,
    is_fp8,
    is_packed,
    is_packed_experts,
    is_plain_float,
    native,
    num_heads,
    packed_of,
    rows_of,
)
from porcelet.kernels.experts import ExpertWeight, PackedExperts, experts, route, route_softmax
from porcelet.kernels.linear import (
    GROUP,
    FP8Weight,
    HeadsWeight,
    PackedHeads,
    PackedWeight,
    Weight,
    heads_linear,
    linear,
    wide_from,
)
from porcelet.kernels.record import NotRecordable

if TYPE_CHECKING:
    from jaxtyping import Float, Int

if available():
    from porcelet.kernels.cpu import _native


@native(linear, "cpu_packed", lambda key: is_packed(key) and is_float(key), work=lambda x: WORTH_THREADS)
def linear_packed(target: Target, x: Float[Tensor, "T D"], weight: Weight) -> Float[Tensor, "T N"]:
    """x · weightᵀ with x rounded as `round_activations` says.

    The result is the same bit for bit whatever the instruction set, the number of threads and the other tokens. A token
    that holds NaN or infinity gets NaN in all its outputs.
    """
    assert isinstance(weight, PackedWeight) and x.dtype == torch.float32 and x.is_cpu
    T, K = x.shape
    N = weight.shape[0]
    assert weight.shape[1] == K and K % GROUP == 0, (x.shape, weight.shape)
    out, records = target.empty(T, N), _records(target, x)
    target.program.linear_packed(records.data_ptr(), packed_of(weight), out.data_ptr())
    return out


def _records(target: Target, x: Tensor) -> Tensor:
    """`x`, rows or heads of rows, rounded: once for all the weights that are multiplied with it."""
    records = target.derived(x)
    if records is None:
        *rows, K = x.shape
        records = target.derive(x, target.empty(*rows, _native.record_bytes(K), dtype=torch.uint8))
        target.program.quantize(heads_of(target.dense(x)), records.data_ptr(), num_heads(x), K, wide_from())
    return records


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
    """x · weightᵀ from the parameter as it lies, each token with the same bits in every batch and on any number of
    threads. Weights whose rows do not lie in one piece go to torch."""
    assert isinstance(weight, Tensor)
    if weight.stride(-1) != 1 or weight.dtype != torch.float32:
        return linear.reference(x, weight)
    return at_once(_linear_float, len(x), x.numel() * len(weight), x, weight)


@native(linear, "cpu_fp8", is_fp8, work=lambda x: WORTH_THREADS)
def linear_fp8(target: Target, x: Float[Tensor, "T D"], weight: Weight) -> Float[Tensor, "T N"]:
    """x · weightᵀ from the stored bytes, any number of tokens; each has the same bits in every batch and on any number
    of threads, those that `linear_float` gives with the expanded weight."""
    assert isinstance(weight, FP8Weight)
    (T, K), N = x.shape, weight.shape[0]
    assert weight.shape == (N, K), (x.shape, weight.shape)
    out = target.empty(T, N)
    target.program.linear_fp8(rows_of(target.dense(x)), fp8_of(weight), out.data_ptr(), N)
    return out


def _heads_linear(target: Target, x: Tensor, weight: HeadsWeight) -> Tensor:
    """`weight` may be a slice of kv_b_proj, or that transposed."""
    assert isinstance(weight, Tensor)
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


heads_linear.instruction(when=is_plain_float, available=available)(_heads_linear)


@native(heads_linear, "cpu_packed", lambda key: is_packed(key) and is_float(key), work=lambda x: WORTH_THREADS)
def heads_linear_packed(target: Target, x: Float[Tensor, "T H I"], weight: HeadsWeight) -> Float[Tensor, "T H O"]:
    """One packed matrix a head, x rounded a token, head and group; the same bits in every batch."""
    assert isinstance(weight, PackedHeads) and x.dtype == torch.float32
    T, heads, K = x.shape
    assert weight.shape[0] == heads and weight.shape[2] == K, (x.shape, weight.shape)
    out = target.empty(T, heads, weight.shape[1])
    first = packed_of(weight[0])
    head_bytes = weight.packed.stride(0)
    target.program.heads_packed(_records(target, x).data_ptr(), first, head_bytes, heads, out.data_ptr())
    return out


@heads_linear.body("cpu_float", when=is_plain_float, available=available)
def heads_linear_float(x: Float[Tensor, "T H I"], weight: HeadsWeight) -> Float[Tensor, "T H O"]:
    """One matrix a head from where it lies; each token has the same bits in every batch."""
    assert isinstance(weight, Tensor)
    if 1 not in weight.stride()[1:]:
        return heads_linear.reference(x, weight)
    return at_once(_heads_linear, len(x), x.numel() * weight.shape[1], x, weight)


def _experts(
    target: Target, x: Tensor, gate_up: ExpertWeight, down: ExpertWeight, indices: Tensor, weights: Tensor
) -> Tensor:
    assert isinstance(gate_up, Tensor) and isinstance(down, Tensor)
    (T, D), (E, _, F), A = x.shape, down.shape, indices.shape[1]
    assert gate_up.shape == (E, 2 * F, D) and down.shape == (E, D, F)
    for tensor in (gate_up, down):
        assert tensor.is_contiguous() and tensor.dtype == torch.float32
    out, hidden = target.empty(T, D), target.empty(T * A, F)
    chosen = _chosen(target, indices, weights, T, E)
    stacks = gate_up.data_ptr(), down.data_ptr()
    target.program.experts_float(rows_of(target.dense(x)), stacks, chosen, hidden.data_ptr(), out.data_ptr(), (D, F))
    return out


def _chosen(target: Target, indices: Tensor, weights: Tensor, T: int, E: int) -> tuple[int, int, int, int, int, int]:
    """Addresses of indices and weights, E, A, and scratch to sort by expert."""
    A = indices.shape[1]
    assert weights.shape == indices.shape == (T, A) and weights.is_contiguous() and weights.dtype == torch.float32
    starts, order = target.empty(E + 1, dtype=torch.int64), target.empty(T * A, dtype=torch.int64)
    return indices_of(indices), weights.data_ptr(), E, A, starts.data_ptr(), order.data_ptr()


def _experts_packed(
    target: Target, x: Tensor, gate_up: ExpertWeight, down: ExpertWeight, indices: Tensor, weights: Tensor
) -> Tensor:
    assert isinstance(gate_up, PackedExperts) and isinstance(down, PackedExperts)
    (T, D), (E, _, F), A = x.shape, down.shape, indices.shape[1]
    assert gate_up.shape == (E, 2 * F, D) and down.shape[1] == D and F % GROUP == 0, (gate_up.shape, down.shape)
    out, hidden = target.empty(T, D), target.empty(T * A, F)
    hidden_records = target.empty(T * A, _native.record_bytes(F), dtype=torch.uint8)
    first, residence = gate_up[0], gate_up.residence
    target.program.experts_packed(
        _records(target, x).data_ptr(),
        (packed_of(first[0]), packed_of(first[1]), packed_of(down[0][0])),
        (gate_up.packed.stride(0), down.packed.stride(0)),
        _chosen(target, indices, weights, T, E),
        (hidden.data_ptr(), hidden_records.data_ptr()),
        wide_from(),
        out.data_ptr(),
        (residence.residency.address(), residence.layer) if residence else (0, 0),
    )
    return out


def _experts_fp8(
    target: Target, x: Tensor, gate_up: ExpertWeight, down: ExpertWeight, indices: Tensor, weights: Tensor
) -> Tensor:
    assert isinstance(gate_up, FP8Weight) and isinstance(down, FP8Weight)
    (T, D), (E, _, _, F), A = x.shape, down.shape, indices.shape[1]
    assert gate_up.shape == (E, 2, F, D) and down.shape == (E, 1, D, F), (gate_up.shape, down.shape)
    out, hidden = target.empty(T, D), target.empty(T * A, F)
    target.program.experts_fp8(
        rows_of(target.dense(x)),
        (fp8_of(gate_up), fp8_of(gate_up[0][1]), fp8_of(down)),
        (gate_up.values.stride(0), gate_up.scale.stride(0), down.values.stride(0), down.scale.stride(0)),
        _chosen(target, indices, weights, T, E),
        hidden.data_ptr(),
        out.data_ptr(),
    )
    return out


experts.instruction(when=is_fp8, available=available)(_experts_fp8)


@experts.body("cpu_fp8", when=is_fp8, available=available)
def experts_fp8(
    x: Float[Tensor, "T D"],
    gate_up: ExpertWeight,
    down: ExpertWeight,
    indices: Int[Tensor, "T A"],
    weights: Float[Tensor, "T A"],
) -> Float[Tensor, "T D"]:
    """All experts of any number of tokens from the stored bytes, each with the same bits in every batch."""
    _check_indices(indices, down.shape[0])
    return at_once(_experts_fp8, len(x), WORTH_THREADS, x, gate_up, down, indices.contiguous(), weights.contiguous())


experts.instruction(when=is_packed_experts, available=available)(_experts_packed)


@experts.body("cpu_packed", when=is_packed_experts, available=available)
def experts_packed(
    x: Float[Tensor, "T D"],
    gate_up: ExpertWeight,
    down: ExpertWeight,
    indices: Int[Tensor, "T A"],
    weights: Float[Tensor, "T A"],
) -> Float[Tensor, "T D"]:
    """All experts of any number of tokens in one parallel region, with the same bits in every batch."""
    _check_indices(indices, down.shape[0])
    return at_once(_experts_packed, len(x), WORTH_THREADS, x, gate_up, down, indices.contiguous(), weights.contiguous())


def _check_indices(indices: Tensor, count: int) -> None:
    """A wrong index would be read by the native code as it is."""
    assert not indices.numel() or (int(indices.min()) >= 0 and int(indices.max()) < count)


experts.instruction(when=is_plain_float, available=available)(_experts)


@experts.body("cpu_float", when=is_plain_float, available=available)
def experts_float(
    x: Float[Tensor, "T D"],
    gate_up: ExpertWeight,
    down: ExpertWeight,
    indices: Int[Tensor, "T A"],
    weights: Float[Tensor, "T A"],
) -> Float[Tensor, "T D"]:
    """All experts in one parallel region. A token's experts are summed in ascending order: so it has the same bits in
    every batch."""
    assert isinstance(gate_up, Tensor) and isinstance(down, Tensor)
    if not (gate_up.is_contiguous() and down.is_contiguous()):
        return experts.reference(x, gate_up, down, indices, weights)
    _check_indices(indices, down.shape[0])
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
