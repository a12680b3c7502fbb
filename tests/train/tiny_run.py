"""A run that takes milliseconds a step: a V3 model of some 30,000 parameters on sums of small numbers."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from porcelet.config import TaskConfig, TrainConfig, read_hf
from porcelet.models.transformer import Transformer, build, initialize
from porcelet.train.measure import MEASURED

FIELDS: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 2,
    "num_nextn_predict_layers": 1,
    "initializer_range": 0.2,
}


def config(output: Path, **changes: Any) -> TrainConfig:
    """A run of 12 steps; `changes` may name fields of its tables and options of its task without the table."""
    values = {"output": str(output), "steps": 12, "samples_per_step": 8, "checkpoint_every": 6}
    values |= changes
    values = {"warmup_steps": min(2, values["steps"])} | values
    own = {field.name for field in dataclasses.fields(TrainConfig)}
    tables: dict[str, Any] = {}
    for name in ("data", "optimizer", "policy", "lora", "log", "evaluate"):
        kind = type(getattr(TrainConfig(), name))
        known = {field.name for field in dataclasses.fields(kind)} - own
        tables[name] = kind(**{key: values.pop(key) for key in known & values.keys()})
    task = TaskConfig(name=values.pop("task", "sums"), options={k: values.pop(k) for k in values.keys() - own})
    return TrainConfig(**(tables | {"task": task} | values))


def model(seed: int = 0, **changes: Any) -> Transformer:
    """A model over the sums' tokenizer, random enough that no two logits are nearly equal."""
    shape = read_hf(FIELDS | {"vocab_size": 261, "eos_token_id": 1, "bos_token_id": 0})
    return initialize(build(dataclasses.replace(shape, **changes)), seed)


def state_of(output: Path) -> dict[str, Tensor]:
    """The tensors of a run's newest checkpoint; there must be exactly one."""
    (folder,) = (output / "checkpoint").iterdir()
    return load_file(folder / "state.safetensors")


def metrics_of(output: Path) -> list[dict[str, float]]:
    """A run's metrics without those that are measured anew by every run."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{name: value for name, value in line.items() if name not in MEASURED} for line in lines]
