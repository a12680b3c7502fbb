"""One step of the model: a `Batch` becomes tensors, the model runs over the cache, sampled rows' logits come back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from porcelet.config import PAGE_SIZE, REPLAYED_TOKENS, ModelConfig
from porcelet.engine.gpu import GraphedSteps
from porcelet.engine.step import MOST_SAMPLED, Inputs, RecordedStep, step
from porcelet.kernels.linear import PackedWeight, take_rows
from porcelet.kernels.record import NotRecordable
from porcelet.models.layers import Linear
from porcelet.models.transformer import Transformer
from porcelet.types import Batch

if TYPE_CHECKING:
    from jaxtyping import Float


CPU = torch.device("cpu")


def choose_cache_dtype(name: str, model: Transformer) -> torch.dtype:
    """The cache's type for `cache_dtype`; "auto" rounds to half precision beside weights that are rounded further."""
    if name == "auto":
        return torch.float16 if _is_packed(model) else torch.float32
    return {"float32": torch.float32, "float16": torch.float16}[name]


class Runner:
    """Owns the cache tensors. On a CPU they are allocated but not touched, so memory is used as pages are.

    On a GPU, where the model must be then, decoding steps of up to `max_sequences` are graphs (gpu.py). On a CPU
    batches of up to `capacity` tokens are replayed from a recording made at the first of them. Others run eagerly. A
    model that cannot be recorded always does: `recorded` is False and `why_not` says why. `hidden` [T, D] are the last
    step's states after the final norm, until the next step.
    """

    def __init__(
        self,
        model: Transformer,
        num_pages: int,
        num_layers: int,
        *,
        cache_dtype: torch.dtype = torch.float32,
        capacity: int = REPLAYED_TOKENS,
        device: torch.device = CPU,
        max_sequences: int = 1,
    ) -> None:
        self.model, self.capacity = model, capacity
        self.hidden = torch.empty(0)
        self.why_not = "no batch was small enough yet"
        self.device, unread = device, int(device != CPU)  # a page more for what fills up graphs
        self.cache = [_layer_cache(model.config, num_pages + unread, cache_dtype, device) for _ in range(num_layers)]
        self._max_length = min(model.config.max_position_embeddings, num_pages * PAGE_SIZE)
        self._graphs = GraphedSteps(model, self.cache, max_sequences, self._max_length) if unread else None
        self._num_recordings = 0
        self._steps: dict[bool, RecordedStep] = {}  # the model's, and the MTP layer's under True
        self._compared = set[bool]()  # which of them hold the weights of this moment
        self._recordable = True

    @property
    def recorded(self) -> bool:
        """Whether there is a recording."""
        return bool(self._graphs.num_captured if self._graphs else self._steps)

    @property
    def num_recordings(self) -> int:
        """How many steps have been recorded or captured."""
        return self._graphs.num_captured if self._graphs else self._num_recordings

    @torch.inference_mode()
    def run(self, batch: Batch, *, same_weights: bool = False) -> Float[Tensor, "sampled V"]:
        """Logits of the sampled rows, valid until the next step. Recordings are not compared with the model's weights
        again where the caller knows that these are the last step's."""
        if not same_weights:
            self._compared.clear()
        self._copy_pages(batch.copies)
        self.hidden, logits = self._run(batch, None)
        return logits

    @torch.inference_mode()
    def draft(self, batch: Batch, hidden_rows: list[int]) -> Float[Tensor, "sampled V"]:
        """The MTP layer over tokens that follow those of the last step's `hidden_rows`; logits of the sampled rows."""
        return self._run(batch, self.hidden[torch.tensor(hidden_rows, device=self.device)])[1]

    def _run(self, batch: Batch, before: Tensor | None) -> tuple[Tensor, Tensor]:
        """The step of the model, or of its MTP layer from the states `before`: hidden states and logits."""
        if self._graphs:
            return self._run_on_gpu(self._graphs, batch, before)
        is_short = len(batch.tokens) <= self.capacity and len(batch.sampled_rows) <= MOST_SAMPLED
        if is_short:
            recording = self._recording(is_draft=before is not None)
            if recording:
                return recording.run(batch, before)
        return self._run_eagerly(batch, before)

    def _run_on_gpu(self, graphs: GraphedSteps, batch: Batch, before: Tensor | None) -> tuple[Tensor, Tensor]:
        return graphs.run(batch) if before is None and graphs.serves(batch) else self._run_eagerly(batch, before)

    def _run_eagerly(self, batch: Batch, before: Tensor | None) -> tuple[Tensor, Tensor]:
        inputs = Inputs(len(batch.tokens), len(batch.lengths), max(map(len, batch.tables)))
        inputs.fill(batch)
        inputs = inputs.on(self.device)
        hidden = step(self.model, inputs, inputs.view(self.cache), before)
        return hidden, self.model.logits(take_rows(hidden, inputs.sampled[: len(batch.sampled_rows)]))

    def _recording(self, is_draft: bool) -> RecordedStep | None:
        made = self._steps.get(is_draft)
        if made and is_draft in self._compared:
            return made
        self._compared.add(is_draft)
        if self._recordable and not (made and made.is_valid):
            try:
                made = RecordedStep(self.model, self.cache, self.capacity, self._max_length, is_draft=is_draft)
                self.why_not = ""
            except NotRecordable as reason:
                made, self._recordable, self.why_not = None, False, str(reason)
                self._steps.clear()
            if made:
                self._steps[is_draft] = made
                self._num_recordings += 1
        return made

    def _copy_pages(self, copies: tuple[tuple[int, int], ...]) -> None:
        if not copies:
            return
        sources, targets = torch.tensor(copies, device=self.device).unbind(1)
        for layer in self.cache:
            for pages in layer:
                pages[targets] = pages[sources]


def _layer_cache(
    config: ModelConfig, num_pages: int, dtype: torch.dtype = torch.float32, device: torch.device = CPU
) -> tuple[Tensor, ...]:
    """(latents,) [P, page, 1, C+R] for MLA, (keys, values) [P, page, K, Hd] for GQA. In memory a page's tokens of one
    head lie together: attention streams them."""
    if config.is_mla:
        return (
            torch.empty(
                num_pages, PAGE_SIZE, 1, config.kv_lora_rank + config.qk_rope_head_dim, dtype=dtype, device=device
            ),
        )
    shape = (num_pages, config.num_key_value_heads, PAGE_SIZE, config.head_dim)
    return tuple(torch.empty(shape, dtype=dtype, device=device).transpose(1, 2) for _ in range(2))


def _is_packed(model: Transformer) -> bool:
    """Whether every linear layer is."""
    return all(isinstance(module.weight, PackedWeight) for module in model.modules() if isinstance(module, Linear))
