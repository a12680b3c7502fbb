"""How fast this machine's kernels are, as a step of the engine uses them: recorded, one parallel region, all threads.

Each measurement records a chain of one kind of op over more weights or cache than the processor's caches hold and times
its replay. What is left is a table of costs that the planner (plan/engine_time.py) puts together again for models it
has never seen: seconds a weight at so many tokens, seconds a multiply-add of attention, and what an instruction costs
besides. Activations are normally distributed, as layers' normed inputs nearly are.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from porcelet.kernels import cpu
from porcelet.kernels.attention import attention_latent, attention_paged
from porcelet.kernels.experts import ExpertWeight, PackedExperts, experts, packed_shape
from porcelet.kernels.linear import Int8Weight, PackedHeads, PackedWeight, kind_with, linear, pack
from porcelet.kernels.pointwise import add, rms_norm
from porcelet.kernels.record import Tape

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 512)
FORMATS = {"float32": 32, "int8": 9, "int4": 5}  # bits a value
STREAMED = 256 << 20  # bytes that a chain goes over: more than the caches hold
MOST_OPERATIONS = 3e10  # of a chain; wide ones are shorter
SECONDS = 0.12  # that a measurement replays its chain for, at least
WIDTH, INNER = 768, 2048  # of the products; a multiple of the groups of packed weights
HEADS, KV_HEADS, HEAD_DIM = 9, 3, 64
MLA_HEADS, LATENT, ROPE, NOPE, VALUE = 16, 512, 64, 128, 128
MLA_LAYERS = 20
NUM_EXPERTS, ACTIVE, EXPERT_WIDTH, EXPERT_INNER = 16, 2, 512, 512
PAGE = 64

Weight = Tensor | PackedWeight


def costs() -> Iterator[tuple[str, float]]:
    """Every cost by its name, as it is measured: `product.int4.16` is seconds a weight with 16 tokens.

    Raises:
        NotRecordable: this installation has no native library.
    """
    with torch.inference_mode():
        yield "read", _bandwidth()
        for name in FORMATS:
            yield from _products(name)
        yield from _pointwise()
        for name, dtype in (("float32", torch.float32), ("float16", torch.float16)):
            yield from _grouped_attention(name, dtype)
            yield from _latent_attention(name, dtype)
        for name in FORMATS:
            yield from _experts(name)


def _replayed(capacity: int, rows: int, record: Callable[[], object], max_length: int = 64) -> float:
    """Seconds of one replay of what `record` records, with so many rows."""
    with Tape(cpu.new_program(), capacity, max_length) as tape:
        kept = record()
    run, threads = tape.program.run, torch.get_num_threads()
    run(rows, rows, threads)
    taken: list[float] = []
    begin = time.perf_counter()
    while len(taken) < 3 or time.perf_counter() - begin < SECONDS:
        start = time.perf_counter()
        run(rows, rows, threads)
        taken.append(time.perf_counter() - start)
    del kept
    return statistics.median(taken)


def _bandwidth() -> float:
    """Bytes a second that all threads read."""
    values = torch.ones(1 << 26)
    found = []
    for _ in range(5):
        start = time.perf_counter()
        values.sum()
        found.append(values.nbytes / (time.perf_counter() - start))
    return max(found)


# ---- products -------------------------------------------------------------------------------------------------------


def _weight(name: str, outputs: int, inputs: int) -> Weight:
    """A random weight of a size that keeps values near one."""
    if name == "float32":
        return torch.randn(outputs, inputs) * inputs**-0.5
    bits = int(name.removeprefix("int"))
    q = torch.randint(0, 1 << bits, (outputs, inputs), dtype=torch.uint8)
    scale = torch.full((outputs, inputs // 32), 3.4 * inputs**-0.5 / (1 << bits), dtype=torch.float16)
    return pack(q, scale, -scale * (1 << (bits - 1)), bits)


def _copies(weight: Weight, count: int) -> list[Weight]:
    if isinstance(weight, Tensor):
        return [weight.clone() for _ in range(count)]
    return [type(weight)(weight.packed.clone(), weight.shape) for _ in range(count)]


def _products(name: str) -> Iterator[tuple[str, float]]:
    """Seconds a weight at each number of tokens, each product with rounding and meeting of its own; and what one costs
    however small it is."""
    pairs = max(2, STREAMED * 8 // (FORMATS[name] * 2 * WIDTH * INNER))
    ups, downs = _copies(_weight(name, INNER, WIDTH), pairs), _copies(_weight(name, WIDTH, INNER), pairs)
    small = _copies(_weight(name, 64, 64), 64)
    for rows in ROWS:
        fitting = max(2, min(pairs, int(MOST_OPERATIONS / (4 * rows * WIDTH * INNER))))
        chain = [weight for pair in zip(ups[:fitting], downs[:fitting], strict=True) for weight in pair]
        seconds = _replayed(rows, rows, partial(_chain, torch.randn(rows, WIDTH), chain)) / len(chain)
        fixed = _replayed(rows, rows, partial(_chain, torch.randn(rows, 64), small)) / len(small)
        yield f"product.{name}.{rows}", (seconds - fixed) / (WIDTH * INNER)
        yield f"product_call.{name}.{rows}", fixed


def _chain(x: Tensor, weights: list[Weight]) -> Tensor:
    for weight in weights:
        x = linear(x, weight)
    return x


def _pointwise() -> Iterator[tuple[str, float]]:
    """Seconds a value of norms, sums and gates, and what such an instruction costs besides."""
    for rows in (1, 16, 512):
        narrow, wide = (
            _replayed(rows, rows, partial(_norms, torch.randn(rows, width), torch.ones(width))) / 128
            for width in (64, 1088)
        )
        yield f"pointwise.{rows}", max(wide - narrow, 0.0) / (1024 * rows)
        yield f"pointwise_call.{rows}", narrow


def _norms(x: Tensor, weight: Tensor) -> Tensor:
    for _ in range(64):
        x = add(x, rms_norm(x, weight, 1e-6))
    return x


# ---- attention ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Paged:
    """The indices of sequences of equal lengths over pages of their own."""

    offsets: Tensor
    lengths: Tensor
    tables: Tensor

    @classmethod
    def of(cls, sequences: int, new: int, cached: int) -> _Paged:
        pages = -(-(cached + new) // PAGE)
        tables = torch.arange(sequences * pages).view(sequences, pages)
        return cls(torch.arange(sequences + 1) * new, torch.full((sequences,), cached + new), tables)

    @property
    def num_pages(self) -> int:
        return self.tables.numel()


def _grouped_attention(name: str, dtype: torch.dtype) -> Iterator[tuple[str, float]]:
    """Seconds a multiply-add of scores and sums, of one new token a sequence and of a prompt."""

    def seconds(sequences: int, new: int, cached: int, layers: int) -> float:
        paged = _Paged.of(sequences, new, cached)
        shape = (paged.num_pages, KV_HEADS, PAGE, HEAD_DIM)
        caches = [(torch.randn(shape).to(dtype).transpose(1, 2), torch.randn(shape).to(dtype).transpose(1, 2))]
        caches += [(keys.clone(), values.clone()) for keys, values in caches * (layers - 1)]
        q = torch.randn(sequences * new, HEADS, HEAD_DIM)

        def record() -> object:
            for keys, values in caches:
                attention_paged(q, keys, values, paged.offsets, paged.lengths, paged.tables, 0.125)
            return caches

        return _replayed(sequences * new, sequences * new, record, cached + new) / layers

    width = HEADS * 2 * HEAD_DIM
    for sequences, layers in ((1, 24), (16, 8)):
        long, short = seconds(sequences, 1, 1023, layers), seconds(sequences, 1, 63, layers)
        yield f"attention.{name}.{sequences}", (long - short) / (sequences * 960 * width)
        yield f"attention_call.{name}.{sequences}", max(short - (long - short) / 15, 0.0)
    yield f"attention_prompt.{name}", seconds(1, 512, 0, 4) / (512 * 513 / 2 * width)


def _latent_attention(name: str, dtype: torch.dtype) -> Iterator[tuple[str, float]]:
    """The same for MLA, absorbed and expanded, and seconds a value of W_UK and W_UV at each number of tokens."""
    uk, uv = _weight("int8", LATENT, NOPE), _weight("int8", VALUE, LATENT)
    assert isinstance(uk, Int8Weight) and isinstance(uv, Int8Weight)

    def heads() -> tuple[PackedHeads, PackedHeads]:
        """W_UK and W_UV of a layer: each has its own, so they come from memory."""
        return (
            PackedHeads(uk.packed.expand(MLA_HEADS, *uk.packed.shape).contiguous(), (MLA_HEADS, LATENT, NOPE)),
            PackedHeads(uv.packed.expand(MLA_HEADS, *uv.packed.shape).contiguous(), (MLA_HEADS, VALUE, LATENT)),
        )

    weights = [heads() for _ in range(MLA_LAYERS)]

    def seconds(sequences: int, new: int, cached: int, layers: int, *, absorbed: bool) -> float:
        paged, rows = _Paged.of(sequences, new, cached), sequences * new
        caches = [torch.randn(paged.num_pages, PAGE, 1, LATENT + ROPE).to(dtype) for _ in range(layers)]
        q, q_rope = torch.randn(rows, MLA_HEADS, NOPE), torch.randn(rows, MLA_HEADS, ROPE)
        split = torch.tensor([rows if absorbed else 0])

        def record() -> object:
            for cache, (w_uk, w_uv) in zip(caches, weights, strict=False):
                indices = (paged.offsets, paged.lengths, paged.tables)
                attention_latent(q, w_uk, w_uv, q_rope, cache, *indices, split, 0.1)
            return caches

        return _replayed(rows, rows, record, cached + new) / layers

    width, values = MLA_HEADS * (2 * LATENT + ROPE), MLA_HEADS * LATENT * (NOPE + VALUE)
    for sequences in (1, 4, 16):
        long, short = (seconds(sequences, 1, cached, MLA_LAYERS, absorbed=True) for cached in (1023, 63))
        yield f"absorbed.{name}.{sequences}", (long - short) / (sequences * 960 * width)
        yield f"absorbing.{name}.{sequences}", max(short - (long - short) / 15, 0.0) / values
    expanded = 512 * 513 / 2 * MLA_HEADS * (NOPE + ROPE + VALUE) + 512 * values
    yield f"expanded.{name}", seconds(1, 512, 0, 2, absorbed=False) / expanded


# ---- experts --------------------------------------------------------------------------------------------------------


def _stack(name: str, rows: int, inputs: int, parts: int) -> ExpertWeight:
    if name == "float32":
        return torch.randn(NUM_EXPERTS, rows, inputs) * inputs**-0.5
    kind = kind_with(int(name.removeprefix("int")), False)
    shape = (NUM_EXPERTS, rows, inputs)
    one = _weight(name, rows // parts, inputs)
    assert isinstance(one, PackedWeight)
    stacked = one.packed.expand(packed_shape(shape, parts, kind)).contiguous()
    return PackedExperts(stacked, shape)


def _experts(name: str) -> Iterator[tuple[str, float]]:
    """Seconds a weight of the experts that are met, by how many tokens an expert has."""
    size = 3 * EXPERT_WIDTH * EXPERT_INNER
    layers = max(1, STREAMED * 8 // (FORMATS[name] * NUM_EXPERTS * size))
    stacks = [
        (_stack(name, 2 * EXPERT_INNER, EXPERT_WIDTH, 2), _stack(name, EXPERT_WIDTH, EXPERT_INNER, 1))
        for _ in range(layers)
    ]
    for tokens in (1, 4, 8, 32, 128, 512):
        x, weights = torch.randn(tokens, EXPERT_WIDTH), torch.full((tokens, ACTIVE), 0.5)
        met = NUM_EXPERTS * (1 - (1 - ACTIVE / NUM_EXPERTS) ** tokens)
        turns = round(NUM_EXPERTS / met)  # through the layers, so that few experts at a time come from memory too
        choices = [torch.rand(tokens, NUM_EXPERTS).topk(ACTIVE).indices for _ in range(turns * layers)]
        calls = list(zip(stacks * turns, choices, strict=True))
        calls = calls[: max(2, min(len(calls), int(MOST_OPERATIONS / (2 * tokens * ACTIVE * size))))]
        touched = sum(len(chosen.unique()) for _, chosen in calls) * size

        seconds = _replayed(tokens, tokens, partial(_routed, x, weights, calls))
        yield f"experts.{name}.{tokens * ACTIVE / met:.3g}", seconds / touched


def _routed(x: Tensor, weights: Tensor, calls: list[tuple[tuple[ExpertWeight, ExpertWeight], Tensor]]) -> list[Tensor]:
    return [experts(x, gate_up, down, chosen, weights) for (gate_up, down), chosen in calls]
