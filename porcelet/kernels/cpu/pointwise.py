"""Norms, rotary embedding, gating, sums."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from porcelet.kernels.cpu.target import Target, at_once, available, heads_of, is_float, native, num_heads, rows_of
from porcelet.kernels.pointwise import add, concat, rms_norm, rope, silu_mul
from porcelet.kernels.record import NotRecordable

if TYPE_CHECKING:
    from jaxtyping import Float


def knows_norm(x: Tensor, weight: Tensor) -> bool:
    """Whether these are rows, or heads of rows, and one weight for all, in float32."""
    plain = weight.dtype == torch.float32 and weight.is_contiguous()
    return plain and x.dim() in (2, 3) and weight.shape == x.shape[-1:]


def _rms_norm(target: Target, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if not knows_norm(x, weight):
        raise NotRecordable(f"a norm's inputs are {tuple(x.shape)}, and {tuple(weight.shape)} in {weight.dtype}")
    out = target.empty(*x.shape)
    heads = heads_of(target.dense(x))
    target.program.rms_norm(heads, weight.data_ptr(), out.data_ptr(), num_heads(x), x.shape[-1], eps)
    return out


rms_norm.instruction(when=is_float, available=available)(_rms_norm)


@rms_norm.body("cpu_float", when=is_float, available=available)
def rms_norm_float(x: Float[Tensor, "*rows W"], weight: Float[Tensor, "W"], eps: float) -> Float[Tensor, "*rows W"]:
    """One pass a row."""
    if not knows_norm(x, weight):
        return rms_norm.reference(x, weight, eps)
    return at_once(_rms_norm, len(x), x.numel(), x, weight, eps)


@native(rope, "cpu_float", is_float)
def rope_float(
    target: Target,
    x: Float[Tensor, "T heads R"],
    cos: Float[Tensor, "T half"],
    sin: Float[Tensor, "T half"],
    interleaved: bool,
) -> Float[Tensor, "T heads R"]:
    """One pass a head, from any strides: MLA's rotary parts are slices."""
    T, heads, R = x.shape
    assert cos.is_contiguous() and sin.is_contiguous() and cos.shape == sin.shape == (T, R // 2)
    out = target.empty(T, heads, R)
    addresses = cos.data_ptr(), sin.data_ptr(), out.data_ptr()
    target.program.rope(heads_of(target.dense(x)), *addresses, heads, R // 2, interleaved)
    return out


def _silu_mul(target: Target, gate: Tensor, up: Tensor) -> Tensor:
    _check(gate, up)
    assert gate.shape == up.shape
    out = target.empty(*gate.shape)
    target.program.silu_mul(rows_of(target.dense(gate)), rows_of(target.dense(up)), out.data_ptr(), gate.shape[1])
    return out


silu_mul.instruction(when=is_float, available=available)(_silu_mul)


@silu_mul.body("cpu_float", when=is_float, available=available)
def silu_mul_float(gate: Float[Tensor, "*rows F"], up: Float[Tensor, "*rows F"]) -> Float[Tensor, "*rows F"]:
    """One pass, with an exponential good to 1e-7."""
    if gate.dim() != 2 or up.dtype != torch.float32:
        return silu_mul.reference(gate, up)
    return at_once(_silu_mul, len(gate), gate.numel(), gate, up)


@add.instruction(when=is_float, available=available)
def add_float(target: Target, first: Float[Tensor, "T W"], second: Float[Tensor, "*T W"]) -> Float[Tensor, "T W"]:
    _check(first, second)
    assert first.shape[1] == second.shape[-1]
    out = target.empty(*first.shape)
    second = target.dense(second).expand(first.shape)  # a bias has the stride 0 from row to row
    target.program.add(rows_of(target.dense(first)), rows_of(second), out.data_ptr(), first.shape[1])
    return out


@concat.instruction(when=is_float, available=available)
def concat_float(
    target: Target, first: Float[Tensor, "*rows A"], second: Float[Tensor, "*rows B"]
) -> Float[Tensor, "*rows AB"]:
    assert second.dtype == torch.float32 and first.shape[:-1] == second.shape[:-1]
    widths = first.shape[-1], second.shape[-1]
    out = target.empty(*first.shape[:-1], sum(widths))
    parts = heads_of(target.dense(first)), heads_of(target.dense(second))
    target.program.concat(*parts, out.data_ptr(), num_heads(first), *widths)
    return out


def _check(rows: Tensor, other: Tensor) -> None:
    """The instructions of two operands know plain rows of float32."""
    if rows.dim() != 2 or other.dtype != torch.float32:
        raise NotRecordable(f"an op's inputs are {tuple(rows.shape)} in {rows.dtype} and {other.dtype}")
