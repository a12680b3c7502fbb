from __future__ import annotations

import functools
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from porcelet.config import TrainConfig, read_hf
from porcelet.kernels.attention import Segments
from porcelet.models.attention import PackedView
from porcelet.models.transformer import Transformer, build, initialize
from porcelet.train.loss import Totals, compute_loss
from porcelet.train.packing import pack, passes
from porcelet.train.policy import FAMILY
from porcelet.types import Sample
from tests.train.test_loss import gradient, naive_logprobs, naive_loss
from tests.train.tiny_run import config, model

PROMPTS = ((5, 6, 7, 8), (9, 10, 11), (12, 13, 14, 15, 16))
G = 4


def llama() -> Transformer:
    """Grouped queries, tied embeddings, no experts, no MTP layer."""
    fields = {
        "model_type": "llama",
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
        "initializer_range": 0.2,
        "eos_token_id": 1,
        "bos_token_id": 0,
    }
    return initialize(build(read_hf(fields)), 0)


@functools.cache
def answers(network: Transformer, *, kl: bool) -> list[Sample]:
    """Three groups, the last without a signal; all log-probabilities lie about the model's own."""
    draw = random.Random(0)
    samples = []
    for number, prompt in enumerate(PROMPTS):
        for _ in range(G):
            drawn = tuple(draw.randrange(97) for _ in range(draw.randint(1, 6)))
            own = naive_logprobs(network, prompt + drawn).detach().tolist()[-len(drawn) :]
            advantage = 0.0 if number == 2 else draw.uniform(-2, 2)

            def near(width: float, own: list[float] = own, prompt: tuple[int, ...] = prompt) -> tuple[float, ...]:
                return (0.0,) * len(prompt) + tuple(logprob + draw.uniform(-width, width) for logprob in own)

            samples.append(
                Sample(
                    tokens=prompt + drawn,
                    advantages=(0.0,) * len(prompt) + (advantage,) * len(drawn),
                    old_logprobs=near(0.4),
                    sampler_logprobs=near(0.4),
                    reference_logprobs=near(0.6) if kl else (),
                    num_prompt=len(prompt),
                )
            )
    return samples


def padded_logprobs(network: Transformer, samples: list[Sample], temperature: float) -> tuple[Tensor, Tensor]:
    """[B, width] log-probabilities of every sample's own tokens, and the mask of those that were drawn."""
    width = max(len(sample.tokens) for sample in samples)
    tokens = torch.tensor([sample.tokens + (2,) * (width - len(sample.tokens)) for sample in samples])
    view = PackedView(Segments.of(*(width,) * len(samples)))
    hidden = network(tokens.flatten(), torch.arange(width).repeat(len(samples)), view)
    scores = (network.logits(hidden).view(*tokens.shape, -1) / temperature).log_softmax(-1)
    picked = scores[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]
    mask = torch.zeros(len(samples), width - 1)
    for row, sample in enumerate(samples):
        mask[row, sample.num_prompt - 1 : len(sample.tokens) - 1] = 1.0
    return picked, mask


def column(samples: list[Sample], name: str, width: int) -> Tensor:
    """A sample's list as a padded row."""
    rows = [getattr(sample, name)[1:] or (0.0,) * (len(sample.tokens) - 1) for sample in samples]
    return torch.tensor([row + (0.0,) * (width - len(row)) for row in rows])


def naive_policy_loss(network: Transformer, samples: list[Sample], run: TrainConfig) -> Tensor:
    """Each paper's formula, answer by answer, over a padded batch."""
    policy = run.policy
    logprobs, mask = padded_logprobs(network, samples, policy.temperature)
    old, sampler, reference, advantages = (
        column(samples, name, mask.shape[1])
        for name in ("old_logprobs", "sampler_logprobs", "reference_logprobs", "advantages")
    )
    low, high = 1 - policy.clip_low, 1 + policy.clip_high
    total = torch.zeros(())
    for i in range(len(samples)):
        on = mask[i] == 1
        length = int(on.sum())
        A, change = advantages[i][on], (logprobs - old)[i][on]
        rho = {
            "gspo": (change.sum() / length).exp().expand(length),
            "rloo": change.sum().exp().expand(length),
        }.get(policy.loss, change.exp())
        term = torch.min(rho * A, rho.clip(low, high) * A)
        if policy.importance_cap:
            term = term * (old - sampler)[i][on].exp().clip(max=policy.importance_cap)
        if policy.off_policy_limit and A[0] < 0 and (sampler - logprobs)[i][on].mean() > policy.off_policy_limit:
            term = term * 0
        if policy.kl_weight:
            log_r = (reference - logprobs)[i][on]
            k3 = log_r.exp() - log_r - 1
            term = term - policy.kl_weight * (change.exp() * k3 if policy.kl_estimator == "unbiased" else k3)
        divisor = {
            "dapo": float(mask.sum()),
            "dr_grpo": len(samples) * policy.max_new_tokens,
        }.get(policy.loss, len(samples) * length)
        total = total + term.sum() / divisor
    return -total


def in_passes(network: Transformer, samples: list[Sample], run: TrainConfig) -> tuple[Tensor, int]:
    """The loss as the loop computes it: what teaches, packed, prompts shared, pass by pass."""
    totals, losses = Totals.of(samples), []
    for some in passes([sample for sample in samples if sample.teaches], run.tokens_per_pass):
        batch = pack(some)
        losses.append(compute_loss(network, batch, PackedView(batch.segments), run, totals)[0])
    return torch.stack(losses).sum(), len(losses)


EXTRAS: dict[str, dict[str, Any]] = {
    "plain": {},
    "kl": {"kl_weight": 0.3},
    "unbiased kl": {"kl_weight": 0.3, "kl_estimator": "unbiased"},
    "importance": {"importance_cap": 1.2},
    "all": {"kl_weight": 0.1, "importance_cap": 1.1, "off_policy_limit": 0.01, "temperature": 0.8},
}


V3 = model()


@pytest.mark.parametrize("network", [V3, llama()], ids=["v3", "llama"])
@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("loss", FAMILY)
def test_every_loss_equals_the_padded_formula(tmp_path: Path, loss: str, extra: str, network: Transformer) -> None:
    """Packed, with shared prompts, in passes, zero advantages skipped: the papers' loss and gradient."""
    clips = {"clip_low": 0.1, "clip_high": 0.15, "max_new_tokens": 6}
    run = config(tmp_path, loss=loss, tokens_per_pass=18, group_size=G, **clips, **EXTRAS[extra])
    samples = answers(network, kl=run.policy.kl_weight > 0)
    (ours, num_passes), theirs = in_passes(network, samples, run), naive_policy_loss(network, samples, run)
    assert num_passes > 1 and abs(ours.item() - theirs.item()) < 1e-5
    mine, expected = gradient(network, ours), gradient(network, theirs)
    assert torch.cosine_similarity(mine, expected, dim=0) > 0.9999
    assert torch.allclose(mine.norm(), expected.norm(), rtol=1e-4) and expected.norm() > 1e-3


def test_losses_differ(tmp_path: Path) -> None:
    """No two members of the family, and no two extras, are the same on the same answers."""
    network = V3
    runs = [config(tmp_path, loss=loss, max_new_tokens=6) for loss in FAMILY]
    runs += [config(tmp_path, max_new_tokens=6, **extra) for name, extra in EXTRAS.items() if name != "plain"]
    values = [in_passes(network, answers(network, kl=run.policy.kl_weight > 0), run)[0].item() for run in runs]
    assert len({round(value, 5) for value in values}) == len(values)


def test_cross_entropy_mtp_and_policy_add_up(tmp_path: Path) -> None:
    """Samples to imitate and answers to reinforce in one step: the sum of the padded definitions."""
    network, run = V3, config(tmp_path, kl_weight=0.2, tokens_per_pass=20)
    plain = [Sample(tokens=(5, 6, 7, 8, 20 + i), weights=(0.0, 0.0, 1.0, 0.5, 1.0)) for i in range(3)]
    drawn = answers(network, kl=True)
    ours, theirs = in_passes(network, plain + drawn, run)[0], naive_loss(network, plain, 0.3)
    theirs = theirs + naive_policy_loss(network, drawn, run)
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert torch.cosine_similarity(gradient(network, ours), gradient(network, theirs), dim=0) > 0.9999


@pytest.mark.parametrize("loss", FAMILY)
def test_several_updates_follow_the_padded_formula(tmp_path: Path, loss: str) -> None:
    """Three steps of gradient descent on one rollout, from p_old = p on: the same parameters."""
    run = config(tmp_path, loss=loss, clip_low=0.02, clip_high=0.02, max_new_tokens=6)
    finals = []
    for compute in (lambda network, samples: in_passes(network, samples, run)[0], None):
        network, samples = model(), answers(V3, kl=False)
        for _ in range(3):
            value = compute(network, samples) if compute else naive_policy_loss(network, samples, run)
            pieces = torch.autograd.grad(value, list(network.parameters()), allow_unused=True, materialize_grads=True)
            with torch.no_grad():
                for parameter, piece in zip(network.parameters(), pieces, strict=True):
                    parameter.sub_(piece, alpha=0.02)
        finals.append(torch.cat([parameter.detach().flatten() for parameter in network.parameters()]))
    start = torch.cat([parameter.detach().flatten() for parameter in model().parameters()])
    moved, expected = finals[0] - start, finals[1] - start
    assert torch.cosine_similarity(moved, expected, dim=0) > 0.9999 and expected.norm() > 0


def test_metrics_are_means_over_what_is_computed(tmp_path: Path) -> None:
    """By hand: shares of clipped tokens on each side, KL, entropy and the largest mismatch."""
    network, run = V3, config(tmp_path, kl_weight=0.1, clip_low=0.1, clip_high=0.2)
    samples = answers(network, kl=True)
    batch = pack(samples)
    _, parts = compute_loss(network, batch, PackedView(batch.segments), run, Totals.of(samples))
    logprobs, mask = (tensor.detach() for tensor in padded_logprobs(network, samples, 1.0))
    names = ("old_logprobs", "sampler_logprobs", "reference_logprobs", "advantages")
    old, sampler, reference, A = (column(samples, name, mask.shape[1]) for name in names)
    on = mask == 1
    ratio = (logprobs - old).exp()
    log_r, off = reference - logprobs, logprobs - sampler
    expected = {
        "clip_ratio/low_mean": ((ratio < 0.9) & (A < 0))[on].float().mean(),
        "clip_ratio/high_mean": ((ratio > 1.2) & (A > 0))[on].float().mean(),
        "kl": (log_r.exp() - log_r - 1)[on].mean(),
        "entropy": -logprobs[on].mean(),
        "ratio": ratio[on].mean(),
        "mismatch_kl": (off.exp() - off - 1)[on].mean(),
        "mismatch": off[on].abs().max(),
    }
    assert all(float(parts[name]) == pytest.approx(float(value), rel=1e-4) for name, value in expected.items())
    assert min(float(parts[f"clip_ratio/{side}_mean"]) for side in ("low", "high")) > 0


def test_a_teachers_log_probabilities_as_advantages_are_reverse_kl(tmp_path: Path) -> None:
    """Over all first tokens, each drawn as often as it is likely, the gradient is that of KL(student, teacher)."""
    student, teacher, prompt = model(), model(seed=1), (5, 6, 7)
    logits = [naive_distribution(network, prompt) for network in (student, teacher)]
    kl = (logits[0].exp() * (logits[0] - logits[1].detach())).sum()
    own, other = (row.detach().tolist() for row in logits)
    samples = [
        Sample(
            tokens=(*prompt, token),
            # An expectation instead of draws: each token once, weighed by its probability.
            advantages=(0.0, 0.0, 0.0, (other[token] - own[token]) * 2.718281828459045 ** own[token]),
            old_logprobs=(0.0, 0.0, 0.0, own[token]),
            num_prompt=3,
        )
        for token in range(len(own))
    ]
    ours = in_passes(student, samples, config(tmp_path, loss="dapo"))[0] * len(samples)
    assert torch.cosine_similarity(gradient(student, ours), gradient(student, kl), dim=0) > 0.9999


def naive_distribution(network: Transformer, prompt: tuple[int, ...]) -> Tensor:
    """log p(token | prompt) for every token."""
    view = PackedView(Segments.of(len(prompt)))
    hidden = network(torch.tensor(prompt), torch.arange(len(prompt)), view)
    return network.logits(hidden)[-1].log_softmax(-1)
