"""Inputs for every op: odd shapes, empty ones, ragged ones. The parity test runs every body on them; tolerances by
dtype."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from porcelet.config import PAGE_SIZE
from porcelet.kernels.attention import Segments
from porcelet.kernels.experts import PackedExperts
from porcelet.kernels.linear import (
    FP8_BLOCK,
    GROUP,
    KINDS,
    FP8Weight,
    Int4Weight,
    Int8Weight,
    PackedHeads,
    PackedWeight,
    SymmetricInt4Weight,
    pack,
)

TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-12, torch.int64: 0.0}
# Packed experts, and absorbed MLA, round what lies between their two products: last bits decide which way.
EXPERTS_TOLERANCE = 5e-3
Case = tuple[Any, ...]


def packed_weight(rows: int, columns: int, kind: type[PackedWeight] = Int8Weight) -> PackedWeight:
    q = torch.randint(0, 2**kind.bits, (rows, columns), dtype=torch.uint8)
    scale = (torch.rand(rows, columns // GROUP) * 1e-2).half()
    return pack(q, scale, None if kind.symmetric else -(2 ** (kind.bits - 1)) * scale, kind.bits)


def packed_experts(count: int, parts: int, rows: int, columns: int, kind: type[PackedWeight]) -> PackedExperts:
    packed = torch.stack([packed_weight(rows, columns, kind).packed for _ in range(count * parts)])
    return PackedExperts(packed.unflatten(0, (count, parts)), (count, parts * rows, columns))


def activations(tokens: int, columns: int) -> Tensor:
    """Some with outliers, whose groups are rounded more finely."""
    return torch.randn(tokens, columns) * (1 + 30 * (torch.rand(tokens, columns) > 0.98))


def fp8_weight(*shape: int) -> FP8Weight:
    blocks = [-(-size // FP8_BLOCK) for size in shape[-2:]]
    return FP8Weight(torch.randn(shape).to(torch.float8_e4m3fn), torch.rand(*shape[:-2], *blocks))


def offsets(*lengths: int) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def linear() -> Iterator[Case]:
    for tokens, rows, columns in [(0, 8, 32), (1, 37, 96), (5, 16, 64), (17, 100, 160)]:
        yield torch.randn(tokens, columns), torch.randn(rows, columns)
        for kind in KINDS:
            yield activations(tokens, columns), packed_weight(rows, columns, kind)
        yield torch.randn(tokens, columns), fp8_weight(rows, columns)
    for tokens, rows, columns in [(0, 3, 5), (1, 1, 1), (2, 7, 33), (7, 5, 15), (65, 6, 17)]:
        yield torch.randn(tokens, columns + 3)[:, :columns], torch.randn(rows, columns + 2)[:, 1:-1]
        yield torch.randn(tokens, columns), torch.randn(columns, rows).T


def heads_linear() -> Iterator[Case]:
    for tokens in (0, 1, 5):
        yield torch.randn(tokens, 3, 8), torch.randn(3, 6, 8)
        yield torch.randn(tokens, 3, 8), torch.randn(3, 8, 6).transpose(1, 2)
        for rows, columns, kind in [(16, 32, Int8Weight), (48, 96, Int4Weight), (48, 96, SymmetricInt4Weight)]:
            packed = torch.stack([packed_weight(rows, columns, kind).packed for _ in range(3)])
            x = activations(tokens * 3, columns + 4).unflatten(0, (tokens, 3))[..., :columns]
            yield x, PackedHeads(packed, (3, rows, columns))


def take_rows() -> Iterator[Case]:
    yield torch.randn(5, 7), torch.tensor([4, 0, 4])


def rotary_angles() -> Iterator[Case]:
    for factor in (1.0, 0.7):
        yield torch.tensor([0, 1, 500]), torch.rand(8), factor


def add() -> Iterator[Case]:
    yield torch.randn(3, 7), torch.randn(3, 7)
    yield torch.randn(3, 7), torch.randn(7)


def concat() -> Iterator[Case]:
    yield torch.randn(3, 7), torch.randn(3, 2)
    yield torch.randn(3, 4, 7), torch.randn(3, 1, 2).expand(3, 4, 2)


def embedding() -> Iterator[Case]:
    for weight in (torch.randn(37, 64), *(packed_weight(37, 64, kind) for kind in KINDS)):
        yield torch.tensor([0, 36, 5, 5]), weight
        yield torch.zeros(0, dtype=torch.int64), weight


def rms_norm() -> Iterator[Case]:
    for shape in [(0, 8), (1, 1), (5, 17), (2, 3, 64)]:
        yield torch.randn(shape), torch.randn(shape[-1]), 1e-6


def add_rms_norm() -> Iterator[Case]:
    for shape in [(0, 8), (1, 1), (5, 17), (3, 300)]:
        yield torch.randn(shape), torch.randn(shape), torch.randn(shape[-1]), 1e-6


def rope() -> Iterator[Case]:
    for tokens, interleaved in [(0, False), (1, True), (7, False), (7, True)]:
        yield torch.randn(tokens, 3, 16), torch.rand(tokens, 8), torch.rand(tokens, 8), interleaved


def silu_mul() -> Iterator[Case]:
    yield torch.randn(0, 5), torch.randn(0, 5)
    yield torch.randn(3, 7), torch.randn(3, 7)


def attention_packed() -> Iterator[Case]:
    """Ragged and equal lengths, grouped heads, values narrower than keys, no or empty sequences, shared prefixes."""
    for lengths, heads, kv_heads, width, value in [
        ((5,), 4, 4, 16, 16),
        ((3, 4, 3, 1), 4, 2, 16, 16),
        ((1, 40), 2, 1, 8, 8),
        ((6, 6, 6), 3, 3, 20, 12),
        ((4, 0, 5), 2, 2, 8, 8),
        ((5, 4, 0), 2, 2, 8, 8),
        ((), 2, 2, 8, 8),
    ]:
        total = sum(lengths)
        q, k, v = (torch.randn(total, h, w) for h, w in ((heads, width), (kv_heads, width), (kv_heads, value)))
        yield q, k, v, Segments.of(*lengths), width**-0.5
    yield *(torch.randn(14, 2, 8) for _ in range(3)), Segments((0, 4, 6, 6, 9, 10, 14), (-1, 0, 0, -1, 0, 3)), 0.3


def attention_paged() -> Iterator[Case]:
    """Decode, chunks, whole prompts and a mix; pages in any order; what lies beyond a length is NaN."""
    for new, lengths, heads, kv_heads, width, value in [
        ((1,), (1,), 4, 2, 16, 16),
        ((1, 1, 1), (5, 64, 130), 4, 2, 16, 16),
        ((1, 1), (65, 7), 4, 1, 24, 16),
        ((7, 1, 70), (7, 100, 130), 4, 2, 16, 16),
        ((), (), 2, 2, 8, 8),
    ]:
        pages = [-(-length // PAGE_SIZE) for length in lengths]
        order = torch.randperm(sum(pages)).split(pages)
        tables = torch.zeros(len(lengths), max(pages, default=1), dtype=torch.int64)
        k_cache, v_cache = (torch.full((max(1, sum(pages)), PAGE_SIZE, kv_heads, w), torch.nan) for w in (width, value))
        for row, (own, length) in enumerate(zip(order, lengths, strict=True)):
            tables[row, : len(own)] = own
            slots = (own[:, None] * PAGE_SIZE + torch.arange(PAGE_SIZE)).flatten()[:length]
            k_cache.flatten(0, 1)[slots] = torch.randn(length, kv_heads, width)
            v_cache.flatten(0, 1)[slots] = torch.randn(length, kv_heads, value)
        q = torch.randn(sum(new), heads, width)
        yield q, k_cache, v_cache, offsets(*new), torch.tensor(lengths, dtype=torch.int64), tables, width**-0.5


def attention_latent() -> Iterator[Case]:
    """Both forms and mixes of them, lengths around pages; what lies beyond a length is NaN."""
    for new, lengths, absorbed, dtype in [
        ((1,), (1,), 0, torch.float32),
        ((64, 65), (64, 130), 0, torch.float32),
        ((1, 9, 70, 1), (5, 64, 70, 129), 2, torch.float16),
        ((3, 2), (63, 67), 2, torch.float32),
        ((), (), 0, torch.float32),
    ]:
        for sizes, is_packed in [((3, 5, 3, 7, 6), False), ((2, 32, 8, 64, 16), True), ((2, 64, 4, 32, 20), True)]:
            yield latent_case(new, lengths, absorbed, dtype, sizes, is_packed)


def latent_case(
    new: tuple[int, ...],
    lengths: tuple[int, ...],
    absorbed: int,
    dtype: torch.dtype,
    sizes: tuple[int, int, int, int, int],
    is_packed: bool,
) -> Case:
    """Arguments of `attention_latent` for H, N, R, C and value; the first `absorbed` sequences attend absorbed. H
    chooses the kind of packed weights."""
    H, N, R, C, V = sizes
    if is_packed:
        parts = (C, N, KINDS[H % 4]), (V, C, KINDS[(H + 1) % 4])
        keys, values = (torch.stack([packed_weight(*part).packed for _ in range(H)]) for part in parts)
        weights: tuple[Any, Any] = PackedHeads(keys, (H, C, N)), PackedHeads(values, (H, V, C))
    else:
        w_uk, w_uv = torch.randn(H, N + V, C).split((N, V), dim=1)
        weights = w_uk.transpose(1, 2), w_uv
    pages = [-(-length // PAGE_SIZE) for length in lengths]
    tables = torch.zeros(len(lengths), max(pages, default=1), dtype=torch.int64)
    cache = torch.full((max(1, sum(pages)), PAGE_SIZE, 1, C + R), torch.nan, dtype=dtype)
    for row, own in enumerate(torch.randperm(sum(pages)).split(pages)):
        tables[row, : len(own)] = own
        slots = (own[:, None] * PAGE_SIZE + torch.arange(PAGE_SIZE)).flatten()[: lengths[row]]
        cache.flatten(0, 1)[slots] = torch.randn(lengths[row], 1, C + R).to(dtype)
    q_nope, q_rope = torch.randn(sum(new), H, N + R).split((N, R), dim=-1)
    past = offsets(*new), torch.tensor(lengths, dtype=torch.int64), tables, torch.tensor([sum(new[:absorbed])])
    return q_nope, *weights, q_rope, cache, *past, (N + R) ** -0.5


def attention_suffix() -> Iterator[Case]:
    for new, total, heads, kv_heads in [(1, 1, 2, 2), (1, 9, 4, 2), (9, 9, 4, 1), (5, 70, 3, 3), (0, 5, 4, 2)]:
        yield torch.randn(new, heads, 8), torch.randn(total, kv_heads, 8), torch.randn(total, kv_heads, 6), 8**-0.5


def cache_read() -> Iterator[Case]:
    for length in (1, PAGE_SIZE, PAGE_SIZE + 3):
        yield torch.randn(4, PAGE_SIZE, 2, 3), torch.tensor([3, 0, 2]), length


def cache_write() -> Iterator[Case]:
    yield torch.zeros(2, PAGE_SIZE, 3, 4), torch.randn(5, 3, 4), torch.tensor([0, 127, 64, 3, 63])


def write_latents() -> Iterator[Case]:
    for tokens, interleaved in [(0, False), (3, True), (5, False)]:
        caches, angles = torch.zeros(2, PAGE_SIZE, 1, 18), (torch.rand(tokens, 3), torch.rand(tokens, 3))
        wide, slots = torch.randn(tokens, 20), torch.randperm(2 * PAGE_SIZE)[:tokens]
        yield caches, wide[:, :12], wide[:, 12:18], *angles, interleaved, slots


def write_keys_values() -> Iterator[Case]:
    for tokens in (0, 5):
        caches = (torch.zeros(2, 3, PAGE_SIZE, 6).transpose(1, 2) for _ in range(2))
        values, angles = (torch.randn(tokens, 3, 6) for _ in range(2)), (torch.rand(tokens, 3) for _ in range(2))
        yield *caches, *values, *angles, torch.randperm(2 * PAGE_SIZE)[:tokens]


def route() -> Iterator[Case]:
    for tokens, groups, kept, chosen in [(5, 1, 1, 2), (9, 4, 2, 3), (0, 2, 1, 2), (3, 8, 3, 6), (2, 1, 1, 16)]:
        yield torch.randn(tokens, 16), torch.randn(16) * 0.1, groups, kept, chosen, True, 2.5


def route_softmax() -> Iterator[Case]:
    for tokens, groups, kept, chosen in [(5, 1, 1, 2), (9, 4, 2, 3), (0, 2, 1, 2), (3, 16, 3, 3), (2, 1, 1, 16)]:
        yield torch.randn(tokens, 16), groups, kept, chosen, 16.0


def experts() -> Iterator[Case]:
    for tokens in (0, 1, 9):
        indices, weights = torch.rand(tokens, 8).topk(2).indices, torch.rand(tokens, 2)
        yield torch.randn(tokens, 12), torch.randn(8, 20, 12), torch.randn(8, 12, 10), indices, weights
        gate_up, down = fp8_weight(8, 2, 10, 12), fp8_weight(8, 1, 12, 10)
        yield torch.randn(tokens, 12), gate_up, down, indices, weights
    sizes = [(0, 32, 32), (1, 96, 32), (9, 64, 96), (70, 288, 224)]
    for (tokens, width, hidden), kind in zip(sizes, KINDS, strict=True):
        indices, weights = torch.randint(0, 6, (tokens, 3)), torch.randn(tokens, 3)
        stacks = packed_experts(6, 2, hidden, width, kind), packed_experts(6, 1, width, hidden, Int8Weight)
        yield activations(tokens, width), *stacks, indices, weights
    for tokens, width, hidden in [(3, 67, 5), (65, 12, 10), (20, 33, 130)]:
        indices, weights = torch.randint(0, 5, (tokens, 3)), torch.randn(tokens, 3)
        stacks = torch.randn(5, 2 * hidden, width), torch.randn(5, width, hidden)
        yield torch.randn(tokens, width), *stacks, indices, weights


def sample() -> Iterator[Case]:
    """Draws that share rows, in any order; greedy ones among the others; cuts of every kind, alone and together."""
    off = torch.zeros(3, dtype=torch.int64), torch.ones(3), torch.zeros(3)
    for temperature in (torch.zeros(3), torch.ones(3)):
        yield torch.randn(3, 50), torch.arange(3), temperature, *off, torch.rand(3)
    for vocabulary in (1, 64, 65, 1000, 20_001):
        temperature, top_p = torch.tensor([0.0, 0.7, 1.0, 2.0, 1e-30, 1.5]), torch.tensor([1, 0.5, 0.9, 1, 0.9, 0.999])
        rows, top_k = torch.tensor([1, 0, 2, 2, 1, 0]), torch.tensor([0, 0, 500, 1, 0, 10**6])
        min_p, uniform = torch.tensor([0, 0.01, 0, 0, 0, 1e-3]), torch.rand(6, dtype=torch.float64)
        yield torch.randn(3, vocabulary) * 3, rows, temperature, top_k, top_p, min_p, uniform


def allow() -> Iterator[Case]:
    for rows, vocabulary in [(0, 9), (1, 8), (3, 61)]:
        yield torch.randn(rows, vocabulary), torch.randint(0, 256, (rows, -(-vocabulary // 8)), dtype=torch.uint8)


def penalize() -> Iterator[Case]:
    for rows, tokens in [(2, 0), (3, 40)]:
        which, history, drawn = (torch.randint(0, size, (tokens,)) for size in (rows, 50, 2))
        repetition, presence, frequency = torch.rand(rows) + 0.5, torch.randn(rows), torch.randn(rows)
        yield torch.randn(rows, 50), which, history, drawn, repetition, presence, frequency


def token_logprobs() -> Iterator[Case]:
    for tokens in (0, 3, 4500):
        yield torch.randn(tokens, 8), torch.randn(11, 8), torch.randint(0, 11, (tokens,))


CASES = {
    f.__name__: f
    for f in (
        linear,
        heads_linear,
        take_rows,
        rotary_angles,
        add,
        concat,
        embedding,
        rms_norm,
        add_rms_norm,
        rope,
        silu_mul,
        attention_packed,
        attention_paged,
        attention_latent,
        attention_suffix,
        cache_read,
        cache_write,
        write_latents,
        write_keys_values,
        route,
        route_softmax,
        experts,
        sample,
        allow,
        penalize,
        token_logprobs,
    )
}
