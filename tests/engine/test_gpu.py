"""The engine's step on a GPU. Without one its kernels are interpreted on the CPU and graphs are run again as functions:
what is padded, kept and read is the same."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.gpu import random_fp8
from porcelet.config import PAGE_SIZE, EngineConfig, ModelConfig
from porcelet.engine.engine import Engine
from porcelet.engine.gpu import GraphedSteps, device_of, ladder, move
from porcelet.engine.runner import Runner
from porcelet.errors import InputError, MissingExtraError
from porcelet.kernels import OPS
from porcelet.kernels.linear import FP8Operand, FP8Weight, PackedWeight
from porcelet.models.transformer import Transformer
from porcelet.types import SamplingParams
from tests.engine.test_step import NUM_PAGES, PACKED_V3, Sequences, make
from tests.models.variants import LLAMA, V2, V3

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, when the interpreter's exp overflows

HALF = torch.float16  # the interpreter multiplies bfloat16 wrongly
CPU = torch.device("cpu")
MODELS: dict[str, tuple[ModelConfig, str]] = {
    "llama": (LLAMA, "float32"),
    "deepseek_v2": (V2, "float32"),
    "deepseek_v3": (V3, "float32"),
    "deepseek_v3 int8": (PACKED_V3, "int8"),
}
Plan = list[tuple[dict[int, int], int]]  # new tokens of some sequences, and how many of these attend expanded
# Prompts in chunks, decoding alone and in company, guesses among it, past the end of a page.
PLAN: Plan = [
    ({0: 60}, 0),
    ({1: 9, 2: 5}, 0),
    ({0: 3, 1: 1, 2: 1}, 0),
    ({0: 1, 1: 1, 2: 1}, 0),
    ({2: 1, 0: 1}, 0),
    ({0: 1}, 0),
    ({0: 1, 1: 4}, 0),
]
SHORT: Plan = [({1: 3, 0: 6}, 1), ({0: 2, 1: 1, 2: 2}, 0), ({0: 1, 1: 1, 2: 1}, 0)]


def take_bodies(which: str, patch: pytest.MonkeyPatch) -> None:
    """From now on and until `patch` ends, ops take those of PORCELET_KERNELS."""
    patch.setenv("PORCELET_KERNELS", which)
    for an_op in OPS.values():
        patch.setattr(an_op, "_resolved", {})


def again(function: Callable[[], tuple[Tensor, Tensor]]) -> tuple[tuple[Tensor, Tensor], Callable[[], Any]]:
    """What a graph is to its user: results that lie where they lay."""
    outputs = function()

    def replay() -> None:
        for kept, new in zip(outputs, function(), strict=True):
            kept.copy_(new)

    return outputs, replay


def logits_of(runner: Runner, plan: Plan = PLAN) -> list[Tensor]:
    sequences = Sequences(3)
    return [runner.run(sequences.batch(new, num_expanded=last)).float().clone() for new, last in plan]


def close(found: list[Tensor], wanted: list[Tensor]) -> None:
    """Within what half precision leaves of some layers."""
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape
        assert 1 - torch.nn.functional.cosine_similarity(one, other).min() < 2e-4


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are interpreted only where there is no GPU")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name == "deepseek_v2" else []) for name in MODELS]
)
def test_a_model_computes_the_same_with_the_bodies_for_gpus(name: str) -> None:
    """Whole steps of each architecture against float32 and the definitions, packed weights among them."""
    config, weights = MODELS[name]
    layers = config.num_hidden_layers
    with pytest.MonkeyPatch.context() as patch:
        take_bodies("reference", patch)
        patch.setenv("PORCELET_ACTIVATIONS", "16")  # nearest to none at all
        wanted = logits_of(Runner(make(config, weights), NUM_PAGES, layers), SHORT)
    moved = move(make(config, weights), CPU, HALF)
    with pytest.MonkeyPatch.context() as patch:
        take_bodies("interpreted", patch)
        close(logits_of(Runner(moved, NUM_PAGES, layers, cache_dtype=HALF), SHORT), wanted)


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are interpreted only where there is no GPU")
def test_fp8_weights_may_round_their_activations() -> None:
    """Whole steps of V3 from FP8 by the bodies for GPUs, against the definitions; scales are powers of two if the
    weights' are."""
    # Experts' parts are whole blocks; one layer is dense.
    config = dataclasses.replace(V3, moe_intermediate_size=128, num_hidden_layers=2, num_nextn_predict_layers=0)
    plan: Plan = [({1: 3, 0: 6}, 1), ({0: 1, 1: 1, 2: 1}, 0)]

    def made(dtype: torch.dtype) -> Transformer:
        torch.manual_seed(3)
        return move(random_fp8(config, CPU, torch.float32), CPU, dtype, activations="fp8")

    with pytest.MonkeyPatch.context() as patch:
        take_bodies("reference", patch)
        model = made(torch.float32)
        found = [w for module in model.modules() for w in vars(module).values() if isinstance(w, FP8Operand)]
        assert found and not any(weight.power_of_two for weight in found)
        wanted = logits_of(Runner(model, NUM_PAGES, config.num_hidden_layers), plan)
    with pytest.MonkeyPatch.context() as patch:
        take_bodies("interpreted", patch)
        runner = Runner(made(HALF), NUM_PAGES, config.num_hidden_layers, cache_dtype=HALF)
        for one, other in zip(logits_of(runner, plan), wanted, strict=True):
            assert 1 - torch.nn.functional.cosine_similarity(one, other).min() < 5e-3
    layer = model.model.layers[0].self_attn.o_proj
    halves = FP8Weight(layer.weight.values, torch.full_like(layer.weight.scale, 0.25))
    for module in model.modules():
        for name, weight in vars(module).items():
            if isinstance(weight, FP8Operand):
                module.__dict__[name] = FP8Weight(weight.values, torch.ones_like(weight.scale))
    layer.__dict__["weight"] = halves
    move(model, CPU, torch.float32, activations="fp8")
    assert layer.weight.power_of_two
    with pytest.raises(InputError, match="the model has no weights in FP8"):
        move(make(LLAMA), CPU, HALF, activations="fp8")


@pytest.mark.parametrize("config", [LLAMA, V3], ids=["llama", "deepseek_v3"])
def test_graphs_give_what_the_eager_step_gives(config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches between two sizes are filled up; prompts and steps with guesses run eagerly."""

    take_bodies("reference", monkeypatch)
    model, layers = make(config), config.num_hidden_layers
    runner = Runner(model, NUM_PAGES + 1, layers)
    runner._graphs = graphs = GraphedSteps(model, runner.cache, 6, NUM_PAGES * PAGE_SIZE, capture=again)
    for found, wanted in zip(logits_of(runner), logits_of(Runner(model, NUM_PAGES, layers)), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert runner.num_recordings == 3 and set(graphs._graphs) == {1, 2, 4}


def test_who_fills_a_graph_up_writes_to_a_page_of_its_own() -> None:
    """No page of a sequence changes but where its own new token goes."""
    model = make(LLAMA)
    runner = Runner(model, NUM_PAGES + 1, LLAMA.num_hidden_layers)
    graphs = GraphedSteps(model, runner.cache, 8, NUM_PAGES * PAGE_SIZE, capture=again)
    for layer in runner.cache:
        for pages in layer:
            pages.fill_(7.0)
    sequences = Sequences(3)
    sequences.lengths = [5, 70, 64]
    batch = sequences.batch({0: 1, 1: 1, 2: 1})
    with torch.inference_mode():
        graphs.run(batch)
    for layer in runner.cache:
        for pages in layer:
            changed = (pages[:NUM_PAGES] != 7.0).any(-1).any(-1).nonzero().tolist()
            written = sorted([sequences.pages[i][n // PAGE_SIZE], n % PAGE_SIZE] for i, n in enumerate((5, 70, 64)))
            assert changed == written and (pages[NUM_PAGES, 0] != 7.0).any()


def test_the_ladder_has_every_small_size_and_the_most() -> None:
    """Nobody waits for a graph much larger than the batch."""
    assert ladder(1) == [1] and ladder(3) == [1, 2, 3] and ladder(8) == [1, 2, 4, 8]
    assert ladder(20) == [1, 2, 4, 8, 16, 20]


def test_moving_keeps_what_a_format_holds() -> None:
    """Gates stay in float32, packed weights packed, heads become one matrix, tied tables stay one."""
    model = move(make(PACKED_V3, "int8"), CPU, HALF)
    gate = next(module for name, module in model.named_modules() if name.endswith("mlp.gate"))
    assert gate.weight.dtype == torch.float32 and gate.e_score_correction_bias.dtype == torch.float32
    attention = model.model.layers[0].self_attn
    assert attention.packed_w_uk is None and attention.kv_b_proj.weight.dtype == HALF
    assert isinstance(attention.o_proj.weight, PackedWeight)
    assert model.model.norm.weight.dtype == HALF and not model.model.norm.weight.requires_grad
    for weights in ("float32", "int8"):
        tied = move(make(dataclasses.replace(LLAMA, tie_word_embeddings=True), weights), CPU, HALF)
        assert tied.lm_head.weight is tied.model.embed_tokens.weight
    wide = make(LLAMA)
    stored = FP8Weight(torch.zeros(96, 64).to(torch.float8_e4m3fn), torch.ones(1, 1))
    del wide.model.layers[0].mlp.up_proj._parameters["weight"]
    wide.model.layers[0].mlp.up_proj.__dict__["weight"] = stored
    assert isinstance(move(wide, CPU, HALF).model.layers[0].mlp.up_proj.weight, FP8Weight)


def test_a_gpu_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No GPU, one that is too old, no Triton, and settings that only a CPU has; nothing is loaded before."""
    on_gpu = EngineConfig(device="cuda")
    assert device_of(EngineConfig()) == CPU
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="torch sees no GPU; choose device=cpu"):
            Engine(make(LLAMA), on_gpu)
        with pytest.raises(InputError, match="torch sees no GPU"):
            Engine.load(tmp_path, on_gpu)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    with pytest.raises(InputError, match=r"Turing \(sm_75\): nothing; the kernels need sm_80; choose device=cpu"):
        device_of(on_gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    with pytest.raises(InputError, match="expert_memory is 4GB, and experts on disk are for device=cpu"):
        device_of(EngineConfig(device="cuda", expert_memory="4GB"))
    with pytest.raises(InputError, match=r"cache_dtype is float32, and on a GPU the cache is torch.bfloat16"):
        device_of(EngineConfig(device="cuda", cache_dtype="float32"))
    with pytest.raises(InputError, match="activations is fp8, which is for GPUs"):
        EngineConfig(activations="fp8")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 6))
    with pytest.raises(InputError, match="activations is fp8, and Ampere GPUs do not multiply FP8"):
        device_of(EngineConfig(device="cuda", activations="fp8"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(MissingExtraError, match=r"porcelet\[gpu\]"):
        device_of(on_gpu)
    with pytest.raises(InputError, match="device is 'tpu'"):
        EngineConfig(device="tpu")


@pytest.mark.gpu
@pytest.mark.parametrize("name", MODELS)
def test_an_engine_on_a_gpu_writes_what_the_cpu_writes(name: str) -> None:
    """Greedy answers of a few tokens, graphs and all."""
    config, weights = MODELS[name]
    params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    prompts = [[1, 2, 3], list(range(1, 80)), [5]]
    engine = Engine(make(config, weights), EngineConfig(device="cuda", speculation="off"))
    found = [output.tokens for output in engine.generate(prompts, params)]
    assert engine.runner.recorded
    wanted = [output.tokens for output in Engine(make(config, weights)).generate(prompts, params)]
    same = sum(a == b for one, other in zip(found, wanted, strict=True) for a, b in zip(one, other, strict=True))
    assert same >= 30  # of 36: half precision may turn a near tie
