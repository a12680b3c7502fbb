"""`porcelet train`: run a recipe, with its progress on one line."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from porcelet.config import TrainConfig

SHOWN = {"loss": "loss", "reward": "reward", "no_signal": "no signal", "max_violation": "MaxVio"}


def train(
    recipe: Annotated[Path, typer.Argument(help="A TOML file with a [train] and, for a new model, a [model] table.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value for [train], such as steps=100; table.key=value for others.")
    ] = None,
    resume: Annotated[bool, typer.Option(help="Continue the run in the output folder behind its checkpoint.")] = False,
) -> None:
    """Train a model by a recipe: pre-training or reinforcement learning."""
    from porcelet.train.loop import train as run
    from porcelet.train.recipe import read_recipe

    config, model_fields = read_recipe(recipe, overrides or [])
    with _progress(config) as report:
        output = run(config, model_fields, report, resume=resume)
    print(f"model: {output}   metrics: {output / 'metrics.jsonl'}")
    _print_result(config, output)
    print(f"talk to it: porcelet chat --model {output}")


@contextmanager
def _progress(config: TrainConfig) -> Iterator[Callable[[dict[str, float]], None]]:
    """A live line: steps done, the numbers that matter, speed, time left."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task(config.method, total=config.steps)

        def report(metrics: dict[str, float]) -> None:
            parts = [f"{label} {metrics[name]:.3f}" for name, label in SHOWN.items() if name in metrics]
            parts.append(f"{metrics['tokens_per_second']:.0f} tokens/s")
            progress.update(bar, completed=metrics["step"], description="  ".join(parts))

        yield report


def _print_result(config: TrainConfig, output: Path) -> None:
    """What the saved model can do with problems it was never trained on, beside what it could before."""
    from porcelet.train.corpus.bits import held_out_bits
    from porcelet.train.rollout import held_out_accuracy

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
    accuracy, count = held_out_accuracy(output, config)
    before = f" (before: {held_out_accuracy(Path(config.model), config)[0]:.1%})" if config.model else ""
    print(f"held-out {config.task.name} answered exactly: {accuracy:.1%}{before} of {count}")
