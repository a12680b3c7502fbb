"""The one loop: samples in, a step of the optimizer, a line of metrics, now and then a checkpoint.

    source(step) → samples → pack → model → loss → backward → clip → AdamW → expert biases → metrics.jsonl

A source is all that tells pre-training from reinforcement learning. Everything random hashes (seed, step), so a resumed
run equals the uninterrupted one bit for bit on the same machine and thread count. Left out so far: more than one
device.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from porcelet.config import TrainConfig
from porcelet.errors import InputError, PorceletError
from porcelet.models.attention import PackedView
from porcelet.models.transformer import Transformer
from porcelet.train import checkpoint
from porcelet.train.loss import Totals, compute_loss, join_parts
from porcelet.train.optim import balance_experts, learning_rate, make_optimizer
from porcelet.train.packing import pack, passes
from porcelet.train.rendering import Renderer
from porcelet.train.rewards import Reward
from porcelet.train.rewards.text import exact_answer
from porcelet.train.sources import Metrics, Source, make_source
from porcelet.train.start import start_model
from porcelet.types import Sample
from porcelet.weights.load import save


def train(
    config: TrainConfig,
    model_fields: Mapping[str, Any],
    report: Callable[[Metrics], None] = lambda metrics: None,
    *,
    resume: bool = False,
    reward: Reward = exact_answer,
) -> Path:
    """Run a recipe to its end; the folder that then holds the model in Hugging Face form, with its tokenizer.

    `model_fields` are the recipe's [model] table, empty if `config.model` names a folder to start from. `report` sees
    each step's metrics. With `resume`, a run found in `config.output` continues behind its newest checkpoint.

    Raises:
        InputError: the recipe cannot be used, or `config.output` holds another run, or one and `resume` was not given.
        ModelError: the model to start from, or the checkpoint, cannot be read.
        PorceletError: the loss or its gradient is not finite; no weight was touched by it.
    """
    output, recipe = Path(config.output), checkpoint.recipe_of(config, model_fields)
    found = checkpoint.newest(output)
    if found and not resume:
        raise InputError(f"output {output} holds a run ({found.name}); continue it with --resume, or choose another")
    if config.threads:
        torch.set_num_threads(config.threads)
    model = start_model(config, model_fields, output)
    optimizer = make_optimizer(model, config.optimizer)
    first = checkpoint.restore(found, model, optimizer, recipe) if found else 0
    source = make_source(config, model, Renderer(output), reward)
    with _deterministic(), _metrics_file(output / "metrics.jsonl", first) as write:
        for step in range(first, config.steps):
            metrics = _step(model, optimizer, source, step, config)
            write(metrics)
            report(metrics)
            if (step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps:
                checkpoint.save(output, model, optimizer, step + 1, recipe)
    save(model, output)
    return output


def _step(
    model: Transformer, optimizer: torch.optim.Optimizer, source: Source, step: int, config: TrainConfig
) -> Metrics:
    """Draw samples and learn from them. A step whose groups all lack a signal changes nothing."""
    began = time.perf_counter()
    samples, metrics = source(step)
    num_tokens = sum(len(sample.tokens) for sample in samples)
    for update in range(config.policy.updates_per_rollout if samples else 0):
        learned = _update(model, optimizer, samples, step, config)
        metrics |= learned if update == 0 else {}
    seconds = time.perf_counter() - began
    return {"step": step + 1, **metrics, "tokens": num_tokens, "tokens_per_second": num_tokens / seconds}


def _update(
    model: Transformer, optimizer: torch.optim.Optimizer, samples: Sequence[Sample], step: int, config: TrainConfig
) -> Metrics:
    """One step of the optimizer on all samples, in as many passes as `tokens_per_pass` asks for."""
    totals, parts, routing = Totals.of(samples), [], []
    optimizer.zero_grad()
    for some in passes(samples, config.tokens_per_pass):
        batch = pack(some)
        view = PackedView(batch.segments)
        loss, own = compute_loss(model, batch, view, config, totals)
        _require_finite(loss, "loss", step, config)
        loss.backward()
        parts.append({"loss": loss.detach(), **own})
        routing.append(view.routing)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.max_grad_norm)
    _require_finite(norm, "gradient norm", step, config)
    rate = learning_rate(step, config)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    chosen = [torch.cat(layer) for layer in zip(*routing, strict=True)]
    violation = balance_experts(model, chosen, config.bias_update_speed)
    rest = {"gradient_norm": float(norm), "learning_rate": rate, "max_violation": violation}
    return join_parts(parts) | rest


def _require_finite(value: torch.Tensor, name: str, step: int, config: TrainConfig) -> None:
    if not math.isfinite(value.item()):
        raise PorceletError(
            f"step {step + 1}: the {name} is {value.item()}, so the step was not taken; "
            f"lower optimizer.learning_rate (now {config.optimizer.learning_rate}) and resume or start anew"
        )


@contextmanager
def _deterministic() -> Iterator[None]:
    """Sums in a fixed order: with threads, torch otherwise adds gradients of gathered rows in the order they arrive."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@contextmanager
def _metrics_file(path: Path, num_steps: int) -> Iterator[Callable[[Metrics], None]]:
    """Append to a metrics file cut to its first `num_steps` lines: a killed run repeats what follows its checkpoint."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    cut = path.with_suffix(".cut")
    cut.write_text("".join(lines[:num_steps]), encoding="utf-8")
    os.replace(cut, path)
    with path.open("a", encoding="utf-8") as file:

        def write(metrics: Metrics) -> None:
            file.write(json.dumps(metrics) + "\n")
            file.flush()

        yield write
