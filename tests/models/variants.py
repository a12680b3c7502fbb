"""Small configs of every architecture and variant, and the published ones of DeepSeek V2, V2-Lite and V3."""

from __future__ import annotations

import dataclasses
from typing import Any

from porcelet.config import ModelConfig, RopeScaling

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
V2_LITE = dataclasses.replace(
    V3,
    architecture="deepseek_v2",
    q_lora_rank=None,
    topk_method="greedy",
    norm_topk_prob=False,
    n_group=1,
    topk_group=1,
    routed_scaling_factor=1.0,
    num_nextn_predict_layers=0,
)
V2 = dataclasses.replace(
    V2_LITE, q_lora_rank=24, topk_method="group_limited_greedy", n_group=4, topk_group=2, routed_scaling_factor=16.0
)
# The released models' own: with it, the ramp of 8 pairs has frequencies on both sides and in between.
YARN = RopeScaling(kind="yarn", factor=40.0, original_max_position_embeddings=64, mscale=0.707, mscale_all_dim=0.707)
LLAMA3 = RopeScaling(kind="llama3", factor=8.0, original_max_position_embeddings=64)
QWEN2 = dataclasses.replace(LLAMA, architecture="qwen2")
QWEN3 = dataclasses.replace(LLAMA, architecture="qwen3", head_dim=24)
VARIANTS = {
    "llama": LLAMA,
    "llama_tied": dataclasses.replace(LLAMA, tie_word_embeddings=True, rope_theta=5e5),
    "llama_wide_heads": dataclasses.replace(LLAMA, head_dim=24, num_key_value_heads=1),
    "llama_biases": dataclasses.replace(LLAMA, attention_bias=True, rms_norm_eps=1e-4),
    "llama_3_scaling": dataclasses.replace(LLAMA, rope_scaling=LLAMA3),
    "llama_linear_scaling": dataclasses.replace(LLAMA, rope_scaling=RopeScaling(kind="linear", factor=4.0)),
    "qwen2": QWEN2,
    "qwen2_tied_yarn": dataclasses.replace(
        QWEN2,
        tie_word_embeddings=True,
        rope_scaling=RopeScaling(kind="yarn", factor=4.0, original_max_position_embeddings=64),
    ),
    "qwen3": QWEN3,
    "qwen3_tied_biases": dataclasses.replace(QWEN3, tie_word_embeddings=True, attention_bias=True),
    "v2_lite": V2_LITE,
    "v2_lite_yarn": dataclasses.replace(V2_LITE, rope_scaling=YARN),
    "v2": V2,
    "v2_yarn_dense_first": dataclasses.replace(V2, rope_scaling=YARN, first_k_dense_replace=2, n_shared_experts=1),
    "v3_yarn": dataclasses.replace(V3, rope_scaling=dataclasses.replace(YARN, mscale=1.0, mscale_all_dim=1.0)),
    "v3_yarn_two_mscales": dataclasses.replace(
        V3, rope_scaling=dataclasses.replace(YARN, mscale=1.0), rms_norm_eps=1e-4
    ),
    "v3": V3,
    "v3_without_query_rank": dataclasses.replace(V3, q_lora_rank=None, num_nextn_predict_layers=0),
    "v3_one_group": dataclasses.replace(V3, n_group=1, topk_group=1, n_shared_experts=1, norm_topk_prob=False),
    "v3_all_dense": dataclasses.replace(V3, first_k_dense_replace=3, num_nextn_predict_layers=0),
}


YARN_V3 = {
    "type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1,
    "mscale": 1.0, "mscale_all_dim": 1.0,
}  # fmt: skip


def published_v2_lite() -> dict[str, Any]:
    return {
        "model_type": "deepseek_v2", "vocab_size": 102400, "hidden_size": 2048, "intermediate_size": 10944,
        "moe_intermediate_size": 1408, "num_hidden_layers": 27, "num_attention_heads": 16, "num_key_value_heads": 16,
        "n_shared_experts": 2, "n_routed_experts": 64, "routed_scaling_factor": 1.0, "kv_lora_rank": 512,
        "q_lora_rank": None, "qk_rope_head_dim": 64, "v_head_dim": 128, "qk_nope_head_dim": 128, "n_group": 1,
        "topk_group": 1, "topk_method": "greedy", "scoring_func": "softmax", "norm_topk_prob": False,
        "num_experts_per_tok": 6, "first_k_dense_replace": 1, "moe_layer_freq": 1, "max_position_embeddings": 163840,
        "rope_scaling": YARN_V3 | {"mscale": 0.707, "mscale_all_dim": 0.707},
        "bos_token_id": 100000, "eos_token_id": 100001,
    }  # fmt: skip


def published_v2() -> dict[str, Any]:
    return published_v2_lite() | {
        "hidden_size": 5120, "intermediate_size": 12288, "moe_intermediate_size": 1536, "num_hidden_layers": 60,
        "num_attention_heads": 128, "num_key_value_heads": 128, "n_routed_experts": 160,
        "routed_scaling_factor": 16.0, "q_lora_rank": 1536, "n_group": 8, "topk_group": 3,
        "topk_method": "group_limited_greedy", "rope_scaling": YARN_V3,
    }  # fmt: skip


def published_v3() -> dict[str, Any]:
    return {
        "model_type": "deepseek_v3", "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432,
        "moe_intermediate_size": 2048, "num_hidden_layers": 61, "num_attention_heads": 128, "num_key_value_heads": 128,
        "n_shared_experts": 1, "n_routed_experts": 256, "routed_scaling_factor": 2.5, "kv_lora_rank": 512,
        "q_lora_rank": 1536, "qk_rope_head_dim": 64, "v_head_dim": 128, "qk_nope_head_dim": 128, "n_group": 8,
        "topk_group": 4, "num_experts_per_tok": 8, "first_k_dense_replace": 3, "max_position_embeddings": 163840,
        "num_nextn_predict_layers": 1, "topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": True,
        "moe_layer_freq": 1, "rope_scaling": YARN_V3, "bos_token_id": 0, "eos_token_id": 1,
        "quantization_config": {
            "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128],
        },
    }  # fmt: skip
