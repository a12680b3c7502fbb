"""The one loop: samples in, a step of the optimizer, a line of metrics, now and then a checkpoint.

    source(step) → journal → samples → pack → model → loss → backward → spike rule → optimizer → expert biases

A source is all that tells pre-training from reinforcement learning. Everything random hashes (seed, step), so a resumed
run equals the uninterrupted one bit for bit on the same machine and thread count, wherever it was killed. Left out so
far: more than one device.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.utils.deterministic

from porcelet.config import DRAWING, TrainConfig
from porcelet.errors import InputError, PorceletError
from porcelet.kernels.cpu import keep_freed_memory
from porcelet.train import checkpoint, journal, lora
from porcelet.train.files import writing
from porcelet.train.kept import holds_samples
from porcelet.train.log import Log, open_log
from porcelet.train.measure import record_session
from porcelet.train.optim import make_optimizer
from porcelet.train.pause import Paused, watching
from porcelet.train.rendering import Renderer
from porcelet.train.rewards import Reward
from porcelet.train.schedule import check_room
from porcelet.train.sources import make_source
from porcelet.train.spikes import SpikeRule
from porcelet.train.start import start_model
from porcelet.train.step import Run, Taken, take_step
from porcelet.train.types import ROLLOUTS, Metrics

log = logging.getLogger(__name__)


def train(
    config: TrainConfig,
    model_fields: Mapping[str, Any],
    report: Callable[[Metrics], None] = lambda metrics: None,
    *,
    resume: bool = False,
    reward: Reward | None = None,
    minutes: float = math.inf,
    unsafe_sandbox: bool = False,
) -> Path:
    """Run a recipe to its end; the folder that then holds the model in Hugging Face form, with its tokenizer.

    `model_fields` are the recipe's [model] table, empty if `config.model` names a folder to start from. `report` sees
    each step's metrics. A `reward` given here stands in for those of the recipe. With `resume`, a run found in
    `config.output` continues behind its newest checkpoint. After `minutes`, or on SIGINT and SIGTERM, the run pauses:
    the numbers are the same however often it does. `unsafe_sandbox` lets rewards run code without a sandbox.

    Raises:
        InputError: the recipe cannot be used, or `config.output` holds another run, or one and `resume` was not given.
        ModelError: the model to start from, or the checkpoint, cannot be read.
        CapacityError: the disk is full.
        Paused: the run is not at its end; it has a checkpoint of all its steps.
        PorceletError: a step was refused by the spike rule; the checkpoint to resume from is named. It has all steps
            before, unless the step's first updates were taken already.
    """
    began = time.monotonic()
    keep_freed_memory()
    run = begin(config, model_fields, resume=resume, reward=reward, unsafe_sandbox=unsafe_sandbox)
    with deterministic(), open_log(config, run.recipe, run.step) as sink, watching(60 * minutes, began) as watch:
        while run.step < config.steps:
            start = time.monotonic()
            report(_logged_step(run, sink))
            watch.stepped(time.monotonic() - start)
            reason = watch.reason() if run.step < config.steps else ""
            if reason or run.step % config.checkpoint_every == 0 or run.step == config.steps:
                start = time.monotonic()
                num_bytes = _save(run, sink)
                watch.saved(time.monotonic() - start)
            if reason:
                where = f"{checkpoint.folder_of(run.output, run.step)} ({num_bytes / 1e6:.1f} MB)"
                raise Paused(
                    f"{reason}: paused after step {run.step} of {config.steps}, saved as {where}; "
                    f"continue with --resume",
                    asked=not watch.signal,
                )
    with writing(run.output):
        lora.save_result(run.model.cpu(), config, run.output)
    return run.output


def begin(
    config: TrainConfig,
    model_fields: Mapping[str, Any],
    *,
    resume: bool,
    reward: Reward | None,
    unsafe_sandbox: bool = False,
) -> Run:
    """A run before its first step, or behind its newest checkpoint. Raises what `train` raises."""
    check_room(config)
    output, recipe = Path(config.output), checkpoint.recipe_of(config, model_fields)
    found = checkpoint.newest(output)
    if holds_samples(output):
        raise InputError(f"output {output} holds samples that a model was asked for; choose another output")
    if found and not resume:
        raise InputError(f"output {output} holds a run ({found.name}); continue it with --resume, or choose another")
    header = checkpoint.read_header(found, recipe, output) if found else None
    set_threads(config, header)
    check_device(config)
    model = start_model(config, model_fields, output).to(config.device)
    optimizer = make_optimizer(model, config.optimizer)
    spikes = SpikeRule(config.spike_window, config.spike_deviations)
    if found and header:
        checkpoint.restore(found, model, optimizer)
        spikes.restore(header.spikes)
        _prune(config, header.step)  # a run that was killed between a checkpoint and this
    lora.refresh(model)
    source = make_source(config, model, Renderer(output), reward, unsafe_sandbox=unsafe_sandbox)
    _clear(output, resume=resume)
    if config.method in ROLLOUTS:
        decisive = {name: value for name, value in recipe.items() if name not in checkpoint.ROUNDING}
        rule = [config.spike_window, config.spike_deviations]
        source = journal.Journal(source, output / "rollouts", journal.digest(decisive, rule))
    record_session(output, header.step if header else 0, config.device)
    return Run(config, recipe, model, optimizer, source, spikes, header.step if header else 0)


def _clear(output: Path, *, resume: bool) -> None:
    """Drop half a model that a killed run was saving, and what a run that never reached a checkpoint left, unless it
    is to be resumed. The folder is a run's own (`start.claim`)."""
    (output / "evaluation.json").unlink(missing_ok=True)  # of a model that is about to change
    stale = [] if resume else [output / name for name in ("reference", "rollouts", "spikes", "tensorboard")]
    for folder in (*stale, *output.glob(".*.tmp")):
        shutil.rmtree(folder, ignore_errors=True)


def set_threads(config: TrainConfig, header: checkpoint.Header | None) -> None:
    """As many threads as the recipe says, else as many as the checkpoint was made with: sums depend on it. What rounds
    them otherwise than before is told."""
    threads = config.threads or (header.threads if header else 0)
    if threads:
        torch.set_num_threads(threads)
    if not header:
        return
    passes = header.recipe.get("tokens_per_pass", config.tokens_per_pass)  # of a method that makes none, it is not kept
    for what, before, now in (
        ("torch", header.torch, torch.__version__),
        ("threads", header.threads, torch.get_num_threads()),
        ("tokens_per_pass", passes, config.tokens_per_pass),
    ):
        if before != now:
            log.warning(
                "the checkpoint was made with %s %s, this is %s: the run goes on, but no longer bit for bit",
                *(what, before, now),
            )


def check_device(config: TrainConfig) -> None:
    """Refuse a device that is not there, or on which the method cannot run.

    Raises:
        InputError: names the device.
    """
    if config.device == "cpu":
        return
    if not torch.cuda.is_available():
        raise InputError("device is cuda, and torch sees no GPU; choose device=cpu")
    if config.method in DRAWING:
        raise InputError(
            f"device is cuda, and the engine that draws for {config.method} runs on cpu; choose device=cpu"
        )
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs to add in a fixed order


def _logged_step(run: Run, sink: Log) -> Metrics:
    """Take a step and log it, or refuse it as the recipe says."""
    taken = take_step(run)
    if taken.objection:
        _keep(run, taken)
        _refuse(run, sink, taken)
    elif taken.metrics["updates"]:
        run.spikes.end()
    run.step += 1
    metrics = {"step": run.step, **taken.metrics, "skipped": run.spikes.num_skipped}
    sink.write(metrics)
    return metrics


def _keep(run: Run, taken: Taken) -> None:
    """Write down the batch of a refused update."""
    finite = {name: value for name, value in taken.metrics.items() if math.isfinite(value)}
    note = f"step {run.step + 1}, update {int(taken.metrics['updates']) + 1}: {taken.objection}"
    journal.write(run.output / "spikes", journal.Entry(run.step + 1, "", finite, list(taken.samples), note))


def _refuse(run: Run, sink: Log, taken: Taken) -> None:
    """Count a step that was not taken, or not to its end, or end the run there."""
    config, kept = run.config, journal.path_of(run.output / "spikes", run.step)
    num_taken = int(taken.metrics["updates"])
    what = f"the rest of the step, behind update {num_taken}," if num_taken else "the step"
    if config.on_spike == "skip" and run.spikes.num_in_row < config.spike_limit:
        run.spikes.skip()
        log.warning("step %d: %s, so %s is skipped; its batch is %s", run.step + 1, taken.objection, what, kept)
        return
    if not num_taken:  # nothing has moved since the step before
        _save(run, sink)
    found = checkpoint.newest(run.output)
    place = f"behind {found}" if found else "from the first step, as there is no checkpoint yet"
    remedy = "on_spike=skip" if config.on_spike == "stop" else f"spike_limit above {config.spike_limit}"
    raise PorceletError(
        f"step {run.step + 1}: {taken.objection}, so {what} was not taken; its batch is {kept}. Resume with {remedy}, "
        f"{place}, or start anew with optimizer.learning_rate below {config.optimizer.learning_rate}"
    )


def _save(run: Run, sink: Log) -> int:
    """A checkpoint of the steps done, behind metrics that are on the disk; its bytes."""
    sink.flush()
    header = checkpoint.Header(run.step, run.recipe, run.spikes.state(), torch.get_num_threads(), torch.__version__)
    num_bytes = checkpoint.save(run.output, run.model, run.optimizer, header)
    _prune(run.config, run.step)
    return num_bytes


def _prune(config: TrainConfig, step: int) -> None:
    """Drop what the checkpoint of `step` makes superfluous."""
    checkpoint.prune(Path(config.output), config.keep_checkpoints)
    journal.prune(Path(config.output, "rollouts"), step - config.log.rollouts)


@contextmanager
def deterministic() -> Iterator[None]:
    """Sums in a fixed order: with threads, torch otherwise adds gradients of gathered rows in the order they arrive."""
    filling: Any = torch.utils.deterministic  # its settings are properties of the module
    before = torch.are_deterministic_algorithms_enabled(), filling.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    filling.fill_uninitialized_memory = False  # nothing reads what it has not written; filling takes 3 % of a step
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        filling.fill_uninitialized_memory = before[1]
