"""`porcelet train`: run a recipe, with its progress on one line."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from porcelet.config import TrainConfig
    from porcelet.train.stages import Stage

SHOWN = {"loss": "loss", "reward": "reward", "no_signal": "no signal", "max_violation": "MaxVio"}
LINE_SECONDS = 30  # between two lines where there is no terminal


def train(
    recipe: Annotated[Path, typer.Argument(help="A TOML file with a [train] and, for a new model, a [model] table.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value for [train], such as steps=100; table.key=value for others.")
    ] = None,
    resume: Annotated[bool, typer.Option(help="Continue the run in the output folder behind its checkpoint.")] = False,
    minutes: Annotated[
        float, typer.Option(min=0.0, help="Pause with a checkpoint before so many minutes are over; 0: never.")
    ] = 0.0,
    unsafe_sandbox: Annotated[bool, typer.Option(help="Run code rewards without bubblewrap.")] = False,
) -> None:
    """Train a model by a recipe: pre-training, fine-tuning or reinforcement learning.

    Ctrl-C or SIGTERM finishes the step and writes a checkpoint; --resume continues, with the same numbers as if
    nothing had happened. A run paused by --minutes ends with exit code 0, one that was interrupted with 130.
    """
    start = time.monotonic()
    from porcelet.train.pause import Paused
    from porcelet.train.stages import read_stages, report_path, run_stages

    stages = read_stages(recipe, overrides or [])
    left = minutes - (time.monotonic() - start) / 60 if minutes else float("inf")
    try:
        output = run_stages(stages, _progress, resume=resume, minutes=left, unsafe_sandbox=unsafe_sandbox)
    except Paused as pause:
        if not pause.asked:
            raise
        print(f"porcelet: {pause}", file=sys.stderr)
        return
    config = stages[-1].config
    made = f"samples: {output / 'samples.jsonl'}" if config.method == "sample" else f"model: {output}"
    print(f"{made}   metrics: {output / 'metrics.jsonl'}")
    if config.log.report:
        print(f"report: {report_path(stages[-1])}")
    if config.method == "sample":
        return
    if config.lora.rank:
        print(f"adapter: {output / 'adapter'}")
    if config.lora.rank and not config.lora.merge:
        print(_how_to_merge(config.model, output / "adapter"))
        return
    if not config.data.conversations:
        _print_result(config, output, unsafe_sandbox=unsafe_sandbox)
    print(f"talk to it: porcelet chat --model {output}")


@contextmanager
def _progress(stage: Stage) -> Iterator[Callable[[dict[str, float]], None]]:
    """A live line on a terminal: steps done, the numbers that matter, speed, time left. Elsewhere a line now and
    then."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    name, total = stage.name or stage.config.method, stage.config.steps
    seconds: deque[float] = deque(maxlen=50)
    console = Console(stderr=True)
    columns = (TextColumn(name), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar, printed = progress.add_task("", total=total), 0.0

        def report(metrics: dict[str, float]) -> None:
            nonlocal printed
            seconds.append(metrics["seconds"])
            step = int(metrics["step"])
            line = summary(metrics, (total - step) * statistics.fmean(seconds))
            progress.update(bar, completed=step, description=line)
            if not console.is_terminal and (step == total or time.monotonic() - printed > LINE_SECONDS):
                printed = time.monotonic()
                print(f"{name} {step}/{total}  {line}", file=sys.stderr, flush=True)

        yield report


def summary(metrics: dict[str, float], seconds_left: float) -> str:
    """The numbers of a step that matter while it runs, and the time left."""
    parts = [f"{label} {metrics[name]:.3f}" for name, label in SHOWN.items() if name in metrics]
    parts += [f"{metrics['tokens_per_second']:.0f} tokens/s", f"{metrics['peak_bytes'] / 1e9:.1f} GB"]
    if metrics.get("reward_failures"):
        parts.append(f"failed rewards {metrics['reward_failures']:.0f}")
    if metrics["skipped"]:
        parts.append(f"skipped {metrics['skipped']:.0f}")
    minutes, rest = divmod(round(seconds_left), 60)
    hours, minutes = divmod(minutes, 60)
    return "  ".join([*parts, f"{hours}:{minutes:02}:{rest:02} left"])


def _how_to_merge(model: str, adapter: Path) -> str:
    """What to do to make a model of an adapter: merging takes a base in a folder."""
    from porcelet import hub

    base = hub.resolve(model)
    if base.is_dir():
        return f"make it a model: porcelet merge {base} {adapter} FOLDER"
    return f"`porcelet merge` takes no GGUF file, which {model} is; a run with lora.merge=true makes a model"


def _print_result(config: TrainConfig, output: Path, *, unsafe_sandbox: bool) -> None:
    """What the saved model can do with problems it was never trained on, beside what it could before."""
    from porcelet import hub
    from porcelet.train.corpus.bits import held_out_bits
    from porcelet.train.evaluate import held_out_accuracy

    if config.method == "pretrain" and config.data.corpus:
        if config.data.held_out:
            found = held_out_bits(output, config.data.held_out, context=config.data.context)
            print(f"held-out text: {found.bits_per_byte:.4f} bits a byte of {found.num_bytes:,}")
        return
    lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rewards = [metrics["reward"] for metrics in map(json.loads, lines) if "reward" in metrics]
    if rewards:
        num = min(5, len(rewards))
        first, last = statistics.fmean(rewards[:num]), statistics.fmean(rewards[-num:])
        print(f"mean reward: {first:.3f} in the first {num} steps, {last:.3f} in the last")
    accuracy, count = held_out_accuracy(output, config, unsafe_sandbox=unsafe_sandbox)
    before = ""
    if config.model:
        share, _ = held_out_accuracy(hub.resolve(config.model), config, unsafe_sandbox=unsafe_sandbox)
        before = f" (before: {share:.1%})"
    print(f"held-out {config.task.name} answered exactly: {accuracy:.1%}{before} of {count}")
