"""Configs: unusable values are refused by name, with the remedy."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from porcelet.config import (
    DataConfig,
    EngineConfig,
    ModelConfig,
    TrainConfig,
    override,
    parse_settings,
    read_file,
    read_hf,
    write_hf,
)
from porcelet.errors import InputError, ModelError
from porcelet.models.rope import angles
from porcelet.types import SamplingParams
from tests.models.variants import VARIANTS, YARN_V3, published_v2_lite, published_v3


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_hf_round_trip(config: ModelConfig) -> None:
    """`from_hf` reads what `to_hf` writes."""
    assert read_hf(write_hf(config)) == config


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("model_type", "gpt2", "gpt2"),
        ("hidden_size", None, "hidden_size"),
        ("hidden_size", -7168, "hidden_size is -7168"),
        ("vocab_size", "many", "vocab_size is 'many'"),
        ("n_group", 7, "n_group 7"),
        ("num_experts_per_tok", 1000, "1000"),
        ("rope_scaling", {"type": "dynamic", "factor": 40}, "RoPE scaling 'dynamic'"),
        ("rope_scaling", {"type": "yarn", "factor": 0.5}, "factor is 0.5"),
        ("rope_scaling", {"type": "yarn", "factor": 40, "mscale": "big"}, "mscale is 'big'"),
        ("rope_scaling", {"type": "yarn"}, "factor"),
        ("rope_scaling", {"type": "llama3", "factor": 8, "low_freq_factor": 4}, "low_freq_factor 4.0 is not below"),
        ("rope_theta", 1.0, "rope_theta is 1.0"),
        ("rope_interleave", "yes", "rope_interleave is 'yes'"),
        ("scoring_func", "softmax", "scoring_func 'softmax'"),
        ("topk_method", "greedy", "topk_method is 'greedy'"),
        ("attention_bias", True, "attention_bias"),
        ("use_sliding_window", True, "use_sliding_window"),
        ("layer_types", ["full_attention", "sliding_attention"], "layer_types 'sliding_attention'"),
        ("eos_token_id", 129280, "token id 129280"),
        ("kv_lora_rank", 0, "kv_lora_rank is 0"),
        ("first_k_dense_replace", -1, "first_k_dense_replace is -1"),
        ("rope_scaling", "yarn", "rope_scaling is 'yarn'"),
        ("partial_rotary_factor", 0.5, "partial_rotary_factor 0.5"),
        ("rope_theta", "x", "missing or unusable"),
        ("rms_norm_eps", "1e-5", "rms_norm_eps is '1e-5'"),
        ("quantization_config", {"quant_method": "awq"}, "quant_method 'awq'"),
        ("quantization_config", {"quant_method": "fp8", "weight_block_size": [64, 64]}, r"\[64, 64\]"),
        ("quantization_config", "fp8", "quantization_config is 'fp8'"),
        ("num_nextn_predict_layers", 3, "num_nextn_predict_layers"),
    ],
)
def test_unusable_model_config(field: str, value: Any, message: str) -> None:
    """A missing, absurd or unsupported field is one ModelError that names it."""
    values = published_v3() | {field: value}
    with pytest.raises(ModelError, match=message):
        read_hf(values)


def test_v2_with_renormalised_weights_is_refused() -> None:
    """Implementations disagree on what it would mean, so it is not guessed; a q_lora_rank left out is not, either."""
    with pytest.raises(ModelError, match="norm_topk_prob"):
        read_hf(published_v2_lite() | {"norm_topk_prob": True})
    values = published_v2_lite()
    del values["q_lora_rank"]
    with pytest.raises(ModelError, match="q_lora_rank is missing"):
        read_hf(values)


def test_what_the_published_configs_imply() -> None:
    """Softmax scales with YaRN's mscale squared, and the counts from which MLA changes its form, from the papers."""
    v3, lite = read_hf(published_v3()), read_hf(published_v2_lite())
    assert v3.softmax_scale == pytest.approx(0.135234, abs=1e-6)
    assert lite.softmax_scale == pytest.approx(0.114721, abs=1e-6)
    assert v3.rope_scaling and v3.rope_scaling.angle_factor == 1.0
    assert v3.absorbed_below() == lite.absorbed_below() == 171


def test_every_token_that_ends_an_answer_is_read(tmp_path: Path) -> None:
    """Chat models name some in generation_config.json only; a GGUF has one key a kind."""
    (tmp_path / "config.json").write_text(json.dumps(published_v3()))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 1]}))
    assert read_file(tmp_path / "config.json").eos_token_ids == (1, 7)
    (tmp_path / "generation_config.json").write_text("[")
    with pytest.raises(ModelError, match="generation_config"):
        read_file(tmp_path / "config.json")


ODD: list[Any] = [None, True, 0, -1, 1.5, math.nan, math.inf, 10**400, 2**31 - 1, 1e-320, 1e308]
ODD += ["", "x", [], [1], [[1]], {}, {"a": 1}]
BASES = {"v3": published_v3(), "v2": published_v2_lite(), "qwen3": write_hf(VARIANTS["qwen3"])}


@pytest.mark.parametrize("values", BASES.values(), ids=BASES)
def test_any_odd_value_is_a_config_or_one_error(values: dict[str, Any], tmp_path: Path) -> None:
    """Whatever JSON a field holds: a config that can be counted, rotated and written, or a ModelError."""
    values = values | {"rope_theta": 1e4, "rope_parameters": None, "layer_types": None, "attention_bias": False}
    scalings = [
        {"rope_scaling": {**YARN_V3, name: odd}} for name in [*YARN_V3, "rope_theta", "truncate"] for odd in ODD
    ]
    for change in [*scalings, *({name: odd} for name in values for odd in ODD)]:
        (tmp_path / "config.json").write_text(json.dumps(values | change))
        try:
            config = read_file(tmp_path / "config.json")
        except ModelError as problem:
            assert len(str(problem)) < 1000
            continue
        assert config.num_parameters(mtp=True) > 0 and config.absorbed_below() > 0 and config.packed_bytes(4) > 0
        assert read_hf(write_hf(config)) == config
        cos, _ = angles(config, torch.arange(2), torch.float32)
        assert cos.isfinite().all() and config.softmax_scale > 0


def test_override_converts_and_names_the_nearest_key() -> None:
    """`key=value` words become typed fields; a typing mistake is answered with the key that was meant."""
    config = override(EngineConfig(), parse_settings(["cache_tokens=640", "weights=int8"]), "--set")
    assert config == EngineConfig(cache_tokens=640, weights="int8")
    with pytest.raises(InputError, match="did you mean 'cache_tokens'"):
        override(EngineConfig(), {"cache_token": 1}, "--set")
    with pytest.raises(InputError, match="cache_tokens is 'x'"):
        override(EngineConfig(), {"cache_tokens": "x"}, "--set")
    with pytest.raises(InputError, match="key=value"):
        parse_settings(["weights"])


@pytest.mark.parametrize("weights", [(1.0, -1.0), (1.0, math.nan), (0.0, 0.0), (1.0, math.inf)])
def test_weights_that_are_no_shares_are_refused(weights: tuple[float, ...]) -> None:
    """Below 0, not a number, infinite, or all 0; one of them may be 0."""
    with pytest.raises(InputError, match="weights are"):
        DataConfig(corpus=("one", "two"), weights=weights)
    assert DataConfig(corpus=("one", "two"), weights=(0.0, 0.5)).weights == (0.0, 0.5)


UNTRAINABLE: list[dict[str, Any]] = [
    {"method": "dpo"},
    {"steps": 0},
    {"method": "grpo", "samples_per_step": 63},
    {"output": ""},
    {"threads": 100_000},
    {"seed": 2**63},
]


@pytest.mark.parametrize("values", UNTRAINABLE, ids=str)
def test_unusable_train_config(values: dict[str, Any]) -> None:
    """Values that cannot be trained with are refused before anything starts."""
    with pytest.raises(InputError):
        dataclasses.replace(TrainConfig(), **values)


@pytest.mark.parametrize(
    "values",
    [
        {"max_tokens": 0},
        {"max_tokens": 10**20},
        {"top_k": 2**63},
        {"top_k": -1},
        {"temperature": float("nan")},
        {"top_p": 0},
        {"min_p": 1.5},
        {"presence_penalty": 2.1},
        {"frequency_penalty": float("nan")},
        {"repetition_penalty": 0},
        {"logprobs": 21},
        {"logit_bias": ((1, 100.5),)},
        {"logit_bias": ((1, 1.0), (1, 2.0))},
        {"logit_bias": tuple((token, 1.0) for token in range(1025))},
        {"stop": "a string"},
        {"stop": ("x",) * 17},
        {"stop": ("x", "")},
        {"stop": ("x" * 1025,)},
        {"stop": ("\ud800",)},
    ],
    ids=str,
)
def test_unusable_sampling_params(values: dict[str, Any]) -> None:
    """What a draw could not compute with is refused where it is made, so that it never reaches the engine."""
    with pytest.raises(InputError, match=next(iter(values))):
        SamplingParams(**values)
