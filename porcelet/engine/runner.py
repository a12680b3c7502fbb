"""One step of the model: a `Batch` becomes tensors, the model runs over the cache, sampled rows' logits come back."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from porcelet.config import PAGE_SIZE, ModelConfig
from porcelet.errors import CapacityError
from porcelet.models.attention import PagedView
from porcelet.models.transformer import Transformer
from porcelet.types import Batch

CACHE_VALUE_BYTES = 4  # float32


class Runner:
    """Owns the cache tensors. They are allocated but not touched, so memory is used as pages are."""

    def __init__(self, model: Transformer, num_pages: int) -> None:
        self.model = model
        _require_memory(num_pages * PAGE_SIZE * model.config.cache_values_per_token() * CACHE_VALUE_BYTES)
        self.cache = [_layer_cache(model.config, num_pages) for _ in range(model.config.num_hidden_layers)]

    @torch.inference_mode()
    def run(self, batch: Batch) -> Tensor:
        """Logits [number of sampled rows, V]."""
        view = self._view(batch)
        hidden = self.model(torch.tensor(batch.tokens), torch.tensor(batch.positions), view)
        return self.model.logits(hidden[torch.tensor(batch.sampled_rows, dtype=torch.int64)])

    def _view(self, batch: Batch) -> PagedView:
        width = max(map(len, batch.tables))
        tables = [table + (0,) * (width - len(table)) for table in batch.tables]
        slots = [
            table[position // PAGE_SIZE] * PAGE_SIZE + position % PAGE_SIZE
            for table, start, end in zip(batch.tables, batch.offsets, batch.offsets[1:], strict=False)
            for position in batch.positions[start:end]
        ]
        return PagedView(
            torch.tensor(batch.offsets),
            torch.tensor(batch.lengths),
            torch.tensor(tables),
            torch.tensor(slots),
            self.cache,
            batch.expanded,
        )


def _require_memory(num_bytes: int) -> None:
    """Memory is taken as pages fill, so a cache beyond the machine's would fail late, by a kill."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if num_bytes > memory:
        raise CapacityError(
            f"the cache would take {num_bytes / 1e9:.1f} GB, this machine has {memory / 1e9:.1f} GB; lower cache_tokens"
        )


def _layer_cache(config: ModelConfig, num_pages: int) -> tuple[Tensor, ...]:
    """(latents,) [P, page, 1, C+R] for MLA, (keys, values) [P, page, K, Hd] for GQA."""
    if config.is_mla:
        return (torch.empty(num_pages, PAGE_SIZE, 1, config.kv_lora_rank + config.qk_rope_head_dim),)
    shape = (num_pages, PAGE_SIZE, config.num_key_value_heads, config.head_dim)
    return torch.empty(shape), torch.empty(shape)
