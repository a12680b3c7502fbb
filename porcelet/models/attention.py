"""Attention layers, and the two views of a batch they accept.

`PackedView` is a batch without a past: training, scoring. `PagedView` reads and extends the cache: prefill and
decode. Both carry flat tokens; neither has a batch axis or padding.

MLA (DeepSeek-V2 paper, section 2.1) exists in two forms that give the same numbers. The naive form expands keys and
values from the latent; the absorbed one moves W_UK to the query's side and W_UV behind the sum, so one "key head" of
C + R values, which is all that the cache holds, serves every query head. Packed batches use the naive form. In a paged
one each sequence says which: few new tokens are cheaper absorbed, many expanded (`ModelConfig.absorbed_below`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from porcelet.config import ModelConfig
from porcelet.kernels.attention import (
    Segments,
    attention_packed,
    attention_paged,
    attention_suffix,
    cache_read,
    cache_write,
)
from porcelet.kernels.linear import HeadsWeight, PackedHeads, heads_linear, linear
from porcelet.kernels.pointwise import concat, rope
from porcelet.models.layers import Linear, RMSNorm
from porcelet.models.rope import Angles

if TYPE_CHECKING:
    from jaxtyping import Float, Int


@dataclass(frozen=True)
class PackedView:
    """Segments side by side, each attending to itself and to its prefix. `routing` collects every MoE layer's chosen
    experts [T, A], in order; `gate_logits`, if it is a list, what its gate chose by [T, E], with the layer's segments.
    """

    segments: Segments
    routing: list[Tensor] = field(default_factory=list)
    gate_logits: list[tuple[Tensor, Segments]] | None = None


@dataclass(frozen=True)
class PagedView:
    """Sequences that continue what the cache holds.

    `lengths` [B] count cached tokens after this step, `tables` [B, max_pages] list pages, `slots` [T] say where the new
    tokens' values go, and `cache` holds one entry a layer: (keys, values) [P, page, K, Hd] each, or (latents,) [P,
    page, 1, C+R]. `expanded` [B] marks the sequences that MLA attends expanded; empty means none.
    """

    offsets: Int[Tensor, "B1"]
    lengths: Int[Tensor, "B"]
    tables: Int[Tensor, "B max_pages"]
    slots: Int[Tensor, "T"]
    cache: list[tuple[Tensor, ...]]
    expanded: tuple[bool, ...] = ()
    routing: list[Tensor] = field(default_factory=list)

    @cached_property
    def absorbed_part(self) -> tuple[Tensor, PagedView] | None:
        """The tokens of all sequences that are not expanded, and a view of these alone; None if there are none."""
        rows = torch.tensor([row for row, expanded in enumerate(self.expanded) if not expanded], dtype=torch.int64)
        if not len(rows):
            return None
        counts = self.offsets.diff()
        kept = torch.zeros(len(counts), dtype=torch.bool).index_fill(0, rows, True)
        offsets = torch.cat((counts.new_zeros(1), counts[rows].cumsum(0)))
        tokens = kept.repeat_interleave(counts).nonzero()[:, 0]
        view = PagedView(offsets, self.lengths[rows], self.tables[rows], self.slots[tokens], self.cache)
        return tokens, view

    @cached_property
    def expanded_parts(self) -> list[tuple[int, int, int, Tensor]]:
        """(first token, last + 1, cached length, pages) of every expanded sequence."""
        cuts, lengths = self.offsets.tolist(), self.lengths.tolist()
        rows = [row for row, expanded in enumerate(self.expanded) if expanded]
        return [(cuts[row], cuts[row + 1], lengths[row], self.tables[row]) for row in rows]


View = PackedView | PagedView
LATENT_EPS = 1e-6  # of the norms inside MLA, whatever rms_norm_eps says: DeepSeek's code and transformers' agree on it


class GQA(nn.Module):
    """Grouped-query attention with rotary positions: llama, qwen2 (biases), qwen3 (queries and keys normed a head)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.scale = layer, config.softmax_scale
        self.heads, self.kv_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        width, bias = config.hidden_size, config.has_qkv_bias
        self.q_proj = Linear(width, self.heads * self.head_dim, bias=bias)
        self.k_proj = Linear(width, self.kv_heads * self.head_dim, bias=bias)
        self.v_proj = Linear(width, self.kv_heads * self.head_dim, bias=bias)
        self.o_proj = Linear(self.heads * self.head_dim, width, bias=config.attention_bias)
        self.has_norm = config.has_qk_norm
        if self.has_norm:
            self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)

    def forward(self, x: Float[Tensor, "T D"], angles: Angles, view: View) -> Float[Tensor, "T D"]:
        q = self.q_proj(x).unflatten(-1, (self.heads, -1))  # [T, H, Hd]
        k = self.k_proj(x).unflatten(-1, (self.kv_heads, -1))  # [T, K, Hd]
        v = self.v_proj(x).unflatten(-1, (self.kv_heads, -1))  # [T, K, Hd]
        if self.has_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rope(q, *angles, False), rope(k, *angles, False)
        scale = self.scale
        if isinstance(view, PackedView):
            out = attention_packed(q, k, v, view.segments, scale)
        else:
            k_cache, v_cache = view.cache[self.layer]
            cache_write(k_cache, k, view.slots)
            cache_write(v_cache, v, view.slots)
            out = attention_paged(q, k_cache, v_cache, view.offsets, view.lengths, view.tables, scale)
        return self.o_proj(out.flatten(1))


class MLA(nn.Module):
    """Multi-head latent attention (deepseek_v2, deepseek_v3)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.scale = layer, config.softmax_scale
        self.heads, self.interleaved = config.num_attention_heads, config.rope_interleave
        self.nope, self.rope, self.latent, self.value = (
            config.qk_nope_head_dim,
            config.qk_rope_head_dim,
            config.kv_lora_rank,
            config.v_head_dim,
        )
        width, query = config.hidden_size, self.heads * (self.nope + self.rope)
        self.q_lora_rank = config.q_lora_rank
        if config.q_lora_rank is None:
            self.q_proj = Linear(width, query)
        else:
            self.q_a_proj = Linear(width, config.q_lora_rank)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, LATENT_EPS)
            self.q_b_proj = Linear(config.q_lora_rank, query)
        self.kv_a_proj_with_mqa = Linear(width, self.latent + self.rope)
        self.kv_a_layernorm = RMSNorm(self.latent, LATENT_EPS)
        self.kv_b_proj: Linear | None = Linear(self.latent, self.heads * (self.nope + self.value))
        self.o_proj = Linear(self.heads * self.value, width)
        # What a packed model has in the place of kv_b_proj: both forms are computed from these.
        self.packed_w_uk: PackedHeads | None = None  # [H, C, N]
        self.packed_w_uv: PackedHeads | None = None  # [H, value, C]

    def forward(self, x: Float[Tensor, "T D"], angles: Angles, view: View) -> Float[Tensor, "T D"]:
        q = self.q_proj(x) if self.q_lora_rank is None else self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        q_nope, q_rope = q.unflatten(-1, (self.heads, -1)).split((self.nope, self.rope), dim=-1)  # [T, H, N], [T, H, R]
        latent, k_rope = self.kv_a_proj_with_mqa(x).split((self.latent, self.rope), dim=-1)  # [T, C], [T, R]
        latent = self.kv_a_layernorm(latent)
        q_rope = rope(q_rope, *angles, self.interleaved)
        k_rope = rope(k_rope[:, None], *angles, self.interleaved)  # [T, 1, R]
        if isinstance(view, PackedView):
            q = concat(q_nope, q_rope)  # [T, H, N+R]
            out = attention_packed(q, *self._expand(latent, k_rope), view.segments, self.scale)
        else:
            (cache,) = view.cache[self.layer]
            cache_write(cache[..., : self.latent], latent[:, None], view.slots)
            cache_write(cache[..., self.latent :], k_rope, view.slots)
            out = self._paged(q_nope, q_rope, cache, view)
        return self.o_proj(out.flatten(1))

    def _paged(self, q_nope: Tensor, q_rope: Tensor, cache: Tensor, view: PagedView) -> Float[Tensor, "T H value"]:
        """Every sequence in its own form; how the others attend changes nothing for it."""
        if not any(view.expanded):
            return self._absorbed(q_nope, q_rope, cache, view)
        out = q_nope.new_empty(*q_nope.shape[:2], self.value)
        q = concat(q_nope, q_rope)  # [T, H, N+R]
        for first, end, length, table in view.expanded_parts:
            latent, k_rope = cache_read(cache, table, length).to(q.dtype).split((self.latent, self.rope), dim=-1)
            out[first:end] = attention_suffix(q[first:end], *self._expand(latent[:, 0], k_rope), self.scale)
        if view.absorbed_part is not None:
            tokens, part = view.absorbed_part
            out[tokens] = self._absorbed(q_nope[tokens], q_rope[tokens], cache, part)
        return out

    def _expand(
        self, latent: Float[Tensor, "S C"], k_rope: Float[Tensor, "S 1 R"]
    ) -> tuple[Float[Tensor, "S H NR"], Float[Tensor, "S H value"]]:
        """The naive form: every head's keys, of width N + R, and values; from packed weights without rounding the
        latent, as W_UK's groups lie along its outputs here."""
        expanded = self.kv_b_proj(latent) if self.kv_b_proj is not None else linear(latent, self._expanded_weight())
        k_nope, v = expanded.unflatten(-1, (self.heads, -1)).split((self.nope, self.value), dim=-1)
        return concat(k_nope, k_rope.expand(-1, self.heads, -1)), v

    def _absorbed(self, q_nope: Tensor, q_rope: Tensor, cache: Tensor, view: PagedView) -> Float[Tensor, "T H value"]:
        """Queries taken into the latent space, attention over one head of width C + R, values taken out of it."""
        w_uk, w_uv = self._absorbed_weights()
        q = concat(heads_linear(q_nope, w_uk), q_rope)  # [T, H, C+R]
        latents = cache[..., : self.latent]
        out = attention_paged(q, cache, latents, view.offsets, view.lengths, view.tables, self.scale)
        return heads_linear(out, w_uv)

    def _absorbed_weights(self) -> tuple[HeadsWeight, HeadsWeight]:
        """W_UK [H, C, N] and W_UV [H, value, C]."""
        if self.packed_w_uk and self.packed_w_uv:
            return self.packed_w_uk, self.packed_w_uv
        assert self.kv_b_proj is not None and isinstance(self.kv_b_proj.weight, Tensor), "whole only in float32"
        weight = self.kv_b_proj.weight
        w_uk, w_uv = weight.unflatten(0, (self.heads, -1)).split((self.nope, self.value), dim=1)
        return w_uk.transpose(1, 2), w_uv

    def _expanded_weight(self) -> Float[Tensor, "HNV C"]:
        """kv_b_proj's weight, from packed parts."""
        assert self.packed_w_uk and self.packed_w_uv
        w_uk, w_uv = self.packed_w_uk.dequantize(), self.packed_w_uv.dequantize()
        return torch.cat((w_uk.transpose(1, 2), w_uv), dim=1).flatten(0, 1)
