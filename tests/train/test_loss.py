from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from porcelet.kernels.attention import Segments
from porcelet.models.attention import PackedView
from porcelet.models.transformer import Transformer
from porcelet.train.loss import Totals, compute_loss, mtp_loss
from porcelet.train.packing import Packed, pack
from porcelet.types import Sample
from tests.train.tiny_run import config, model


def random_samples(count: int, seed: int = 0) -> list[Sample]:
    """Sequences of 2 to 12 tokens, each half weighed."""
    draw = random.Random(seed)
    samples = []
    for length in (draw.randint(2, 12) for _ in range(count)):
        tokens = tuple(draw.randrange(261) for _ in range(length))
        samples.append(Sample(tokens=tokens, weights=(0.0, *(draw.choice((0.0, 1.0, 0.5)) for _ in tokens[1:]))))
    return samples


def policy_samples(network: Transformer, count: int) -> list[Sample]:
    """The same with advantages; old log-probabilities lie about the model's own, so that some ratios are clipped."""
    draw = random.Random(1)
    samples = []
    for sample in random_samples(count):
        own = naive_logprobs(network, sample.tokens).detach().tolist()
        chosen = [weight > 0 for weight in sample.weights]
        samples.append(
            Sample(
                tokens=sample.tokens,
                advantages=tuple(draw.uniform(-2, 2) if c else 0.0 for c in chosen),
                old_logprobs=(0.0, *(logprob + draw.uniform(-0.5, 0.5) for logprob in own)),
            )
        )
    return samples


def naive_logprobs(network: Transformer, tokens: tuple[int, ...], temperature: float = 1.0) -> Tensor:
    """Entry t - 1: log p(token t | tokens before it), of one sequence by whole logits."""
    flat = torch.tensor(tokens)
    hidden = network(flat, torch.arange(len(flat)), PackedView(Segments.of(len(flat))))
    return (network.logits(hidden) / temperature).log_softmax(-1)[torch.arange(len(flat) - 1), flat[1:]]


def naive_loss(network: Transformer, samples: list[Sample], mtp_weight: float) -> Tensor:
    """The definition over a padded batch with masks, as most trainers write it."""
    width = max(len(sample.tokens) for sample in samples)
    tokens = torch.tensor([sample.tokens + (2,) * (width - len(sample.tokens)) for sample in samples])
    weights = torch.tensor([sample.weights + (0.0,) * (width - len(sample.tokens)) for sample in samples])
    positions, view = torch.arange(width).repeat(len(samples)), PackedView(Segments.of(*(width,) * len(samples)))
    hidden = network(tokens.flatten(), positions, view)
    scores = network.logits(hidden).view(*tokens.shape, -1).log_softmax(-1)
    picked = scores[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]
    main = -(picked * weights[:, 1:]).sum() / weights[:, 1:].sum()
    following = torch.cat((tokens[:, 1:], tokens[:, :1]), dim=1)
    further = network.lm_head(network.predict_further(hidden, following.flatten(), positions, view))
    picked = further.view(*tokens.shape, -1).log_softmax(-1)[:, :-2].gather(-1, tokens[:, 2:, None])[..., 0]
    return main + mtp_weight * -(picked * weights[:, 2:]).sum() / weights[:, 2:].sum()


def run(
    network: Transformer, samples: list[Sample], output: Path, **changes: object
) -> tuple[Tensor, dict[str, Tensor]]:
    batch = pack(samples)
    return compute_loss(network, batch, PackedView(batch.segments), config(output, **changes), Totals.of(samples))


def gradient(network: Transformer, loss: Tensor) -> Tensor:
    """All gradients as one vector; parameters the loss does not reach count as zeros."""
    pieces = torch.autograd.grad(loss, list(network.parameters()), allow_unused=True, materialize_grads=True)
    return torch.cat([piece.flatten() for piece in pieces])


def test_loss_and_gradients_equal_the_padded_definition(tmp_path: Path) -> None:
    """Flat rows and chosen tokens give what padding and masks give."""
    network, samples = model(), random_samples(9)
    ours, theirs = run(network, samples, tmp_path)[0], naive_loss(network, samples, 0.3)
    assert torch.allclose(ours, theirs, rtol=1e-5)
    mine, expected = gradient(network, ours), gradient(network, theirs)
    assert torch.cosine_similarity(mine, expected, dim=0) > 0.9999
    assert torch.allclose(mine.norm(), expected.norm(), rtol=1e-4)


def test_packed_equals_single_samples(tmp_path: Path) -> None:
    """The packed loss is the weighted mean of the losses of its samples alone: no sample sees another."""
    network, samples = model(), [sample for sample in random_samples(6, seed=3) if any(sample.weights)]
    whole = run(network, samples, tmp_path, mtp_weight=0.0)[0]
    single = sum(run(network, [s], tmp_path, mtp_weight=0.0)[0] * sum(s.weights) for s in samples)
    assert torch.allclose(whole, single / sum(sum(s.weights) for s in samples), rtol=1e-5)


def test_mtp_predicts_two_ahead_and_never_across_a_border(tmp_path: Path) -> None:
    """What follows in the flat batch changes nothing: the loss over two sequences is the mean of each one's own."""
    network = model()
    first = Sample(tokens=(5, 6, 7, 8), weights=(0.0, 1.0, 1.0, 1.0))
    losses = []
    for second in ((9, 10, 11), (20, 21, 22)):
        batch = pack([first, Sample(tokens=second, weights=(0.0, 1.0, 0.0))])  # no weight two ahead
        view = PackedView(batch.segments)
        losses.append(mtp_loss(network, network(batch.tokens, batch.positions, view), batch, view, 2.0))
    assert torch.allclose(losses[0], losses[1], rtol=1e-6)
    flat = torch.tensor(first.tokens[:-1])
    view = PackedView(Segments.of(3))
    hidden = network(flat, torch.arange(3), view)
    further = network.lm_head(network.predict_further(hidden, torch.tensor([6, 7, 8]), torch.arange(3), view))
    expected = -further.log_softmax(-1)[[0, 1], [7, 8]].mean()
    assert torch.allclose(losses[0], expected, rtol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_policy_gradient_equals_the_hand_formula(tmp_path: Path, temperature: float) -> None:
    """d/dθ of the clipped objective is Σ A·ρ·∇log p / n over the tokens that the clip lets through."""
    network = model()
    samples = policy_samples(network, 9)
    loss, parts = run(network, samples, tmp_path, temperature=temperature, clip_low=0.1, clip_high=0.3)
    surrogate, num_tokens, num_clipped = torch.zeros(()), 0, 0
    for sample in samples:
        logprobs = naive_logprobs(network, sample.tokens, temperature)
        for logprob, advantage, old in zip(logprobs, sample.advantages[1:], sample.old_logprobs[1:], strict=True):
            ratio = math.exp(logprob.item() - old)
            passes = ratio < 1.3 if advantage > 0 else ratio > 0.9
            surrogate = surrogate - logprob * advantage * ratio * passes
            num_tokens += advantage != 0
            num_clipped += advantage != 0 and not passes
    assert 0 < num_clipped < num_tokens
    mine, expected = gradient(network, loss), gradient(network, surrogate / num_tokens)
    assert torch.allclose(mine, expected, atol=1e-6, rtol=1e-4) and expected.norm() > 0
    assert float(parts["clipped"]) == pytest.approx(num_clipped / num_tokens)


def test_terms_add_up_and_zero_weights_cost_nothing(tmp_path: Path) -> None:
    """A batch with both kinds of weights has both terms; one without advantages has no policy term at all."""
    network, plain = model(), random_samples(4)
    policy = policy_samples(network, 4)
    total, parts = run(network, plain + policy, tmp_path)
    expected = parts["cross_entropy"] + 0.3 * parts["mtp"] + parts["policy"]
    assert torch.allclose(total, expected) and parts["mismatch"] <= 0.5 + 1e-4
    assert set(run(network, plain, tmp_path)[1]) == {"cross_entropy", "mtp"}
    assert set(run(network, policy, tmp_path)[1]) == {"policy", "clipped", "mismatch"}


def test_mtp_layer_routes_last(tmp_path: Path) -> None:
    """`routing` holds one entry a MoE layer, the MTP layer's at the end, each for its rows."""
    network, samples = model(), random_samples(4)
    batch = pack(samples)
    view = PackedView(batch.segments)
    compute_loss(network, batch, view, config(tmp_path), Totals.of(samples))
    rows = len(batch.tokens), len(batch.further.tokens)
    assert [tuple(chosen.shape) for chosen in view.routing] == [(count, 3) for count in rows]
    assert isinstance(batch, Packed)
