"""A model of DeepSeek-V3's shape with random weights, as a GGUF file that llama.cpp and porcelet both read.

Latent attention with a query rank, a dense layer, then experts: 6 of 16 and a shared one, chosen by sigmoid and bias.
256 M parameters, 162 M of them active. Tensors are named by the `gguf` library's own table and stored as llama.cpp's
converter stores them: experts stacked, kv_b_proj cut into its keys, turned over, and its values. The tokenizer is the
default model's, so that text can be asked of it too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import gguf
import torch
from gguf import MODEL_ARCH, ExpertGatingFuncType, GGUFWriter
from torch import Tensor

from porcelet import hub
from porcelet.config import ModelConfig
from porcelet.models.transformer import Transformer, build, initialize
from porcelet.weights.gguf import read
from porcelet.weights.load import checkpoint_tensors

CONFIG = ModelConfig(
    architecture="deepseek_v3",
    vocab_size=49152,
    hidden_size=768,
    intermediate_size=2048,
    num_hidden_layers=9,
    num_attention_heads=12,
    num_key_value_heads=12,
    head_dim=96,
    max_position_embeddings=8192,
    rope_interleave=True,
    initializer_range=0.04,  # logits of about one, so that a wrong product shows
    q_lora_rank=256,
    kv_lora_rank=256,
    qk_nope_head_dim=64,
    qk_rope_head_dim=32,
    v_head_dim=64,
    n_routed_experts=16,
    n_shared_experts=1,
    num_experts_per_tok=6,
    moe_intermediate_size=512,
    first_k_dense_replace=1,
    routed_scaling_factor=2.5,
)
EXPERT = re.compile(r"(.*\.mlp\.experts)\.\d+(\..+)\.weight")
BIAS = ".e_score_correction_bias"


def make() -> Transformer:
    """The model: always the same weights. The gate's biases are no zeros, which would hide that they were left out."""
    model = initialize(build(CONFIG), seed=0).eval()
    generator = torch.Generator().manual_seed(1)
    for name, buffer in model.named_buffers():
        if name.endswith(BIAS):
            buffer.normal_(0.0, 0.05, generator=generator)
    return model


def write(path: Path) -> None:
    """The model in float32."""
    writer = GGUFWriter(path, "deepseek2")
    _write_shape(writer)
    _write_tokenizer(writer)
    for name, tensor in stored_tensors(make()):
        writer.add_tensor(name, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def stored_tensors(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    """GGUF name and tensor of everything in the model."""
    config = model.config
    names = gguf.get_tensor_name_map(MODEL_ARCH.DEEPSEEK2, config.num_hidden_layers)
    stacks: dict[str, list[Tensor]] = {}

    def named(name: str, ending: str = ".weight") -> str:
        found = names.get_name(name)
        assert found is not None, name
        return found + ending

    for name, tensor in checkpoint_tensors(model):
        if match := EXPERT.fullmatch(name):
            stacks.setdefault(match[1] + match[2], []).append(tensor)
        elif name.endswith(BIAS):
            yield named(name.removesuffix("_bias"), ".bias"), tensor
        elif name.endswith(".kv_b_proj.weight"):
            heads = tensor.unflatten(0, (config.num_attention_heads, -1))  # [H, N + value, C]
            keys, values = heads.split([config.qk_nope_head_dim, config.v_head_dim], dim=1)
            yield named(name.replace(".kv_b_", ".k_b_").removesuffix(".weight")), keys.transpose(1, 2)
            yield named(name.replace(".kv_b_", ".v_b_").removesuffix(".weight")), values
        else:
            yield named(name.removesuffix(".weight")), tensor
    for name, experts in stacks.items():
        yield named(name), torch.stack(experts)


def _write_shape(writer: GGUFWriter) -> None:
    """Attention as the converter describes it: the absorbed form's one wide head, and the heads' own widths apart."""
    writer.add_vocab_size(CONFIG.vocab_size)
    writer.add_block_count(CONFIG.num_hidden_layers)
    writer.add_context_length(CONFIG.max_position_embeddings)
    writer.add_embedding_length(CONFIG.hidden_size)
    writer.add_feed_forward_length(CONFIG.intermediate_size)
    writer.add_head_count(CONFIG.num_attention_heads)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(CONFIG.rms_norm_eps)
    writer.add_rope_freq_base(CONFIG.rope_theta)
    writer.add_rope_dimension_count(CONFIG.qk_rope_head_dim)
    writer.add_q_lora_rank(CONFIG.q_lora_rank or 0)
    writer.add_kv_lora_rank(CONFIG.kv_lora_rank)
    writer.add_key_length(CONFIG.kv_lora_rank + CONFIG.qk_rope_head_dim)
    writer.add_value_length(CONFIG.kv_lora_rank)
    writer.add_key_length_mla(CONFIG.head_dim)
    writer.add_value_length_mla(CONFIG.v_head_dim)
    writer.add_leading_dense_block_count(CONFIG.first_k_dense_replace)
    writer.add_expert_count(CONFIG.n_routed_experts)
    writer.add_expert_used_count(CONFIG.num_experts_per_tok)
    writer.add_expert_shared_count(CONFIG.n_shared_experts)
    writer.add_expert_feed_forward_length(CONFIG.moe_intermediate_size)
    writer.add_expert_gating_func(ExpertGatingFuncType.SIGMOID)
    writer.add_expert_weights_norm(CONFIG.norm_topk_prob)
    writer.add_expert_weights_scale(CONFIG.routed_scaling_factor)


def _write_tokenizer(writer: GGUFWriter) -> None:
    known = read(hub.resolve(hub.DEFAULT_MODEL)).metadata
    writer.add_tokenizer_model(known["tokenizer.ggml.model"])
    writer.add_tokenizer_pre(known["tokenizer.ggml.pre"])
    writer.add_token_list(known["tokenizer.ggml.tokens"])
    writer.add_token_types(list(known["tokenizer.ggml.token_type"]))
    writer.add_token_merges(known["tokenizer.ggml.merges"])
    writer.add_bos_token_id(known["tokenizer.ggml.bos_token_id"])
    writer.add_eos_token_id(known["tokenizer.ggml.eos_token_id"])
    writer.add_add_bos_token(False)
