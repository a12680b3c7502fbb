"""The engine's step on a GPU: the model moved there, and decoding captured in CUDA graphs.

A step of a small batch is hundreds of kernels of a few microseconds each, which Python cannot launch as fast as they
run. A graph launches them all at once. It holds for one number of sequences, so there is one for each size of a
ladder, captured when a batch first needs it; a batch in between is filled up with sequences that nobody reads, of one
token in a page of their own. Prompts, and steps with guesses, run without.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from porcelet import hub
from porcelet.config import PAGE_SIZE, EngineConfig
from porcelet.engine.step import Cache, Inputs, step
from porcelet.errors import CapacityError, InputError
from porcelet.extras import optional
from porcelet.kernels.experts import PackedExperts
from porcelet.kernels.generations import generation_of
from porcelet.kernels.linear import FP8Operand, FP8Weight, PackedWeight, take_rows
from porcelet.kernels.triton import contest
from porcelet.kernels.triton.device import arch_of, why_not
from porcelet.models.attention import MLA
from porcelet.models.experts import Gate
from porcelet.models.layers import Embedding, Linear
from porcelet.models.transformer import Transformer
from porcelet.types import Batch

if TYPE_CHECKING:
    from jaxtyping import Float

DTYPE = torch.bfloat16  # of weights that are not packed, of activations and of the cache
FIRST_SIZES = (1, 2, 4)

log = logging.getLogger(__name__)


class Capture(Protocol):
    """Runs a function once, and gives what it returned and what runs it again, into the same tensors."""

    def __call__(
        self, function: Callable[[], tuple[Tensor, Tensor]]
    ) -> tuple[tuple[Tensor, Tensor], Callable[[], Any]]: ...


def device_of(config: EngineConfig) -> torch.device:
    """The device that an engine computes on; a GPU's tasks take the kernels that were measured fastest there.

    Raises:
        InputError: it is not there, or too old, or other settings are for a CPU alone, or what `porcelet bench` wrote
            cannot be read.
        MissingExtraError: Triton is not installed.
    """
    if config.device == "cpu":
        return torch.device("cpu")
    if reason := why_not():
        raise InputError(f"device is cuda, and {reason}; choose device=cpu")
    if config.expert_memory:
        raise InputError(
            f"expert_memory is {config.expert_memory}, and experts on disk are for device=cpu; leave it out"
        )
    if config.cache_dtype != "auto":
        raise InputError(f"cache_dtype is {config.cache_dtype}, and on a GPU the cache is {DTYPE}; leave it auto")
    generation = generation_of(arch_of(torch.device("cuda")))
    if config.activations == "fp8" and not generation.multiplies_fp8:
        raise InputError(f"activations is fp8, and {generation.name} GPUs do not multiply FP8; leave it half")
    os.environ.setdefault("TRITON_CACHE_DIR", str(hub.home() / "triton"))
    optional("triton", "gpu")
    device = torch.device("cuda", torch.cuda.current_device())
    contest.apply(hub.home() / contest.FILE, device)
    return device


@contextmanager
def within_memory(device: torch.device) -> Iterator[None]:
    """What is made meanwhile fits into the GPU's memory, or it is a CapacityError."""
    try:
        yield
    except torch.OutOfMemoryError as problem:
        total = torch.cuda.get_device_properties(device).total_memory / 1e9
        raise CapacityError(
            f"model and cache do not fit into the GPU's {total:.1f} GB; lower cache_tokens, or choose weights=int8 or "
            "int4, or device=cpu"
        ) from problem


def move(
    model: Transformer, device: torch.device, dtype: torch.dtype = DTYPE, *, activations: str = "half"
) -> Transformer:
    """The model itself with its weights on `device`: packed and FP8 ones as they are, others in `dtype` but for the
    gates, which score in float32. Heads that a packed model keeps apart become MLA's one matrix again. With
    `activations` "fp8" FP8 weights become `FP8Operand`s, with scales that are powers of two if all of theirs are.

    Raises:
        InputError: there are none.
    """
    tied = model.config.tie_word_embeddings
    for module in model.modules():
        if not (tied and module is model.lm_head):
            _move(module, device, torch.float32 if isinstance(module, Gate) else dtype)
    if tied:
        weight, head = model.model.embed_tokens.weight, model.lm_head
        if isinstance(weight, nn.Parameter):
            head._parameters["weight"] = weight
        else:
            head.__dict__["weight"] = weight
    if activations == "fp8":
        _round_activations(model)
    return model


def _round_activations(model: Transformer) -> None:
    found = [
        (module, name, weight)
        for module in model.modules()
        for name, weight in module.__dict__.items()
        if isinstance(weight, FP8Weight)
    ]
    if not found:
        raise InputError(
            "activations is fp8, and the model has no weights in FP8; leave it half, or take a checkpoint in FP8"
        )
    power_of_two = all(bool((weight.scale.frexp().mantissa == 0.5).all()) for _, _, weight in found)
    for module, name, weight in found:
        module.__dict__[name] = FP8Operand(weight.values, weight.scale, power_of_two)


def _move(module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    if isinstance(module, MLA) and module.packed_w_uk:
        joined = Linear(1, 1)
        joined.weight = nn.Parameter(module._expanded_weight().to(device, dtype), requires_grad=False)
        module.kv_b_proj, module.packed_w_uk, module.packed_w_uv = joined, None, None
    if isinstance(module, Embedding):
        module.dtype = dtype
    for name, parameter in module._parameters.items():
        if parameter is not None:
            module._parameters[name] = nn.Parameter(parameter.to(device, dtype), requires_grad=False)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = buffer.to(device)
    for name, weight in list(module.__dict__.items()):
        if isinstance(weight, PackedWeight):
            module.__dict__[name] = type(weight)(weight.packed.to(device), weight.shape)
        elif isinstance(weight, PackedExperts):
            module.__dict__[name] = PackedExperts(weight.packed.to(device), weight.shape)
        elif isinstance(weight, FP8Weight):
            module.__dict__[name] = FP8Weight(weight.values.to(device), weight.scale.to(device))


def ladder(most: int) -> list[int]:
    """The sizes that graphs are captured for: 1, 2, 4, every eighth, and the most."""
    return sorted({size for size in (*FIRST_SIZES, *range(8, most, 8)) if size < most} | {most})


def capture(function: Callable[[], tuple[Tensor, Tensor]]) -> tuple[tuple[Tensor, Tensor], Callable[[], Any]]:
    """A CUDA graph. The function runs once before, so that its kernels are compiled by then."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=_pool()):
        outputs = function()
    return outputs, graph.replay


@cache
def _pool() -> Any:
    """Memory that all graphs share: of two, one at a time is run and read."""
    return torch.cuda.graph_pool_handle()


class GraphedSteps:
    """The model's steps that give each sequence one token, over a cache whose last page is theirs to fill up with."""

    def __init__(
        self, model: Transformer, cache: Cache, most: int, max_length: int, capture: Capture = capture
    ) -> None:
        self.model, self.cache, self.sizes = model, cache, ladder(most)
        self.device, self.unread = cache[0][0].device, len(cache[0][0]) - 1
        self._capture = capture
        self._host = Inputs(most, most, -(-max_length // PAGE_SIZE), pinned=self.device.type == "cuda")
        self._inputs = self._host.on(self.device)
        self._tables: tuple[tuple[int, ...], ...] = ()
        # Of the last copies from the host's tensors.
        self._copied = torch.cuda.Event() if self.device.type == "cuda" else None
        self._graphs: dict[int, tuple[tuple[Tensor, Tensor], Callable[[], Any]]] = {}

    @property
    def num_captured(self) -> int:
        return len(self._graphs)

    def serves(self, batch: Batch) -> bool:
        """Whether each sequence has one new token, MLA attends absorbed, and a graph is large enough."""
        count = len(batch.lengths)
        return len(batch.tokens) == count <= self.sizes[-1] and not any(batch.expanded)

    def run(self, batch: Batch) -> tuple[Float[Tensor, "T D"], Float[Tensor, "sampled V"]]:
        """Hidden states after the final norm and the sampled rows' logits; both are overwritten by the next step."""
        count = len(batch.tokens)
        size = next(size for size in self.sizes if size >= count)
        self._fill(batch, count, size)
        made = self._graphs.get(size)
        if made is None:
            start = time.perf_counter()
            made = self._graphs[size] = self._capture(lambda: self._step(size))
            log.info("captured the step of %d sequences in %.1f s", size, time.perf_counter() - start)
        (hidden, logits), replay = made
        replay()
        return hidden[:count], logits[: len(batch.sampled_rows)]

    def replay_of(self, size: int) -> Callable[[], Any]:
        """What runs the graph of that size again, over the tensors as they are: for measuring."""
        return self._graphs[size][1]

    def _fill(self, batch: Batch, count: int, size: int) -> None:
        """The batch, and behind it sequences of one token in the page that nobody reads."""
        host, rest = self._host, slice(count, size)
        if self._copied:
            self._copied.synchronize()
        host.fill(batch)
        host.tokens[rest] = host.positions[rest] = 0
        host.sampled[len(batch.sampled_rows) : size] = 0
        host.slots[rest] = self.unread * PAGE_SIZE
        host.offsets[: size + 1] = torch.arange(size + 1)
        host.lengths[rest] = 1
        host.tables[rest, 0] = self.unread
        for name in ("tokens", "positions", "slots", "sampled", "lengths"):
            getattr(self._inputs, name)[:size].copy_(getattr(host, name)[:size], non_blocking=True)
        self._inputs.offsets[: size + 1].copy_(host.offsets[: size + 1], non_blocking=True)
        if batch.tables != self._tables:
            self._inputs.tables[:size].copy_(host.tables[:size], non_blocking=True)
            self._tables = batch.tables
        if self._copied:
            self._copied.record()

    def _step(self, size: int) -> tuple[Tensor, Tensor]:
        own = self._inputs.first(size)
        hidden = step(self.model, own, own.view(self.cache), None)
        return hidden, self.model.logits(take_rows(hidden, own.sampled))
