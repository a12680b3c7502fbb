"""A Hugging Face `config.json` as a `ModelConfig`, and back.

What is not supported (sliding windows, dynamic RoPE, biases in MLA, other activations, other quantisation than FP8 in
blocks of 128) is refused by name.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from porcelet.config.model import ROPE_KINDS, ModelConfig, RopeScaling, is_count, require, require_architecture
from porcelet.errors import ModelError

_HF_CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
}
_DEEPSEEK_FIELDS = """
    q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim n_routed_experts n_shared_experts
    num_experts_per_tok moe_intermediate_size first_k_dense_replace n_group topk_group topk_method norm_topk_prob
    routed_scaling_factor num_nextn_predict_layers rope_interleave
    """.split()  # noqa: SIM905  seventeen quoted names would be harder to read
_ROPE_FIELDS = {
    "linear": ("factor",),
    "yarn": (
        *("factor", "original_max_position_embeddings", "beta_fast", "beta_slow"),
        *("mscale", "mscale_all_dim", "attention_factor", "truncate"),
    ),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
}


def read_file(path: Path) -> ModelConfig:
    """Read `config.json`, and from `generation_config.json` beside it the further tokens that end an answer.

    Raises:
        ModelError: as `read_hf`, or a file is missing or damaged.
    """
    values = _read_json(path)
    if values is None:
        raise ModelError(f"{path} does not exist; a model folder needs config.json and *.safetensors")
    generation = _read_json(path.with_name("generation_config.json")) or {}
    eos = _as_list(values.get("eos_token_id"))
    eos = eos + [token for token in _as_list(generation.get("eos_token_id")) if token not in eos]
    return read_hf(values | {"eos_token_id": eos or None}, str(path))


def _read_json(path: Path) -> dict[str, Any] | None:
    """The file's object; None where there is no such file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as problem:
        raise ModelError(f"{path} is not valid JSON: {problem}") from problem
    if not isinstance(values, dict):
        raise ModelError(f"{path} holds a {type(values).__name__}; a JSON object was expected")
    return values


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def read_hf(values: Mapping[str, Any], source: str = "config.json") -> ModelConfig:
    """Read a Hugging Face `config.json` (either RoPE spelling: `rope_theta` or `rope_parameters`).

    Raises:
        ModelError: unknown architecture, missing or unusable field, or a feature that is not supported.
    """
    architecture = values.get("model_type")
    require_architecture(architecture, source)
    _check_shapes(values, source)
    _refuse_unsupported(values, source)
    mla = architecture in ("deepseek_v2", "deepseek_v3")
    needed = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
    needed += ["kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"] if mla else []
    for name in [*needed, "max_position_embeddings"]:
        if not is_count(values.get(name)):
            raise ModelError(f"{source}: {name} is {values.get(name)!r}; it must be a positive integer")
    if mla and "q_lora_rank" not in values:
        raise ModelError(f"{source}: q_lora_rank is missing; it must be a rank, or null for a plain q_proj")
    known = {field.name for field in dataclasses.fields(ModelConfig)} - (set() if mla else set(_DEEPSEEK_FIELDS))
    read = {name: value for name, value in values.items() if name in known and value is not None}
    try:
        head_dim = values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"]
        derived = {
            "architecture": architecture,
            "head_dim": values["qk_nope_head_dim"] + values["qk_rope_head_dim"] if mla else head_dim,
            "num_key_value_heads": values.get("num_key_value_heads") or values["num_attention_heads"],
            "rope_theta": _hf_rope_theta(values),
            "rope_interleave": values.get("rope_interleave", mla),
            "attention_bias": bool(values.get("attention_bias")) and architecture != "qwen2",  # qwen2's are fixed
            "rope_scaling": _hf_rope_scaling(values, source),
            "eos_token_ids": tuple(_as_list(values.get("eos_token_id"))),
        }
        return ModelConfig(**read | _gate_defaults(architecture, values) | derived)
    except (KeyError, TypeError, ValueError, OverflowError) as problem:
        raise ModelError(f"{source}: missing or unusable field: {problem}") from problem
    except ModelError as problem:
        raise ModelError(f"{source}: {problem}") from problem


def write_hf(config: ModelConfig) -> dict[str, Any]:
    """The `config.json` that `transformers` (4 and 5) and `read_hf` read back."""
    values = dataclasses.asdict(config)
    architecture, scaling = values.pop("architecture"), values.pop("rope_scaling")
    eos = values.pop("eos_token_ids")
    if not config.is_mla:
        values = {name: value for name, value in values.items() if name not in _DEEPSEEK_FIELDS}
    else:
        values.pop("head_dim")  # transformers means the rotary width by it
        values["scoring_func"] = "sigmoid" if config.topk_method == "noaux_tc" else "softmax"
    rope = {"rope_type": "default"}
    if scaling:
        used = {name: scaling[name] for name in _ROPE_FIELDS[scaling["kind"]] if scaling[name] is not None}
        rope = {"rope_type": scaling["kind"], **used}
        values["rope_scaling"] = rope | {"type": scaling["kind"]}
    return values | {
        "architectures": [_HF_CLASSES[config.architecture]],
        "model_type": architecture,
        "eos_token_id": list(eos) if len(eos) > 1 else (eos[0] if eos else None),
        "rope_parameters": rope | {"rope_theta": config.rope_theta},
        "hidden_act": "silu",
        "torch_dtype": "float32",
    }


def _hf_rope(values: Mapping[str, Any]) -> dict[str, Any]:
    return values.get("rope_scaling") or values.get("rope_parameters") or {}


def _hf_rope_theta(values: Mapping[str, Any]) -> float:
    places = (values.get("rope_scaling") or {}, values.get("rope_parameters") or {}, values)
    return float(next((place["rope_theta"] for place in places if place.get("rope_theta") is not None), 10000.0))


def _hf_rope_scaling(values: Mapping[str, Any], source: str) -> RopeScaling | None:
    rope = _hf_rope(values)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    require(kind in ROPE_KINDS, f"RoPE scaling {kind!r} is not supported; supported: {', '.join(ROPE_KINDS)}")
    original = "original_max_position_embeddings"
    given = {name: rope[name] for name in _ROPE_FIELDS[kind] if rope.get(name) is not None}
    given = {name: float(value) if type(value) is int and name != original else value for name, value in given.items()}
    if original in _ROPE_FIELDS[kind]:
        given.setdefault(original, values["max_position_embeddings"])
    return RopeScaling(kind=kind, **given)


def _gate_defaults(architecture: object, values: Mapping[str, Any]) -> dict[str, Any]:
    """What a config leaves unsaid about the gate: V3's configs written by transformers do not name their method."""
    if architecture == "deepseek_v3":
        return {"topk_method": values.get("topk_method") or "noaux_tc"}
    if architecture == "deepseek_v2":
        normalize = values.get("norm_topk_prob") or False
        return {"topk_method": values.get("topk_method") or "greedy", "norm_topk_prob": normalize}
    return dict.fromkeys(("n_routed_experts", "n_shared_experts", "first_k_dense_replace"), 0)


def _check_shapes(values: Mapping[str, Any], source: str) -> None:
    """The fields that hold more than a number or a word."""
    for name in ("rope_scaling", "rope_parameters", "quantization_config"):
        if not isinstance(values.get(name) or {}, dict):
            raise ModelError(f"{source}: {name} is {values[name]!r}; an object was expected")
    if not isinstance(values.get("layer_types") or [], list):
        raise ModelError(f"{source}: layer_types is {values['layer_types']!r}; a list was expected")


def _refuse_unsupported(values: Mapping[str, Any], source: str) -> None:
    rope = _hf_rope(values)
    layers = values.get("layer_types") or []
    scores = {"deepseek_v2": "softmax", "deepseek_v3": "sigmoid"}.get(values["model_type"])
    quantized = values.get("quantization_config") or None
    wanted: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "partial_rotary_factor": (rope.get("partial_rotary_factor", values.get("partial_rotary_factor")), (None, 1.0)),
        "hidden_act": (values.get("hidden_act", "silu"), ("silu",)),
        "mlp_bias": (values.get("mlp_bias", False), (False,)),
        "scoring_func": (values.get("scoring_func", scores), (scores,)),
        "moe_layer_freq": (values.get("moe_layer_freq", 1), (1,)),
        "use_sliding_window": (values.get("use_sliding_window", False), (False,)),
        "layer_types": (next((kind for kind in layers if kind != "full_attention"), None), (None,)),
    }
    if quantized is not None:
        wanted["quantization_config.quant_method"] = (quantized.get("quant_method"), ("fp8",))
        wanted["quantization_config.weight_block_size"] = (quantized.get("weight_block_size"), ([128, 128],))
        wanted["quantization_config.fmt"] = (quantized.get("fmt", "e4m3"), ("e4m3",))
    for name, (value, supported) in wanted.items():
        if value not in supported:
            raise ModelError(f"{source}: {name} {value!r} is not supported; supported: {supported[-1]!r}")
