"""GGUF metadata as a `ModelConfig`.

Key names and meanings: the `gguf` library's constants, and what llama.cpp's converter writes for DeepSeek models.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from porcelet.config.model import ModelConfig, RopeScaling, require
from porcelet.errors import ModelError

# What GGUF files made before the group counts were stored leave out: the released models' own, by number of experts.
_GROUPS_OF_EXPERTS = {160: (8, 3), 256: (8, 4)}


def read_gguf(
    metadata: Mapping[str, Any],
    *,
    tied: bool,
    biased: bool = False,
    rope_factors: Sequence[float] | None = None,
    source: str = "GGUF",
) -> ModelConfig:
    """Read GGUF metadata of the architectures llama, qwen2, qwen3 and deepseek2.

    `tied` says that the file holds no separate output head, `biased` that its q, k, v and output projections have
    biases; `rope_factors` are the values of the tensor
    `rope_freqs.weight`, in which Llama 3's RoPE scaling is stored.

    Raises:
        ModelError: another architecture, a missing key, or a feature that is not supported.
    """
    name = metadata.get("general.architecture")
    if name not in ("llama", "qwen2", "qwen3", "deepseek2"):
        supported = "llama, qwen2, qwen3, deepseek2"
        raise ModelError(f"{source}: GGUF architecture {name!r} is not supported; supported: {supported}")
    keys = _GGUFKeys(metadata, name)
    try:
        fields = _gguf_latent(keys) if name == "deepseek2" else _gguf_grouped(keys, name)
        width, heads = keys["embedding_length"], keys["attention.head_count"]
        # End of the sequence, of a turn, of a message: whichever comes ends an answer.
        ends = (metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom"))
        return ModelConfig(
            **fields,
            vocab_size=keys.get("vocab_size") or len(metadata["tokenizer.ggml.tokens"]),
            hidden_size=width,
            intermediate_size=keys["feed_forward_length"],
            num_attention_heads=heads,
            max_position_embeddings=keys["context_length"],
            rms_norm_eps=keys["attention.layer_norm_rms_epsilon"],
            rope_theta=keys.get("rope.freq_base", 10000.0),
            rope_scaling=_gguf_rope_scaling(keys, rope_factors),
            attention_bias=biased and name != "qwen2",
            tie_word_embeddings=tied,
            bos_token_id=metadata.get("tokenizer.ggml.bos_token_id"),
            eos_token_ids=tuple(dict.fromkeys(token for token in ends if token is not None)),
        )
    except (KeyError, TypeError, ZeroDivisionError) as problem:
        raise ModelError(f"{source}: missing or unusable metadata: {problem}") from problem
    except ModelError as problem:
        raise ModelError(f"{source}: {problem}") from problem


@dataclass(frozen=True)
class _GGUFKeys:
    """The metadata of one architecture, by key without its prefix."""

    metadata: Mapping[str, Any]
    architecture: str

    def __getitem__(self, key: str) -> Any:
        return self.metadata[f"{self.architecture}.{key}"]

    def get(self, key: str, default: Any = None) -> Any:
        return self.metadata.get(f"{self.architecture}.{key}", default)


def _gguf_grouped(keys: _GGUFKeys, architecture: str) -> dict[str, Any]:
    """The attention of llama, qwen2 and qwen3."""
    heads = keys["attention.head_count"]
    head_dim = keys.get("attention.key_length") or keys["embedding_length"] // heads
    for key in ("attention.value_length", "rope.dimension_count"):
        require(keys.get(key, head_dim) == head_dim, f"{key} {keys.get(key)} beside heads of {head_dim}: not supported")
    require(not keys.get("expert_count"), f"{architecture} with {keys.get('expert_count')} experts is not supported")
    return {
        "architecture": architecture,
        "num_hidden_layers": keys["block_count"],
        "num_key_value_heads": keys.get("attention.head_count_kv", heads),
        "head_dim": head_dim,
    }


def _gguf_latent(keys: _GGUFKeys) -> dict[str, Any]:
    """Attention, gate and experts of deepseek2, which is V2 or V3 by its scoring function."""
    gating = keys.get("expert_gating_func", 1)
    sigmoid = gating == 2
    require(gating in (1, 2), f"expert_gating_func {gating} is not supported; supported: 1 softmax, 2 sigmoid")
    rotary = keys["rope.dimension_count"]
    # Newer files describe the absorbed form by key_length and put the heads' own widths under *_mla.
    key = keys.get("attention.key_length_mla") or keys["attention.key_length"]
    value = keys.get("attention.value_length_mla") or keys["attention.value_length"]
    experts, mtp = keys["expert_count"], keys.get("nextn_predict_layers", 0)
    groups = _GROUPS_OF_EXPERTS.get(experts, (1, 1))
    num_groups = keys.get("expert_group_count", groups[0])
    softmax_method = "group_limited_greedy" if num_groups > 1 else "greedy"
    return {
        "architecture": "deepseek_v3" if sigmoid else "deepseek_v2",
        "num_hidden_layers": keys["block_count"] - mtp,
        "num_key_value_heads": keys["attention.head_count"],
        "head_dim": key,
        "rope_interleave": True,
        "q_lora_rank": keys.get("attention.q_lora_rank") or None,
        "kv_lora_rank": keys["attention.kv_lora_rank"],
        "qk_nope_head_dim": key - rotary,
        "qk_rope_head_dim": rotary,
        "v_head_dim": value,
        "n_routed_experts": experts,
        "n_shared_experts": keys["expert_shared_count"],
        "num_experts_per_tok": keys["expert_used_count"],
        "moe_intermediate_size": keys["expert_feed_forward_length"],
        "first_k_dense_replace": keys["leading_dense_block_count"],
        "n_group": num_groups,
        "topk_group": keys.get("expert_group_used_count", groups[1]),
        "topk_method": "noaux_tc" if sigmoid else softmax_method,
        "norm_topk_prob": keys.get("expert_weights_norm", False),
        "routed_scaling_factor": keys.get("expert_weights_scale") or 1.0,
        "num_nextn_predict_layers": mtp,
    }


def _gguf_rope_scaling(keys: _GGUFKeys, factors: Sequence[float] | None) -> RopeScaling | None:
    for key, neutral in (("attn_factor", 1.0), ("yarn_ext_factor", 1.0)):
        found = keys.get(f"rope.scaling.{key}", neutral)
        require(found == neutral, f"rope.scaling.{key} {found} is not supported; supported: {neutral}")
    kind = keys.get("rope.scaling.type", "none")
    if factors:
        return _llama3_scaling(keys, factors)
    linear = keys.get("rope.scale_linear", 1.0)  # how old files said it
    if kind == "none":
        return None if linear == 1.0 else RopeScaling(kind="linear", factor=linear)
    scaling = RopeScaling(
        kind=kind,
        factor=keys["rope.scaling.factor"],
        original_max_position_embeddings=keys.get("rope.scaling.original_context_length", keys["context_length"]),
        beta_fast=keys.get("rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=keys.get("rope.scaling.yarn_beta_slow", 1.0),
        attention_factor=keys.get("rope.scaling.yarn_attn_factor"),
    )
    if keys.architecture != "deepseek2" or kind != "yarn":
        return scaling
    # Stored as 0.1 · mscale_all_dim; the two mscales of every released model are equal. Half a millionth undoes the
    # rounding of the product to float32.
    mscale = round(10 * keys["rope.scaling.yarn_log_multiplier"], 6)
    return dataclasses.replace(scaling, mscale=mscale, mscale_all_dim=mscale)


def _llama3_scaling(keys: _GGUFKeys, factors: Sequence[float]) -> RopeScaling:
    """Llama 3's scaling, found again from the factors that its rule gives: the largest is `factor`, the other
    parameters are the same in every released model. Factors of any other rule are refused."""
    scaling = RopeScaling(kind="llama3", factor=max(factors), original_max_position_embeddings=8192)
    theta = keys.get("rope.freq_base", 10000.0)
    for index, found in enumerate(factors):
        expected = _llama3_factor(2 * math.pi * theta ** (index / len(factors)), scaling)
        require(
            math.isclose(found, expected, rel_tol=1e-3),
            f"tensor 'rope_freqs.weight': value {index} is {found}, Llama 3's rule gives {expected}; not supported",
        )
    return scaling


def _llama3_factor(wavelength: float, scaling: RopeScaling) -> float:
    """What a frequency is divided by, from its wavelength in tokens."""
    turns = scaling.original_max_position_embeddings / wavelength
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    share = min(max((turns - low) / (high - low), 0.0), 1.0)
    return 1 / ((1 - share) / scaling.factor + share)
