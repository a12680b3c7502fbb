"""One step of a run: samples, gradients in passes, the spike rule, the optimizer, the expert biases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from porcelet.config import TrainConfig
from porcelet.models.attention import PackedView
from porcelet.models.transformer import Transformer
from porcelet.train import lora
from porcelet.train.balance import balance_metrics, expert_loads, move_biases
from porcelet.train.flops import train_flops
from porcelet.train.loss import Totals, compute_loss, join_parts, join_updates
from porcelet.train.measure import Stopwatch
from porcelet.train.optim import Optimizer
from porcelet.train.packing import pack, passes, to_device
from porcelet.train.schedule import at_step, learning_rate
from porcelet.train.sources import Metrics, Source
from porcelet.train.spikes import SpikeRule, not_finite
from porcelet.train.updates import batches
from porcelet.types import Sample


@dataclass
class Run:
    """A run between two steps; `step` of them are done."""

    config: TrainConfig
    recipe: Mapping[str, Any]
    model: Transformer
    optimizer: Optimizer
    source: Source
    spikes: SpikeRule
    step: int = 0

    @property
    def output(self) -> Path:
        return Path(self.config.output)


@dataclass(frozen=True)
class Taken:
    """A step's samples, what is to log about it, and why it was refused, if it was."""

    samples: Sequence[Sample]
    metrics: Metrics
    objection: str


def take_step(run: Run) -> Taken:
    """Draw samples and learn from them. Without any signal in them nothing changes.

    Only the first update of a step is held against the steps before, as later ones are of another kind.
    """
    watch = Stopwatch()
    with watch.phase("draw"):
        samples, metrics = run.source(run.step)
    updates: list[Metrics] = []
    refused, objection = Metrics(), ""
    for batch in batches(samples, run.config.policy, run.config.seed, run.step):
        learned, objection = _update(run, batch, watch, first=not updates)
        if objection:
            refused = learned
            break
        updates.append(learned)
    num_tokens = sum(len(sample.tokens) for sample in samples if sample.teaches)
    measured = {"updates": len(updates), "tokens": num_tokens, **watch.metrics(num_tokens, run.config.device)}
    return Taken(samples, {**metrics, **(join_updates(updates) or refused), **measured}, objection)


def _update(run: Run, samples: Sequence[Sample], watch: Stopwatch, *, first: bool) -> tuple[Metrics, str]:
    """One step of the optimizer on all samples; or why it was not taken, with model and optimizer as they were."""
    config = at_step(run.config, run.step)
    with watch.phase("gradient"):
        run.optimizer.zero_grad()
        parts, routing = gradients(run, samples, config, watch)
        norm, rate = run.optimizer.gradient_norm(), learning_rate(run.step, config)
    metrics = {**parts, "gradient_norm": norm, "learning_rate": rate}
    objection = run.spikes.objection(parts["loss"], norm) if first else not_finite(parts["loss"], norm)
    if objection:
        return metrics, objection
    with watch.phase("optimizer"):
        run.optimizer.step(norm, rate)
        lora.refresh(run.model)
        loads = expert_loads(routing, run.model.config.n_routed_experts)
        move_biases(run.model, loads, 0.0 if config.lora.rank else config.bias_update_speed)
    if first:
        run.spikes.take(parts["loss"], norm)
    return {**metrics, **balance_metrics(loads)}, ""


def gradients(
    run: Run, samples: Sequence[Sample], config: TrainConfig, watch: Stopwatch
) -> tuple[dict[str, float], list[torch.Tensor]]:
    """The loss by parts, its gradients in the model, and every MoE layer's choices, in as many passes as
    `tokens_per_pass` asks for. One whose loss is not finite is the last: its gradients would be of no use."""
    totals, parts, routing = Totals.of(samples), [], []
    for some in passes(samples, config.tokens_per_pass):
        batch = to_device(pack(some), config.device)
        view = PackedView(batch.segments, gate_logits=[] if config.balance_weight else None)
        loss, own = compute_loss(run.model, batch, view, config, totals)
        parts.append({"loss": loss.detach(), **own})
        routing.append(view.routing)
        if not loss.isfinite():
            break
        loss.backward()
        watch.flops += train_flops(run.model.config, batch, mtp="mtp" in own, frozen=bool(config.lora.rank))
    return join_parts(parts), [torch.cat(layer) for layer in zip(*routing, strict=True)]
