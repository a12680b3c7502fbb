"""Attention over pages on a GPU, by the kernel of attention.py or one that was taken in its place (tasks.py). Importing
this registers the bodies and does not import Triton."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from porcelet.kernels.attention import attention_latent, attention_paged
from porcelet.kernels.linear import HeadsWeight, heads_linear
from porcelet.kernels.pointwise import concat
from porcelet.kernels.triton.device import available, serves
from porcelet.kernels.triton.tasks import grouped_attention, latent_attention

if TYPE_CHECKING:
    from jaxtyping import Float, Int

CHUNK = 8192  # keys of a sequence that MLA's expanded form has at a time


@attention_paged.body("triton", when=lambda key: serves(key, "Tensor"), available=available)
def attention_paged_triton(
    q: Float[Tensor, "T H Hd"],
    k_cache: Float[Tensor, "P page K Hd"],
    v_cache: Float[Tensor, "P page K Vd"],
    offsets: Int[Tensor, "B1"],
    lengths: Int[Tensor, "B"],
    tables: Int[Tensor, "B max_pages"],
    scale: float,
) -> Float[Tensor, "T H Vd"]:
    """Any mix of new tokens; pages are read in place. A cache of another precision than q's is the definition's."""
    if not q.dtype == k_cache.dtype == v_cache.dtype:
        return attention_paged.reference(q, k_cache, v_cache, offsets, lengths, tables, scale)
    return grouped_attention(q, k_cache, v_cache, offsets, lengths, tables, scale)


@attention_latent.body("triton", when=lambda key: serves(key, "Tensor"), available=available)
def attention_latent_triton(
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
    """Absorbed: latents are read from their pages once for 64 heads. Expanded: a sequence's keys and values are made
    `CHUNK` at a time. A cache of another precision than q's is the definition's."""
    assert isinstance(w_uk, Tensor) and isinstance(w_uv, Tensor)
    if q_nope.dtype != cache.dtype:
        weights, past = (w_uk, w_uv), (offsets, lengths, tables)
        return attention_latent.reference(q_nope, *weights, q_rope, cache, *past, num_absorbed, scale)
    absorbed = int(num_absorbed)
    row = len(lengths) if absorbed == len(q_nope) else int((offsets < absorbed).sum())
    out = q_nope.new_empty(*q_nope.shape[:2], w_uv.shape[1])
    if row:
        q = concat(heads_linear(q_nope[:absorbed], w_uk), q_rope[:absorbed])  # [T, H, C+R]
        past = offsets[: row + 1], lengths[:row], tables[:row]
        out[:absorbed] = heads_linear(latent_attention(q, cache, w_uv.shape[2], *past, scale)[0], w_uv)
    if row == len(lengths):
        return out  # without a question to the device
    bounds, sizes = offsets.tolist(), lengths.tolist()
    for b in range(row, len(lengths)):
        own = slice(bounds[b], bounds[b + 1])
        q = concat(q_nope[own], q_rope[own])  # [new, H, N+R]
        out[own] = attend_expanded(q, w_uk, w_uv, cache, sizes[b], tables[b], scale)
    return out


def attend_expanded(
    q: Float[Tensor, "new H NR"],
    w_uk: Float[Tensor, "H C N"],
    w_uv: Float[Tensor, "H value C"],
    cache: Float[Tensor, "P page 1 CR"],
    length: int,
    table: Int[Tensor, "max_pages"],
    scale: float,
    chunk: int = CHUNK,
) -> Float[Tensor, "new H value"]:
    """A sequence's last tokens over every head's own keys and values, made of the latents of `chunk` tokens at a time.

    Chunks' results are joined by their log-sum-exps in float32, so memory does not grow with the cached prefix.
    """
    from porcelet.kernels.triton.attention import attend

    (H, C, _), page_size = w_uk.shape, cache.shape[1]
    assert chunk % page_size == 0
    offsets, ends = (torch.tensor(values, dtype=torch.int32, device=q.device) for values in ([0, len(q)], [length]))
    joined = q.new_zeros(len(q), H, w_uv.shape[1], dtype=torch.float32), q.new_full((len(q), H), -torch.inf).float()
    for start in range(0, length, chunk):
        pages = table[start // page_size : -(-min(start + chunk, length) // page_size)]
        latent, k_rope = cache[pages][:, :, 0].split((C, cache.shape[3] - C), dim=-1)
        k_nope = torch.einsum("psc,hcn->pshn", latent, w_uk)
        k = concat(k_nope, k_rope[:, :, None].expand(-1, -1, H, -1))  # [pages, page, H, N+R]
        v = torch.einsum("psc,hvc->pshv", latent, w_uv)
        own = torch.arange(len(pages), dtype=torch.int32, device=q.device)[None]
        joined = _joined(joined, attend(q, k, v, offsets, ends - start, own, scale))
    return joined[0].to(q.dtype)


def _joined(*parts: tuple[Float[Tensor, "T H value"], Float[Tensor, "T H"]]) -> tuple[Tensor, Tensor]:
    """Attention over all keys from attention over some each; a part that saw none has a log-sum-exp of -inf."""
    lse = torch.logsumexp(torch.stack([part_lse for _, part_lse in parts]), 0)
    shares = [(part_lse - lse).exp().nan_to_num(0.0) for _, part_lse in parts]
    joined = sum(out.float() * share[..., None] for (out, _), share in zip(parts, shares, strict=True))
    assert isinstance(joined, Tensor)
    return joined, lse
