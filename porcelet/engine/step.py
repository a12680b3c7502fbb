"""A step's tensors, and the step recorded.

`Inputs` are the tensors that a `Batch` becomes. `RecordedStep` keeps one set of them for good: the model's Python has
run over it once, and a step fills it in and replays what was recorded. It serves every batch of up to `capacity`
tokens, as lengths, pages and the number of rows are read anew each time. The MTP layer's step is another recording,
which begins with the main model's hidden states.
"""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from porcelet.config import PAGE_SIZE
from porcelet.kernels import cpu
from porcelet.kernels.experts import PackedExperts
from porcelet.kernels.linear import FP8Weight, PackedHeads, PackedWeight, take_rows
from porcelet.kernels.record import NotRecordable, Tape
from porcelet.models.attention import PagedView
from porcelet.models.rope import frequencies
from porcelet.models.transformer import Transformer
from porcelet.types import Batch

if TYPE_CHECKING:
    from jaxtyping import Float

Cache = list[tuple[Tensor, ...]]

MOST_SAMPLED = 256  # rows whose logits a recording has room for


class Inputs:
    """Room for a batch of so many tokens, sequences and pages a sequence; `pinned` for a GPU to read it from."""

    def __init__(self, num_tokens: int, num_sequences: int, max_pages: int, *, pinned: bool = False) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.int64, pin_memory=pinned)

        self.tokens, self.positions, self.slots, self.sampled = zeros(4, num_tokens)
        self.offsets, self.lengths = zeros(num_sequences + 1), zeros(num_sequences)
        self.tables, self.num_absorbed = zeros(num_sequences, max_pages), zeros(1)

    def fill(self, batch: Batch) -> None:
        """Write a batch over the first rows; what lies behind them stays as it was."""
        for target, values in (
            (self.tokens, batch.tokens),
            (self.positions, batch.positions),
            (self.offsets, batch.offsets),
            (self.lengths, batch.lengths),
            (self.sampled, batch.sampled_rows),
        ):
            target.numpy()[: len(values)] = values
        num_absorbed = batch.expanded.count(False)
        assert not any(batch.expanded[:num_absorbed]), "sequences that attend expanded come last"
        self.num_absorbed[0] = batch.offsets[num_absorbed]
        tables = self.tables.numpy()
        for row, pages in enumerate(batch.tables):
            tables[row, : len(pages)] = pages
        counts = [end - start for start, end in pairwise(batch.offsets)]
        positions = self.positions.numpy()[: len(batch.tokens)]
        page = tables[np.repeat(np.arange(len(counts)), counts), positions // PAGE_SIZE]
        self.slots.numpy()[: len(positions)] = page * PAGE_SIZE + positions % PAGE_SIZE

    def on(self, device: torch.device) -> Inputs:
        """The same on a device, all but the number of absorbed tokens, which decides what is computed."""
        if device.type == "cpu":
            return self
        moved = copy.copy(self)
        for name in ("tokens", "positions", "slots", "sampled", "offsets", "lengths", "tables"):
            setattr(moved, name, getattr(self, name).to(device))
        return moved

    def first(self, size: int) -> Inputs:
        """The part for so many sequences of one token each, all of which MLA attends absorbed."""
        part = copy.copy(self)
        for name in ("tokens", "positions", "slots", "sampled", "lengths", "tables"):
            setattr(part, name, getattr(self, name)[:size])
        part.offsets, part.num_absorbed = self.offsets[: size + 1], torch.tensor([size])
        return part

    def view(self, cache: Cache) -> PagedView:
        return PagedView(self.offsets, self.lengths, self.tables, self.slots, cache, self.num_absorbed)


def step(model: Transformer, inputs: Inputs, view: PagedView, before: Tensor | None) -> Float[Tensor, "T D"]:
    """Hidden states of the model, or of its MTP layer, which begins with the states `before`."""
    if before is None:
        return model(inputs.tokens, inputs.positions, view)
    return model.predict_further(before, inputs.tokens, inputs.positions, view)


def _weights(model: Transformer) -> list[tuple[dict[str, Any], str, object, Tensor, int]]:
    """The table that holds each parameter, buffer or packed weight, its name there, itself, its tensor and the address.

    The list keeps them alive: the recording reads them until it is found to be out of date.
    """
    found = []
    for module in model.modules():
        for table in (module._parameters, module._buffers, module.__dict__):
            for name, weight in table.items():
                for tensor in _tensors(weight):
                    found.append((table, name, weight, tensor, tensor.data_ptr()))
    return found


def _tensors(weight: object) -> tuple[Tensor, ...]:
    """Those of a weight in any format; none of what is no weight."""
    if isinstance(weight, FP8Weight):
        return weight.values, weight.scale
    if isinstance(weight, (PackedExperts, PackedHeads, PackedWeight)):
        return (weight.packed,)
    return (weight,) if isinstance(weight, Tensor) else ()


class RecordedStep:
    """The model's step over a cache, recorded for up to `capacity` tokens at positions below `max_length`, of which
    MOST_SAMPLED are scored; the MTP layer's if `is_draft`.

    Raises:
        NotRecordable: something in the model has no native instruction.
    """

    def __init__(
        self, model: Transformer, cache: Cache, capacity: int, max_length: int, *, is_draft: bool = False
    ) -> None:
        if not cpu.available():
            raise NotRecordable("the native module was not built")
        self.capacity, self.max_length, self.vocab_size = capacity, max_length, model.config.vocab_size
        self.program = cpu.new_program()
        self._inputs = Inputs(capacity, capacity, -(-max_length // PAGE_SIZE))
        self._before = torch.zeros(capacity, model.config.hidden_size) if is_draft else None
        frequencies(model.config, torch.device("cpu"))  # computed once a model, so before the recording
        with Tape(self.program, capacity, max_length) as self._tape:
            self._hidden = step(model, self._inputs, self._inputs.view(cache), self._before)
            self._logits = model.logits(take_rows(self._hidden, self._inputs.sampled[:MOST_SAMPLED]))
        self._weights = _weights(model)

    @property
    def is_valid(self) -> bool:
        """Whether the model's weights are the ones that were recorded, and where they were."""
        for table, name, weight, tensor, address in self._weights:
            if table.get(name) is not weight or tensor.data_ptr() != address:
                return False
        return True

    def run(
        self, batch: Batch, before: Float[Tensor, "T D"] | None = None
    ) -> tuple[Float[Tensor, "T D"], Float[Tensor, "sampled V"]]:
        """Hidden states after the final norm and the sampled rows' logits; both are overwritten by the next step. The
        MTP layer begins with the states `before`."""
        count, taken = len(batch.tokens), len(batch.sampled_rows)
        assert count <= self.capacity and taken <= len(self._logits), (count, taken)
        # A wrong index would be read by the native code as it is.
        assert min(batch.tokens) >= 0 and max(batch.tokens) < self.vocab_size
        assert min(batch.positions) >= 0 and max(batch.positions) < self.max_length
        assert all(0 <= row < count for row in batch.sampled_rows)
        self._inputs.fill(batch)
        if self._before is not None:
            assert before is not None and len(before) == count
            self._before[:count] = before
        self.program.run(count, taken, torch.get_num_threads())
        return self._hidden[:count], self._logits[:taken]
