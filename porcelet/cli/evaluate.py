"""`porcelet eval`: how often models are right. `porcelet report`: what a run did, as one page."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from porcelet.train.evaluate import Evaluation


def evaluate(
    recipe: Annotated[Path, typer.Argument(help="A recipe: its [task], [[reward]], [policy] and [evaluate] count.")],
    models: Annotated[list[Path], typer.Argument(help="Folders of models.")],
    problems: Annotated[int, typer.Option(min=1, help="Held-out problems.")] = 200,
    samples: Annotated[int, typer.Option(min=1, help="Answers to each; pass@k needs k.")] = 16,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy: one answer.")] = 1.0,
    setting: Annotated[list[str] | None, typer.Option("--set", help="table.key=value of the recipe.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a model.")] = False,
    unsafe_sandbox: Annotated[bool, typer.Option(help="Run code rewards without bubblewrap.")] = False,
) -> None:
    """Ask models a task's held-out problems: pass@k with 95 % intervals.

    The result is kept in each folder as evaluation.json, which `porcelet report` reads.
    """
    from porcelet.config import EvaluateConfig
    from porcelet.train.evaluate import evaluate_folder, save_evaluation
    from porcelet.train.stages import read_stages

    config = read_stages(recipe, setting or [])[-1].config
    wanted = EvaluateConfig(num_problems=problems, num_samples=samples, temperature=temperature)
    for folder in models:
        found = evaluate_folder(folder, dataclasses.replace(config, evaluate=wanted), unsafe_sandbox=unsafe_sandbox)
        save_evaluation(found, folder / "evaluation.json")
        print(json.dumps({"model": str(folder), **dataclasses.asdict(found)}) if as_json else _line(folder, found))


def report(
    folders: Annotated[list[Path], typer.Argument(help="Output folders of runs or stages, in order.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The page to write.")] = Path("report.html"),
    language: Annotated[str, typer.Option(help="en, fr or zh.")] = "en",
) -> None:
    """Write what runs did as one self-contained HTML page: plots, pass@k, answers before and after."""
    from porcelet.train.report import write_report

    print(f"report: {write_report(folders, output, language)}")


def _line(folder: Path, found: Evaluation) -> str:
    shares = "  ".join(f"pass@{k} {share}" for k, share in found.pass_at.items())
    return f"{folder}: {shares}  {found.num_tokens:.1f} tokens an answer, {found.finished:.1%} ended by themselves"
