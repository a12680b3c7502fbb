"""How a shape is measured: every variant once a seed, in turns; claims are judged seed by seed, in pairs."""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from porcelet.config import TrainConfig
from porcelet.train.loop import train
from porcelet.train.recipe import read_recipe

HERE = Path(__file__).parent
QUICK_STEPS = 2

Values = dict[str, list[float]]  # metric → a value a seed
Trial = Callable[[int, Path], Mapping[str, float]]  # seed, an empty folder → metrics


@dataclass(frozen=True)
class Setting:
    """What all shapes are told: where to work, how many seeds, and whether a few steps are enough to see it run."""

    folder: Path
    seeds: int = 3
    quick: bool = False

    def steps(self, count: int) -> int:
        return QUICK_STEPS if self.quick else count


@dataclass(frozen=True)
class Claim:
    """A published direction and what each seed says about it. `holds` judges one seed's value, or the mean."""

    name: str
    what: str
    published: str
    values: Sequence[float]
    holds: Callable[[float], bool]

    @property
    def verdict(self) -> str:
        held = sum(map(self.holds, self.values))
        if held == len(self.values):
            return "holds"
        part = f"in {held} of {len(self.values)} seeds"
        return f"holds in the mean, {part}" if self.holds(statistics.fmean(self.values)) else f"does not hold: {part}"


@dataclass(frozen=True)
class Shape:
    """What was measured, variant by variant, what follows, and what it depends on besides this program."""

    measured: Mapping[str, Values]
    claims: Sequence[Claim]
    facts: Mapping[str, str] = field(default_factory=dict)


def take_turns(setting: Setting, variants: Mapping[str, Trial]) -> dict[str, Values]:
    """Every variant once a seed, the order turning by one each seed."""
    measured: dict[str, Values] = {name: {} for name in variants}
    names = list(variants)
    for seed in range(setting.seeds):
        turn = seed % len(names)
        for name in names[turn:] + names[:turn]:
            start = time.perf_counter()
            with tempfile.TemporaryDirectory(dir=setting.folder) as folder:
                metrics = {**variants[name](seed, Path(folder))}
            metrics["seconds"] = time.perf_counter() - start
            for metric, value in metrics.items():
                measured[name].setdefault(metric, []).append(value)
            shown = "  ".join(f"{metric} {value:.4g}" for metric, value in metrics.items())
            print(f"seed {seed}  {name:20} {shown}", file=sys.stderr, flush=True)
    return measured


def run(recipe: str | Path, settings: Sequence[str], output: Path) -> tuple[Path, TrainConfig]:
    """Train one of the recipes here, or at a path, with some values changed; the model's folder and what was run."""
    config, fields = read_recipe(HERE / recipe, [*settings, f"output={output}", "checkpoint_every=1000000"])
    return train(config, fields), config


def logged(folder: Path, metric: str) -> list[float]:
    """A metric of a run, step by step."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [float(json.loads(line)[metric]) for line in lines]


def paired(first: Sequence[float], second: Sequence[float], join: Callable[[float, float], float]) -> list[float]:
    """Two variants' values joined seed by seed."""
    return [join(a, b) for a, b in zip(first, second, strict=True)]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean and extremes over seeds."""
    found = {"mean": statistics.fmean(values), "low": min(values), "high": max(values)}
    return {name: float(f"{value:.4g}") for name, value in found.items()}


def results(shape: Shape) -> dict[str, object]:
    """A shape for results.jsonl."""
    return {
        **{
            name: {metric: spread(series) for metric, series in values.items()}
            for name, values in shape.measured.items()
        },
        "claims": {claim.name: {**spread(claim.values), "verdict": claim.verdict} for claim in shape.claims},
    }


def table(shape: Shape) -> str:
    """A shape as two Markdown tables: variants, then claims."""
    metrics = list(dict.fromkeys(metric for values in shape.measured.values() for metric in values))
    lines = [_row("", *metrics), _row(*["---"] * (len(metrics) + 1))]
    for name, values in shape.measured.items():
        lines.append(_row(name, *(_shown(values[metric]) if metric in values else "" for metric in metrics)))
    lines += ["", _row("published", "there", "here", ""), _row(*["---"] * 4)]
    lines += [_row(claim.what, claim.published, _shown(claim.values), claim.verdict) for claim in shape.claims]
    return "\n".join(lines)


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _shown(values: Sequence[float]) -> str:
    found = spread(values)
    return f"{found['mean']:.4g} ({found['low']:.4g} to {found['high']:.4g})"
