"""The report of a run: one self-contained HTML page with what each stage did and what the model could do after it.

Reads the folders of the stages: metrics.jsonl, sessions.jsonl, the recipe as a checkpoint or a collection of samples
keeps it, and evaluation.json where the model was evaluated. There is no script, and nothing is loaded from elsewhere.
Equal folders give equal bytes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from porcelet import __version__
from porcelet.chat.split import Content, Reasoning, Splitter
from porcelet.errors import InputError
from porcelet.page import Plot, grouped, render
from porcelet.train.estimate import Estimate
from porcelet.train.evaluate import Shown
from porcelet.train.files import write_durably
from porcelet.train.plots import draw_curves, draw_stages, smoothed, window_of
from porcelet.train.records import Record, read_record
from porcelet.train.words import WORDS

# What is drawn, in this order, of whatever a stage logged, by the title in words.py.
PLOTS = {
    "loss": ("loss",),
    "cross_entropy": ("cross_entropy",),
    "reward": ("reward",),
    "length": ("completions/mean_length",),
    "distance": ("distance",),
    "kept": ("kept",),
    "waste": ("no_signal", "completions/clipped_ratio"),
    "clip": ("clip_ratio/region_mean",),
    "balance": ("max_violation",),
    "rate": ("learning_rate",),
}
# Of these one value is better than another; a loss only where it is not about what the model itself has drawn.
BEST: Mapping[str, Callable[..., Any]] = {
    "reward": max,
    **dict.fromkeys(("distance", "no_signal", "completions/clipped_ratio", "max_violation"), min),
}
LOSSES: Mapping[str, Callable[..., Any]] = dict.fromkeys(("loss", "cross_entropy"), min)
EXACT = ("learning_rate",)  # no noise to smooth


@dataclass(frozen=True)
class Said:
    """One stage's answer to a problem."""

    stage: str
    is_right: bool
    reasoning: str
    content: str


def write_report(folders: Sequence[Path], output: Path, language: str = "en", name: str = "") -> Path:
    """Write the page about these stages, in order, to `output`. `name` is the recipe's; without one, that of the
    folder in which they lie.

    Raises:
        InputError: the language is not known, or a folder holds no run.
        ModelError: a file of a run is damaged.
        MissingExtraError: matplotlib is not installed.
        CapacityError: the page cannot be written.
    """
    if language not in WORDS:
        raise InputError(f"the report's language is {language!r}; known: {', '.join(WORDS)}")
    if not folders:
        raise InputError("there is no folder to report on; give the output folders of runs or stages")
    words = WORDS[language]
    stages = [read_record(folder) for folder in folders]
    found = [stage.evaluation for stage in stages if stage.evaluation]
    html = render(
        "porcelet.train",
        "report.html.jinja",
        language=language,
        words=words,
        facts=_facts(stages, name or _name(folders), words),
        stages=stages,
        powers=sorted({k for evaluation in found for k in evaluation.pass_at}),
        overview=_overview(stages, words),
        plots=[_plots(stage, words) for stage in stages],
        windows=[window_of(stage.num_steps) for stage in stages],
        samples=_side_by_side(stages),
    )
    write_durably(output, html)
    return output


def _name(folders: Sequence[Path]) -> str:
    common = Path(os.path.commonpath([folder.resolve() for folder in folders])).name
    return common or ", ".join(folder.resolve().name for folder in folders)


def _facts(stages: Sequence[Record], name: str, words: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the head says of the run as a whole, under its names; what is not known is left out."""
    sessions = [session for stage in stages for session in stage.sessions]

    def all_of(key: str) -> str:
        return ", ".join(dict.fromkeys(str(session[key]) for session in sessions if key in session))

    rates = [session["matmul_flops_per_second"] / 1e9 for session in sessions if "matmul_flops_per_second" in session]
    seeds = dict.fromkeys(str(stage.recipe["seed"]) for stage in stages if "seed" in stage.recipe)
    slow, fast = (f"{limit(rates, default=0):.0f}" for limit in (min, max))
    facts = [
        (words["recipe"], name),
        (words["minutes_of_steps"], f"{sum(stage.minutes for stage in stages):.1f}"),
        (words["tokens"].lower(), grouped(sum(stage.num_tokens for stage in stages))),
        (words["seed"], ", ".join(seeds)),
        (words["device"], all_of("device")),
        (words["threads"], all_of("threads")),
        (words["rate"], (slow if slow == fast else f"{slow}–{fast}") if rates else ""),
        ("torch", all_of("torch")),
        ("porcelet", __version__),
        (words["begun"], min((session["time"] for session in sessions if "time" in session), default="")),
        (words["sessions"], str(len(sessions) or "")),
    ]
    return [(label, value) for label, value in facts if value]


def _overview(stages: Sequence[Record], words: Mapping[str, Any]) -> list[Plot]:
    """What the model could do after each stage that was evaluated."""
    found = [(stage.name, stage.evaluation) for stage in stages if stage.evaluation]
    if not found:
        return []
    names, evaluations = [name for name, _ in found], [evaluation for _, evaluation in found]
    powers = sorted({k for evaluation in evaluations for k in evaluation.pass_at})
    shown = dict.fromkeys((powers[0], powers[-1]))
    shares = {f"pass@{k}": [_percent(evaluation.pass_at.get(k)) for evaluation in evaluations] for k in shown}
    lengths = [Estimate(*[evaluation.num_tokens] * 3) for evaluation in evaluations]
    return [
        _stages_plot(words["shares"], names, shares, words, max),
        _stages_plot(words["lengths"], names, {words["metrics"]["completions/mean_length"]: lengths}, words, None),
    ]


def _percent(share: Estimate | None) -> Estimate | None:
    return share and Estimate(100 * share.value, 100 * share.low, 100 * share.high)


def _stages_plot(
    title: str,
    names: Sequence[str],
    curves: Mapping[str, Sequence[Estimate | None]],
    words: Mapping[str, Any],
    best: Callable[..., Any] | None,
) -> Plot:
    numbers = [
        _numbers(label, [(name, one.value) for name, one in zip(names, curve, strict=True) if one], best, words)
        for label, curve in curves.items()
    ]
    svg = draw_stages(names, list(curves.values()), f"{title}. {'; '.join(numbers)}", title)
    return Plot(title, list(curves), numbers, svg, words["stage"].lower())


def _plots(stage: Record, words: Mapping[str, Any]) -> list[Plot]:
    """What a stage logged, over its steps."""
    plots: list[Plot] = []
    best = BEST if any("reward" in line for line in stage.metrics) else {**BEST, **LOSSES}
    for key, names in PLOTS.items():
        curves = {name: [(line["step"], line[name]) for line in stage.metrics if name in line] for name in names}
        curves = {name: points for name, points in curves.items() if points}
        if not curves:
            continue
        labels, title = [words["metrics"][name] for name in curves], words["plots"][key]
        means = {name: points if name in EXACT else smoothed(points) for name, points in curves.items()}
        numbers = [
            _numbers(label, _placed(mean, words), best.get(name), words)
            for label, (name, mean) in zip(labels, means.items(), strict=True)
        ]
        svg = draw_curves(
            list(curves.values()), list(means.values()), f"{title}. {'; '.join(numbers)}", f"{stage.name} {key}"
        )
        plots.append(Plot(title, labels, numbers, svg, words["step"]))
    return plots


def _placed(points: Sequence[tuple[float, float]], words: Mapping[str, Any]) -> list[tuple[str, float]]:
    return [(words["at_step"].format(step=int(step)), value) for step, value in points]


def _numbers(
    label: str, points: Sequence[tuple[str, float]], best: Callable[..., Any] | None, words: Mapping[str, Any]
) -> str:
    """The first, last and best of some values, in words."""
    first, last = f"{points[0][1]:.3g}", f"{points[-1][1]:.3g}"
    said = str(words["of"]).format(name=label, first=first, last=last)
    if best is None:
        return said
    place, value = best(points, key=lambda point: point[1])
    return said + str(words["best"]).format(value=f"{value:.3g}", place=place)


def _side_by_side(stages: Sequence[Record]) -> list[tuple[str, list[Said]]]:
    """Each shown question with its answers, stage by stage."""
    answers: dict[str, list[Said]] = {}
    for stage in stages:
        for shown in stage.evaluation.shown if stage.evaluation else ():
            answers.setdefault(shown.question, []).append(_said(stage, shown))
    return list(answers.items())


def _said(stage: Record, shown: Shown) -> Said:
    splitter = Splitter(stage.opens_reasoning)
    events = splitter.push(shown.text) + splitter.flush()
    reasoning = "".join(event.text for event in events if isinstance(event, Reasoning))
    content = "".join(event.text for event in events if isinstance(event, Content))
    return Said(stage.name, shown.is_right, reasoning.strip("\n"), content.strip("\n"))
