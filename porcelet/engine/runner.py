"""One step of the model: a `Batch` becomes tensors, the model runs over the cache, sampled rows' logits come back."""

from __future__ import annotations

import torch
from torch import Tensor

from porcelet.config import PAGE_SIZE, ModelConfig
from porcelet.models.attention import PagedView
from porcelet.models.transformer import Transformer
from porcelet.types import Batch


class Runner:
    """Owns the cache tensors. They are allocated but not touched, so memory is used as pages are."""

    def __init__(self, model: Transformer, num_pages: int, cache_dtype: torch.dtype = torch.float32) -> None:
        self.model = model
        self.cache = [_layer_cache(model.config, num_pages, cache_dtype) for _ in range(model.config.num_hidden_layers)]

    @torch.inference_mode()
    def run(self, batch: Batch) -> Tensor:
        """Logits [number of sampled rows, V]."""
        for layer in self.cache:
            for part in layer:
                for source, target in batch.copies:
                    part[target] = part[source]
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


def _layer_cache(config: ModelConfig, num_pages: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """(latents,) [P, page, 1, C+R] for MLA, (keys, values) [P, page, K, Hd] for GQA."""
    if config.is_mla:
        return (torch.empty(num_pages, PAGE_SIZE, 1, config.kv_lora_rank + config.qk_rope_head_dim, dtype=dtype),)
    shape = (num_pages, PAGE_SIZE, config.num_key_value_heads, config.head_dim)
    return torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype)
