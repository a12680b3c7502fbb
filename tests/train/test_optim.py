from __future__ import annotations

from pathlib import Path

import pytest
import torch

from porcelet.models.attention import PackedView
from porcelet.models.experts import Gate
from porcelet.train.loss import Totals, compute_loss
from porcelet.train.optim import balance_experts, learning_rate, make_optimizer
from porcelet.train.packing import pack
from tests.train.test_loss import random_samples
from tests.train.tiny_run import config, model


def test_schedule_warms_up_and_decays_to_its_floor(tmp_path: Path) -> None:
    """Linear to the peak, then down a cosine that ends at the minimum in the last step."""
    run = config(tmp_path, steps=100, warmup_steps=10, learning_rate=1e-2, min_learning_rate=1e-3)
    rates = [learning_rate(step, run) for step in range(100)]
    assert rates[:10] == pytest.approx([1e-3 * (step + 1) for step in range(10)])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(1e-3) and rates[10] == pytest.approx(1e-2)
    assert learning_rate(0, config(tmp_path, warmup_steps=0, learning_rate=1e-2)) == pytest.approx(1e-2)


def test_balancing_lowers_max_violation(tmp_path: Path) -> None:
    """The biases alone, without any gradient, even out the experts of all MoE layers, the MTP layer's included."""
    network, samples = model(), random_samples(40)
    batch, totals = pack(samples), Totals.of(samples)
    violations = []
    for _ in range(60):
        view = PackedView(batch.segments)
        with torch.no_grad():
            compute_loss(network, batch, view, config(tmp_path), totals)
        violations.append(balance_experts(network, view.routing, 0.01))
    assert violations[-1] < 0.5 * violations[0]
    gates = [module for module in network.modules() if isinstance(module, Gate)]
    assert len(gates) == 2 and all(gate.e_score_correction_bias.abs().sum() > 0 for gate in gates)


def test_balancing_is_the_rule_of_the_report() -> None:
    """b += speed · sign(mean load - load), and MaxVio = max load / mean load - 1, by hand."""
    network = model()
    routing = torch.tensor([[0, 1, 2], [0, 1, 3], [0, 1, 4], [0, 5, 6]])  # loads 4 3 1 1 1 1 1 0, mean 1.5
    assert balance_experts(network, [routing], 0.5) == pytest.approx(4 / 1.5 - 1)
    first, last = (module for module in network.modules() if isinstance(module, Gate))
    assert first.e_score_correction_bias.tolist() == [-0.5, -0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]
    assert not last.e_score_correction_bias.any()  # its layer did not run


def test_only_matrices_decay(tmp_path: Path) -> None:
    """Norms keep their scale; everything else is in exactly one group."""
    network = model()
    optimizer = make_optimizer(network, config(tmp_path).optimizer)
    decayed, kept = (group["params"] for group in optimizer.param_groups)
    assert all(p.dim() > 1 for p in decayed) and all(p.dim() == 1 for p in kept)
    assert len(decayed) + len(kept) == len(list(network.parameters()))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
