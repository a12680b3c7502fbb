"""The random model of DeepSeek's shape that benchmarks/deepseek.py gives to both engines."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from benchmarks.rivals import deepseek
from porcelet.weights.load import checkpoint_tensors, load
from tests.models.variants import V3

SMALL = dataclasses.replace(V3, n_group=1, topk_group=1, n_shared_experts=1, num_nextn_predict_layers=0)


def test_the_file_holds_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written by the `gguf` library's names reads as the same model: every tensor bit for bit, gates' biases
    other than zero, and the shape."""
    monkeypatch.setattr(deepseek, "CONFIG", SMALL)
    monkeypatch.setattr(deepseek, "_write_tokenizer", lambda writer: None)
    deepseek.write(tmp_path / "small.gguf")
    found, made = load(tmp_path / "small.gguf"), deepseek.make()
    tensors, expected = dict(checkpoint_tensors(found)), dict(checkpoint_tensors(made))
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in tensors)
    assert any(name.endswith(deepseek.BIAS) and tensor.abs().max() > 0 for name, tensor in tensors.items())
    same = ("architecture", "num_experts_per_tok", "routed_scaling_factor", "norm_topk_prob", "qk_nope_head_dim")
    assert all(getattr(found.config, name) == getattr(SMALL, name) for name in same)


def test_its_size() -> None:
    """Its shape is DeepSeek's, its size one that two cores measure in minutes."""
    assert 250e6 < deepseek.CONFIG.num_parameters() < 260e6
    assert 155e6 < deepseek.CONFIG.num_active_parameters() < 165e6
    assert deepseek.CONFIG.q_lora_rank and deepseek.CONFIG.topk_method == "noaux_tc"
