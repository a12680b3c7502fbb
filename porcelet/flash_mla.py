"""FlashMLA's calling convention over our kernels: `from porcelet import flash_mla` in place of `import flash_mla`.

Dense decoding on NVIDIA GPUs since Ampere. What it leaves out: sparse attention (`indices` and what belongs to them).
What it adds: 8-bit latents may be attended densely.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from porcelet.errors import InputError, MissingExtraError
from porcelet.kernels.latent8 import BYTES

if TYPE_CHECKING:
    from jaxtyping import Float, Int, Shaped


@dataclass
class FlashMLASchedMeta:
    """What calls of one shape share; to its holder it is opaque."""

    offsets: dict[tuple[int, int, torch.device], Tensor] = field(default_factory=dict)

    def offsets_of(self, num_sequences: int, num_new: int, device: torch.device) -> Int[Tensor, "b1"]:
        """Where each sequence's tokens begin."""
        key = num_sequences, num_new, device
        if key not in self.offsets:
            self.offsets[key] = torch.arange(num_sequences + 1, dtype=torch.int32, device=device) * num_new
        return self.offsets[key]


def get_mla_metadata(*args: Any, **kwargs: Any) -> tuple[FlashMLASchedMeta, None]:
    """The metadata of `flash_mla_with_kvcache`; arguments, which FlashMLA once took, are ignored as it does now."""
    return FlashMLASchedMeta(), None


def flash_mla_with_kvcache(
    q: Float[Tensor, "b s_q h_q 576"],
    k_cache: Shaped[Tensor, "blocks 64 h_kv cached"],
    block_table: Int[Tensor, "b max_blocks"] | None,
    cache_seqlens: Int[Tensor, "b"] | None,
    head_dim_v: int,
    tile_scheduler_metadata: FlashMLASchedMeta,
    num_splits: None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    is_fp8_kvcache: bool = False,
    indices: Tensor | None = None,
    attn_sink: Tensor | None = None,
    extra_k_cache: Tensor | None = None,
    extra_indices_in_kvcache: Tensor | None = None,
    topk_length: Tensor | None = None,
    extra_topk_length: Tensor | None = None,
) -> tuple[Float[Tensor, "b s_q h_q 512"], Float[Tensor, "b h_q s_q"]]:
    """Each sequence's last s_q tokens attend to its first `cache_seqlens` cached ones: outputs, and log-sum-exps in
    float32. A query that sees no key gets zeros and +inf.

    With `is_fp8_kvcache` the cache holds 656 bytes a token (`porcelet.kernels.latent8`), as uint8 or float8_e4m3fn, and
    h_kv is 1. The scale is by default q's width to the power -0.5. Raises InputError for arguments of sparse attention
    and for what does not fit, MissingExtraError without Triton.
    """
    sparse = {
        "indices": indices,
        "attn_sink": attn_sink,
        "extra_k_cache": extra_k_cache,
        "extra_indices_in_kvcache": extra_indices_in_kvcache,
        "topk_length": topk_length,
        "extra_topk_length": extra_topk_length,
    }
    for name, value in sparse.items():
        if value is not None:
            raise InputError(f"{name} asks for sparse attention, which is not offered; leave it out")
    if block_table is None or cache_seqlens is None:
        raise InputError("dense attention needs block_table and cache_seqlens")
    if not isinstance(tile_scheduler_metadata, FlashMLASchedMeta) or num_splits is not None:
        raise InputError("tile_scheduler_metadata and num_splits must be what get_mla_metadata returned")
    if is_fp8_kvcache and k_cache.dtype == torch.float8_e4m3fn:
        k_cache = k_cache.view(torch.uint8)
    _check(q, k_cache, block_table, cache_seqlens, head_dim_v, is_fp8_kvcache)
    if find_spec("triton") is None:
        raise MissingExtraError("triton", "gpu")
    from porcelet.kernels.triton.tasks import latent_attention

    b, s_q, h_q, width = q.shape
    offsets = tile_scheduler_metadata.offsets_of(b, s_q, q.device)
    past = offsets, cache_seqlens, block_table
    scale = width**-0.5 if softmax_scale is None else softmax_scale
    out, lse = latent_attention(q.flatten(0, 1), k_cache, head_dim_v, *past, scale, causal=causal)
    lse = torch.where(lse == -torch.inf, torch.inf, lse)
    return out.view(b, s_q, h_q, head_dim_v), lse.view(b, s_q, h_q).transpose(1, 2)


def _check(
    q: Tensor, k_cache: Tensor, block_table: Tensor, cache_seqlens: Tensor, head_dim_v: int, is_fp8_kvcache: bool
) -> None:
    if head_dim_v != 512 or q.dim() != 4 or q.shape[3] != 576:
        raise InputError(f"q {list(q.shape)} with head_dim_v {head_dim_v}: queries are 576 wide, values 512")
    if q.dtype not in (torch.bfloat16, torch.float16):
        raise InputError(f"q is {q.dtype}; queries are bfloat16 or float16")
    if k_cache.dim() != 4 or k_cache.shape[1] != 64:
        raise InputError(f"k_cache {list(k_cache.shape)}: a cache is [blocks, 64, h_kv, width]")
    h_q, h_kv = q.shape[2], k_cache.shape[2]
    if h_q % h_kv or (is_fp8_kvcache and h_kv != 1):
        raise InputError(f"{h_q} query heads cannot share {h_kv} key heads" + " of 8 bits" * is_fp8_kvcache)
    width, dtype = (BYTES, torch.uint8) if is_fp8_kvcache else (576, q.dtype)
    if k_cache.shape[3] != width or k_cache.dtype != dtype:
        raise InputError(f"k_cache's rows are {k_cache.shape[3]} × {k_cache.dtype}; they must be {width} × {dtype}")
    if len(block_table) != len(q) or cache_seqlens.shape != (len(q),):
        raise InputError(
            f"block_table {list(block_table.shape)} and cache_seqlens {list(cache_seqlens.shape)} are of other than "
            f"{len(q)} sequences"
        )
    if not q.stride(3) == k_cache.stride(3) == block_table.stride(1) == 1:
        raise InputError("the last dimensions of q, k_cache and block_table must be contiguous")
