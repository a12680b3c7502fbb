"""Causal attention over flat tokens, from a packed batch (training) or from cache pages (serving).

Both read the same layout, q [T, H, Hd] with offsets [B+1] cutting T into sequences. Grouped queries share key heads;
absorbed MLA is the case of one key head whose first C columns are also the values. Softmax is in fp32 inside torch's
SDPA.

Over the cache MLA (DeepSeek-V2 paper, section 2.1) exists in two forms that give the same numbers. The expanded form
makes every head's keys and values from the latents; the absorbed one moves W_UK to the query's side and W_UV behind the
sum, so one "key head" of C + R values, which is all that the cache holds, serves every query head. Few new tokens are
cheaper absorbed, many expanded.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from porcelet.kernels import composed, op
from porcelet.kernels.linear import HeadsWeight, heads_linear
from porcelet.kernels.pointwise import concat, rope

if TYPE_CHECKING:
    from jaxtyping import Float, Int


@dataclass(frozen=True)
class Bucket:
    """Segments of about one length behind prefixes of one length P, padded to the longest of them, L."""

    keys: Int[Tensor, "B PL"]  # the rows that each reads; padding repeats its first row
    num_prefix: int  # P

    @property
    def queries(self) -> Int[Tensor, "B L"]:
        return self.keys[:, self.num_prefix :]


@dataclass(frozen=True)
class Plan:
    """How segments lie in buckets, and at which of all the buckets' places, one after the other, each row went."""

    buckets: tuple[Bucket, ...]
    places: Int[Tensor, "T"]


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
        assert all(a <= b for a, b in pairwise(self.offsets)), "a segment ends where the next one begins"
        assert all(-1 <= p < b and (p < 0 or self.prefixes[p] < 0) for b, p in enumerate(self.prefixes))

    @classmethod
    def of(cls, *lengths: int) -> Segments:
        """Sequences of these lengths side by side, none the prefix of another."""
        return cls((0, *accumulate(lengths)), (-1,) * len(lengths))

    def rows(self, segment: int) -> slice:
        return slice(self.offsets[segment], self.offsets[segment + 1])

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        return tuple(b - a for a, b in pairwise(self.offsets))

    def plan(self, device: torch.device) -> Plan:
        """Made once a batch and device, not once a layer."""
        if device not in self._plans:
            self._plans[device] = _plan(self, device)
        return self._plans[device]

    @cached_property
    def _plans(self) -> dict[torch.device, Plan]:
        return {}


def _plan(segments: Segments, device: torch.device) -> Plan:
    members: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
    for segment, length in enumerate(segments.lengths):
        if length:
            prefix = segments.prefixes[segment]
            step = max(8, (1 << length.bit_length()) // 8)  # so that a quarter at most is padding, or 7 rows
            members[segments.lengths[prefix] if prefix >= 0 else 0, -(-length // step) * step].append(segment)
    buckets, places, num_places = [], torch.empty(segments.offsets[-1], dtype=torch.int64), 0
    for (num_prefix, _), chosen in members.items():
        longest = max(segments.lengths[segment] for segment in chosen)
        keys = torch.empty(len(chosen), num_prefix + longest, dtype=torch.int64)
        for row, segment in enumerate(chosen):
            own, length = segments.rows(segment), segments.lengths[segment]
            if num_prefix:
                keys[row, :num_prefix] = torch.arange(num_prefix) + segments.offsets[segments.prefixes[segment]]
            keys[row, num_prefix:] = own.start
            keys[row, num_prefix : num_prefix + length] += torch.arange(length)
            places[own] = torch.arange(length) + num_places
            num_places += longest
        buckets.append(Bucket(keys.to(device), num_prefix))
    return Plan(tuple(buckets), places.to(device))


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


@attention_packed.body("bucketed", when=lambda key: True)
def attention_bucketed(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float) -> Tensor:
    """One SDPA a bucket of segments that are about equally long; a prefix is expanded over its readers in there only.

    Causality hides padding from the rows that are not: it lies behind them.
    """
    plan = segments.plan(q.device)
    if not plan.buckets:
        return q.new_zeros(0, q.shape[1], v.shape[2])
    out = torch.cat([_attend(q, k, v, bucket, scale) for bucket in plan.buckets])
    return out.index_select(0, plan.places)


def _attend(q: Tensor, k: Tensor, v: Tensor, bucket: Bucket, scale: float) -> Float[Tensor, "BL H Vd"]:
    width, value_width, num_prefix = q.shape[2], v.shape[2], bucket.num_prefix
    # torch's fused attention for the CPU wants values as wide as keys; without it all scores are kept in memory.
    v = functional.pad(v, (0, width - value_width)) if value_width < width else v
    q, k, v = _take(q, bucket.queries), _take(k, bucket.keys), _take(v, bucket.keys)
    mask = None
    if num_prefix:
        length, total = bucket.queries.shape[1], bucket.keys.shape[1]
        mask = torch.ones(length, total, dtype=torch.bool, device=q.device).tril(num_prefix)
    out = functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out[..., :value_width].transpose(1, 2).flatten(0, 1)


def _take(x: Float[Tensor, "T heads W"], index: Int[Tensor, "B L"]) -> Float[Tensor, "B heads L W"]:
    return x.index_select(0, index.flatten()).unflatten(0, index.shape).transpose(1, 2)


@op
def cache_write(
    cache: Float[Tensor, "P page *width"], values: Float[Tensor, "T *width"], slots: Int[Tensor, "T"]
) -> None:
    """Put each token's values into its slot, page · page size + place in the page. Changes `cache` in place."""
    cache[slots // cache.shape[1], slots % cache.shape[1]] = values.to(cache.dtype)


@op
def write_latents(
    cache: Float[Tensor, "P page 1 CR"],
    latent: Float[Tensor, "T C"],
    k_rope: Float[Tensor, "T R"],
    cos: Float[Tensor, "T half"],
    sin: Float[Tensor, "T half"],
    interleaved: bool,
    slots: Int[Tensor, "T"],
) -> None:
    """MLA's cached row of each token: its latent, and its rotary key, rotated. Changes `cache` in place."""
    turned = rope(k_rope[:, None], cos, sin, interleaved)
    cache_write(cache[..., : latent.shape[1]], latent[:, None], slots)
    cache_write(cache[..., latent.shape[1] :], turned, slots)


composed(write_latents)


@op
def write_keys_values(
    k_cache: Float[Tensor, "P page K Hd"],
    v_cache: Float[Tensor, "P page K Vd"],
    k: Float[Tensor, "T K Hd"],
    v: Float[Tensor, "T K Vd"],
    cos: Float[Tensor, "T half"],
    sin: Float[Tensor, "T half"],
    slots: Int[Tensor, "T"],
) -> None:
    """Each token's keys, rotated, and values. Changes both caches in place."""
    cache_write(k_cache, rope(k, cos, sin, False), slots)
    cache_write(v_cache, v, slots)


composed(write_keys_values)


@op
def cache_read(cache: Float[Tensor, "P page *width"], table: Int[Tensor, "pages"], length: int) -> Tensor:
    """The first `length` cached values of a sequence whose pages `table` lists in order, [length, *width]."""
    return cache[table[: -(-length // cache.shape[1])]].flatten(0, 1)[:length]


@op
def attention_suffix(
    q: Float[Tensor, "T H Hd"], k: Float[Tensor, "S K Hd"], v: Float[Tensor, "S K Vd"], scale: float
) -> Float[Tensor, "T H Vd"]:
    """One sequence: its last T tokens attend causally to all S, themselves included."""
    new, total, kv_heads, group = len(q), len(k), k.shape[1], q.shape[1] // k.shape[1]
    mask = None
    if 1 < new < total:
        mask = torch.ones(new, total, dtype=torch.bool, device=q.device).tril(total - new)
    if new < total and group > 1:
        # The queries of a group lie under one another, so that keys and values need no copy a query head: for
        # absorbed MLA, 16 to 128 copies of the cache.
        grouped = q.unflatten(1, (kv_heads, group)).permute(1, 2, 0, 3).flatten(1, 2)  # [K, G·T, Hd]
        folded = None if mask is None else mask.repeat(group, 1)
        k, v = k.transpose(0, 1), v.transpose(0, 1)
        out = functional.scaled_dot_product_attention(grouped[None], k[None], v[None], attn_mask=folded, scale=scale)
        return out[0].unflatten(1, (group, new)).permute(2, 0, 1, 3).flatten(1, 2)  # [T, H, Vd]
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))  # [1, heads, tokens, width]
    out = functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=new == total and new > 1, scale=scale, enable_gqa=group > 1
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


@op
def attention_latent(
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
    """MLA's attention over cached latents and rotary keys, with W_UK [H, C, N] and W_UV [H, value, C].

    The sequences of the first `num_absorbed` tokens attend absorbed, those behind them expanded, each as it would
    alone. Packed weights round what they are multiplied with in the absorbed form, as `heads_linear` says; the expanded
    one multiplies the latents as they are cached with the weights that `dequantize` gives.
    """
    absorbed = int(num_absorbed)
    row = int((offsets < absorbed).sum())
    assert offsets[row] == absorbed, "a sequence has one form"
    past = offsets[: row + 1], lengths[:row], tables[:row]
    out = q_nope.new_empty(*q_nope.shape[:2], w_uv.shape[1])
    if row:
        out[:absorbed] = _absorbed(q_nope[:absorbed], w_uk, w_uv, q_rope[:absorbed], cache, *past, scale)
    if row < len(lengths):
        keys, values = (w if isinstance(w, Tensor) else w.dequantize() for w in (w_uk, w_uv))
    for b in range(row, len(lengths)):
        own = slice(int(offsets[b]), int(offsets[b + 1]))
        q = concat(q_nope[own], q_rope[own])  # [new, H, N+R]
        out[own] = _expanded(q, keys, values, cache_read(cache, tables[b], int(lengths[b])), scale)
    return out


def _absorbed(
    q_nope: Tensor,
    w_uk: HeadsWeight,
    w_uv: HeadsWeight,
    q_rope: Tensor,
    cache: Tensor,
    offsets: Tensor,
    lengths: Tensor,
    tables: Tensor,
    scale: float,
) -> Float[Tensor, "T H value"]:
    """Queries taken into the latent space, attention over one head of width C + R, values taken out of it."""
    q = concat(heads_linear(q_nope, w_uk), q_rope)  # [T, H, C+R]
    out = attention_paged(q, cache, cache[..., : w_uv.shape[2]], offsets, lengths, tables, scale)
    return heads_linear(out, w_uv)


def _expanded(
    q: Float[Tensor, "new H NR"],
    w_uk: Float[Tensor, "H C N"],
    w_uv: Float[Tensor, "H value C"],
    cached: Float[Tensor, "S 1 CR"],
    scale: float,
) -> Float[Tensor, "new H value"]:
    """One sequence over every head's keys, of width N + R, and values."""
    latent, k_rope = cached.to(q.dtype).split((w_uv.shape[2], cached.shape[2] - w_uv.shape[2]), dim=-1)
    k_nope = torch.einsum("sc,hcn->shn", latent[:, 0], w_uk)
    k = concat(k_nope, k_rope.expand(-1, k_nope.shape[1], -1))  # [S, H, N+R]
    return attention_suffix(q, k, torch.einsum("sc,hvc->shv", latent[:, 0], w_uv), scale)
