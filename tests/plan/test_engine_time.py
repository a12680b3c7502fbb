"""Forecasts of our own engine: from costs of a machine, put together as the model is, and compared with the engine."""

from __future__ import annotations

import dataclasses
import statistics
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from porcelet.cli import app
from porcelet.cli.bench import _compared, _conditions, _measured
from porcelet.config import ModelConfig
from porcelet.errors import InputError
from porcelet.kernels import cpu
from porcelet.models.transformer import build, initialize
from porcelet.plan.engine_time import EngineTime, scaled_to
from porcelet.plan.machine import Machine, check_current, load, save
from porcelet.plan.model import find_model
from porcelet.weights.load import save as save_model

FORMATS, CACHES = ("float32", "int8", "int4"), ("float32", "float16")
BYTES = {"float32": 4, "int8": 1.2, "int4": 0.7}
COSTS = {
    **{f"product.{w}.{n}": 1e-11 * (1 + n / 16) * b for w, b in BYTES.items() for n in (1, 16, 512)},
    **{f"product_call.{w}.{n}": 3e-7 * n for w in FORMATS for n in (1, 16, 512)},
    **{f"experts.{w}.{n}": 2e-11 * (1 + n) for w in FORMATS for n in (1, 1.5, 64)},
    **{f"{name}.{c}.{n}": 8e-12 for name in ("attention", "absorbed", "absorbing") for c in CACHES for n in (1, 16)},
    **{f"{name}.{c}": 6e-12 for name in ("attention_prompt", "expanded") for c in CACHES},
    **{f"{name}.{n}": 1e-10 for name in ("pointwise", "pointwise_call") for n in (1, 512)},
    **{f"step.{n}": 1e-4 * n**0.4 for n in (1, 16)},
    **{f"scale.{w}.{n}": 1.0 for w in FORMATS for n in (1, 4, 16)},
    **{f"scale_prompt.{w}": 1.0 for w in FORMATS},
    "token": 7e-10,
    "prompt": 1e-6,
    "read": 3e10,
}  # fmt: skip
MACHINE = Machine("a processor", 2, "avx2", "2.13", "2026-11-23", COSTS)
MODELS = ["v2-lite", "deepseek-v3", "r1-distill-qwen-7b", "r1-distill-llama-8b"]


def test_profile_is_kept_and_read_back(tmp_path: Path) -> None:
    """Bit for bit; what is no profile is refused, and none is None."""
    file = tmp_path / "machine.json"
    assert load(file) is None
    assert load(save(MACHINE, file)) == MACHINE
    file.write_text('{"processor": "x"}')
    with pytest.raises(InputError, match="no profile of a machine"):
        load(file)


@pytest.mark.parametrize("name", ["processor", "threads", "instructions", "torch", "porcelet"])
def test_a_profile_of_other_conditions_is_refused(name: str) -> None:
    """The refusal says what differs and how to measure again."""
    check_current(MACHINE, MACHINE)
    other = dataclasses.replace(MACHINE, **{name: "another"})
    with pytest.raises(InputError, match=f"{name} .*another.*porcelet bench"):
        check_current(MACHINE, other)


def test_costs_lie_between_their_neighbours() -> None:
    """Interpolated in logarithms; beyond the last number they go on as between the last two."""
    low, middle, high, beyond = (MACHINE.cost("product.int8", n) for n in (1, 4, 16, 2048))
    assert low < middle < high < beyond
    assert MACHINE.cost("experts.int4", 1.5) == pytest.approx(COSTS["experts.int4.1.5"])
    with pytest.raises(InputError, match="no 'product.int3'"):
        MACHINE.cost("product.int3", 1)


@given(st.sampled_from(MODELS), st.sampled_from(FORMATS), st.integers(1, 64), st.integers(1, 4000))
def test_more_work_takes_longer(name: str, weights: str, sequences: int, context: int) -> None:
    """Sequences and context make a step longer; more sequences write more in all; a prompt takes longer than a part."""
    time = EngineTime(find_model(name).config, weights, MACHINE)
    assert all(part.seconds >= 0 for part in time.decode(sequences, context))
    assert time.decode_rate(sequences, context) > time.decode_rate(sequences, 2 * context)
    assert sequences / time.decode_rate(sequences, context) < 2 * sequences / time.decode_rate(2 * sequences, context)
    assert context / time.prompt_rate(1, context) < (context + 64) / time.prompt_rate(1, context + 64) * 1.3


def test_a_reference_sets_the_scale() -> None:
    """A machine whose reference takes twice what its costs say takes twice as long for every model."""
    config = find_model("r1-distill-llama-8b").config
    plain = EngineTime(config, "int8", MACHINE)
    taken = {
        f"reference.{w}.{n}": 2 * n / EngineTime(config, w, MACHINE).decode_rate(n, 120)
        for w in FORMATS
        for n in (1, 4, 16)
    }
    taken |= {f"reference_prompt.{w}": 3 / EngineTime(config, w, MACHINE).prompt_rate(16, 100) for w in FORMATS}
    slow = scaled_to(dataclasses.replace(MACHINE, costs={**COSTS, **taken}), config, 100, 40)
    time = EngineTime(config, "int8", slow)
    assert time.decode_rate(4, 500) == pytest.approx(plain.decode_rate(4, 500) / 2)
    assert time.prompt_rate(1, 300) == pytest.approx(plain.prompt_rate(1, 300) / 3)


def test_plan_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a profile the command says how to get one; with one it tells speeds; an unknown format is refused."""
    monkeypatch.setenv("PORCELET_HOME", str(tmp_path))
    runner = CliRunner()
    refused = runner.invoke(app, ["plan", "v2-lite", "--on", "here"])
    assert "porcelet bench" in str(refused.exception)
    save(MACHINE)
    shown = runner.invoke(app, ["plan", "v2-lite", "--on", "here", "--weights", "int4"])
    assert shown.exit_code == 0 and "16 at once" in shown.output and "routed experts" in shown.output
    assert "give --weights" in str(runner.invoke(app, ["plan", "r1", "--on", "here"]).exception)


def test_bench_refuses_what_it_cannot_forecast(monkeypatch: pytest.MonkeyPatch) -> None:
    """A format without costs, and an installation without the native library: before anything is measured."""
    runner = CliRunner()
    assert "--weights is 'fp8'" in str(runner.invoke(app, ["bench", "r1", "--weights", "fp8"]).exception)
    monkeypatch.setattr(cpu, "available", lambda: False)
    assert "porcelet doctor" in str(runner.invoke(app, ["bench"]).exception)


# ---- beside the engine ----------------------------------------------------------------------------------------------

COMMON = {"vocab_size": 16384, "hidden_size": 768, "intermediate_size": 2048, "max_position_embeddings": 4096}
LATENT = {
    "num_attention_heads": 12, "num_key_value_heads": 12, "head_dim": 96, "kv_lora_rank": 256, "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32, "v_head_dim": 64, "n_routed_experts": 16, "num_experts_per_tok": 4,
    "moe_intermediate_size": 512, "first_k_dense_replace": 1, "rope_interleave": True,
}  # fmt: skip
SHAPES = {
    "qwen3": ModelConfig(
        architecture="qwen3", num_hidden_layers=14, num_attention_heads=16, num_key_value_heads=8, head_dim=64, **COMMON
    ),
    "deepseek_v2": ModelConfig(
        architecture="deepseek_v2", num_hidden_layers=8, n_shared_experts=2, topk_method="greedy", norm_topk_prob=False,
        **COMMON, **LATENT,
    ),
    "deepseek_v3": ModelConfig(
        architecture="deepseek_v3", num_hidden_layers=8, n_shared_experts=1, q_lora_rank=384, n_group=4, topk_group=2,
        routed_scaling_factor=2.5, **COMMON, **LATENT,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def measured() -> Machine:
    return _measured(_conditions())


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(not cpu.available(), reason="no compiler, hence no native module")
@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_forecast_beside_the_engine(shape: str, measured: Machine, tmp_path: Path) -> None:
    """Three architectures that nothing was calibrated on, in 8 bits, forecast and run in turns: the median of their
    rates is within 20 %, and none is off by half. The machine must have nothing else to do."""
    save_model(initialize(build(SHAPES[shape]), seed=0), tmp_path)
    rows = list(_compared(str(tmp_path), "int8", measured, 3))
    ratios = [row[key] for row in rows for key in ("decode_ratio", "prefill_ratio")]
    print(shape, [round(ratio, 2) for ratio in ratios])
    assert abs(statistics.median(ratios) - 1) <= 0.2
    assert all(0.5 < ratio < 1.5 for ratio in ratios)
