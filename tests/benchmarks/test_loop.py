"""What benchmarks/loop.py sets side by side computes the same, and is refused where it does not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import loop
from benchmarks.gradients import MODEL
from porcelet.train.schedule import learning_rate
from porcelet.types import Sample

SMALL = {**MODEL, "vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
LENGTHS = (3, 40, 17, 8, 25, 8, 31, 5, 12, 20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return loop.model_folder(SMALL, tmp_path_factory.mktemp("model"))


def _samples(first_weight: float = 1.0) -> list[Sample]:
    drawn = [tuple(range(i + 2, i + 3 + length)) for i, length in enumerate(LENGTHS)]
    return [Sample(tokens=tokens, weights=(0.0, first_weight) + (1.0,) * (len(tokens) - 2)) for tokens in drawn]


def _flat(model: torch.nn.Module) -> Tensor:
    named = sorted(model.named_parameters())
    return torch.cat([parameter.detach().flatten() for _, parameter in named])


@pytest.mark.parametrize("experts", loop.EXPERTS)
@pytest.mark.parametrize("whole", [True, False])
def test_both_sides_have_the_same_gradient(folder: Path, experts: str, whole: bool) -> None:
    """Sequences of any length, padded in one batch or in several: one loss, one gradient."""
    samples = _samples()
    plain = loop.Plain(folder, samples, experts, whole=whole)
    assert len(plain.batches) == (1 if whole else 2)
    difference, cosine = loop.agreement(loop.training_run(folder, samples), plain, samples)
    assert difference < loop.MAX_LOSS_DIFFERENCE and cosine > loop.MIN_COSINE


def test_both_sides_take_the_same_step(folder: Path) -> None:
    """Behind the same gradients, clipping, rate, AdamW and its decay move every parameter alike."""
    samples = _samples()
    ours, plain = loop.training_run(folder, samples), loop.Plain(folder, samples, "eager", whole=True)
    before = _flat(ours.model)
    assert torch.equal(before, _flat(plain.model))
    plain.gradient()
    found = {name: p.grad for name, p in plain.model.named_parameters()}
    for name, parameter in ours.model.named_parameters():
        grad = found[name]
        parameter.grad = None if grad is None else grad.clone()
    norm = ours.optimizer.gradient_norm()
    assert norm > 1  # so that it is clipped
    ours.optimizer.step(norm, learning_rate(0, ours.config))
    plain.descend()
    moved = [_flat(model) - before for model in (ours.model, plain.model)]
    torch.testing.assert_close(*moved, rtol=0, atol=0.01 * loop.LEARNING_RATE)
    assert moved[0].abs().max() > 0.9 * loop.LEARNING_RATE


def test_sides_that_disagree_are_not_timed(folder: Path) -> None:
    """Another loss on one side ends the program."""
    plain = loop.Plain(folder, _samples(), "eager", whole=True)
    samples = _samples(first_weight=3.0)
    with pytest.raises(SystemExit, match="disagree"):
        loop.agreement(loop.training_run(folder, samples), plain, samples)


def test_workloads_are_what_they_are_called() -> None:
    """Eight full sequences, or 32 of 32 to 512 tokens; the first token of each is given."""
    filled, documents = (loop.make_samples(name, 100) for name in loop.WORKLOADS)
    assert [len(sample.tokens) for sample in filled] == [loop.SEQUENCE + 1] * 8
    lengths = sorted(len(sample.tokens) - 1 for sample in documents)
    assert len(lengths) == 32 and lengths[0] == 32 and lengths[-1] == 512
    assert all(sample.weights[0] == 0.0 and all(sample.weights[1:]) for sample in filled + documents)


def test_a_timed_step_runs_once_and_says_what_it_reached() -> None:
    """One call a run; seconds, tokens a second, and a share of the rate measured beside it."""
    calls: list[int] = []
    found = loop.timed(lambda: calls.append(1), num_tokens=10, flops=10**6)()
    assert calls == [1] and found["percent_of_matmul"] > 0
    assert found["tokens_per_second"] == pytest.approx(10 / found["seconds"])
