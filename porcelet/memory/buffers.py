"""The buffers of a recorded step, counted as kernels/record.py lends them.

A buffer goes back when the model lets go of it, and is lent again to what is of the same size. So a step takes, for
each size, as many buffers as are lent at once; a block leaves all of its own free for the next. What is counted here
follows the order of the model's calls (porcelet/models), a line a call.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from porcelet.config import PAGE_SIZE, ModelConfig
from porcelet.memory.tensors import GROUP

RECORD_BYTES = 84  # of 32 values rounded for a packed weight (kernels/cpu/linear.h)
MOST_SAMPLED = 256  # rows whose logits a recorded step has room for (engine/step.py)
SMALLEST_PART = 128  # cached tokens that one thread attends to at least (kernels/cpu/attention.cpp)


class _Arena:
    """Counts buffers; what is taken in a `block` comes back at its end."""

    def __init__(self, num_rows: int, packed: bool) -> None:
        self.num_rows, self.packed = num_rows, packed
        self.most = Counter[int]()
        self._lent = Counter[int]()
        self._taken: list[int] = []

    def take(self, width: int, count: int = 1) -> None:
        """`count` buffers of so many floats a row."""
        self.take_bytes(4 * width * self.num_rows, count)

    def take_bytes(self, num_bytes: int, count: int = 1) -> None:
        self._lent[num_bytes] += count
        self._taken += [num_bytes] * count
        self.most[num_bytes] = max(self.most[num_bytes], self._lent[num_bytes])

    def round(self, width: int, heads: int = 1) -> None:
        """What packed weights are multiplied with: `heads` rows of `width` values a token, rounded."""
        if self.packed:
            self.take_bytes(heads * width // GROUP * RECORD_BYTES * self.num_rows)

    @contextmanager
    def block(self) -> Iterator[None]:
        start = len(self._taken)
        yield
        for num_bytes in self._taken[start:]:
            self._lent[num_bytes] -= 1
        del self._taken[start:]

    @property
    def num_bytes(self) -> int:
        return sum(num_bytes * count for num_bytes, count in self.most.items())


def step_bytes(config: ModelConfig, num_tokens: int, *, packed: bool) -> int:
    """Bytes of a step of so many tokens, without logits and the partial results of attention, of which a step touches
    as much as it needs."""
    arena = _Arena(num_tokens, packed)
    arena.take(config.hidden_size)  # the embedding
    arena.take(config.rope_dim // 2, 2)  # cos and sin
    arena.take_bytes(4 * MOST_SAMPLED * config.hidden_size)  # the sampled rows
    kinds = {config.is_moe_layer(layer) for layer in range(config.num_hidden_layers)}
    for is_moe in sorted(kinds):
        with arena.block():
            arena.take(config.hidden_size)  # the norm
            arena.round(config.hidden_size)
            (_mla if config.is_mla else _gqa)(arena, config)
            arena.take(config.hidden_size)  # the output
        with arena.block():
            arena.take(config.hidden_size, 2)  # the sum, the norm
            arena.round(config.hidden_size)
            (_moe if is_moe else _mlp)(arena, config, config.intermediate_size)
            arena.take(config.hidden_size)
    return arena.num_bytes


def _gqa(arena: _Arena, config: ModelConfig) -> None:
    query, key = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    arena.take(query)
    arena.take(key, 2)
    with arena.block():
        arena.take(query)  # rotated
        arena.take(key)
    arena.take(query)  # what was attended to
    arena.round(query)


def _mla(arena: _Arena, config: ModelConfig) -> None:
    H, C, R = config.num_attention_heads, config.kv_lora_rank, config.qk_rope_head_dim
    N, V = config.qk_nope_head_dim, config.v_head_dim
    if config.q_lora_rank is not None:
        with arena.block():
            arena.take(config.q_lora_rank, 2)  # and its norm
            arena.round(config.q_lora_rank)
    arena.take(H * (N + R))
    arena.take(C + R)
    arena.take(C)
    arena.take(H * R)
    arena.take(R)
    with arena.block():
        arena.round(N, H)
        arena.take(H * C)
        arena.take(H * (C + R))
    with arena.block():
        arena.take(H * (C + R))
        arena.take(H * C)  # what was attended to
        arena.round(C, H)
        arena.take(H * V)
    arena.take(H * V)
    arena.round(H * V)


def _mlp(arena: _Arena, config: ModelConfig, width: int) -> None:
    arena.take(width, 3)
    arena.round(width)


def _moe(arena: _Arena, config: ModelConfig, width: int) -> None:
    E, A, F = config.n_routed_experts, config.num_experts_per_tok, config.moe_intermediate_size
    arena.take(E)
    arena.take(2 * A, 2)  # indices are 8 bytes
    with arena.block():
        arena.take(2 * E + config.n_group)
    arena.take(config.hidden_size)
    with arena.block():
        arena.take(A * F)
        arena.take(2 * A)
        if arena.packed:
            arena.round(F, A)
    if config.n_shared_experts:
        _mlp(arena, config, config.n_shared_experts * F)
        arena.take(config.hidden_size)


def partial_bytes(config: ModelConfig, num_sequences: int, cache_tokens: int) -> int:
    """What attention to parts of long sequences leaves to be merged: a sum and two numbers a head and part."""
    H = config.num_attention_heads
    group, keys, values = H // config.num_key_value_heads, config.head_dim, config.head_dim
    if config.is_mla:
        group, keys, values = H, config.kv_lora_rank + config.qk_rope_head_dim, config.kv_lora_rank
    part = max(SMALLEST_PART, 8 * group * (values + 2) // keys)
    part = -(-part // PAGE_SIZE) * PAGE_SIZE
    return 4 * H * (values + 2) * (cache_tokens // part + num_sequences)
