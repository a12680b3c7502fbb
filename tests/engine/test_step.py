"""The recorded step against the eager one, and a sequence against itself in other company."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from porcelet.config import PAGE_SIZE, EngineConfig, ModelConfig
from porcelet.engine import runner
from porcelet.engine.engine import Engine
from porcelet.engine.runner import Runner
from porcelet.engine.step import step
from porcelet.kernels import OPS, cpu
from porcelet.kernels.attention import Segments
from porcelet.kernels.linear import FP8Weight, PackedWeight
from porcelet.models.attention import PackedView
from porcelet.models.experts import Gate
from porcelet.models.transformer import Transformer, build, initialize
from porcelet.types import Batch, Request, SamplingParams
from porcelet.weights.load import quantized
from porcelet.weights.quantize import to_packed
from tests.models.variants import LLAMA, V3, VARIANTS
from tests.tiny_model import save_tiny_model

pytestmark = pytest.mark.skipif(not cpu.available(), reason="no compiler, hence no native module")

# All widths are whole groups, so every layer is packed.
PACKED_V3 = dataclasses.replace(V3, q_lora_rank=32, kv_lora_rank=64, qk_nope_head_dim=32, v_head_dim=32)
NUM_PAGES, MAX_PAGES = 24, 8
CAPACITY = 16
# Absorbed prompts go through torch's products eagerly; where activations are rounded, a last bit can become a step.
TOLERANCE = {"float32": 1e-5, "int8": 2e-4}


def make(config: ModelConfig, weights: str = "float32") -> Transformer:
    model = initialize(build(config), seed=1).eval()
    generator = torch.Generator().manual_seed(2)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "norm" in name or "bias" in name:
            tensor.data += 0.2 * torch.randn(tensor.shape, generator=generator)
    return quantized(model) if weights == "int8" else model


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def start(model: Transformer, *, capacity: int = CAPACITY, cache_dtype: torch.dtype = torch.float32) -> Runner:
    layers = model.config.num_hidden_layers
    return Runner(model, NUM_PAGES, layers, capacity=capacity, cache_dtype=cache_dtype)


class Sequences:
    """Made-up sequences, each with its own tokens and pages, that grow step by step."""

    def __init__(self, count: int) -> None:
        generator = torch.Generator().manual_seed(3)
        self.tokens = torch.randint(0, 97, (count, MAX_PAGES * PAGE_SIZE), generator=generator).tolist()
        pages = torch.randperm(NUM_PAGES, generator=generator).tolist()
        each = NUM_PAGES // count
        self.pages = [tuple(pages[i * each : (i + 1) * each]) for i in range(count)]
        self.lengths = [0] * count

    def batch(self, new: dict[int, int], sampled: tuple[int, ...] | None = None, num_expanded: int = 0) -> Batch:
        """`new` tokens of some sequences, the last of which MLA attends expanded; by default each one's last token is
        sampled."""
        tokens, positions, offsets = list[int](), list[int](), [0]
        for index, count in new.items():
            start = self.lengths[index]
            tokens += self.tokens[index][start : start + count]
            positions += range(start, start + count)
            offsets.append(len(tokens))
            self.lengths[index] += count
        return Batch(
            request_ids=tuple(map(str, new)),
            tokens=tuple(tokens),
            positions=tuple(positions),
            offsets=tuple(offsets),
            lengths=tuple(self.lengths[i] for i in new),
            tables=tuple(self.pages[i][: -(-self.lengths[i] // PAGE_SIZE)] for i in new),
            expanded=(False,) * (len(new) - num_expanded) + (True,) * num_expanded,
            sampled_rows=tuple(end - 1 for end in offsets[1:]) if sampled is None else sampled,
            draws=(),
        )


def steps() -> list[dict[int, int]]:
    """Prompts in chunks, then decoding in changing company, drafts among it, past the end of a page and of a part."""
    chunks = [{0: 16}] * 4 + [{1: 9, 2: 5}, {0: 3, 1: 1, 2: 12}] + [{0: 1, 1: 7, 2: 1}] * 2
    return chunks + [{0: 1}, {2: 1, 0: 1}, {1: 4, 0: 1}] + [{0: 16}] * 5 + [{0: 1, 1: 1, 2: 1}]


def run_steps(runner: Runner, plan: list[dict[int, int]]) -> list[Tensor]:
    sequences = Sequences(3)
    return [runner.run(sequences.batch(new)).clone() for new in plan]


def difference(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


KINDS = [(name, weights) for name in VARIANTS for weights in ("float32", "int8")]


@pytest.mark.parametrize(("name", "weights"), KINDS, ids=["-".join(kind) for kind in KINDS])
def test_recorded_equals_eager(name: str, weights: str) -> None:
    """Every architecture, over chunks, decoding and drafts: the same logits, and one recording for all row counts."""
    model = make(VARIANTS[name], weights)
    recorded, eager = start(model), start(model, capacity=0)
    for actual, expected in zip(run_steps(recorded, steps()), run_steps(eager, steps()), strict=True):
        assert difference(actual, expected) < TOLERANCE[weights]
    assert recorded.recorded and not recorded.why_not and not eager.recorded


@pytest.mark.parametrize("weights", ["float32", "int8"])
@pytest.mark.parametrize("config", [LLAMA, V3], ids=["llama", "v3"])
def test_decoding_is_bitwise_the_same_recorded_and_eager(config: ModelConfig, weights: str) -> None:
    """A few new tokens a sequence: both ways run the same native bodies, so every bit agrees."""
    model = make(config, weights)
    plan = [{0: 1, 1: 1, 2: 1}] * 3 + [{2: 8}] * 16 + [{2: 1, 1: 5}] * 2 + [{2: 1}] * 2
    recorded, eager = start(model), start(model, capacity=0)
    for actual, expected in zip(run_steps(recorded, plan), run_steps(eager, plan), strict=True):
        assert torch.equal(actual, expected)


def test_absorbed_mla_on_packed_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where widths allow it both parts of kv_b_proj are packed: recorded and eager agree in every bit, and with
    activations in 16 bits the logits, expanded ones too, are those of the weights that are packed."""
    monkeypatch.setenv("PORCELET_ACTIVATIONS", "16")
    config = dataclasses.replace(V3, qk_nope_head_dim=32, v_head_dim=32, num_hidden_layers=2, first_k_dense_replace=2)
    model, plan = make(config, "int8"), [{0: 8}, {0: 1, 1: 3}, {0: 2}]
    assert all(layer.self_attn.packed_w_uk for layer in model.model.layers[: config.num_hidden_layers])
    recorded = run_steps(start(model), plan)
    for actual, expected in zip(recorded, run_steps(start(model, capacity=0), plan), strict=True):
        assert torch.equal(actual, expected)
    dense = dequantised(model)
    for actual, expected in zip(recorded, run_steps(start(dense), plan), strict=True):
        assert difference(actual, expected) < 5e-4
    tokens, positions, view = torch.arange(20), torch.arange(20), PackedView(Segments.of(20))
    with torch.inference_mode():
        assert difference(model(tokens, positions, view), dense(tokens, positions, view)) < 5e-4


def dequantised(model: Transformer) -> Transformer:
    """In float32, with the numbers of a packed model."""
    dense = make(model.config)
    for name, module in dense.named_modules():
        if name.endswith(".kv_b_proj"):
            parts = model.get_submodule(name.rpartition(".")[0])
            module.weight.data.copy_(parts._expanded_weight())
        elif isinstance(weight := getattr(model.get_submodule(name), "weight", None), PackedWeight):
            module.weight.data.copy_(weight.dequantize())
    return dense


@pytest.mark.parametrize("weights", ["float32", "int8"])
def test_expanded_mla_is_bitwise_the_same_recorded_and_eager(weights: str) -> None:
    """Chunks of a prompt that attend expanded, alone and beside absorbed ones: every bit agrees, and so it does with
    none beside them."""
    model = make(PACKED_V3, weights)
    plan = [({0: 16}, 1), ({1: 2, 0: 14}, 1), ({2: 1, 1: 1, 0: 9}, 2), ({0: 1, 1: 1}, 0), ({2: 3, 0: 13}, 2)]
    recorded, eager, alone = start(model), start(model, capacity=0), start(model)
    sequences = Sequences(3), Sequences(3), Sequences(3)
    for new, num_expanded in plan:
        actual = recorded.run(sequences[0].batch(new, num_expanded=num_expanded)).clone()
        assert torch.equal(actual, eager.run(sequences[1].batch(new, num_expanded=num_expanded)))
        for row, (index, count) in enumerate(new.items()):
            is_expanded = row >= len(new) - num_expanded
            assert torch.equal(alone.run(sequences[2].batch({index: count}, None, int(is_expanded)))[0], actual[row])
    assert recorded.num_recordings == 1 and not eager.recorded


@pytest.mark.parametrize("weights", ["float32", "int8"])
def test_long_prompts_of_mla_are_replayed(monkeypatch: pytest.MonkeyPatch, weights: str) -> None:
    """A prompt that attends expanded, whole and in chunks, takes no eager step."""
    model = make(PACKED_V3, weights)
    prompt = tuple(torch.randint(0, 97, (PACKED_V3.absorbed_below(),)).tolist())
    eager, seen = [], []

    def watched(*args: Any) -> Tensor:
        eager.append(True)
        return step(*args)

    monkeypatch.setattr(runner, "step", watched)
    for most in (512, 40):
        engine = Engine(model, EngineConfig(max_batch_tokens=most, cache_tokens=1024, speculation="off"))
        engine.submit(Request(id="a", prompt=prompt, params=SamplingParams(max_tokens=4, temperature=0)))
        while engine.has_work:
            engine.step()
            seen.append(bool(engine.runner._steps[False]._inputs.num_absorbed))
        assert engine.runner.recorded
    assert not eager and not seen[0] and seen[-1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("weights", ["float32", "int8"])
@pytest.mark.parametrize("config", [LLAMA, V3], ids=["llama", "v3"])
def test_company_and_threads_change_no_bit(config: ModelConfig, weights: str, dtype: torch.dtype) -> None:
    """A sequence's logits are the same alone on one thread, and among others, their prompts and drafts, on two."""
    model = make(config, weights)
    alone, shared = (start(model, cache_dtype=dtype) for _ in range(2))
    first, second = Sequences(3), Sequences(3)
    counts = [8] * 16 + [1] * 8  # past a part of the attention
    lone = [alone.run(first.batch({0: count})).clone() for count in counts]
    with threads(2):
        for step, (count, expected) in enumerate(zip(counts, lone, strict=True)):
            others = {1: 1 + step % 3, 2: 1}
            company = {0: count} | others if step % 2 else others | {0: count}
            row = list(company).index(0)
            assert torch.equal(shared.run(second.batch(company))[row], expected[0]), step
    assert alone.recorded and shared.recorded


def test_one_recording_serves_all_batch_sizes() -> None:
    """Within the capacity nothing is recorded again; a longer batch runs eagerly beside the recording."""
    runner, sequences = start(make(LLAMA)), Sequences(3)
    assert not runner.recorded and runner.why_not
    runner.run(sequences.batch({0: 1}))
    first = runner._steps[False]
    for new in ({0: 16}, {0: 1, 1: 1}, {1: 40}, {0: 1, 1: 1, 2: 1}, {2: 5}):
        assert torch.isfinite(runner.run(sequences.batch(new))).all()
        assert runner._steps[False] is first


def test_rows_are_sampled_as_asked() -> None:
    """Any rows in any order, or none, recorded as eagerly."""
    model = make(LLAMA)
    runners = [start(model, capacity=capacity) for capacity in (CAPACITY, 0)]
    for sampled in ((4, 0, 2), (), (3,)):
        both = [runner.run(Sequences(3).batch({0: 5}, sampled)).clone() for runner in runners]
        assert both[0].shape == (len(sampled), 97)
        assert torch.allclose(*both, rtol=1e-4, atol=1e-5)


def test_hidden_states_belong_to_the_logits() -> None:
    """`hidden` holds every token's state, from which the head makes the logits."""
    model = make(LLAMA)
    for capacity in (CAPACITY, 0):
        runner = start(model, capacity=capacity)
        logits = runner.run(Sequences(3).batch({0: 5, 1: 2}))
        assert runner.hidden.shape == (7, 64)
        with torch.inference_mode():
            assert torch.equal(model.logits(runner.hidden[[4, 6]]), logits)


def test_half_precision_cache_is_near() -> None:
    """A float16 cache holds half the bytes and moves the logits by its rounding only, recorded or eager."""
    for config in (LLAMA, V3):
        model = make(config)
        exact = run_steps(start(model), steps())
        for capacity in (CAPACITY, 0):
            runner = start(model, cache_dtype=torch.float16, capacity=capacity)
            assert all(pages.dtype == torch.float16 for layer in runner.cache for pages in layer)
            for actual, expected in zip(run_steps(runner, steps()), exact, strict=True):
                assert 0 < difference(actual, expected) < 1e-2


@pytest.mark.parametrize("config", [LLAMA, V3], ids=["llama", "v3"])
def test_copied_pages_continue_their_sequence(config: ModelConfig) -> None:
    """A fork that reads its copy of a page gives the logits of the original."""
    runner, sequences = start(make(config)), Sequences(3)
    runner.run(sequences.batch({0: 10}))
    source, target = sequences.pages[0][0], sequences.pages[1][0]
    original = sequences.batch({0: 1})
    fork = dataclasses.replace(original, tables=((target,),), copies=((source, target),))
    copied = runner.run(fork).clone()
    assert torch.equal(runner.run(original), copied)


def test_parameters_are_used_as_they_are() -> None:
    """Values changed in place count in the next step, and so do parameters that were moved or replaced."""
    model, moved = make(LLAMA), make(LLAMA)
    runner = start(model)
    for change in (
        lambda p: p.data.mul_(0.5),
        lambda p: setattr(p, "data", p.data * 1.5),
    ):
        runner.run(Sequences(3).batch({0: 5}))
        for parameter in model.parameters():
            change(parameter)
        moved.load_state_dict(model.state_dict())
        actual = runner.run(Sequences(3).batch({0: 5}))
        assert torch.equal(actual, start(moved).run(Sequences(3).batch({0: 5})))


def new_parameter(model: Transformer) -> None:
    layer = model.model.layers[1].mlp.down_proj
    layer.weight = nn.Parameter(layer.weight.detach() * 1.5)


def assigned_state(model: Transformer) -> None:
    model.load_state_dict({name: tensor * 1.5 for name, tensor in model.state_dict().items()}, assign=True)


def new_buffer(model: Transformer) -> None:
    gate = next(module for module in model.modules() if isinstance(module, Gate))
    gate.e_score_correction_bias = gate.e_score_correction_bias.flip(0) * 100


def new_packed_weight(model: Transformer) -> None:
    layer = model.model.layers[1].mlp.down_proj
    layer.weight = to_packed(layer.weight.dequantize() * 1.5, 8)


def new_fp8_weight(model: Transformer) -> None:
    layer = model.model.layers[1].mlp.down_proj
    values = layer.weight.detach().to(torch.float8_e4m3fn)
    del layer.weight
    layer.weight = FP8Weight(values, torch.full((1, 1), 1.5))


@pytest.mark.parametrize(
    ("config", "weights", "replace"),
    [
        (LLAMA, "float32", new_parameter),
        (LLAMA, "float32", assigned_state),
        (V3, "float32", new_buffer),
        (LLAMA, "int8", new_packed_weight),
        (LLAMA, "float32", new_fp8_weight),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_replaced_weights_count(config: ModelConfig, weights: str, replace: Callable[[Transformer], None]) -> None:
    """Whatever way a weight is put in another's place, the next step reads it, and never the memory of the old one."""
    model, fresh = make(config, weights), make(config, weights)
    runner = start(model)
    before = runner.run(Sequences(3).batch({0: 5})).clone()
    replace(model)
    replace(fresh)
    actual = runner.run(Sequences(3).batch({0: 5}))
    assert runner.recorded and not torch.equal(actual, before)
    assert torch.equal(actual, start(fresh).run(Sequences(3).batch({0: 5})))


def test_a_model_that_cannot_be_recorded_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """With native bodies turned off it runs eagerly, and the runner names the reason."""
    monkeypatch.setenv("PORCELET_KERNELS", "reference")
    runner = start(make(LLAMA))
    assert runner.run(Sequences(3).batch({0: 5})).shape == (1, 97)
    assert not runner.recorded and "no instruction" in runner.why_not


@pytest.mark.parametrize("config", [LLAMA, V3], ids=["llama", "v3"])
def test_a_model_in_another_precision_runs_eagerly(config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 over a cache of float32: nothing is recorded, the runner names the reason, the logits are the
    definitions'."""
    model, batch = make(config).bfloat16(), Sequences(3).batch({0: 5, 1: 1})
    runner = start(model)
    logits = runner.run(batch)
    assert not runner.recorded and "bfloat16" in runner.why_not
    monkeypatch.setenv("PORCELET_KERNELS", "reference")
    for an_op in OPS.values():
        monkeypatch.setattr(an_op, "_resolved", {})
    assert difference(logits, start(model).run(batch)) < 0.02


def test_indices_outside_the_tables_assert() -> None:
    """A token or position that is not there never reaches the native code."""
    runner, batch = start(make(LLAMA)), Sequences(3).batch({0: 2})
    runner.run(batch)
    for wrong in ({"tokens": (97, 0)}, {"tokens": (-1, 0)}, {"positions": (0, 10**6)}, {"sampled_rows": (2,)}):
        with pytest.raises(AssertionError):
            runner.run(dataclasses.replace(batch, **wrong))


def test_recording_leaves_the_compiler_alone(tmp_path: Path) -> None:
    """A process that answers its first request imports none of torch's compiler, which would take it seconds."""
    folder = save_tiny_model(tmp_path / "tiny")
    program = (
        "import sys, porcelet\n"
        f"model = porcelet.load({str(folder)!r})\n"
        "model.chat('x', porcelet.SamplingParams(max_tokens=3))\n"
        "assert not model.engine.runner.why_not\n"
        "print('torch._dynamo' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (ran.stdout.strip(), ran.stderr) == ("False", "")
