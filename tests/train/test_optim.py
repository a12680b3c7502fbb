from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from porcelet.config import OptimizerConfig
from porcelet.models.transformer import Transformer
from porcelet.train import checkpoint
from porcelet.train.loop import train
from porcelet.train.muon import QUINTIC, UPDATE_RMS, orthogonalize
from porcelet.train.optim import Optimizer, make_optimizer
from tests.train.test_checkpoint import assert_same_run, train_until
from tests.train.tiny_run import FIELDS, config, model

SETTLING = (*QUINTIC, *((2.0, -1.5, 0.5),) * 12)  # coefficients whose fixed point is 1


def with_gradients(network: Transformer, seed: int = 0, size: float = 1.0) -> Transformer:
    """Random gradients on everything."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.grad = size * torch.randn(parameter.shape, generator=generator)
    return network


def stepped(network: Transformer, optimizer: Optimizer, seed: int, size: float, rate: float = 0.01) -> None:
    with_gradients(network, seed, size)
    optimizer.step(optimizer.gradient_norm(), rate)


@pytest.mark.parametrize("size", [1e-4, 1.0])
def test_adamw_is_torchs_behind_its_clip(size: float) -> None:
    """Three steps equal clip_grad_norm_ and AdamW, which decays matrices alone, whether the clip acts or not."""
    network, twin = model(), model()
    settings = OptimizerConfig()
    optimizer = make_optimizer(network, settings)
    groups = [
        {"params": [p for p in twin.parameters() if p.dim() > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in twin.parameters() if p.dim() <= 1], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), eps=1e-8)
    for seed in range(3):
        stepped(network, optimizer, seed, size)
        norm = torch.nn.utils.clip_grad_norm_(with_gradients(twin, seed, size).parameters(), settings.max_grad_norm)
        assert (float(norm) > settings.max_grad_norm) == (size == 1.0)
        reference.step()
    for mine, theirs in zip(network.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("norm", [math.nan, math.inf])
def test_a_norm_that_is_not_finite_changes_nothing(name: str, norm: float) -> None:
    """No parameter, no moment, no count of steps."""
    network = model()
    optimizer = make_optimizer(network, OptimizerConfig(name=name))
    stepped(network, optimizer, 0, 1.0)
    before = copy.deepcopy([*network.state_dict().values(), *map(tuple, map(dict.values, optimizer.state.values()))])
    next(with_gradients(network).parameters()).grad[0, 0] = norm
    assert not math.isfinite(optimizer.gradient_norm())
    optimizer.step(optimizer.gradient_norm(), 0.01)
    after = [*network.state_dict().values(), *map(tuple, map(dict.values, optimizer.state.values()))]
    for old, new in zip(before, after, strict=True):
        for a, b in zip(old, new, strict=True):
            assert torch.equal(a, b)


def test_parameters_without_a_gradient_stay_and_frozen_ones_are_left_out() -> None:
    """As the MTP layer in a step without its loss, or the base of a low-rank adapter."""
    network = with_gradients(model())
    frozen, idle = network.lm_head.weight, network.model.norm.weight
    frozen.requires_grad_(False)
    optimizer = make_optimizer(network, OptimizerConfig())
    idle.grad = None
    before = frozen.clone(), idle.clone()
    optimizer.step(optimizer.gradient_norm(), 0.1)
    assert torch.equal(frozen, before[0]) and torch.equal(idle, before[1])
    assert frozen not in optimizer.state and idle not in optimizer.state


def test_muon_takes_the_matrices_of_blocks() -> None:
    """Everything in layers but routers and norms; embedding and head stay with AdamW; experts' halves count as two."""
    network = model()
    optimizer = make_optimizer(network, OptimizerConfig(name="muon"))
    counts = {part.parameter: part.num_matrices for part in optimizer.parts}
    for name, parameter in network.named_parameters():
        adamw = parameter.dim() < 2 or name in ("model.embed_tokens.weight", "lm_head.weight") or "mlp.gate." in name
        wanted = 0 if adamw else 2 if "gate_up_proj" in name else 1
        assert counts[parameter] == wanted, name
    stepped(network, optimizer, 0, 1.0)
    for parameter, count in counts.items():
        assert set(optimizer.state[parameter]) == ({"momentum"} if count else {"step", "exp_avg", "exp_avg_sq"})


def polar(matrix: Tensor) -> Tensor:
    """U·Vᵀ by singular values."""
    u, _, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    return (u @ v).float()


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
def test_updates_are_nearly_orthogonal(shape: tuple[int, int]) -> None:
    """Five steps bring every singular value that is not tiny to 0.6..1.3; settled ones give U·Vᵀ itself."""
    matrices = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(matrices)
    kept = values > 0.01 * values.amax(-1, keepdim=True)
    found = torch.linalg.svdvals(orthogonalize(matrices))
    assert kept.float().mean() > 0.95 and ((found > 0.6) & (found < 1.3))[kept].all()
    for matrix, settled in zip(matrices, orthogonalize(matrices, SETTLING), strict=True):
        assert (settled - polar(matrix)).abs().max() < 1e-4


def test_a_stack_is_its_matrices_one_by_one() -> None:
    """Experts' gate, up and down matrices move as if each were a parameter of its own; so does a zero one: not at
    all."""
    network, settings = model(), OptimizerConfig(name="muon", weight_decay=0.0)
    with_gradients(network)
    experts = network.model.layers[1].mlp.experts
    experts.down_proj.grad[3] = 0
    before = experts.gate_up_proj.detach().clone(), experts.down_proj.detach().clone()
    gradients = experts.gate_up_proj.grad.clone(), experts.down_proj.grad.clone()
    make_optimizer(network, settings).step(1.0, 0.01)
    moved = before[0] - experts.gate_up_proj, before[1] - experts.down_proj
    for expert in range(8):
        pairs = [*zip(moved[0][expert].chunk(2), gradients[0][expert].chunk(2), strict=True)]
        for change, gradient in [*pairs, (moved[1][expert], gradients[1][expert])]:
            wanted = 0.01 * UPDATE_RMS * max(gradient.shape) ** 0.5 * orthogonalize(gradient[None])[0]
            torch.testing.assert_close(change, wanted, rtol=1e-3, atol=1e-6)
    assert not moved[1][3].any()


def test_muons_step_is_the_papers() -> None:
    """Nesterov momentum, orthogonal direction of root mean square 0.2, decoupled decay, over two clipped steps."""
    network, settings = model(), OptimizerConfig(name="muon", muon_learning_rate=6e-3, learning_rate=3e-3)
    optimizer = make_optimizer(network, settings)
    parameter = network.model.layers[0].mlp.up_proj.weight
    weight, momentum = parameter.detach().clone(), torch.zeros_like(parameter)
    for seed in range(2):
        with_gradients(network, seed)
        gradient = parameter.grad.clone()
        optimizer.step(4.0, 1e-3)  # a norm of 4 is clipped to 1; Muon's rate is twice AdamW's
        momentum = 0.95 * momentum + gradient / 4
        update = orthogonalize((gradient / 4 + 0.95 * momentum)[None])[0] * 0.2 * 48**0.5
        assert 0.15 < update.square().mean().sqrt() < 0.25
        weight = weight - 2e-3 * (update + 0.1 * weight)
    torch.testing.assert_close(parameter.detach(), weight, rtol=1e-4, atol=1e-6)


def test_state_of_both_kinds_is_saved_and_restored(tmp_path: Path) -> None:
    """A restored optimizer takes the same next step, bit for bit."""
    run = config(tmp_path, name="muon")
    network = model()
    optimizer = make_optimizer(network, run.optimizer)
    stepped(network, optimizer, 0, 1.0)
    checkpoint.save(tmp_path, network, optimizer, checkpoint.Header(1, {}, {}, 1, torch.__version__))
    other = model(seed=7)
    resumed = make_optimizer(other, run.optimizer)
    folder = checkpoint.newest(tmp_path)
    assert folder and checkpoint.read_header(folder, {}, tmp_path).step == 1
    checkpoint.restore(folder, other, resumed)
    for net, opt in ((network, optimizer), (other, resumed)):
        stepped(net, opt, 1, 1.0)
    for mine, theirs in zip(network.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_resumed_muon_run_equals_the_uninterrupted_one(tmp_path: Path) -> None:
    """The whole loop, broken off between checkpoints."""
    whole = config(tmp_path / "whole", name="muon", checkpoint_every=100, balance_weight=0.01)
    broken = config(tmp_path / "broken", name="muon", balance_weight=0.01)
    train(whole, FIELDS)
    train_until(broken, FIELDS, 8)
    train(broken, FIELDS, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "broken")
