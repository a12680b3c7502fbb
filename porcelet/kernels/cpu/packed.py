"""Attention of packed batches, forward and backward."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from porcelet.kernels import Key
from porcelet.kernels.attention import Segments, attention_packed
from porcelet.kernels.cpu.target import WORTH_THREADS, available, heads_of

if TYPE_CHECKING:
    from jaxtyping import Float

if available():
    from porcelet.kernels.cpu import _native


def trains_or_scores(key: Key) -> bool:
    return key.device == "cpu" and key.dtype == torch.float32 and key.format in ("Tensor", "Parameter")


@attention_packed.body("cpu_packed", when=trains_or_scores, available=available)
def attention_packed_float(
    q: Float[Tensor, "T H Hd"],
    k: Float[Tensor, "T K Hd"],
    v: Float[Tensor, "T K Vd"],
    segments: Segments,
    scale: float,
) -> Float[Tensor, "T H Vd"]:
    """Blocks of scores that never leave the cache; a prefix's keys meet all who read them where they lie.

    Kept for the backward pass, beside the inputs and the result: a logarithm a row and head. The bits depend neither on
    the number of threads nor on the other segments.
    """
    T, heads, kv_heads = q.shape[0], q.shape[1], k.shape[1]
    assert k.shape == (T, kv_heads, q.shape[2]) and v.shape[:2] == (T, kv_heads) and heads % kv_heads == 0
    assert k.dtype == v.dtype == torch.float32 and segments.offsets[-1] == T and scale > 0
    out: Tensor = _PackedAttention.apply(_dense(q), _dense(k), _dense(v), segments, scale)  # type: ignore[no-untyped-call]
    return out


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float) -> Tensor:
        out, lse = q.new_empty(*q.shape[:2], v.shape[2]), q.new_empty(q.shape[:2])
        _native.packed_attention(
            (segments.offsets, segments.prefixes),
            (heads_of(q), heads_of(k), heads_of(v)),
            heads_of(out),
            lse.data_ptr(),
            _sizes(q, k, v),
            scale,
            _threads(q),
        )
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.segments, ctx.scale = segments, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, out, lse = ctx.saved_tensors
        gradient = _dense(gradient)
        dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
        _native.packed_attention_backward(
            (ctx.segments.offsets, ctx.segments.prefixes),
            (heads_of(q), heads_of(k), heads_of(v)),
            heads_of(out),
            lse.data_ptr(),
            heads_of(gradient),
            (heads_of(dq), heads_of(dk), heads_of(dv)),
            _sizes(q, k, v),
            ctx.scale,
            _threads(q),
        )
        return dq, dk, dv, None, None


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _sizes(q: Tensor, k: Tensor, v: Tensor) -> tuple[int, int, int, int]:
    return q.shape[1], k.shape[1], q.shape[2], v.shape[2]


def _threads(q: Tensor) -> int:
    return torch.get_num_threads() if q.numel() >= WORTH_THREADS else 1
