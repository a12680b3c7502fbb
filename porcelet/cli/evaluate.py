"""`porcelet eval`: how often models are right. `porcelet report`: what a run did, as one page."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from porcelet.errors import InputError

if TYPE_CHECKING:
    from porcelet.config import EvaluateConfig
    from porcelet.train.evaluate import Evaluation

NUM_PROBLEMS = 200  # where neither the recipe nor an option says how many


def evaluate(
    recipe: Annotated[Path, typer.Argument(help="A recipe: its [task], [[reward]], [policy] and [evaluate] count.")],
    models: Annotated[list[str], typer.Argument(help="Names in the store, GGUF files or model folders.")],
    problems: Annotated[
        int | None, typer.Option(min=1, help="Held-out problems; else as many as [evaluate] says, or 200.")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Answers to each; pass@k needs k. Else [evaluate]'s, or 16.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0.0, help="0 is greedy: one answer. Else [evaluate]'s, or 1.")
    ] = None,
    setting: Annotated[list[str] | None, typer.Option("--set", help="table.key=value of the recipe.")] = None,
    keep: Annotated[
        bool, typer.Option("--keep", help="Keep the result in a run's folder, for `porcelet report`.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a model.")] = False,
    unsafe_sandbox: Annotated[bool, typer.Option(help="Run code rewards without bubblewrap.")] = False,
) -> None:
    """Ask models a task's held-out problems: pass@k with 95 % intervals.

    With --keep the result becomes evaluation.json of a run's folder, in the place of the one that its recipe made.
    """
    from porcelet import hub
    from porcelet.train.evaluate import evaluate_folder, save_evaluation
    from porcelet.train.stages import read_stages

    config = read_stages(recipe, setting or [])[-1].config
    config = dataclasses.replace(config, evaluate=_wanted(config.evaluate, problems, samples, temperature))
    paths = {model: hub.resolve(model) for model in models}
    for model, path in paths.items():  # all of them before the first is measured
        if keep and not (path / "metrics.jsonl").is_file():
            raise InputError(f"--keep leaves the result in a run's folder, and {model} is none; leave --keep out")
    for model, path in paths.items():
        found = evaluate_folder(path, config, unsafe_sandbox=unsafe_sandbox)
        if keep:
            save_evaluation(found, path / "evaluation.json")
        print(json.dumps({"model": model, **dataclasses.asdict(found)}) if as_json else _line(model, found))


def _wanted(
    table: EvaluateConfig, problems: int | None, samples: int | None, temperature: float | None
) -> EvaluateConfig:
    """The recipe's [evaluate] table with the options that were given; without either 200 problems."""
    return dataclasses.replace(
        table,
        num_problems=problems or table.num_problems or NUM_PROBLEMS,
        num_samples=samples or table.num_samples,
        temperature=table.temperature if temperature is None else temperature,
    )


def report(
    folders: Annotated[list[Path], typer.Argument(help="Output folders of runs or stages, in order.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The page to write.")] = Path("report.html"),
    language: Annotated[str, typer.Option(help="en, fr or zh.")] = "en",
) -> None:
    """Write what runs did as one self-contained HTML page: plots, pass@k, answers before and after."""
    from porcelet.train.report import write_report

    print(f"report: {write_report(folders, output, language)}")


def _line(model: str, found: Evaluation) -> str:
    shares = "  ".join(f"pass@{k} {share}" for k, share in found.pass_at.items())
    return f"{model}: {shares}  {found.num_tokens:.1f} tokens an answer, {found.finished:.1%} ended by themselves"
