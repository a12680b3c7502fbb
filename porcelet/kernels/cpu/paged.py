"""The paged cache: writing to it, and attention over it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from porcelet.kernels import Key
from porcelet.kernels.attention import attention_paged, cache_write
from porcelet.kernels.cpu.target import (
    WORTH_THREADS,
    Target,
    at_once,
    available,
    heads_of,
    indices_of,
    is_float,
    on_cpu,
)
from porcelet.kernels.record import NotRecordable

if TYPE_CHECKING:
    from jaxtyping import Float, Int

if available():
    from porcelet.kernels.cpu import _native

MOST_NEW = 8  # new tokens a sequence that attend one by one; of more, blocks do


def _is_cache(key: Key) -> bool:
    return on_cpu(key) and key.dtype in (torch.float32, torch.float16)


@cache_write.instruction(when=_is_cache, available=available)
def _write(target: Target, cache: Tensor, values: Tensor, slots: Tensor) -> None:
    if values.dtype != torch.float32:
        raise NotRecordable(f"the cache is written from {values.dtype}")
    assert cache.dim() == 4 and cache.shape[2:] == values.shape[1:] and len(slots) == len(values)
    assert cache.stride(3) == 1
    _, page_size, heads, width = cache.shape
    target.program.cache_write(
        cache_of(cache), heads_of(target.dense(values)), indices_of(slots), (page_size, heads, width)
    )


@cache_write.body("cpu", when=_is_cache, available=available)
def cache_write_cpu(
    cache: Float[Tensor, "P page *width"], values: Float[Tensor, "T *width"], slots: Int[Tensor, "T"]
) -> None:
    """One copy a token, into the whole of a slot or, where `cache` is a slice, into a part of it."""
    if values.dtype != torch.float32:  # the op's choice looked at the cache's alone
        return cache_write.reference(cache, values, slots)
    return at_once(_write, len(values), values.numel(), cache, values, slots)


@attention_paged.instruction(when=is_float, available=available)
def attention_native(
    target: Target,
    q: Float[Tensor, "T H Hd"],
    k_cache: Float[Tensor, "P page K Hd"],
    v_cache: Float[Tensor, "P page K Vd"],
    offsets: Int[Tensor, "B1"],
    lengths: Int[Tensor, "B"],
    tables: Int[Tensor, "B max_pages"],
    scale: float,
) -> Float[Tensor, "T H Vd"]:
    """Pages are read in place: by every new token for itself, by those of a prompt in blocks."""
    return attend(target, q, k_cache, v_cache, offsets, lengths, tables, scale)


@attention_paged.body("cpu_paged", when=is_float, available=available)
def attention_float(
    q: Float[Tensor, "T H Hd"],
    k_cache: Float[Tensor, "P page K Hd"],
    v_cache: Float[Tensor, "P page K Vd"],
    offsets: Int[Tensor, "B1"],
    lengths: Int[Tensor, "B"],
    tables: Int[Tensor, "B max_pages"],
    scale: float,
) -> Float[Tensor, "T H Vd"]:
    """As in a recorded step, to the bit."""
    if not len(q):
        return q.new_zeros(0, q.shape[1], v_cache.shape[3])
    past = k_cache, v_cache, offsets, lengths, tables
    return at_once(attend, len(q), WORTH_THREADS, q.contiguous(), *past, scale)


def attend(
    target: Target,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    offsets: Tensor,
    lengths: Tensor,
    tables: Tensor,
    scale: float,
) -> Tensor:
    (T, H, k_width), (_, page_size, K, v_width) = q.shape, v_cache.shape
    assert q.is_contiguous() and tables.is_contiguous() and k_cache.stride(3) == v_cache.stride(3) == 1
    assert k_width == k_cache.shape[3] and H % K == 0 and k_cache.dtype == v_cache.dtype and page_size % 4 == 0
    out = target.empty(T, H, v_width)
    max_pages = tables.shape[1]
    parts = -(-max_pages * page_size // _native.attention_part(H // K, k_width, v_width, page_size))
    partials = target.empty(T * H * parts * (v_width + 2) if parts > 1 else 0)
    target.program.attention(
        q.data_ptr(),
        cache_of(k_cache),
        cache_of(v_cache),
        (indices_of(offsets), indices_of(lengths), indices_of(tables)),
        partials.data_ptr(),
        out.data_ptr(),
        (H, K, k_width, v_width, page_size, max_pages),
        MOST_NEW,
        scale,
    )
    return out


def cache_of(cache: Tensor) -> tuple[int, bool, int, int, int]:
    """Address, whether in half precision, values from page to page, from slot to slot and from head to head."""
    assert cache.dtype in (torch.float32, torch.float16)
    page, slot, head = cache.stride()[:3]
    return cache.data_ptr(), cache.dtype == torch.float16, page, slot, head
