"""MLA over the paged cache: one native body for its two forms, a mix of them in one batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from porcelet.kernels import Key
from porcelet.kernels.attention import attention_latent
from porcelet.kernels.cpu.paged import attend, cache_of
from porcelet.kernels.cpu.target import (
    WORTH_THREADS,
    Target,
    at_once,
    available,
    heads_of,
    indices_of,
    is_float,
    is_packed,
    is_plain,
    packed_of,
)
from porcelet.kernels.linear import HeadsWeight, PackedHeads, heads_linear
from porcelet.kernels.pointwise import concat
from porcelet.kernels.record import NotRecordable

if TYPE_CHECKING:
    from jaxtyping import Float, Int


def _is_served(key: Key) -> bool:
    return is_float(key) and (is_plain(key) or is_packed(key))


@attention_latent.instruction(when=_is_served, available=available)
def _attend_latent(
    target: Target,
    q_nope: Tensor,
    w_uk: HeadsWeight,
    w_uv: HeadsWeight,
    q_rope: Tensor,
    cache: Tensor,
    offsets: Tensor,
    lengths: Tensor,
    tables: Tensor,
    num_absorbed: Tensor,
    scale: float,
) -> Tensor:
    """The absorbed form over the rows that it is for; the expanded one then writes the others of the same output."""
    if not _lie_in_rows(w_uk, w_uv):
        raise NotRecordable("rows of W_UK or W_UV do not lie in one piece, or are not in float32")
    key = Key("cpu", type(w_uk).__name__, q_nope.dtype, needs_grad=False)
    multiply, join = heads_linear.instruction_for(key), concat.instruction_for(key)
    assert multiply and join
    past = offsets, lengths, tables
    target.program.limit(indices_of(num_absorbed))
    q = join(target, multiply(target, q_nope, w_uk), q_rope)  # [T, H, C+R]
    out = multiply(target, attend(target, q, cache, cache[..., : w_uv.shape[2]], *past, scale), w_uv)
    target.program.limit(0)
    (_, H, N), R, (_, V, C), (_, page_size, _, width) = q_nope.shape, q_rope.shape[2], w_uv.shape, cache.shape
    assert width == C + R and w_uk.shape == (H, C, N) and q_rope.dtype == torch.float32
    target.program.attention_expanded(
        (heads_of(target.dense(q_nope)), heads_of(target.dense(q_rope))),
        _matrices_of(w_uk.transpose(1, 2) if isinstance(w_uk, Tensor) else w_uk),
        _matrices_of(w_uv),
        cache_of(cache),
        (indices_of(offsets), indices_of(lengths), indices_of(tables)),
        indices_of(num_absorbed),
        out.data_ptr(),
        (H, N, R, C, V, page_size, tables.shape[1]),
        scale,
    )
    return out


@attention_latent.body("cpu", when=_is_served, available=available)
def attention_latent_native(
    q_nope: Float[Tensor, "T H N"],
    w_uk: HeadsWeight,
    w_uv: HeadsWeight,
    q_rope: Float[Tensor, "T H R"],
    cache: Float[Tensor, "P page 1 CR"],
    offsets: Int[Tensor, "B1"],
    lengths: Int[Tensor, "B"],
    tables: Int[Tensor, "B max_pages"],
    num_absorbed: Int[Tensor, "1"],
    scale: float,
) -> Float[Tensor, "T H value"]:
    """As in a recorded step, to the bit: each token the same in every batch and on any number of threads."""
    past = offsets, lengths, tables, num_absorbed
    if not len(q_nope) or not _lie_in_rows(w_uk, w_uv):
        return attention_latent.reference(q_nope, w_uk, w_uv, q_rope, cache, *past, scale)
    return at_once(_attend_latent, len(q_nope), WORTH_THREADS, q_nope, w_uk, w_uv, q_rope, cache, *past, scale)


def _lie_in_rows(w_uk: HeadsWeight, w_uv: HeadsWeight) -> bool:
    """Whether the native code can read them where they are: as slices of kv_b_proj are, or packed."""
    if isinstance(w_uk, PackedHeads) or isinstance(w_uv, PackedHeads):
        return isinstance(w_uk, PackedHeads) and isinstance(w_uv, PackedHeads)
    return w_uk.stride(1) == w_uv.stride(2) == 1 and w_uk.dtype == w_uv.dtype == torch.float32


def _matrices_of(weight: HeadsWeight) -> tuple[tuple[int, int, int], tuple[int, int, bool, int, int], int]:
    """Floats of each head, or packed ones with the bytes from head to head; zeros stand for the other."""
    if isinstance(weight, PackedHeads):
        return (0, 0, 0), packed_of(weight[0]), weight.packed.stride(0)
    return heads_of(weight), (0, 0, False, 0, 0), 0
