"""Causal attention over flat tokens, from a packed batch (training) or from cache pages (serving).

Both read the same layout, q [T, H, Hd] with offsets [B+1] cutting T into sequences. Grouped queries share key heads;
absorbed MLA is the case of one key head whose first C columns are also the values. Softmax is in fp32 inside torch's
SDPA.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from porcelet.kernels import op

if TYPE_CHECKING:
    from jaxtyping import Float, Int


@dataclass(frozen=True)
class Segments:
    """How a packed batch's T rows lie: segment b is rows offsets[b] to offsets[b + 1].

    A segment attends causally to itself and, before that, to the whole of segment prefixes[b], or to none if that is
    -1. A prefix lies before those who read it and has none itself.
    """

    offsets: tuple[int, ...]
    prefixes: tuple[int, ...]

    def __post_init__(self) -> None:
        assert len(self.offsets) == len(self.prefixes) + 1 and self.offsets[0] == 0
        assert all(-1 <= p < b and (p < 0 or self.prefixes[p] < 0) for b, p in enumerate(self.prefixes))

    @classmethod
    def of(cls, *lengths: int) -> Segments:
        """Sequences of these lengths side by side, none the prefix of another."""
        return cls((0, *accumulate(lengths)), (-1,) * len(lengths))

    def rows(self, segment: int) -> slice:
        return slice(self.offsets[segment], self.offsets[segment + 1])

    @property
    def has_prefixes(self) -> bool:
        return any(prefix >= 0 for prefix in self.prefixes)

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        return tuple(b - a for a, b in zip(self.offsets, self.offsets[1:], strict=False))


@op
def attention_packed(
    q: Float[Tensor, "T H Hd"],
    k: Float[Tensor, "T K Hd"],
    v: Float[Tensor, "T K Vd"],
    segments: Segments,
    scale: float,
) -> Float[Tensor, "T H Vd"]:
    """Each segment attends causally to itself, behind its prefix; a loop over segments."""
    out = []
    for segment, prefix in enumerate(segments.prefixes):
        own = segments.rows(segment)
        keys, values = k[own], v[own]
        if prefix >= 0:
            first = segments.rows(prefix)
            keys, values = torch.cat((k[first], keys)), torch.cat((v[first], values))
        out.append(attention_suffix.reference(q[own], keys, values, scale))
    return torch.cat(out) if out else q.new_zeros(0, q.shape[1], v.shape[2])


@attention_packed.body("padded", when=lambda key: True)
def _attention_padded(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float) -> Tensor:
    """One SDPA over sequences padded to the longest; the loop where padding would more than double the work."""
    num_sequences, longest = len(segments.lengths), max(segments.lengths, default=0)
    wasteful = num_sequences < 2 or longest * num_sequences > 2 * len(q) or not all(segments.lengths)
    if wasteful or segments.has_prefixes:
        return attention_packed.reference(q, k, v, segments, scale)
    offsets = torch.tensor(segments.offsets, device=q.device)
    lengths = offsets.diff()
    column = torch.arange(longest, device=q.device)
    filled = column < lengths[:, None]  # [B, longest]
    # Padding reads the sequence's first token: any finite row will do, as causality hides it from the real ones.
    index = offsets[:-1, None] + torch.where(filled, column, 0)
    q, k, v = (t[index].transpose(1, 2) for t in (q, k, v))  # [B, heads, longest, width]
    out = functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.transpose(1, 2)[filled]  # [T, H, Vd]


@op
def cache_write(
    cache: Float[Tensor, "P page *width"], values: Float[Tensor, "T *width"], slots: Int[Tensor, "T"]
) -> None:
    """Put each token's values into its slot, page · page size + place in the page. Changes `cache` in place."""
    cache.flatten(0, 1)[slots] = values.to(cache.dtype)


@op
def cache_read(cache: Float[Tensor, "P page *width"], table: Int[Tensor, "pages"], length: int) -> Tensor:
    """The first `length` cached values of a sequence whose pages `table` lists in order, [length, *width]."""
    return cache[table[: -(-length // cache.shape[1])]].flatten(0, 1)[:length]


@op
def attention_suffix(
    q: Float[Tensor, "T H Hd"], k: Float[Tensor, "S K Hd"], v: Float[Tensor, "S K Vd"], scale: float
) -> Float[Tensor, "T H Vd"]:
    """One sequence: its last T tokens attend causally to all S, themselves included."""
    new, total, kv_heads = len(q), len(k), k.shape[1]
    mask = None
    if 1 < new < total:
        mask = torch.ones(new, total, dtype=torch.bool, device=q.device).tril(total - new)
    if new < total and q.shape[1] != kv_heads:
        # The queries of a group lie under one another, so that keys and values need no copy a query head: for
        # absorbed MLA, 16 to 128 copies of the cache.
        grouped = q.unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3).flatten(1, 2)  # [K, G·T, Hd]
        folded = None if mask is None else mask.repeat(q.shape[1] // kv_heads, 1)
        k, v = k.transpose(0, 1), v.transpose(0, 1)
        out = functional.scaled_dot_product_attention(grouped[None], k[None], v[None], attn_mask=folded, scale=scale)
        return out[0].unflatten(1, (-1, new)).permute(2, 0, 1, 3).flatten(1, 2)  # [T, H, Vd]
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))  # [1, heads, tokens, width]
    out = functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=new == total and new > 1, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out[0].transpose(0, 1)


@op
def attention_paged(
    q: Float[Tensor, "T H Hd"],
    k_cache: Float[Tensor, "P page K Hd"],
    v_cache: Float[Tensor, "P page K Vd"],
    offsets: Int[Tensor, "B1"],
    lengths: Int[Tensor, "B"],
    tables: Int[Tensor, "B max_pages"],
    scale: float,
) -> Float[Tensor, "T H Vd"]:
    """Each sequence's new tokens attend to its `lengths` cached ones, themselves included; a loop over sequences.

    Every sequence has a new token at least, so as many tokens as sequences means one each, which faster bodies rely on.
    `tables` lists each sequence's pages in order; entries past its last page are never read as values.
    """
    cuts = offsets.tolist()
    out = []
    for row, (a, b, length) in enumerate(zip(cuts, cuts[1:], lengths.tolist(), strict=False)):
        k, v = (cache_read.reference(cache, tables[row], length).to(q.dtype) for cache in (k_cache, v_cache))
        out.append(attention_suffix.reference(q[a:b], k, v, scale))
    return torch.cat(out) if out else q.new_zeros(0, q.shape[1], v_cache.shape[3])


@attention_paged.body("batched_decode", when=lambda key: not key.needs_grad)
def _attention_decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, offsets: Tensor, lengths: Tensor, tables: Tensor, scale: float
) -> Tensor:
    """One SDPA when every sequence has a single new token; the loop otherwise."""
    num_sequences = len(lengths)
    if len(q) != num_sequences or num_sequences == 0:
        return attention_paged.reference(q, k_cache, v_cache, offsets, lengths, tables, scale)
    num_slots = tables.shape[1] * k_cache.shape[1]
    hidden = torch.arange(num_slots, device=q.device) >= lengths[:, None]  # [B, S]
    # Slots past the end may hold anything, NaN too, and 0 · NaN is NaN: both sides are masked.
    k = k_cache[tables].flatten(1, 2).to(q.dtype)
    v = v_cache[tables].flatten(1, 2).to(q.dtype)
    k, v = (t.masked_fill(hidden[:, :, None, None], 0).transpose(1, 2) for t in (k, v))  # [B, K, S, width]
    out = functional.scaled_dot_product_attention(
        q[:, :, None], k, v, attn_mask=~hidden[:, None, None], scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out[:, :, 0]  # [B, H, Vd]
