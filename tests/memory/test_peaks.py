"""The memory of our own engine: counted exactly where it can be, and within 5 % of real processes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from porcelet.config import EngineConfig, ModelConfig
from porcelet.engine.runner import Runner
from porcelet.memory.buffers import step_bytes
from porcelet.memory.engine import engine_memory
from porcelet.memory.tensors import kept, read_inventory, tensors_of
from porcelet.models.transformer import build, initialize
from porcelet.types import Batch
from porcelet.weights.load import checkpoint_tensors, load, save
from tests.memory.memory_of import peak_of
from tests.models.variants import VARIANTS
from tests.weights import tiny_gguf

TOLERANCE = 0.05
LLAMA = ModelConfig(
    architecture="llama",
    vocab_size=32000,
    hidden_size=768,
    intermediate_size=2048,
    num_hidden_layers=12,
    num_attention_heads=12,
    num_key_value_heads=4,
    head_dim=64,
    max_position_embeddings=8192,
)
QWEN = dataclasses.replace(
    LLAMA,
    architecture="qwen2",
    vocab_size=50000,
    hidden_size=640,
    intermediate_size=1792,
    num_hidden_layers=10,
    num_attention_heads=10,
    num_key_value_heads=2,
    tie_word_embeddings=True,
)
V3 = ModelConfig(
    architecture="deepseek_v3",
    vocab_size=16000,
    hidden_size=512,
    intermediate_size=1536,
    num_hidden_layers=6,
    num_attention_heads=8,
    num_key_value_heads=8,
    head_dim=96,
    max_position_embeddings=8192,
    rope_interleave=True,
    q_lora_rank=256,
    kv_lora_rank=256,
    qk_nope_head_dim=64,
    qk_rope_head_dim=32,
    v_head_dim=64,
    n_routed_experts=32,
    n_shared_experts=1,
    num_experts_per_tok=4,
    moe_intermediate_size=512,
    first_k_dense_replace=1,
    n_group=4,
    topk_group=2,
    routed_scaling_factor=2.5,
)
V2 = dataclasses.replace(
    V3,
    architecture="deepseek_v2",
    q_lora_rank=None,
    topk_method="greedy",
    norm_topk_prob=False,
    n_group=1,
    topk_group=1,
    routed_scaling_factor=1.0,
)
V3_MTP = dataclasses.replace(V3, num_nextn_predict_layers=1)
SMALL = dataclasses.replace(LLAMA, num_hidden_layers=4)
# Name → model, engine settings. A cache of 4,096 tokens is filled by 8 prompts of 480 tokens with answers of 32.
ENGINES: dict[str, tuple[ModelConfig, dict[str, Any]]] = {
    "small llama int8": (SMALL, {"weights": "int8"}),
    "llama float32": (LLAMA, {"weights": "float32"}),
    "llama float32, large cache": (LLAMA, {"weights": "float32", "cache_tokens": 12288}),
    "llama int8": (LLAMA, {"weights": "int8"}),
    "llama int8, large cache": (LLAMA, {"weights": "int8", "cache_tokens": 12288}),
    "qwen2 int4": (QWEN, {"weights": "int4"}),
    "qwen2 float32, short steps": (QWEN, {"weights": "float32", "max_batch_tokens": 64}),
    "deepseek_v2 float32": (V2, {"weights": "float32"}),
    "deepseek_v2 int4": (V2, {"weights": "int4"}),
    "deepseek_v3 int8": (V3, {"weights": "int8"}),
    "deepseek_v3 with its MTP layer": (V3_MTP, {"weights": "float32"}),
    "deepseek_v3, experts on disk": (V3, {"weights": "int8", "expert_memory": "60MB"}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_tensor_is_counted(name: str) -> None:
    """Names and shapes that follow from a config are those of the model that is built from it."""
    built = {name: tuple(tensor.shape) for name, tensor in checkpoint_tensors(build(VARIANTS[name], "meta"))}
    assert dict(tensors_of(VARIANTS[name])) == built


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("weights", ["float32", "int8", "int4"])
def test_loaded_weights_have_the_counted_size(name: str, weights: str, tmp_path: Path) -> None:
    """Of a folder, byte by byte, whatever can be packed and what cannot."""
    save(initialize(build(VARIANTS[name]), seed=0), tmp_path)
    assert kept(read_inventory(tmp_path), weights).weights == _held(load(tmp_path, weights))


@pytest.mark.parametrize("type_name", ["Q4_0", "Q4_1", "Q5_0", "Q8_0", "F16"])
@pytest.mark.parametrize("architecture", ["llama", "deepseek2"])
def test_weights_of_a_gguf_file_have_the_counted_size(architecture: str, type_name: str, tmp_path: Path) -> None:
    """As they are stored: symmetric blocks, stacked experts, the two parts of kv_b."""
    tiny_gguf.write(tmp_path / "model.gguf", type_name, architecture=architecture)
    inventory = read_inventory(tmp_path / "model.gguf")
    for weights in ("stored", "int8", "float32"):
        assert kept(inventory, weights).weights == _held(load(tmp_path / "model.gguf", weights)), weights


def _held(model: Any) -> int:
    """Bytes of all weights of a model, those that are tied once."""
    from porcelet.engine.step import _weights

    return sum({address: tensor.nbytes for _, _, _, tensor, address in _weights(model)}.values())


@pytest.mark.parametrize("weights", ["float32", "int8"])
@pytest.mark.parametrize("config", [SMALL, V3, V2], ids=["llama", "deepseek_v3", "deepseek_v2"])
def test_the_buffers_of_a_recorded_step_are_counted(config: ModelConfig, weights: str, tmp_path: Path) -> None:
    """Within a tenth of what the recording lends; logits and the parts of long sequences are touched as needed."""
    small = dataclasses.replace(config, vocab_size=64, num_hidden_layers=2)
    save(initialize(build(small), seed=0), tmp_path)
    runner = Runner(load(tmp_path, weights), num_pages=2, num_layers=2, capacity=512)
    runner.run(_one_token())
    found = runner._steps[False]._tape.arena.num_bytes
    logits = 4 * 256 * small.vocab_size
    assert abs(step_bytes(small, 512, packed=weights == "int8") / (found - logits) - 1) < 0.1


def _one_token() -> Batch:
    return Batch(
        request_ids=("a",),
        tokens=(3,),
        positions=(0,),
        offsets=(0, 1),
        lengths=(1,),
        tables=((0,),),
        expanded=(False,),
        sampled_rows=(0,),
        draws=(),
    )


def _engine_case(name: str, folder: Path) -> tuple[int, int]:
    """Predicted and real peak."""
    config, settings = ENGINES[name]
    engine = {"cache_tokens": 4096, "max_sequences": 8, "speculation": "auto"} | settings
    save(initialize(build(config), seed=0), folder / "model")
    inventory = read_inventory(folder / "model")
    made = EngineConfig(**engine)
    num_prompts = made.cache_tokens // 512
    real = peak_of("engine", path=str(folder / "model"), engine=engine, work=[num_prompts, 480, 32])
    return engine_memory(config, made, stored=inventory).peak, real


QUICK = ("small llama int8",)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in ENGINES]
)
def test_the_peak_of_an_engine_is_predicted(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a fresh process that fills its cache with steps as large as they may be."""
    monkeypatch.setenv("PORCELET_HOME", str(tmp_path / "home"))
    assert_near(name, *_engine_case(name, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [4096, 16384])
def test_the_peak_of_the_default_model_is_predicted(default_model: Path, tokens: int) -> None:
    """As it is stored, in a GGUF file that is mapped while it is read."""
    engine = {"cache_tokens": tokens, "max_sequences": 8}
    inventory = read_inventory(default_model)
    predicted = engine_memory(inventory.config, EngineConfig(**engine), stored=inventory).peak
    real = peak_of("engine", path=str(default_model), engine=engine, work=[tokens // 512, 480, 32])
    assert_near(f"default model, {tokens} tokens", predicted, real)


def assert_near(name: str, predicted: int, real: int) -> None:
    print(f"{name}: {predicted / 1e6:.0f} MB predicted, {real / 1e6:.0f} MB real, {predicted / real - 1:+.1%}")
    assert abs(predicted / real - 1) <= TOLERANCE
