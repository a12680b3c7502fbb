"""The memory of porcelet's own engine process on a CPU, byte by byte: what is kept, and the most there is at once.

    working = runtime + weights + cache + a step's buffers + rotary table + page tables + logits
    loading = runtime + weights so far + the tensor that is being read

The larger of the two is the peak. Memory is what the system counts as resident (VmHWM): that is what the kernel kills
for. Cache and buffers are taken page by page as they are used, so this is the peak of an engine whose cache is full and
whose steps are as large as they may be. tests/memory/test_peaks.py compares it with real processes.
"""

from __future__ import annotations

from dataclasses import replace

from porcelet.config import PAGE_SIZE, REPLAYED_TOKENS, EngineConfig, ModelConfig, parse_memory
from porcelet.memory.buffers import MOST_SAMPLED, partial_bytes, step_bytes
from porcelet.memory.process import ProcessMemory
from porcelet.memory.tensors import EXPERT, GROUP, PACKED, Inventory, Kept, counted, kept
from porcelet.weights.memory import available_memory

# VmHWM of a fresh engine process that has loaded a model of 1.7 MB and answered once, less that model's own parts: 230
# to 290 MB, torch 2.13.0+cpu on x86-64 (2026-11-23).
RUNTIME_BYTES = 252_000_000


def engine_memory(
    config: ModelConfig,
    engine: EngineConfig = EngineConfig(),
    *,
    stored: Inventory | None = None,
    native: bool = True,
    available: int | None = None,
) -> ProcessMemory:
    """What an engine takes whose cache is full and which runs as many sequences as it may.

    `stored` are the checkpoint's tensors (`read_inventory`), else they are counted in float32. `native` is whether the
    native bodies are there, which weights "auto" depend on. Shares in `engine` are of `available` bytes, by default
    what can be had now.

    Raises:
        InputError: an amount of memory in `engine` cannot be read.
    """
    inventory = stored or counted(config)
    weights = inventory.format_of(engine.weights, native=native)
    available = available_memory() if available is None else available
    loaded = kept(inventory, weights, on_disk=bool(engine.expert_memory))
    experts = _resident_experts(engine, loaded, available)
    packed = is_packed(inventory, weights)
    cached = cached_tokens(config, engine, inventory, available, native=native)
    tokens, context = max(REPLAYED_TOKENS, engine.max_batch_tokens), min(config.max_position_embeddings, cached)
    runners = 1 + _drafts(config, engine)
    steps = step_bytes(config, tokens, packed=packed)
    if runners > 1:
        steps += step_bytes(_one_layer(config), tokens, packed=packed)
    working = {
        "runtime": RUNTIME_BYTES,
        "weights": loaded.weights,
        "experts": experts,
        "cache": cached * token_bytes(config, engine, 2 if packed else 4),
        "step": steps,
        "attention": partial_bytes(config, engine.max_sequences, cached),
        "rotary": runners * 4 * context * config.rope_dim,
        "tables": runners * 8 * tokens * -(-context // PAGE_SIZE),
        "logits": runners * 4 * min(engine.max_sequences, MOST_SAMPLED) * config.vocab_size,
    }
    loading = {"runtime": RUNTIME_BYTES, "weights": loaded.weights, "reading": loaded.peak - loaded.weights}
    return ProcessMemory({name: part for name, part in working.items() if part}, loading)


def cached_tokens(
    config: ModelConfig, engine: EngineConfig, inventory: Inventory, available: int, *, native: bool = True
) -> int:
    """Tokens that the cache has room for, whole pages; a share is of the bytes that are left once all is loaded."""
    if not engine.cache_memory:
        return engine.cache_tokens // PAGE_SIZE * PAGE_SIZE
    weights = inventory.format_of(engine.weights, native=native)
    loaded = kept(inventory, weights, on_disk=bool(engine.expert_memory))
    total = parse_memory(engine.cache_memory)
    if total <= 1:
        total *= max(available - RUNTIME_BYTES - loaded.weights - _resident_experts(engine, loaded, available), 0)
    value_bytes = 2 if is_packed(inventory, weights) else 4
    return int(total // (PAGE_SIZE * token_bytes(config, engine, value_bytes))) * PAGE_SIZE


def token_bytes(config: ModelConfig, engine: EngineConfig, value_bytes: int) -> int:
    """Of one cached token. `value_bytes` are those of cache_dtype "auto"."""
    size = {"auto": value_bytes, "float32": 4, "float16": 2}[engine.cache_dtype]
    layers = config.num_hidden_layers
    return size * (config.cache_values_per_token() // layers) * (layers + _drafts(config, engine))


def is_packed(inventory: Inventory, weights: str) -> bool:
    """Whether all linear layers are packed, beside which a cache "auto" is in half precision."""
    if weights not in PACKED:
        return False
    widths = {
        tensor.shape[-1]
        for tensor in inventory.tensors
        if len(tensor.shape) > 1 and not EXPERT.fullmatch(tensor.name) and not tensor.name.endswith(".mlp.gate.weight")
    }
    return all(width % GROUP == 0 for width in widths)


def may_stay_on_disk(inventory: Inventory, weights: str) -> bool:
    """Whether the routed experts may: packed ones, of whole groups (weights/load.py)."""
    config = inventory.config
    aligned = config.hidden_size % GROUP == config.moe_intermediate_size % GROUP == 0
    return bool(config.n_routed_experts) and weights in PACKED and aligned


def _drafts(config: ModelConfig, engine: EngineConfig) -> int:
    """1 where the model's MTP layer guesses: it has a cache and a recorded step of its own."""
    return int(bool(config.num_nextn_predict_layers) and engine.speculation in ("auto", "mtp"))


def _one_layer(config: ModelConfig) -> ModelConfig:
    """The MTP layer as a model."""
    return replace(config, num_hidden_layers=1, first_k_dense_replace=0)


def _resident_experts(engine: EngineConfig, loaded: Kept, available: int) -> int:
    if not engine.expert_memory:
        return 0
    amount = parse_memory(engine.expert_memory, "expert_memory")
    return min(loaded.experts, int(amount * available) if amount <= 1 else int(amount))
