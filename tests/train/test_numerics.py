from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from porcelet.config import read_hf
from porcelet.kernels.experts import experts
from porcelet.kernels.linear import round_to_e4m3
from porcelet.models.attention import PackedView
from porcelet.models.experts import Gate
from porcelet.models.transformer import Transformer, build, initialize
from porcelet.train import numerics
from porcelet.train.loop import train
from porcelet.train.loss import Totals, compute_loss
from porcelet.train.numerics import BFloat16Parameter, FP8Parameter, fp8_linear
from porcelet.train.packing import pack
from tests.train.test_flops import DENSE
from tests.train.test_loss import random_samples
from tests.train.tiny_run import FIELDS, config, metrics_of, model

GENERATOR = torch.Generator().manual_seed(0)
TILES = [(1, 128), (128, 1), (128, 128)]


def spread(rows: int, columns: int) -> Tensor:
    """Values over many powers of two, so that tiles differ in scale."""
    sizes = torch.exp2(torch.randint(-12, 12, (rows, columns), generator=GENERATOR).float())
    return torch.randn(rows, columns, generator=GENERATOR) * sizes


def naive_quantize(x: Tensor, tile: tuple[int, int], power_of_two: bool) -> Tensor:
    """Tile by tile."""
    out = torch.empty_like(x)
    for i in range(0, len(x), tile[0]):
        for j in range(0, x.shape[1], tile[1]):
            piece = x[i : i + tile[0], j : j + tile[1]]
            scale = piece.abs().max() / 448
            scale = 2.0 ** torch.ceil(torch.log2(scale)) if power_of_two else scale
            out[i : i + tile[0], j : j + tile[1]] = (piece / scale).to(torch.float8_e4m3fn).float() * scale
    return out


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("power_of_two", [True, False])
def test_quantisation_is_by_tile_and_its_error_is_bounded(tile: tuple[int, int], power_of_two: bool) -> None:
    """Equal to the loop over tiles, ragged edges included; an error is below 1/16 of the value, or below half of the
    smallest step of its tile, amax / 448 · 2^-9 (doubled by rounding the scale up)."""
    x = spread(200, 300)
    mine = round_to_e4m3(x, tile, power_of_two=power_of_two)
    assert torch.equal(mine, naive_quantize(x, tile, power_of_two))
    for i in range(0, 200, tile[0]):
        for j in range(0, 300, tile[1]):
            piece = x[i : i + tile[0], j : j + tile[1]]
            error = (mine[i : i + tile[0], j : j + tile[1]] - piece).abs()
            step = piece.abs().max() / 448 * 2**-9 * (2 if power_of_two else 1)
            assert (error <= torch.maximum(piece.abs() / 16, step / 2) * 1.0001).all()


@pytest.mark.parametrize("tile", TILES)
def test_representable_values_survive(tile: tuple[int, int]) -> None:
    """E4M3 values times a power of two a tile, with a full mantissa's range, and zeros, come back exactly."""
    grid = torch.randint(1, 127, (256, 256), generator=GENERATOR).to(torch.uint8).view(torch.float8_e4m3fn).float()
    grid[:: tile[0], :: tile[1]] = 448.0
    x = grid * 2.0**-20
    assert torch.equal(round_to_e4m3(x, tile), x)
    assert not round_to_e4m3(torch.zeros(3, 5), tile).any()


def test_product_is_exact_on_representable_operands() -> None:
    """Small integers: forward, both gradients and the definition agree bit for bit."""
    x, weight, direction = (
        torch.randint(-8, 9, shape, generator=GENERATOR).float() for shape in ((40, 200), (150, 200), (40, 150))
    )
    results = []
    for product in (fp8_linear, nn.functional.linear):
        a, w = x.clone().requires_grad_(), weight.clone().requires_grad_()
        out = product(a, w)
        out.backward(direction)
        results.append((out, a.grad, w.grad))
    for mine, exact in zip(*results, strict=True):
        assert torch.equal(mine, exact)


def test_product_of_random_operands_is_off_by_a_few_percent() -> None:
    """1 - cosine-like similarity below 1e-3 (DeepGEMM's bound), forward and backward, and not zero."""
    x, weight = spread(256, 384).sign() * torch.rand(256, 384), torch.randn(320, 384, generator=GENERATOR)
    direction = torch.randn(256, 320, generator=GENERATOR)
    results = []
    for product in (fp8_linear, nn.functional.linear):
        a, w = x.clone().requires_grad_(), weight.clone().requires_grad_()
        product(a, w).backward(direction)
        results.append((product(a, w).detach(), a.grad, w.grad))
    for mine, exact in zip(*results, strict=True):
        difference = 1 - 2 * (mine * exact).sum() / (mine.square() + exact.square()).sum()
        assert 1e-6 < difference < 2e-3


def test_experts_are_single_products() -> None:
    """Grouped FP8 experts equal a loop over tokens and their experts by `fp8_linear`."""
    x, weights = torch.randn(12, 32, generator=GENERATOR), torch.rand(12, 2, generator=GENERATOR)
    gate_up = FP8Parameter(torch.randn(4, 48, 32, generator=GENERATOR))
    down = FP8Parameter(torch.randn(4, 32, 24, generator=GENERATOR))
    indices = torch.stack([torch.randperm(4, generator=GENERATOR)[:2] for _ in range(12)])
    out = experts(x, gate_up, down, indices, weights)
    for token in range(12):
        wanted = torch.zeros(32)
        for expert, weight in zip(indices[token].tolist(), weights[token], strict=True):
            gate, up = (fp8_linear(x[token : token + 1], half) for half in gate_up[expert].chunk(2))
            wanted += weight * fp8_linear(nn.functional.silu(gate) * up, down[expert])[0]
        torch.testing.assert_close(out[token], wanted, rtol=1e-4, atol=1e-4)


def gradients(network: Transformer, output: Path) -> tuple[float, dict[str, Tensor]]:
    samples = random_samples(8)
    batch = pack(samples)
    run = config(output, balance_weight=0.01)
    total, _ = compute_loss(network, batch, PackedView(batch.segments, gate_logits=[]), run, Totals.of(samples))
    total.backward()
    assert total.dtype == torch.float32
    return total.item(), {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("dtype", "bound"), [("bfloat16", 0.98), ("fp8", 0.95)])
@pytest.mark.parametrize("kind", ["v3", "qwen3", "tied"])
def test_low_precision_computes_nearly_the_same(tmp_path: Path, dtype: str, bound: float, kind: str) -> None:
    """Loss within 2 %, every large gradient of cosine near 1 and float32, weights float32 and still tied."""
    shapes = {"qwen3": DENSE, "tied": DENSE | {"tie_word_embeddings": True, "model_type": "qwen2"}}

    def make() -> Transformer:
        return model(initializer_range=0.1) if kind == "v3" else initialize(build(read_hf(shapes[kind])), 0)

    exact_loss, exact = gradients(make(), tmp_path)
    network = numerics.apply(make(), dtype)
    loss, found = gradients(network, tmp_path)
    assert loss == pytest.approx(exact_loss, rel=0.02) and loss != exact_loss
    assert found.keys() == exact.keys()
    mine, wanted = (torch.cat([g[name].flatten() for name in exact]) for g in (found, exact))
    assert mine.dtype == torch.float32
    assert torch.cosine_similarity(mine, wanted, dim=0) > bound
    assert all(parameter.dtype == torch.float32 for parameter in network.parameters())
    assert (network.lm_head.weight is network.model.embed_tokens.weight) == (kind == "tied")


def test_what_stays_in_high_precision() -> None:
    """FP8: embedding, head, routers, norms. bfloat16: routers."""
    network = numerics.apply(model(), "fp8")
    kinds = {name: type(parameter) for name, parameter in network.named_parameters()}
    for name, kind in kinds.items():
        plain = "norm" in name or "mlp.gate." in name or not name.startswith("model.layers.")
        assert kind is (nn.Parameter if plain else FP8Parameter), name
    network = numerics.apply(model(), "bfloat16")
    routers = {id(module.weight) for module in network.modules() if isinstance(module, Gate)}
    assert all((type(p) is BFloat16Parameter) == (id(p) not in routers) for p in network.parameters())
    untouched = model()
    before = list(untouched.parameters())
    assert all(a is b for a, b in zip(numerics.apply(untouched, "float32").parameters(), before, strict=True))


@pytest.mark.parametrize(("dtype", "bound"), [("bfloat16", 0.02), ("fp8", 0.02)])
def test_training_in_low_precision_follows_float32(tmp_path: Path, dtype: str, bound: float) -> None:
    """The same recipe's loss over the last steps, relative to float32's; the saved model is float32."""
    changes: dict[str, Any] = {"steps": 12, "learning_rate": 5e-3}
    losses = []
    for kind in ("float32", dtype):
        train(config(tmp_path / kind, dtype=kind, **changes), FIELDS)
        losses.append(sum(line["loss"] for line in metrics_of(tmp_path / kind)[-5:]))
    assert losses[1] == pytest.approx(losses[0], rel=bound) and losses[1] != losses[0]


@pytest.mark.parametrize(("dtype", "bound"), [("bfloat16", 0.2), ("fp8", 1.0)])
def test_reinforcement_in_low_precision(tmp_path: Path, dtype: str, bound: float) -> None:
    """The sampler reads the same parameters by the same bodies, but for kv_b_proj, which it absorbs unquantised."""
    start = train(config(tmp_path / "start", steps=2), FIELDS)
    run = config(
        tmp_path / "rl", method="grpo", model=str(start), steps=1, dtype=dtype, max_new_tokens=2, samples_per_step=16
    )
    train(run, {}, reward=lambda problem, answer: float(answer.text[:1] < "m"))
    assert 0 < metrics_of(tmp_path / "rl")[0]["mismatch"] < bound
