"""The report of a run: one self-contained HTML page with what each stage did and what the model could do after it.

Reads the folders of the stages: metrics.jsonl, and evaluation.json where the model was evaluated. Plots are inline SVG
by matplotlib; there is no script, and nothing is loaded from elsewhere.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from porcelet.errors import InputError, MissingExtraError
from porcelet.train.evaluate import Evaluation, Shown, read_evaluation

# What is drawn, in this order, of whatever a stage logged; several names share one plot.
PLOTS = (
    ("loss", "cross_entropy"),
    ("reward",),
    ("no_signal", "completions/clipped_ratio"),
    ("completions/mean_length",),
    ("clip_ratio/region_mean",),
    ("max_violation",),
)
TEXTS = {
    "en": {
        "title": "Training report", "stage": "Stage", "steps": "Steps", "minutes": "Minutes", "tokens": "Tokens",
        "length": "Answer (tokens)", "samples": "The same problems after each stage", "right": "right",
        "wrong": "wrong", "plotted": "Over the steps of the stage:",
        "note": "Shares are over held-out problems; in brackets 95 % intervals from resampling the problems.",
    },
    "fr": {
        "title": "Rapport d’entraînement", "stage": "Étape", "steps": "Pas", "minutes": "Minutes", "tokens": "Jetons",
        "length": "Réponse (jetons)", "samples": "Les mêmes problèmes après chaque étape", "right": "juste",
        "wrong": "faux", "plotted": "Au fil des pas de l’étape :",
        "note": "Parts mesurées sur des problèmes jamais vus ; entre crochets, intervalles à 95 % par "
        "rééchantillonnage des problèmes.",
    },
    "zh": {
        "title": "训练报告", "stage": "阶段", "steps": "步数", "minutes": "分钟", "tokens": "词元",
        "length": "回答（词元）", "samples": "各阶段之后的同一批题目", "right": "正确", "wrong": "错误",
        "plotted": "随本阶段步数变化：",
        "note": "比例在未参与训练的题目上测得；方括号内为对题目重采样得到的 95 % 区间。",
    },
}  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """One stage's folder as the report shows it."""

    name: str
    metrics: Sequence[Mapping[str, float]]
    evaluation: Evaluation | None

    @property
    def num_steps(self) -> int:
        return len(self.metrics)

    @property
    def num_tokens(self) -> int:
        return int(sum(line["tokens"] for line in self.metrics))

    @property
    def minutes(self) -> float:
        return sum(line["seconds"] for line in self.metrics) / 60

    @cached_property
    def plots(self) -> list[Markup]:
        drawn = [[name for name in names if any(name in line for line in self.metrics)] for names in PLOTS]
        return [_plot(self.metrics, names) for names in drawn if names]


def write_report(folders: Sequence[Path], output: Path, language: str = "en") -> Path:
    """Write the page about these stages, in order, to `output`.

    Raises:
        InputError: the language is not known, or a folder holds no run.
        MissingExtraError: matplotlib is not installed.
    """
    if language not in TEXTS:
        raise InputError(f"the report's language is {language!r}; known: {', '.join(TEXTS)}")
    text = TEXTS[language]
    stages = [read_stage(folder) for folder in folders]
    found = [stage.evaluation for stage in stages if stage.evaluation]
    page = Environment(loader=PackageLoader("porcelet.train", ""), autoescape=True, trim_blocks=False)
    html = page.get_template("report.html.jinja").render(
        language=language,
        text=text,
        name=output.parent.name,
        stages=stages,
        powers=sorted({k for evaluation in found for k in evaluation.pass_at}),
        samples=_side_by_side(stages),
    )
    output.write_text(html, encoding="utf-8")
    return output


def read_stage(folder: Path) -> Stage:
    """What the folder of a run says.

    Raises:
        InputError: it holds no run.
    """
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise InputError(f"{folder} holds no metrics.jsonl; give the output folders of finished stages")
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    evaluated = folder / "evaluation.json"
    return Stage(folder.name, lines, read_evaluation(evaluated) if evaluated.is_file() else None)


def _side_by_side(stages: Sequence[Stage]) -> list[tuple[str, list[tuple[str, Shown]]]]:
    """Each shown question with its answers, stage by stage."""
    answers: dict[str, list[tuple[str, Shown]]] = {}
    for stage in stages:
        for shown in stage.evaluation.shown if stage.evaluation else ():
            answers.setdefault(shown.question, []).append((stage.name, shown))
    return list(answers.items())


def _plot(metrics: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Markup:
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as problem:
        raise MissingExtraError("matplotlib", "train") from problem
    figure = Figure(figsize=(4.6, 2.7), layout="constrained")
    axes = figure.subplots()
    for name in names:
        points = [(line["step"], line[name]) for line in metrics if name in line]
        axes.plot(*zip(*points, strict=True), label=name, linewidth=1.2)
    axes.set_title(", ".join(names), fontsize=10)
    axes.grid(alpha=0.25)
    if len(names) > 1:
        axes.legend(fontsize=8, frameon=False)
    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": "_".join(names)}):  # the same ids, and so the same page, every time
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    drawn = buffer.getvalue()
    return Markup(drawn[drawn.index("<svg") :])
