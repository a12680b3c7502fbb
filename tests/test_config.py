"""Configs: unusable values are refused by name, with the remedy."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from porcelet.config import EngineConfig, ModelConfig, TrainConfig, override, parse_settings
from porcelet.errors import InputError, ModelError
from porcelet.types import SamplingParams
from tests.models.variants import VARIANTS, published_v3


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_hf_round_trip(config: ModelConfig) -> None:
    """`from_hf` reads what `to_hf` writes."""
    assert ModelConfig.from_hf(config.to_hf()) == config


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("model_type", "gpt2", "gpt2"),
        ("hidden_size", None, "hidden_size"),
        ("hidden_size", -7168, "hidden_size is -7168"),
        ("vocab_size", "many", "vocab_size is 'many'"),
        ("n_group", 7, "n_group 7"),
        ("num_experts_per_tok", 1000, "1000"),
        ("rope_scaling", {"type": "yarn", "factor": 40}, "RoPE scaling 'yarn'"),
        ("scoring_func", "softmax", "scoring_func 'softmax'"),
        ("rope_scaling", "yarn", "RoPE scaling is 'yarn'"),
        ("partial_rotary_factor", 0.5, "partial_rotary_factor 0.5"),
        ("rope_theta", "x", "missing or unusable"),
        ("rms_norm_eps", "1e-5", "rms_norm_eps is '1e-5'"),
        ("quantization_config", {"quant_method": "fp8"}, "quantization_config"),
        ("num_nextn_predict_layers", 3, "num_nextn_predict_layers"),
    ],
)
def test_unusable_model_config(field: str, value: Any, message: str) -> None:
    """A missing, absurd or unsupported field is one ModelError that names it."""
    values = published_v3() | {field: value}
    with pytest.raises(ModelError, match=message):
        ModelConfig.from_hf(values)


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


@pytest.mark.parametrize("values", [{"method": "dpo"}, {"steps": 0}, {"method": "grpo", "samples_per_step": 63}])
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
    ],
    ids=str,
)
def test_unusable_sampling_params(values: dict[str, Any]) -> None:
    """What a draw could not compute with is refused where it is made, so that it never reaches the engine."""
    with pytest.raises(InputError, match=next(iter(values))):
        SamplingParams(**values)
