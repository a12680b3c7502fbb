"""Small configs of every architecture and variant, and the published one of DeepSeek-V3."""

from __future__ import annotations

import dataclasses
from typing import Any

from porcelet.config import ModelConfig

LLAMA = ModelConfig(
    architecture="llama",
    vocab_size=97,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=512,
    initializer_range=0.2,
)
V3 = ModelConfig(
    architecture="deepseek_v3",
    vocab_size=97,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=36,
    max_position_embeddings=512,
    rope_interleave=True,
    initializer_range=0.2,
    q_lora_rank=24,
    kv_lora_rank=32,
    qk_nope_head_dim=20,
    qk_rope_head_dim=16,
    v_head_dim=24,
    n_routed_experts=8,
    n_shared_experts=2,
    num_experts_per_tok=3,
    moe_intermediate_size=32,
    first_k_dense_replace=1,
    n_group=4,
    topk_group=2,
    routed_scaling_factor=2.5,
    num_nextn_predict_layers=1,
)
VARIANTS = {
    "llama": LLAMA,
    "llama_tied": dataclasses.replace(LLAMA, tie_word_embeddings=True, rope_theta=5e5),
    "llama_wide_heads": dataclasses.replace(LLAMA, head_dim=24, num_key_value_heads=1),
    "v3": V3,
    "v3_without_query_rank": dataclasses.replace(V3, q_lora_rank=None, num_nextn_predict_layers=0),
    "v3_one_group": dataclasses.replace(V3, n_group=1, topk_group=1, n_shared_experts=1, norm_topk_prob=False),
    "v3_all_dense": dataclasses.replace(V3, first_k_dense_replace=3, num_nextn_predict_layers=0),
}


def published_v3() -> dict[str, Any]:
    return {
        "model_type": "deepseek_v3", "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432,
        "moe_intermediate_size": 2048, "num_hidden_layers": 61, "num_attention_heads": 128, "num_key_value_heads": 128,
        "n_shared_experts": 1, "n_routed_experts": 256, "routed_scaling_factor": 2.5, "kv_lora_rank": 512,
        "q_lora_rank": 1536, "qk_rope_head_dim": 64, "v_head_dim": 128, "qk_nope_head_dim": 128, "n_group": 8,
        "topk_group": 4, "num_experts_per_tok": 8, "first_k_dense_replace": 3, "max_position_embeddings": 163840,
        "num_nextn_predict_layers": 1,
    }  # fmt: skip
