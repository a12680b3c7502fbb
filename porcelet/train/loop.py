"""The one loop: samples in, a step of the optimizer, a line of metrics, now and then a checkpoint.

    source(step) → samples → pack → model → loss → backward → clip → AdamW → expert biases → metrics.jsonl

A source is all that tells pre-training from reinforcement learning. Everything random hashes (seed, step), so a resumed
run equals the uninterrupted one bit for bit on the same machine and thread count. Left out so far: more than one
device, micro-batches.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
import shutil
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from porcelet.config import EngineConfig, ModelConfig, TrainConfig, override, parse_settings, read_hf
from porcelet.engine.engine import Engine
from porcelet.errors import InputError, ModelError, PorceletError
from porcelet.models.attention import PackedView
from porcelet.models.transformer import Transformer, build, initialize
from porcelet.train import checkpoint
from porcelet.train.data import EOS, Renderer, Task, load_task, make_tokenizer, pack
from porcelet.train.loss import compute_loss
from porcelet.train.optim import balance_experts, learning_rate, make_optimizer
from porcelet.train.rewards import Reward, exact_answer
from porcelet.train.rollout import Rollout
from porcelet.types import Sample
from porcelet.weights.load import load, save

Metrics = dict[str, float]
Source = Callable[[int], tuple[list[Sample], Metrics]]  # step → its samples, and what is to log about them

TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")


def read_recipe(path: Path, overrides: Sequence[str] = ()) -> tuple[TrainConfig, dict[str, Any]]:
    """A TOML recipe's [train] table, with `key=value` overrides, and its [model] table.

    Raises:
        InputError: the file is missing or malformed, or a key is unknown (the nearest one is named).
    """
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise InputError(f"recipe {path} cannot be read: {problem}") from problem
    strange = [name for name, table in tables.items() if name not in ("train", "model") or not isinstance(table, dict)]
    if strange:
        raise InputError(f"recipe {path}: {strange[0]!r} is neither the table [train] nor [model]")
    config = override(TrainConfig(), tables.get("train", {}), f"{path} [train]")
    return override(config, parse_settings(overrides), "command line"), tables.get("model", {})


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
    task = load_task(config)
    model = _start_model(config, model_fields, output)
    optimizer = make_optimizer(model, config)
    first = checkpoint.restore(found, model, optimizer, recipe) if found else 0
    source = _source(config, model, task, Renderer(output), reward)
    with _deterministic(), _metrics_file(output / "metrics.jsonl", first) as write:
        for step in range(first, config.steps):
            metrics = _step(model, optimizer, source, step, config)
            write(metrics)
            report(metrics)
            if (step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps:
                checkpoint.save(output, model, optimizer, step + 1, recipe)
    save(model, output)
    return output


def _start_model(config: TrainConfig, model_fields: Mapping[str, Any], output: Path) -> Transformer:
    """The model of step 0; its tokenizer and chat format go to `output`."""
    if bool(config.model) == bool(model_fields):
        raise InputError("a recipe needs either model=FOLDER to start from or a [model] table, and not both")
    if config.model and Path(config.model).resolve() == output.resolve():
        raise InputError(f"output {config.output} is the model to start from; choose another output")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise InputError(f"output {config.output} cannot be made: {problem.strerror}; choose another") from problem
    if not config.model:
        make_tokenizer(output)
        return initialize(build(_model_config(model_fields, output)), config.seed)
    folder = Path(config.model)
    if not folder.is_dir():
        raise ModelError(f"model {folder} is not a folder; training starts from one in Hugging Face form")
    for name in TEXT_FILES:
        if (folder / name).exists():
            shutil.copyfile(folder / name, output / name)
    return load(folder)


def _model_config(fields: Mapping[str, Any], folder: Path) -> ModelConfig:
    """The [model] table, completed by what follows from the tokenizer."""
    known = [field.name for field in dataclasses.fields(ModelConfig)] + ["model_type"]
    strange = [name for name in fields if name not in known]
    if strange:
        near = difflib.get_close_matches(strange[0], known, n=1)
        raise InputError(f"[model]: unknown key {strange[0]!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    tokenizer = Renderer(folder).tokenizer
    values = {"vocab_size": tokenizer.vocab_size, **fields}
    if values["vocab_size"] < tokenizer.vocab_size:
        raise InputError(f"[model] vocab_size is {values['vocab_size']}; the tokenizer needs {tokenizer.vocab_size}")
    return read_hf(values | {"bos_token_id": 0, "eos_token_id": tokenizer.token_id(EOS)}, "[model]")


def _source(config: TrainConfig, model: Transformer, task: Task, renderer: Renderer, reward: Reward) -> Source:
    if not model.config.eos_token_ids:
        raise ModelError(f"model {config.model} names no eos_token_id; an answer could not end")
    stop, count = model.config.eos_token_ids[0], config.samples_per_step
    if config.method == "grpo":
        return Rollout(Engine(model, EngineConfig(weights="float32")), task, renderer, config, reward)

    def stream(step: int) -> tuple[list[Sample], Metrics]:
        positions = range(step * count, (step + 1) * count)
        return [renderer.sample(task.draw(config.seed, i), stop) for i in positions], {}

    return stream


def _step(
    model: Transformer, optimizer: torch.optim.Optimizer, source: Source, step: int, config: TrainConfig
) -> Metrics:
    """Draw samples and learn from them. A step whose groups all lack a signal changes nothing."""
    began = time.perf_counter()
    samples, metrics = source(step)
    num_tokens = sum(len(sample.tokens) for sample in samples)
    for update in range(config.updates_per_rollout if samples else 0):
        learned = _update(model, optimizer, samples, step, config)
        metrics |= learned if update == 0 else {}
    seconds = time.perf_counter() - began
    return {"step": step + 1, **metrics, "tokens": num_tokens, "tokens_per_second": num_tokens / seconds}


def _update(
    model: Transformer, optimizer: torch.optim.Optimizer, samples: Sequence[Sample], step: int, config: TrainConfig
) -> Metrics:
    batch = pack(samples)
    view = PackedView(batch.offsets)
    loss, parts = compute_loss(model, batch, view, config)
    _require_finite(loss, "loss", step, config)
    optimizer.zero_grad()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
    _require_finite(norm, "gradient norm", step, config)
    rate = learning_rate(step, config)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    violation = balance_experts(model, view.routing, config.bias_update_speed)
    parts = {"loss": loss.detach(), **parts, "gradient_norm": norm}
    return {name: float(part) for name, part in parts.items()} | {"learning_rate": rate, "max_violation": violation}


def _require_finite(value: torch.Tensor, name: str, step: int, config: TrainConfig) -> None:
    if not math.isfinite(value.item()):
        raise PorceletError(
            f"step {step + 1}: the {name} is {value.item()}, so the step was not taken; "
            f"lower learning_rate (now {config.learning_rate}) and resume or start anew"
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
