"""A checkpoint's tensors before any is read: what each takes in memory, and while it is being loaded.

From the headers of the files, or counted from a config where there are none. The rules are those of weights/load.py:
which tensors a format packs, into how many bits, and what stays in float32.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from pathlib import Path

from porcelet.config import ModelConfig
from porcelet.errors import ModelError
from porcelet.weights import gguf
from porcelet.weights.header import gguf_config, read_config
from porcelet.weights.shards import read_header

GROUP, TILE, FP8_BLOCK = 32, 16, 128  # of packed weights and of FP8 ones, as kernels/linear.py lays them out
PIECE = 1 << 20  # values that weights/quantize.py works on at a time
PACKED = ("int8", "int4", "stored")
FOUR_BITS, SYMMETRIC = ("Q4_0", "Q4_1", "Q4_K"), ("Q4_0", "Q5_0", "Q8_0")
PLAIN = ("F32", "F16", "BF16", "F64")
EIGHT_BITS = ("model.embed_tokens.weight", "lm_head.weight")  # what int4 does not go below
EXPERT = re.compile(r"(.*\.mlp\.experts)\.\d+\.(gate|up|down)_proj\.weight")
SCALE = "_scale_inv"


@dataclass(frozen=True)
class Stored:
    """One tensor of a checkpoint: its name there, its shape and type, and its bytes in the file."""

    name: str
    shape: tuple[int, ...]
    type: str
    num_bytes: int


@dataclass(frozen=True, eq=False)
class Inventory:
    """A model's config and its tensors in the order in which they are read. `is_file` is a GGUF file, which is
    mapped."""

    config: ModelConfig
    tensors: tuple[Stored, ...]
    is_file: bool = False

    def format_of(self, weights: str, *, native: bool = True) -> str:
        """What an engine's setting `weights` means for this model; `native`: the native bodies are there."""
        if weights != "auto":
            return weights
        if all(tensor.type in PLAIN for tensor in self.tensors):
            return "float32"
        if not self.is_file:
            return "fp8"
        return "stored" if native else "float32"


@dataclass(frozen=True)
class Kept:
    """What loading takes: bytes of all weights, of the routed experts among them, and the most there are at once."""

    weights: int
    experts: int
    peak: int


# ---- which tensors there are ----------------------------------------------------------------------------------------


def read_inventory(path: Path) -> Inventory:
    """Of a GGUF file or of a folder of safetensors; only headers are read.

    Raises:
        ModelError: a file is missing, damaged or not supported.
    """
    if path.is_file():
        file = gguf.read(path)
        architecture = file.metadata["general.architecture"]
        rows = [
            one
            for tensor in file.tensors.values()
            for one in _gguf_rows(tensor, gguf.hf_name(tensor.name, architecture, str(path)))
        ]
        return _without_unread(Inventory(gguf_config(file), tuple(rows), is_file=True))
    config, shards = read_config(path), sorted(path.glob("*.safetensors"))
    if not shards:
        raise ModelError(f"{path} holds no safetensors; give a GGUF file or a folder with the model's weights")
    entries = [entry for shard in shards for entry in read_header(shard).values()]
    tensors = tuple(Stored(entry.name, entry.shape, entry.dtype, entry.num_bytes) for entry in entries)
    return _without_unread(Inventory(config, tensors))


def counted(config: ModelConfig) -> Inventory:
    """A model that is built and not read: everything in float32."""
    tensors = tuple(Stored(name, shape, "F32", 4 * prod(shape)) for name, shape in tensors_of(config))
    return Inventory(config, tensors)


def tensors_of(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a checkpoint's tensors, the MTP layer's own ones included."""
    D, V, L = config.hidden_size, config.vocab_size, config.num_hidden_layers
    yield "model.embed_tokens.weight", (V, D)
    for layer in range(L + config.num_nextn_predict_layers):
        prefix = f"model.layers.{layer}."
        for name, shape in _layer_tensors(config, config.is_moe_layer(layer)):
            yield prefix + name, shape
        if layer >= L:
            yield prefix + "eh_proj.weight", (D, 2 * D)
            yield from ((f"{prefix}{name}.weight", (D,)) for name in ("enorm", "hnorm", "shared_head.norm"))
    yield "model.norm.weight", (D,)
    if not config.tie_word_embeddings:
        yield "lm_head.weight", (V, D)


def _layer_tensors(config: ModelConfig, is_moe: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    D, F = config.hidden_size, config.moe_intermediate_size
    for name, shape in (_mla_tensors if config.is_mla else _gqa_tensors)(config):
        yield f"self_attn.{name}", shape
    if is_moe:
        yield "mlp.gate.weight", (config.n_routed_experts, D)
        if config.has_gate_bias:
            yield "mlp.gate.e_score_correction_bias", (config.n_routed_experts,)
        for expert in range(config.n_routed_experts):
            yield from _mlp_tensors(f"mlp.experts.{expert}.", D, F)
        if config.n_shared_experts:
            yield from _mlp_tensors("mlp.shared_experts.", D, config.n_shared_experts * F)
    else:
        yield from _mlp_tensors("mlp.", D, config.intermediate_size)
    yield "input_layernorm.weight", (D,)
    yield "post_attention_layernorm.weight", (D,)


def _mlp_tensors(prefix: str, width: int, hidden: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield prefix + "gate_proj.weight", (hidden, width)
    yield prefix + "up_proj.weight", (hidden, width)
    yield prefix + "down_proj.weight", (width, hidden)


def _gqa_tensors(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    D, head = config.hidden_size, config.head_dim
    query, key = config.num_attention_heads * head, config.num_key_value_heads * head
    for name, rows in (("q", query), ("k", key), ("v", key)):
        yield f"{name}_proj.weight", (rows, D)
        if config.has_qkv_bias:
            yield f"{name}_proj.bias", (rows,)
    yield "o_proj.weight", (D, query)
    if config.attention_bias:
        yield "o_proj.bias", (D,)
    if config.has_qk_norm:
        yield "q_norm.weight", (head,)
        yield "k_norm.weight", (head,)


def _mla_tensors(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    D, H, C, R = config.hidden_size, config.num_attention_heads, config.kv_lora_rank, config.qk_rope_head_dim
    query, rank = H * (config.qk_nope_head_dim + R), config.q_lora_rank
    if rank is None:
        yield "q_proj.weight", (query, D)
    else:
        yield "q_a_proj.weight", (rank, D)
        yield "q_a_layernorm.weight", (rank,)
        yield "q_b_proj.weight", (query, rank)
    yield "kv_a_proj_with_mqa.weight", (C + R, D)
    yield "kv_a_layernorm.weight", (C,)
    yield "kv_b_proj.weight", (H * (config.qk_nope_head_dim + config.v_head_dim), C)
    yield "o_proj.weight", (D, H * config.v_head_dim)


def _gguf_rows(tensor: gguf.GGUFTensor, name: str) -> Iterator[Stored]:
    """A tensor of a GGUF file; of stacked experts one each."""
    if ".mlp.experts." not in name:
        yield Stored(name, tensor.shape, tensor.type.name, len(tensor.data))
        return
    for expert in range(tensor.shape[0]):
        one, num_bytes = name.replace(".experts.", f".experts.{expert}."), len(tensor.data) // tensor.shape[0]
        yield Stored(one, tensor.shape[1:], tensor.type.name, num_bytes)


def _without_unread(inventory: Inventory) -> Inventory:
    """Without what `load` leaves out: the MTP layer's copies of embedding and head, a tied head; and without an MTP
    layer that the config names and no file holds."""
    config = inventory.config
    last = f"model.layers.{config.num_hidden_layers}."
    unread = [last + "embed_tokens.weight", last + "shared_head.head.weight"]
    unread += ["lm_head.weight"] if config.tie_word_embeddings else []
    tensors = tuple(tensor for tensor in inventory.tensors if tensor.name not in unread)
    if not any(tensor.name.startswith(last) for tensor in tensors):
        config = replace(config, num_nextn_predict_layers=0)
    return Inventory(config, tensors, inventory.is_file)


# ---- what of them is kept -------------------------------------------------------------------------------------------


@lru_cache(maxsize=16)  # who looks for settings that fit asks again and again
def kept(inventory: Inventory, weights: str, on_disk: bool = False) -> Kept:
    """What loading in a format takes; `weights` is float32, int8, int4, fp8 or stored. `on_disk`: the routed experts
    are written to a file, tensor by tensor, and not kept."""
    total = experts = peak = 0
    kinds = _stack_kinds(inventory.tensors)
    for tensor in inventory.tensors:
        own = _kept_bytes(inventory.config, tensor, weights, kinds)
        is_expert = bool(EXPERT.fullmatch(tensor.name))
        experts += own if is_expert else 0
        total += 0 if is_expert and on_disk else own
        peak = max(peak, total + _read_bytes(inventory, tensor, weights) + (own if is_expert and on_disk else 0))
    return Kept(total, experts, peak)


def _kept_bytes(config: ModelConfig, tensor: Stored, weights: str, kinds: dict[str, tuple[int, bool]]) -> int:
    """Of one tensor in its final form."""
    floats = 4 * prod(tensor.shape)
    if tensor.name.endswith(SCALE):
        return floats if weights == "fp8" else 0
    if weights == "fp8" and tensor.type == "F8_E4M3" and not tensor.name.endswith(".kv_b_proj.weight"):
        return prod(tensor.shape)
    if weights not in PACKED or not _is_packable(config, tensor):
        return floats
    bits, symmetric = _kind(tensor, weights)
    rows, columns = tensor.shape[-2], tensor.shape[-1]
    if match := EXPERT.fullmatch(tensor.name):
        bits, symmetric = kinds[stack_of(match)] if weights == "stored" else (_bits(weights), False)
    elif tensor.name.endswith(".kv_b_proj.weight"):
        return _packed_bytes(*_latent_rows(config), bits, symmetric)
    return _packed_bytes(prod(tensor.shape[:-2]) * rows, columns, bits, symmetric)


def _latent_rows(config: ModelConfig) -> tuple[int, int]:
    """Rows and columns of W_UK and W_UV together, which lie in groups of 32 either way."""
    H, C = config.num_attention_heads, config.kv_lora_rank
    return H * (config.qk_nope_head_dim + config.v_head_dim), C


def _is_packable(config: ModelConfig, tensor: Stored) -> bool:
    """Whether load packs it: matrices of linear layers and tables, of whole groups; the gate and norms are not."""
    if EXPERT.fullmatch(tensor.name):
        return config.hidden_size % GROUP == config.moe_intermediate_size % GROUP == 0
    if tensor.name.endswith(".kv_b_proj.weight"):
        C, N, V = config.kv_lora_rank, config.qk_nope_head_dim, config.v_head_dim
        return N % GROUP == C % GROUP == V % TILE == 0
    is_matrix = len(tensor.shape) > 1 and not tensor.name.endswith(".mlp.gate.weight")
    return is_matrix and tensor.shape[-1] % GROUP == 0


def _kind(tensor: Stored, weights: str) -> tuple[int, bool]:
    """Bits of its packed weight, and whether it has no minima."""
    needed = 4 if tensor.type in FOUR_BITS else 8
    eight = weights == "int4" and tensor.name in EIGHT_BITS
    bits = needed if weights == "stored" else 8 if eight else _bits(weights)
    return bits, tensor.type in SYMMETRIC and bits >= needed


def _bits(weights: str) -> int:
    return int(weights.removeprefix("int"))


def _packed_bytes(rows: int, columns: int, bits: int, symmetric: bool) -> int:
    block = TILE * (GROUP * bits // 8 + (2 if symmetric else 4))
    return -(-rows // TILE) * (columns // GROUP) * block


def _stack_kinds(tensors: Sequence[Stored]) -> dict[str, tuple[int, bool]]:
    """A stack of experts is of one kind: as many bits as one of its tensors needs, symmetric if all are."""
    kinds: dict[str, tuple[int, bool]] = {}
    for tensor in tensors:
        if match := EXPERT.fullmatch(tensor.name):
            bits, symmetric = _kind(tensor, "stored")
            before = kinds.get(stack_of(match), (bits, symmetric))
            kinds[stack_of(match)] = max(bits, before[0]), symmetric and before[1]
    return kinds


def stack_of(match: re.Match[str]) -> str:
    """The parameter that an expert's tensor is a part of."""
    return f"{match[1]}.{'down' if match[2] == 'down' else 'gate_up'}"


def _read_bytes(inventory: Inventory, tensor: Stored, weights: str) -> int:
    """What is in memory beside the result while a tensor is read: the file's bytes, and pieces that are converted."""
    converted = weights in PACKED and _is_packable(inventory.config, tensor)
    if inventory.is_file or converted or tensor.type not in PLAIN or EXPERT.fullmatch(tensor.name):
        pieces = min(prod(tensor.shape), PIECE) * 4 * (4 if converted else 1)
        return tensor.num_bytes + pieces
    return 0
