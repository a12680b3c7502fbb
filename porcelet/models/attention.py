"""Attention layers, and the two views of a batch they accept.

`PackedView` is a batch without a past: training, scoring. `PagedView` reads and extends the cache: prefill and
decode. Both carry flat tokens; neither has a batch axis or padding.

MLA (DeepSeek-V2 paper, section 2.1) exists in two forms that give the same numbers. Packed batches use the naive
form: keys and values are expanded from the latent. Paged ones use the absorbed form: W_UK moves to the query's side
and W_UV behind the sum, so the cache holds C + R values a token and one "key head" serves every query head.
Switching to the naive form for long paged prefills is left out so far.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from porcelet.config import ModelConfig
from porcelet.kernels.attention import attention_packed, attention_paged, cache_write
from porcelet.kernels.pointwise import rope
from porcelet.models.layers import Linear, RMSNorm

if TYPE_CHECKING:
    from jaxtyping import Float, Int


@dataclass(frozen=True)
class PackedView:
    """Sequences side by side, each attending to itself. `routing` collects every MoE layer's chosen experts [T, A],
    in order."""

    offsets: Int[Tensor, "B1"]
    routing: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class PagedView:
    """Sequences that continue what the cache holds.

    `lengths` [B] count cached tokens after this step, `tables` [B, max_pages] list pages, `slots` [T] say where the new
    tokens' values go, and `cache` holds one entry a layer: (keys, values) [P, page, K, Hd] each, or (latents,) [P,
    page, 1, C+R].
    """

    offsets: Int[Tensor, "B1"]
    lengths: Int[Tensor, "B"]
    tables: Int[Tensor, "B max_pages"]
    slots: Int[Tensor, "T"]
    cache: list[tuple[Tensor, ...]]
    routing: list[Tensor] = field(default_factory=list)


View = PackedView | PagedView
Angles = tuple[Tensor, Tensor]  # cos and sin [T, R/2] of every token's position


class GQA(nn.Module):
    """Grouped-query attention with rotary positions (llama)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.heads, self.kv_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        self.q_proj = Linear(config.hidden_size, self.heads * self.head_dim)
        self.k_proj = Linear(config.hidden_size, self.kv_heads * self.head_dim)
        self.v_proj = Linear(config.hidden_size, self.kv_heads * self.head_dim)
        self.o_proj = Linear(self.heads * self.head_dim, config.hidden_size)

    def forward(self, x: Float[Tensor, "T D"], angles: Angles, view: View) -> Float[Tensor, "T D"]:
        q = self.q_proj(x).unflatten(-1, (self.heads, -1))  # [T, H, Hd]
        k = self.k_proj(x).unflatten(-1, (self.kv_heads, -1))  # [T, K, Hd]
        v = self.v_proj(x).unflatten(-1, (self.kv_heads, -1))  # [T, K, Hd]
        q, k = rope(q, *angles, False), rope(k, *angles, False)
        scale = self.head_dim**-0.5
        if isinstance(view, PackedView):
            out = attention_packed(q, k, v, view.offsets, scale)
        else:
            k_cache, v_cache = view.cache[self.layer]
            cache_write(k_cache, k, view.slots)
            cache_write(v_cache, v, view.slots)
            out = attention_paged(q, k_cache, v_cache, view.offsets, view.lengths, view.tables, scale)
        return self.o_proj(out.flatten(1))


class MLA(nn.Module):
    """Multi-head latent attention (deepseek_v3)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
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
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, config.rms_norm_eps)
            self.q_b_proj = Linear(config.q_lora_rank, query)
        self.kv_a_proj_with_mqa = Linear(width, self.latent + self.rope)
        self.kv_a_layernorm = RMSNorm(self.latent, config.rms_norm_eps)
        self.kv_b_proj = Linear(self.latent, self.heads * (self.nope + self.value))
        self.o_proj = Linear(self.heads * self.value, width)

    def forward(self, x: Float[Tensor, "T D"], angles: Angles, view: View) -> Float[Tensor, "T D"]:
        q = self.q_proj(x) if self.q_lora_rank is None else self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        q_nope, q_rope = q.unflatten(-1, (self.heads, -1)).split((self.nope, self.rope), dim=-1)  # [T, H, N], [T, H, R]
        latent, k_rope = self.kv_a_proj_with_mqa(x).split((self.latent, self.rope), dim=-1)  # [T, C], [T, R]
        latent = self.kv_a_layernorm(latent)
        q_rope = rope(q_rope, *angles, self.interleaved)
        k_rope = rope(k_rope[:, None], *angles, self.interleaved)  # [T, 1, R]
        scale = (self.nope + self.rope) ** -0.5
        form = self._naive if isinstance(view, PackedView) else self._absorbed
        return self.o_proj(form(q_nope, q_rope, latent, k_rope, view, scale).flatten(1))

    def _naive(
        self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, view: View, scale: float
    ) -> Float[Tensor, "T H value"]:
        """Keys and values expanded from the latent, attention over H heads of width N + R."""
        k_nope, v = self.kv_b_proj(latent).unflatten(-1, (self.heads, -1)).split((self.nope, self.value), dim=-1)
        k = torch.cat((k_nope, k_rope.expand(-1, self.heads, -1)), dim=-1)  # [T, H, N+R]
        return attention_packed(torch.cat((q_nope, q_rope), dim=-1), k, v, view.offsets, scale)

    def _absorbed(
        self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, view: View, scale: float
    ) -> Float[Tensor, "T H value"]:
        """Queries taken into the latent space, attention over one head of width C + R, values taken out of it."""
        assert isinstance(view, PagedView)
        weight = self.kv_b_proj.weight
        assert isinstance(weight, Tensor), "weights/load.py keeps kv_b_proj in full precision"
        w_uk, w_uv = weight.unflatten(0, (self.heads, -1)).split(
            (self.nope, self.value), dim=1
        )  # [H, N, C], [H, Vd, C]
        q = torch.cat((torch.einsum("thn,hnc->thc", q_nope, w_uk), q_rope), dim=-1)  # [T, H, C+R]
        (cache,) = view.cache[self.layer]
        cache_write(cache, torch.cat((latent[:, None], k_rope), dim=-1), view.slots)
        out = attention_paged(q, cache, cache[..., : self.latent], view.offsets, view.lengths, view.tables, scale)
        return torch.einsum("thc,hvc->thv", out, w_uv)
