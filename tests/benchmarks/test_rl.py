"""What benchmarks/rl.py feeds to both sides, and that every switched-off part computes the same update."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import rl, rl_ablation


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> rl.Trainer:
    folder = rl.model_folder("tiny", tmp_path_factory.mktemp("tiny"))
    return rl.Trainer(folder, rl.WORKLOADS["XS"], tokens_per_pass=100)


def test_answers_have_the_workloads_shape(trainer: rl.Trainer) -> None:
    """32 answers of R tokens behind P, in groups whose advantages cancel out."""
    samples, shape = trainer.rollout(), trainer.workload
    assert len(samples) == rl.NUM_ANSWERS and {sample.num_drawn for sample in samples} == {shape.answer}
    assert {sample.num_prompt for sample in samples} == {shape.prompt}
    for start in range(0, rl.NUM_ANSWERS, shape.group):
        group = samples[start : start + shape.group]
        assert len({sample.tokens[: shape.prompt] for sample in group}) == 1
        assert sum(sample.advantages[-1] for sample in group) == pytest.approx(0.0, abs=1e-6)


def test_what_is_switched_off_computes_the_same_gradient(trainer: rl.Trainer) -> None:
    """Prompts of their own, filling, silent groups and all logits change the time, not the gradient."""
    samples = rl_ablation.natural_samples(trainer)
    longest = max(len(sample.tokens) for sample in samples)
    teaching = [sample for sample in samples if sample.teaches]
    assert 0 < len(teaching) < len(samples)
    filled = [rl_ablation.filled_up(sample, longest) for sample in teaching]
    found = []
    for computed, changes in (
        (teaching, {}),
        (teaching, {"share": False}),
        (filled, {"share": False}),
        (samples, {}),
        (teaching, {"logprobs": rl_ablation.from_all_logits}),
    ):
        loss = rl_ablation.update(trainer, computed, samples, **changes)
        gradients = [p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]
        found.append((loss, torch.cat(gradients).clone()))
    for loss, gradient in found[1:]:
        assert abs(loss - found[0][0]) < 1e-5
        assert torch.cosine_similarity(gradient, found[0][1], dim=0) > 0.9999
        assert torch.allclose(gradient.norm(), found[0][1].norm(), rtol=1e-4)


def test_variants_are_ready_to_be_timed(trainer: rl.Trainer) -> None:
    """Each way of the docstring exists and gives seconds."""
    variants = rl_ablation.variants(trainer)
    assert all(f"    {name} " in (rl_ablation.__doc__ or "") for name in variants)
    assert all(run()["seconds"] > 0 for run in variants.values())


def test_new_models_have_the_size_they_are_named_after(tmp_path: Path) -> None:
    """10m: between 9.5 and 10.5 million parameters over a vocabulary of 4096."""
    trainer = rl.Trainer(rl.model_folder("10m", tmp_path), rl.WORKLOADS["XS"])
    assert 9.5e6 < sum(p.numel() for p in trainer.model.parameters()) < 10.5e6
    assert trainer.model.config.vocab_size == 4096 and rl.WORKLOADS["L"].num_prompts == 2
