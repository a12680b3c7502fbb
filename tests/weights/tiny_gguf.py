"""Whole models of a few thousand parameters as GGUF files, written by the `gguf` library.

`write(path)` is a llama; `architecture` and the fields of `Model` make it a qwen2, a qwen3 or a deepseek2. Rows that
are no whole blocks of the type asked for are stored as F32, so a file of K-quants (blocks of 256) wants width=256.
A tensor's values depend on its name and shape only, and attn_k_b and attn_v_b are cut from what attn_kv_b would be.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

import numpy
from gguf import GGML_QUANT_SIZES, ExpertGatingFuncType, GGMLQuantizationType, GGUFWriter, RopeScalingType, TokenType
from gguf.quants import quantize

WIDTH, HEADS, KV_HEADS, INNER, VOCABULARY = 64, 4, 2, 96, 40
SPECIAL = ["<|im_start|>", "<|im_end|>"]
TEMPLATE = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
# Where a block's half-precision scales lie.
HALVES = {"Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,)}
HALVES |= {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
K_SCALES = {"Q4_K": (2e-4, 1.5e-3), "Q5_K": (1e-4, 1.5e-3), "Q6_K": (5e-5,)}  # d and dmin: values are about ±0.1


@dataclass(frozen=True, kw_only=True)
class Model:
    """What a file holds. `tied` leaves output.weight out; `scale` is the matrices' standard deviation."""

    architecture: str = "llama"
    width: int = WIDTH
    heads: int = HEADS
    kv_heads: int = KV_HEADS
    head_dim: int = WIDTH // HEADS  # of llama and qwen
    inner: int = INNER
    layers: int = 1
    tied: bool = True
    scale: float = 1.0
    # deepseek2
    q_rank: int | None = 32
    kv_rank: int = 32
    nope: int = 32
    rope: int = 16
    value: int = 32
    split_kv_b: bool = True  # as converters do since April 2025; before, attn_kv_b and other key lengths were stored
    dense_layers: int = 1
    experts: int = 8
    experts_used: int = 2
    expert_inner: int = 32
    shared_experts: int = 1
    groups: int = 1
    groups_used: int = 1
    sigmoid: bool = True  # V3: sigmoid, exp_probs_b and normalised weights; else V2: softmax and neither
    weights_scale: float = 2.5
    yarn: tuple[float, int, float] | None = None  # factor, original context, mscale_all_dim

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """GGUF names with shapes in torch's order."""
        shapes: dict[str, tuple[int, ...]] = {
            "token_embd.weight": (VOCABULARY, self.width),
            "output_norm.weight": (self.width,),
        }
        if not self.tied:
            shapes["output.weight"] = (VOCABULARY, self.width)
        for i in range(self.layers):
            attention = self._mla() if self.architecture == "deepseek2" else self._attention()
            dense = self.architecture != "deepseek2" or i < self.dense_layers
            feed_forward = self._feed_forward("", self.inner) if dense else self._experts()
            layer = {
                "attn_norm.weight": (self.width,),
                **attention,
                "ffn_norm.weight": (self.width,),
                **feed_forward,
            }
            shapes |= {f"blk.{i}.{name}": shape for name, shape in layer.items()}
        return shapes

    def _attention(self) -> dict[str, tuple[int, ...]]:
        rows = {"q": self.heads * self.head_dim, "k": self.kv_heads * self.head_dim, "v": self.kv_heads * self.head_dim}
        shapes: dict[str, tuple[int, ...]] = {f"attn_{part}.weight": (size, self.width) for part, size in rows.items()}
        if self.architecture == "qwen2":
            shapes |= {f"attn_{part}.bias": (size,) for part, size in rows.items()}
        if self.architecture == "qwen3":
            shapes |= {"attn_q_norm.weight": (self.head_dim,), "attn_k_norm.weight": (self.head_dim,)}
        return shapes | {"attn_output.weight": (self.width, self.heads * self.head_dim)}

    def _mla(self) -> dict[str, tuple[int, ...]]:
        query = self.heads * (self.nope + self.rope)
        shapes: dict[str, tuple[int, ...]] = {"attn_q.weight": (query, self.width)}
        if self.q_rank is not None:
            shapes = {
                "attn_q_a.weight": (self.q_rank, self.width),
                "attn_q_a_norm.weight": (self.q_rank,),
                "attn_q_b.weight": (query, self.q_rank),
            }
        shapes |= {
            "attn_kv_a_mqa.weight": (self.kv_rank + self.rope, self.width),
            "attn_kv_a_norm.weight": (self.kv_rank,),
        }
        if self.split_kv_b:
            shapes["attn_k_b.weight"] = (self.heads, self.kv_rank, self.nope)
            shapes["attn_v_b.weight"] = (self.heads, self.value, self.kv_rank)
        else:
            shapes["attn_kv_b.weight"] = (self.heads * (self.nope + self.value), self.kv_rank)
        return shapes | {"attn_output.weight": (self.width, self.heads * self.value)}

    def _feed_forward(self, suffix: str, inner: int) -> dict[str, tuple[int, ...]]:
        return {
            f"ffn_gate{suffix}.weight": (inner, self.width),
            f"ffn_up{suffix}.weight": (inner, self.width),
            f"ffn_down{suffix}.weight": (self.width, inner),
        }

    def _experts(self) -> dict[str, tuple[int, ...]]:
        routed = self._feed_forward("_exps", self.expert_inner)
        return {
            "ffn_gate_inp.weight": (self.experts, self.width),
            **({"exp_probs_b.bias": (self.experts,)} if self.sigmoid else {}),
            **{name: (self.experts, *shape) for name, shape in routed.items()},
            **self._feed_forward("_shexp", self.shared_experts * self.expert_inner),
        }


def shapes() -> dict[str, tuple[int, ...]]:
    """GGUF names and shapes of what `write(path)` writes."""
    return Model().shapes()


def write(
    path: Path,
    type_name: str = "Q4_1",
    extra: dict[str, tuple[int, ...]] | None = None,
    architecture: str = "llama",
    **options: object,
) -> dict[str, numpy.ndarray]:
    """Write a model; vectors stay F32, matrices get `type_name`. Returns the bytes stored for each tensor."""
    model = Model(architecture=architecture, **{"layers": 2 if architecture == "deepseek2" else 1} | options)  # type: ignore[arg-type]
    writer = GGUFWriter(path, architecture)
    _write_metadata(writer, model)
    _write_tokenizer(writer)
    stored = {}
    for name, shape in (model.shapes() | (extra or {})).items():
        kind = GGMLQuantizationType[_type(name, shape, type_name)]
        stored[name] = _store(name, shape, kind, model)
        writer.add_tensor(name, stored[name], raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


def random_blocks(random: numpy.random.Generator, shape: Sequence[int], type_name: str) -> numpy.ndarray:
    """Valid blocks of a K-quant with moderate scales, as the library has no quantiser for them. Rows are bytes."""
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[type_name]]
    blocks = random.integers(0, 256, (*shape[:-1], shape[-1] // block, size), numpy.uint8)
    for place, scale in zip(HALVES[type_name], K_SCALES[type_name], strict=True):
        halves = random.uniform(scale / 2, scale, blocks.shape[:-1]).astype("<f2")
        blocks[..., place : place + 2] = halves[..., None].view(numpy.uint8)
    return blocks.reshape(*shape[:-1], -1)


def _type(name: str, shape: tuple[int, ...], type_name: str) -> str:
    block = GGML_QUANT_SIZES[GGMLQuantizationType[type_name]][0]
    plain = len(shape) == 1 or name.endswith("ffn_gate_inp.weight") or shape[-1] % block
    return "F32" if plain else type_name


def _store(name: str, shape: tuple[int, ...], kind: GGMLQuantizationType, model: Model) -> numpy.ndarray:
    random = numpy.random.default_rng(crc32(f"{name} {shape}".encode()))
    if kind.name in K_SCALES:
        return random_blocks(random, shape, kind.name)
    return quantize(numpy.ascontiguousarray(_values(name, shape, model)), kind)


def _values(name: str, shape: tuple[int, ...], model: Model) -> numpy.ndarray:
    part = re.fullmatch(r"(blk\.\d+\.attn_)([kv])(_b\.weight)", name)
    if part:
        joined = _values(f"{part[1]}kv{part[3]}", (model.heads * (model.nope + model.value), model.kv_rank), model)
        heads = joined.reshape(model.heads, -1, model.kv_rank)
        return heads[:, : model.nope].swapaxes(1, 2) if part[2] == "k" else heads[:, model.nope :]
    random = numpy.random.default_rng(crc32(f"{name} {shape}".encode()))
    scale = numpy.float32(model.scale if len(shape) > 1 else 1.0)
    return random.standard_normal(shape, numpy.float32) * scale


def _write_metadata(writer: GGUFWriter, model: Model) -> None:
    writer.add_block_count(model.layers)
    writer.add_context_length(128)
    writer.add_embedding_length(model.width)
    writer.add_feed_forward_length(model.inner)
    writer.add_head_count(model.heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_array("general.languages", ["en"])
    if model.architecture == "deepseek2":
        _write_mla(writer, model)
        _write_experts(writer, model)
    else:
        writer.add_head_count_kv(model.kv_heads)
    if model.architecture.startswith("qwen"):
        writer.add_rope_freq_base(1e6)
    if model.architecture == "qwen3" or model.head_dim * model.heads != model.width:
        writer.add_key_length(model.head_dim)
        writer.add_value_length(model.head_dim)


def _write_mla(writer: GGUFWriter, model: Model) -> None:
    """Attention as the converter describes it: since the split of kv_b as one wide head, with the true sizes apart."""
    writer.add_vocab_size(VOCABULARY)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(model.rope)
    writer.add_kv_lora_rank(model.kv_rank)
    if model.q_rank is not None:
        writer.add_q_lora_rank(model.q_rank)
    if model.split_kv_b:
        writer.add_head_count_kv(1)
        writer.add_key_length(model.kv_rank + model.rope)
        writer.add_value_length(model.kv_rank)
        writer.add_key_length_mla(model.nope + model.rope)
        writer.add_value_length_mla(model.value)
    else:
        writer.add_head_count_kv(model.heads)
        writer.add_key_length(model.nope + model.rope)
        writer.add_value_length(model.value)
    if model.yarn is not None:
        factor, original_context, mscale_all_dim = model.yarn
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(factor)
        writer.add_rope_scaling_orig_ctx_len(original_context)
        writer.add_rope_scaling_yarn_log_mul(0.1 * mscale_all_dim)


def _write_experts(writer: GGUFWriter, model: Model) -> None:
    writer.add_leading_dense_block_count(model.dense_layers)
    writer.add_expert_count(model.experts)
    writer.add_expert_used_count(model.experts_used)
    writer.add_expert_shared_count(model.shared_experts)
    writer.add_expert_feed_forward_length(model.expert_inner)
    writer.add_expert_weights_scale(model.weights_scale)
    if model.groups > 1:
        writer.add_expert_group_count(model.groups)
        writer.add_expert_group_used_count(model.groups_used)
    if model.sigmoid:
        writer.add_expert_weights_norm(True)
    writer.add_expert_gating_func(ExpertGatingFuncType.SIGMOID if model.sigmoid else ExpertGatingFuncType.SOFTMAX)


def _write_tokenizer(writer: GGUFWriter) -> None:
    letters = [chr(code) for code in range(ord("a"), ord("a") + VOCABULARY - len(SPECIAL) - 4)]
    tokens = [*SPECIAL, *letters, "Ċ", "Ġ", "ab", "abc"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL] * len(SPECIAL) + [TokenType.NORMAL] * (len(tokens) - len(SPECIAL)))
    writer.add_token_merges(["a b", "ab c"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)
