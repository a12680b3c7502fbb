"""RL without waste, each part switched off in turn: seconds of an update, or of a rollout, on one workload.

The update's answers have lengths between 1 and twice the workload's R, evenly, so that R is their mean and padding has
something to pad; a quarter of the groups (one at least) is without a signal. Every way of computing must give the loss
of the full one within 1e-5, which is asserted before anything is timed.

    update                 all of it
    own_prompts            every answer computes its prompt: G · (P + R) tokens in the place of P + G · R
    padded                 prompts of their own, and answers filled up to the longest
    old_logprobs_anew      a forward pass for p_old in front of the update
    silent_groups          groups without a signal are computed as well
    all_logits             the head for every row at once, not for drawn tokens in chunks
    rollout                each prompt computed once for its G answers
    rollout_own_prompts    G requests a prompt, and no cache of prefixes
"""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from benchmarks.harness import Run
from porcelet.config import EngineConfig
from porcelet.engine.engine import Engine
from porcelet.models.attention import PackedView
from porcelet.train.loop import deterministic
from porcelet.train.loss import Totals, drawn_logprobs
from porcelet.train.packing import Packed, cut, pack
from porcelet.train.policy import Drawn, policy_loss
from porcelet.train.scoring import score_drawn
from porcelet.types import Sample, SamplingParams

if TYPE_CHECKING:
    from benchmarks.rl import Trainer

FILLING = 0  # the token that padding is made of
SILENT = 4  # one group in so many has no signal
MAX_DIFFERENCE = 1e-5


def variants(trainer: Trainer) -> dict[str, Run]:
    """The ways to compute, ready to be timed."""
    samples = natural_samples(trainer)
    longest = max(len(sample.tokens) for sample in samples)
    filled = [filled_up(sample, longest) for sample in samples]
    teaching = [sample for sample in samples if sample.teaches]
    updates: dict[str, Callable[[], float]] = {
        "update": lambda: update(trainer, teaching, samples),
        "own_prompts": lambda: update(trainer, teaching, samples, share=False),
        "padded": lambda: update(trainer, [s for s in filled if s.teaches], samples, share=False),
        "old_logprobs_anew": lambda: update(trainer, rescored(trainer, teaching), samples),
        "silent_groups": lambda: update(trainer, samples, samples),
        "all_logits": lambda: update(trainer, teaching, samples, logprobs=from_all_logits),
    }
    losses = {name: run() for name, run in updates.items()}
    for name, loss in losses.items():
        assert abs(loss - losses["update"]) < MAX_DIFFERENCE, (name, loss, losses["update"])
    alone = Engine(trainer.model, EngineConfig(weights="float32", prefix_cache="off"))
    return {name: timed(trainer, run) for name, run in updates.items()} | {
        "rollout": lambda: {"seconds": seconds(lambda: generate(trainer, trainer.engine, trainer.workload.group))},
        "rollout_own_prompts": lambda: {"seconds": seconds(lambda: generate(trainer, alone, 1))},
    }


def natural_samples(trainer: Trainer) -> list[Sample]:
    """Random answers of random lengths, scored by the model, with random advantages that are zero in some groups."""
    draw, samples, silent = random.Random(1), list[Sample](), max(1, trainer.workload.num_prompts // SILENT)
    for number, prompt in enumerate(trainer.prompts):
        for _ in range(trainer.workload.group):
            count = draw.randint(1, 2 * trainer.workload.answer - 1)
            tokens = prompt + tuple(draw.randrange(300, trainer.model.config.vocab_size) for _ in range(count))
            advantage = 0.0 if number < silent else draw.uniform(-1, 1)
            weights = (0.0,) * len(prompt) + (advantage,) * count
            samples.append(Sample(tokens=tokens, advantages=weights, num_prompt=len(prompt)))
    return rescored(trainer, samples)


def rescored(trainer: Trainer, samples: Sequence[Sample]) -> list[Sample]:
    found = score_drawn(trainer.model, samples, trainer.config)
    return [dataclasses.replace(s, old_logprobs=logprobs) for s, logprobs in zip(samples, found, strict=True)]


def filled_up(sample: Sample, length: int) -> Sample:
    """Behind its end come tokens that nothing is learnt from."""
    count = length - len(sample.tokens)
    return dataclasses.replace(
        sample,
        tokens=sample.tokens + (FILLING,) * count,
        advantages=sample.advantages + (0.0,) * count,
        old_logprobs=sample.old_logprobs + (0.0,) * count,
    )


def update(
    trainer: Trainer,
    computed: Sequence[Sample],
    counted: Sequence[Sample],
    *,
    share: bool = True,
    logprobs: Callable[..., Tensor] = drawn_logprobs,
) -> float:
    """Gradients of the `computed` samples, as means over the `counted` ones; the loss."""
    trainer.model.zero_grad()
    totals, total, temperature = Totals.of(counted), 0.0, trainer.config.policy.temperature
    for some in cut(computed, trainer.config.tokens_per_pass):
        batch = pack([asking(sample) for sample in some], share=share)
        drawn = Drawn.of(batch)
        hidden = trainer.model(batch.tokens, batch.positions, PackedView(batch.segments))
        found = logprobs(trainer.model, hidden, batch, drawn, temperature)
        loss, _ = policy_loss(found, drawn, trainer.config.policy, totals)
        loss.backward()
        total += float(loss.detach())
    return total


def asking(sample: Sample) -> Sample:
    """A sample without a signal is computed only if it is compared with a reference."""
    if sample.teaches:
        return sample
    return dataclasses.replace(sample, reference_logprobs=sample.old_logprobs)


def from_all_logits(model: torch.nn.Module, hidden: Tensor, batch: Packed, drawn: Drawn, temperature: float) -> Tensor:
    """log-softmax over the vocabulary for every row, then the drawn tokens' entries."""
    scores = (model.logits(hidden) / temperature).log_softmax(-1)  # type: ignore[operator]
    return scores[batch.rows[drawn.chosen], batch.targets[drawn.chosen]]


def timed(trainer: Trainer, run: Callable[[], float]) -> Run:
    def measured() -> dict[str, float]:
        return {"seconds": seconds(lambda: (run(), trainer.descend()))}

    return measured


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    with deterministic():  # as training runs
        run()
    return time.perf_counter() - start


def generate(trainer: Trainer, engine: Engine, per_request: int) -> None:
    """The workload's answers, `per_request` of them a request."""
    engine.weights_changed()
    repeated = [prompt for prompt in trainer.prompts for _ in range(trainer.workload.group // per_request)]
    params = [
        SamplingParams(max_tokens=trainer.workload.answer, n=per_request, ignore_eos=True, seed=number)
        for number in range(len(repeated))
    ]
    engine.generate(repeated, params)
