"""Rotary frequencies against `transformers`' own functions, and the published models' numbers."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import DeepseekV3Config, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from porcelet.config import ModelConfig, RopeScaling, read_gguf, read_hf, write_hf
from porcelet.models.rope import angles, frequencies
from tests.models.variants import LLAMA, published_v2_lite, published_v3

CPU = torch.device("cpu")
LLAMA3 = RopeScaling(kind="llama3", factor=8.0, original_max_position_embeddings=8192)
SCALINGS = {
    "linear": RopeScaling(kind="linear", factor=4.0),
    "llama3": LLAMA3,
    "yarn": RopeScaling(kind="yarn", factor=4.0, original_max_position_embeddings=4096),
    "yarn_untruncated": RopeScaling(kind="yarn", factor=8.0, original_max_position_embeddings=128, truncate=False),
    "yarn_factor": RopeScaling(kind="yarn", factor=8.0, original_max_position_embeddings=128, attention_factor=1.5),
}


@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
def test_frequencies_are_those_of_transformers_bit_for_bit(scaling: RopeScaling) -> None:
    """The same float32 operations in the same order: at position 160,000 the last bit is a hundredth of a radian."""
    config = dataclasses.replace(LLAMA, head_dim=128, rope_theta=5e5, rope_scaling=scaling)
    expected, factor = ROPE_INIT_FUNCTIONS[scaling.kind](LlamaConfig(**write_hf(config)), CPU)
    assert torch.equal(frequencies(config, CPU), expected)
    assert scaling.angle_factor == pytest.approx(factor, rel=1e-12)


@pytest.mark.parametrize("published", [published_v3, published_v2_lite], ids=["v3", "v2_lite"])
def test_the_published_yarn(published: object) -> None:
    """V3's and V2's ramp goes from pair 10 to pair 23 of 32; faster pairs stay, slower ones are divided by 40."""
    assert callable(published)
    config = read_hf(published())
    expected, factor = ROPE_INIT_FUNCTIONS["yarn"](DeepseekV3Config(**write_hf(config)), CPU)
    found = frequencies(config, CPU)
    plain = frequencies(dataclasses.replace(config, rope_scaling=None), CPU)
    assert torch.equal(found, expected) and factor == 1.0
    assert torch.equal(found[:11], plain[:11]) and (found[11:] < plain[11:]).all()
    torch.testing.assert_close(found[23:], plain[23:] / 40, rtol=1e-6, atol=0)
    assert (found[22] > plain[22] / 40).all()


def test_llama3_scaling_is_found_again_in_a_gguf() -> None:
    """GGUF stores Llama 3's rule as one factor a pair; from the factors the rule is recovered, any other is refused."""
    config = dataclasses.replace(LLAMA, head_dim=128, rope_theta=5e5, rope_scaling=LLAMA3)
    plain = frequencies(dataclasses.replace(config, rope_scaling=None), CPU)
    factors = (plain / frequencies(config, CPU)).tolist()
    assert found_scaling(factors) == LLAMA3
    with pytest.raises(Exception, match="value 63 is .* Llama 3's rule"):
        found_scaling([*factors[:63], 1.0])


def found_scaling(factors: list[float]) -> RopeScaling | None:
    metadata = {
        "general.architecture": "llama", "llama.embedding_length": 512, "llama.attention.head_count": 4,
        "llama.feed_forward_length": 64, "llama.context_length": 131072, "llama.block_count": 1, "llama.vocab_size": 9,
        "llama.attention.layer_norm_rms_epsilon": 1e-5, "llama.rope.freq_base": 5e5,
    }  # fmt: skip
    return read_gguf(metadata, tied=False, rope_factors=factors).rope_scaling


def test_angles_serve_training_after_inference() -> None:
    """Frequencies are kept between calls; made first under inference_mode, they must still admit gradients."""
    config: ModelConfig = dataclasses.replace(LLAMA, rope_theta=12345.0)
    with torch.inference_mode():
        angles(config, torch.arange(3), torch.float32)
    cos, _ = angles(config, torch.arange(3), torch.float32)
    x = torch.ones(3, cos.shape[1], requires_grad=True)
    (x * cos).sum().backward()
    assert x.grad is not None and torch.equal(x.grad, cos)
