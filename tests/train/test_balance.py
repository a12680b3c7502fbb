from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from porcelet.config import TrainConfig, read_hf
from porcelet.kernels.attention import Segments
from porcelet.models.attention import PackedView
from porcelet.models.experts import Gate
from porcelet.models.transformer import Transformer, build, initialize
from porcelet.train.balance import balance_metrics, expert_loads, max_violations, move_biases, sequence_balance
from porcelet.train.loop import train
from porcelet.train.loss import Totals, compute_loss
from porcelet.train.packing import pack, passes
from porcelet.types import Sample
from tests.train.test_loss import random_samples
from tests.train.tiny_run import FIELDS, config, metrics_of, model

V2: dict[str, Any] = FIELDS | {
    "model_type": "deepseek_v2",
    "topk_method": "greedy",
    "norm_topk_prob": False,
    "num_nextn_predict_layers": 0,
    "vocab_size": 261,
}


def balance_term(network: Transformer, samples: list[Sample], run: TrainConfig, totals: Totals | None = None) -> Tensor:
    """The term of one pass, with its gradient."""
    batch, totals = pack(samples), totals or Totals.of(samples)
    view = PackedView(batch.segments, gate_logits=[])
    _, parts = compute_loss(network, batch, view, run, totals)
    term = sequence_balance(view, network.config, totals.num_rows)
    assert torch.equal(parts["balance"], term)
    return term


def naive_balance(network: Transformer, samples: list[Sample]) -> Tensor:
    """Equations 17 to 20 of the V3 report, sequence by sequence, layer by layer, expert by expert."""
    total, num_rows = torch.zeros(()), sum(len(sample.tokens) - 1 for sample in samples)
    for sample in samples:
        batch = pack([sample])
        view = PackedView(batch.segments, gate_logits=[])
        hidden = network(batch.tokens, batch.positions, view)
        if network.config.num_nextn_predict_layers:
            ahead = PackedView(Segments.of(len(hidden) - 1), view.routing, view.gate_logits)
            network.predict_further(hidden[:-1], batch.tokens[1:], batch.positions[:-1], ahead)
        assert view.gate_logits is not None
        for (logits, _), routing in zip(view.gate_logits, view.routing, strict=True):
            scores = logits.sigmoid() if network.config.has_gate_bias else logits.softmax(-1)
            num_tokens, num_experts = scores.shape
            top_k, term = routing.shape[1], torch.zeros(())
            for i in range(num_experts):
                best = scores.topk(top_k).indices if network.config.has_gate_bias else routing
                f = num_experts / (top_k * num_tokens) * (best == i).sum()
                term = term + f * (scores[:, i] / scores.sum(-1)).mean()
            total = total + term * num_tokens / num_rows
    return total


@pytest.mark.parametrize("kind", ["v3", "v2"])
def test_sequence_balance_is_the_loop_over_sequences(tmp_path: Path, kind: str) -> None:
    """Value and gradients of one packed batch, MTP layer included, equal the definition over single sequences."""
    network = model() if kind == "v3" else initialize(build(read_hf(V2)), 0)
    samples = [sample for sample in random_samples(9) if len(sample.tokens) > 2]
    run = config(tmp_path, balance_weight=1.0)
    packed = balance_term(network, samples, run)
    naive = naive_balance(network, samples)
    assert packed.item() == pytest.approx(naive.item(), rel=1e-4)
    packed.backward()
    mine = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None and p.grad.any()}
    network.zero_grad()
    naive_balance(network, samples).backward()
    for name, parameter in network.named_parameters():
        if name in mine and parameter.grad is not None:
            torch.testing.assert_close(mine[name], parameter.grad, rtol=2e-3, atol=2e-5)
    gates = [name for name in mine if name.endswith("mlp.gate.weight")]
    assert len(gates) == (2 if kind == "v3" else 1)


def test_an_even_gate_scores_one_a_layer_and_a_collapsed_one_more(tmp_path: Path) -> None:
    """f = P·E = 1 for every expert gives 1 a layer; a gate that prefers few experts costs more."""
    network, samples = model(), random_samples(12)
    run = config(tmp_path, balance_weight=1.0)
    even = balance_term(network, samples, run).item()
    for module in network.modules():
        if isinstance(module, Gate):
            module.weight.data *= 40
    assert balance_term(network, samples, run).item() > even > 1


def test_the_loss_teaches_gates_not_experts(tmp_path: Path) -> None:
    """The last layer's experts and shared experts, which no gate follows, get no gradient; its gate gets one."""
    network, samples = model(num_nextn_predict_layers=0), random_samples(6)
    balance_term(network, samples, config(tmp_path, balance_weight=1.0)).backward()
    layer = network.model.layers[-1].mlp
    assert layer.gate.weight.grad.any()
    for name, parameter in layer.named_parameters():
        if name != "gate.weight":
            assert parameter.grad is None or not parameter.grad.any(), name


def test_terms_of_passes_add_up_to_the_step(tmp_path: Path) -> None:
    """Micro-batches divide by the whole step's rows."""
    network, samples = model(), random_samples(10)
    run, totals = config(tmp_path, balance_weight=1.0), Totals.of(samples)
    whole = balance_term(network, samples, run)
    cut = passes(samples, 20)
    assert len(cut) > 2
    parts = [balance_term(network, some, run, totals).item() for some in cut]
    assert sum(parts) == pytest.approx(whole.item(), rel=1e-4)


def test_a_shared_prefix_counts_once(tmp_path: Path) -> None:
    """Two answers behind one prompt: three sequences with rows of their own, and a finite term."""
    network = model(num_nextn_predict_layers=0)
    samples = [Sample(tokens=(5, 6, 7, 8, a, 9), weights=(0.0,) * 4 + (1.0, 1.0), num_prompt=4) for a in (30, 31)]
    batch = pack(samples)
    view = PackedView(batch.segments, gate_logits=[])
    compute_loss(network, batch, view, config(tmp_path, balance_weight=1.0), Totals.of(samples))
    assert view.gate_logits is not None
    ((logits, segments),) = view.gate_logits
    assert segments.lengths == (4, 1, 1) and len(logits) == 6


def test_balance_loss_is_logged_and_lowers_the_loss_of_balance(tmp_path: Path) -> None:
    """With a weight the step's line has the part; trained on strongly, the term falls below that of a run without."""
    train(config(tmp_path / "on", steps=25, balance_weight=0.5, bias_update_speed=0.0, learning_rate=1e-2), FIELDS)
    train(config(tmp_path / "little", steps=25, balance_weight=1e-6, bias_update_speed=0.0, learning_rate=1e-2), FIELDS)
    on, little = (metrics_of(tmp_path / name) for name in ("on", "little"))
    assert on[-1]["balance"] < little[-1]["balance"]
    assert on[0]["loss"] == pytest.approx(little[0]["loss"] + 0.5 * on[0]["balance"], rel=1e-4)


def test_balancing_lowers_max_violation(tmp_path: Path) -> None:
    """The biases alone, without any gradient, even out the experts of all MoE layers, the MTP layer's included."""
    network, samples = model(), random_samples(40)
    batch, totals = pack(samples), Totals.of(samples)
    violations = []
    for _ in range(60):
        view = PackedView(batch.segments)
        with torch.no_grad():
            compute_loss(network, batch, view, config(tmp_path), totals)
        loads = expert_loads(view.routing, 8)
        move_biases(network, loads, 0.01)
        violations.append(balance_metrics(loads))
    assert violations[-1]["max_violation"] < 0.5 * violations[0]["max_violation"]
    assert violations[-1]["mean_violation"] < 0.5 * violations[0]["mean_violation"]
    gates = [module for module in network.modules() if isinstance(module, Gate)]
    assert len(gates) == 2 and all(gate.e_score_correction_bias.abs().sum() > 0 for gate in gates)


def test_balancing_is_the_rule_of_the_report() -> None:
    """b += speed · sign(mean load - load), and MaxVio = max load / mean load - 1, by hand."""
    network = model()
    loads = expert_loads([torch.tensor([[0, 1, 2], [0, 1, 3], [0, 1, 4], [0, 5, 6]])], 8)
    assert loads[0].tolist() == [4, 3, 1, 1, 1, 1, 1, 0]
    assert max_violations(loads) == pytest.approx([4 / 1.5 - 1])
    even = torch.full((8,), 1.5)
    metrics = balance_metrics([*loads, even])
    assert metrics == pytest.approx({"max_violation": 4 / 1.5 - 1, "mean_violation": (4 / 1.5 - 1) / 2})
    move_biases(network, loads, 0.5)
    first, last = (module for module in network.modules() if isinstance(module, Gate))
    assert first.e_score_correction_bias.tolist() == [-0.5, -0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]
    assert not last.e_score_correction_bias.any()  # its layer did not run


def test_a_gate_without_biases_is_measured_all_the_same(tmp_path: Path) -> None:
    """V2 has no rule to move anything by; its MaxVio is logged."""
    network = initialize(build(read_hf(V2)), 0)
    loads = expert_loads([torch.tensor([[0, 1, 2]] * 4)], 8)
    move_biases(network, loads, 0.5)
    assert not list(network.buffers())
    train(config(tmp_path, steps=1), {name: value for name, value in V2.items() if name != "vocab_size"})
    assert metrics_of(tmp_path)[0]["max_violation"] > 0
