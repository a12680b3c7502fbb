"""Attention layers, and the two views of a batch they accept.

`PackedView` is a batch without a past: training, scoring. `PagedView` reads and extends the cache: prefill and
decode. Both carry flat tokens; neither has a batch axis or padding.

MLA (DeepSeek-V2 paper, section 2.1) exists in two forms that give the same numbers: expanded and absorbed
(kernels/attention.py). Packed batches are expanded; in a paged one each sequence says which it is.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from porcelet.config import ModelConfig
from porcelet.kernels.attention import (
    Segments,
    attention_latent,
    attention_packed,
    attention_paged,
    write_keys_values,
    write_latents,
)
from porcelet.kernels.linear import HeadsWeight, PackedHeads, linear
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
    page, 1, C+R]. MLA attends the sequences of the first `num_absorbed` tokens absorbed, the others expanded.
    """

    offsets: Int[Tensor, "B1"]
    lengths: Int[Tensor, "B"]
    tables: Int[Tensor, "B max_pages"]
    slots: Int[Tensor, "T"]
    cache: list[tuple[Tensor, ...]]
    num_absorbed: Int[Tensor, "1"]
    routing: list[Tensor] = field(default_factory=list)


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
        q, scale = rope(q, *angles, False), self.scale
        if isinstance(view, PackedView):
            out = attention_packed(q, rope(k, *angles, False), v, view.segments, scale)
        else:
            k_cache, v_cache = view.cache[self.layer]
            write_keys_values(k_cache, v_cache, k, v, *angles, view.slots)
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
        if isinstance(view, PackedView):
            k_rope = rope(k_rope[:, None], *angles, self.interleaved)  # [T, 1, R]
            q = concat(q_nope, q_rope)  # [T, H, N+R]
            out = attention_packed(q, *self._expand(latent, k_rope), view.segments, self.scale)
        else:
            (cache,) = view.cache[self.layer]
            write_latents(cache, latent, k_rope, *angles, self.interleaved, view.slots)
            weights, past = self._absorbed_weights(), (view.offsets, view.lengths, view.tables)
            out = attention_latent(q_nope, *weights, q_rope, cache, *past, view.num_absorbed, self.scale)
        return self.o_proj(out.flatten(1))

    def _expand(
        self, latent: Float[Tensor, "S C"], k_rope: Float[Tensor, "S 1 R"]
    ) -> tuple[Float[Tensor, "S H NR"], Float[Tensor, "S H value"]]:
        """The naive form: every head's keys, of width N + R, and values; from packed weights without rounding the
        latent, as W_UK's groups lie along its outputs here."""
        expanded = self.kv_b_proj(latent) if self.kv_b_proj is not None else linear(latent, self._expanded_weight())
        k_nope, v = expanded.unflatten(-1, (self.heads, -1)).split((self.nope, self.value), dim=-1)
        return concat(k_nope, k_rope.expand(-1, self.heads, -1)), v

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
