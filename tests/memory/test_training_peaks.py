"""The memory of our own trainer, within 5 % of real runs."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import pytest

from porcelet.config import ModelConfig, write_hf
from porcelet.memory.tensors import counted, read_inventory
from porcelet.memory.training import training_memory
from porcelet.models.transformer import build, initialize
from porcelet.train.recipe import combine
from porcelet.train.rendering import make_tokenizer
from porcelet.weights.load import save
from tests.memory.memory_of import peak_of
from tests.memory.test_peaks import LLAMA, QWEN, SMALL, V2, V3, V3_MTP, assert_near
from tests.train.corpus.tiny_corpus import store_of

WIDE = dataclasses.replace(LLAMA, hidden_size=1024, intermediate_size=2816, num_hidden_layers=8, num_attention_heads=16)
# Name → model and what of the recipe is not as `_pretraining` has it. Rows of a step go through the model at once.
PRETRAININGS: dict[str, tuple[ModelConfig, dict[str, Any]]] = {
    "small llama": (dataclasses.replace(SMALL, vocab_size=4000), {"data": {"tokens_per_step": 512}}),
    "llama": (LLAMA, {}),
    "llama, half the rows": (LLAMA, {"data": {"tokens_per_step": 1024}}),
    "wide llama": (WIDE, {"data": {"tokens_per_step": 1024}}),
    "llama, Muon": (LLAMA, {"optimizer": {"name": "muon"}}),
    "qwen2, tied": (QWEN, {"data": {"tokens_per_step": 4096}}),
    "qwen2, in four passes": (QWEN, {"train": {"tokens_per_pass": 1024}, "data": {"tokens_per_step": 4096}}),
    "deepseek_v2": (V2, {}),
    "deepseek_v3": (V3, {}),
    "deepseek_v3 with its MTP layer": (V3_MTP, {}),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "small llama" else pytest.mark.slow) for name in PRETRAININGS]
)
def test_the_peak_of_pretraining_is_predicted(name: str, tmp_path: Path) -> None:
    """A new model, three steps of full rows."""
    config, changes = PRETRAININGS[name]
    letters = random.Random(0)
    texts = ["".join(letters.choice("abcdefgh ") for _ in range(letters.choice([100, 400, 3000]))) for _ in range(200)]
    store = store_of(tmp_path, texts)
    tables = {
        "train": {"method": "pretrain", "output": str(tmp_path / "run"), "steps": 3} | changes.get("train", {}),
        "data": {"corpus": [str(store.path)], "tokens_per_step": 2048, "context": 512} | changes.get("data", {}),
        "optimizer": {"warmup_steps": 1} | changes.get("optimizer", {}),
        "model": _fields(config),
    }
    train, _ = combine((tables, "the test's recipe"), words={})
    assert_near(name, training_memory(train, counted(config)).peak, peak_of("train", tables=tables))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adapters", "whole"])
def test_the_peak_of_finetuning_is_predicted(name: str, tmp_path: Path) -> None:
    """Conversations, mostly answers, as many as a step of so many tokens holds; with adapters and without."""
    start = _start(LLAMA, tmp_path)
    told = [{"role": "user", "content": "count"}, {"role": "assistant", "content": "one two three " * 6}]
    talks = tmp_path / "talks.jsonl"
    talks.write_text((json.dumps({"messages": told}) + "\n") * 64)
    tables = {
        "train": {"method": "sft", "model": str(start), "output": str(tmp_path / "run"), "steps": 3},
        "data": {"conversations": [str(talks)], "step_of": "tokens", "tokens_per_step": 2048, "context": 512},
        "optimizer": {"warmup_steps": 1},
        **({"lora": {"rank": 16, "merge": False}} if name == "adapters" else {}),
    }
    train, _ = combine((tables, "the test's recipe"), words={})
    found = training_memory(train, read_inventory(start)).peak
    assert_near(f"sft, {name}", found, peak_of("train", tables=tables))


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["float32", "int8"])
def test_the_peak_of_reinforcement_learning_is_predicted(sampler: str, tmp_path: Path) -> None:
    """GRPO with a reference; the rows of a step are those of its prompts and answers."""
    start = _start(V3, tmp_path)
    tables = {
        "train": {"method": "grpo", "model": str(start), "output": str(tmp_path / "run"), "steps": 3},
        "policy": {"group_size": 8, "max_new_tokens": 32, "kl_weight": 0.001, "sampler_weights": sampler},
        "optimizer": {"warmup_steps": 1},
    }
    train, _ = combine((tables, "the test's recipe"), words={})
    rows = 64 * 32 + 8 * 16
    found = training_memory(train, read_inventory(start), rows=rows).peak
    assert_near(f"grpo, sampler {sampler}", found, peak_of("train", tables=tables))


def _fields(config: ModelConfig) -> dict[str, Any]:
    """The recipe's [model] table."""
    known = {field.name for field in dataclasses.fields(config)} | {"model_type"}
    return {key: value for key, value in write_hf(config).items() if key in known and not key.endswith("token_id")}


def _start(config: ModelConfig, folder: Path) -> Path:
    """A model to start from, with the smallest tokenizer."""
    save(initialize(build(dataclasses.replace(config, eos_token_ids=(1,))), seed=0), folder / "start")
    make_tokenizer(folder / "start")
    return folder / "start"
