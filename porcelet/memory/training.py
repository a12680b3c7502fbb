"""The memory of porcelet's own trainer on a CPU: parameters, optimizer, what a pass keeps, gradients, the rest.

What autograd keeps of a block is counted tensor by tensor, in the order of porcelet/models and
porcelet/kernels/cpu/gradients*.py. The heap adds to that (`HOLES`), and decides which gradients take new memory: most
find a place that activations have left, a table's never do, and those of experts only where logits have been. What it
comes to was compared with real runs (tests/memory/test_training_peaks.py): within 4 %.

Left out: what resuming reads, passes in bfloat16 and emulated FP8, which are counted as float32, GPUs.
"""

from __future__ import annotations

import math
from collections import Counter
from importlib.util import find_spec
from math import prod

from porcelet.config import DRAWING, PAGE_SIZE, EngineConfig, LoraConfig, ModelConfig, TrainConfig
from porcelet.memory.engine import engine_memory
from porcelet.memory.process import ProcessMemory
from porcelet.memory.tensors import EIGHT_BITS, EXPERT, Inventory, Stored, counted, kept, stack_of, tensors_of

# VmHWM of a fresh run before its first step, less its model: torch 2.13.0+cpu on x86-64 (2026-11-23).
RUNTIME_BYTES = 340_000_000
TRITON_BYTES = 76_000_000  # more where Triton is installed: torch's optimizers import it (2026-11-23)
# The C library's heap does not lend a freed block to a request of the same size, as torch's are aligned: beside what a
# pass keeps, what it let go of in between leaves holes of a quarter (2026-11-23, glibc 2.36).
HOLES = 0.25
LARGE_BYTES = 1 << 23  # a gradient from which on it finds no place among activations
CHUNK_BYTES, SAVED_BYTES = 1 << 24, 1 << 28  # of logits (kernels/cpu/gradients_loss.py)


def training_memory(
    train: TrainConfig, model: Inventory, teacher: Inventory | None = None, *, rows: int | None = None
) -> ProcessMemory:
    """What a run takes. `model` is what it starts from, or `counted` for a new one; `rows` go through it at once, else
    as many as the recipe says for certain."""
    config, num_rows = model.config, pass_rows(train) if rows is None else rows
    adapted, adapters = _adapted(config, train.lora)
    parameters = 4 * config.num_parameters(mtp=True)
    runtime = RUNTIME_BYTES + (TRITON_BYTES if find_spec("triton") else 0)
    parts = {
        "runtime": runtime,
        "parameters": parameters,
        "merged": 4 * adapted,  # a second copy of each adapted weight
        "adapters": 4 * adapters,
        "teacher": kept(teacher, "float32").weights if teacher else 0,
        **_step_parts(config, train, num_rows),
        **_sampler_parts(config, train),
    }
    loaded = kept(model, "float32")
    loading = {"runtime": runtime, "parameters": parameters, "reading": loaded.peak - loaded.weights}
    return ProcessMemory({name: part for name, part in parts.items() if part}, loading)


def pass_rows(train: TrainConfig) -> int:
    """Rows that go through the model at once, where the recipe decides it; 0 where texts' lengths do."""
    decided = train.data.corpus or (train.data.conversations and train.data.step_of == "tokens")
    if not decided:
        return train.tokens_per_pass
    return min(train.data.tokens_per_step, train.tokens_per_pass or train.data.tokens_per_step)


# ---- a step ---------------------------------------------------------------------------------------------------------


def _step_parts(config: ModelConfig, train: TrainConfig, rows: int) -> dict[str, int]:
    """What a step of the optimizer adds to the parameters."""
    if train.method == "sample":
        return {}
    learnt = _learnt(config, train.lora)
    predictions = 1 + _mtp_layers(config, train)
    layers = config.num_hidden_layers + predictions - 1
    values = sum(_block_values(config, layer) for layer in range(layers)) + 3 * predictions * config.hidden_size
    activations, logits = 4 * rows * values, predictions * _saved_logits(config, train, rows)
    return {
        "optimizer": sum(_state_bytes(tensor, train) for tensor in learnt),
        "activations": activations,
        "logits": logits,
        "holes": round(HOLES * (activations + logits)),
        "gradients": _gradient_bytes(config, train, learnt, activations, logits),
        "muon": _muon_bytes(learnt, train),
    }


def _gradient_bytes(
    config: ModelConfig, train: TrainConfig, learnt: list[Stored], activations: int, logits: int
) -> int:
    """What gradients take beside the places that a pass leaves. A tied table's comes twice, and so do those of table
    and head that the MTP layer uses too. In a second pass all come again before they are added to those there."""
    sizes = _parameter_bytes(learnt)
    total = sum(sizes.values())
    table = 0 if train.lora.rank else 4 * config.vocab_size * config.hidden_size
    experts = sum(size for name, size in sizes.items() if ".mlp.experts." in name and size >= LARGE_BYTES)
    tables = sum(size for name, size in sizes.items() if name in EIGHT_BITS and size >= LARGE_BYTES)
    small = total - experts - tables
    tables += table * config.tie_word_embeddings
    if 0 < train.tokens_per_pass < (train.data.tokens_per_step if train.data.corpus else math.inf):
        return 2 * total + table * config.tie_word_embeddings
    return tables + max(experts - logits, 0) + max(2 * small - activations, 0)


def _muon_bytes(learnt: list[Stored], train: TrainConfig) -> int:
    """Direction, momentum and what the iteration makes of one parameter."""
    if train.optimizer.name != "muon":
        return 0
    return 6 * max(_parameter_bytes([tensor for tensor in learnt if _is_muons(tensor)]).values(), default=0)


def _parameter_bytes(tensors: list[Stored]) -> Counter[str]:
    """Of each parameter; a layer's experts are one."""
    sizes = Counter[str]()
    for tensor in tensors:
        match = EXPERT.fullmatch(tensor.name)
        sizes[stack_of(match) if match else tensor.name] += tensor.num_bytes
    return sizes


def _mtp_layers(config: ModelConfig, train: TrainConfig) -> int:
    """Whether the MTP layer takes part: 0 or 1."""
    return int(bool(config.num_nextn_predict_layers and train.mtp_weight and train.method in ("pretrain", "sft")))


def _block_values(config: ModelConfig, layer: int) -> int:
    """Floats a row that a block keeps for its backward pass."""
    D, H = config.hidden_size, config.num_attention_heads
    is_mtp = layer == config.num_hidden_layers
    values = 4 * D + H + (5 * D if is_mtp else 0)  # inputs and outputs of the norms, a logarithm a head
    if config.is_mla:
        C, R, N, V = config.kv_lora_rank, config.qk_rope_head_dim, config.qk_nope_head_dim, config.v_head_dim
        values += 2 * (config.q_lora_rank or 0) + 2 * C + R + H * (2 * (N + R) + (N + V) + V)
    else:
        query, key = H * config.head_dim, config.num_key_value_heads * config.head_dim
        values += 2 * query + 2 * key + (query + key if config.has_qk_norm else 0)
    if not config.is_moe_layer(layer):
        return values + 3 * config.intermediate_size
    A, F = config.num_experts_per_tok, config.moe_intermediate_size
    values += config.n_routed_experts + 10 * A + 2 * A * F  # logits, what sorts the assignments, gate and up
    return values + 3 * config.n_shared_experts * F


def _saved_logits(config: ModelConfig, train: TrainConfig, rows: int) -> int:
    """Logits that wait for the backward pass; of a frozen head the gradient of its input does."""
    if train.lora.rank:
        return 4 * rows * config.hidden_size
    num_chunk = max(1, CHUNK_BYTES // (4 * config.vocab_size))
    saved = SAVED_BYTES // (4 * config.vocab_size * num_chunk) * num_chunk
    return 4 * config.vocab_size * min(rows, saved)


# ---- what learns ----------------------------------------------------------------------------------------------------


def _learnt(config: ModelConfig, lora: LoraConfig) -> list[Stored]:
    """What asks for a gradient, as tensors."""
    if lora.rank:
        return [
            Stored(name, (lora.rank, sum(shape)), "F32", 4 * lora.rank * sum(shape))
            for name, shape in _targets(config, lora)
        ]
    return [tensor for tensor in counted(config).tensors if not tensor.name.endswith("e_score_correction_bias")]


def _adapted(config: ModelConfig, lora: LoraConfig) -> tuple[int, int]:
    """Values of all adapted weights and of the adapters."""
    shapes = [shape for _, shape in _targets(config, lora)] if lora.rank else []
    return sum(map(prod, shapes)), lora.rank * sum(map(sum, shapes))


def _targets(config: ModelConfig, lora: LoraConfig) -> list[tuple[str, tuple[int, ...]]]:
    """The layers with an adapter; "all-linear" leaves out DeepSeek's MLPs."""
    layers = [
        (name, shape)
        for name, shape in tensors_of(config)
        if name.startswith("model.layers.") and name.endswith("_proj.weight") and not EXPERT.fullmatch(name)
    ]
    if lora.targets == ("all-linear",):
        return [layer for layer in layers if not (config.is_mla and ".self_attn." not in layer[0])]
    return [layer for layer in layers if layer[0].removesuffix(".weight").endswith(lora.targets)]


def _state_bytes(tensor: Stored, train: TrainConfig) -> int:
    """AdamW keeps two moments, Muon one of the matrices of blocks."""
    return tensor.num_bytes * (1 if train.optimizer.name == "muon" and _is_muons(tensor) else 2)


def _is_muons(tensor: Stored) -> bool:
    is_block = tensor.name.startswith("model.layers.") and len(tensor.shape) > 1
    return is_block and not tensor.name.endswith(".mlp.gate.weight")


def _sampler_parts(config: ModelConfig, train: TrainConfig) -> dict[str, int]:
    """What reinforcement learning has beside the trainer: the engine's buffers and cache, of which it uses a page a
    sequence and those of the answers, and copies of the model. Prompts of more than a page are not counted."""
    if train.method not in DRAWING:
        return {}
    own, most = train.policy.sampler_weights, EngineConfig()
    pages = min(train.samples_per_step, most.max_sequences) * (1 + -(-train.policy.max_new_tokens // PAGE_SIZE))
    used = min(pages * PAGE_SIZE, most.cache_tokens)
    engine = engine_memory(config, EngineConfig(weights=own, speculation="off", cache_tokens=used))
    parts = {f"engine: {name}": part for name, part in engine.working.items() if name not in ("runtime", "weights")}
    if own == "int8":
        parts["engine: copy"] = 2 * engine.working["weights"]  # made anew each step; the heap rarely lends it its place
    if train.policy.kl_weight and train.method == "grpo":
        parts["reference"] = 4 * config.num_parameters(mtp=True)
    return parts
