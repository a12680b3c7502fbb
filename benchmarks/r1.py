"""Does reinforcement learning earn its time? R1's second stage against the same time of what comes cheaper.

    python -m benchmarks.r1 FOLDER [--seeds 0 1 2] [--append]

From each seed's cold start of recipes/r1_countdown.toml four ways go on, the others for rather more seconds than the
recipe's reinforcement takes:

    reinforcement   the recipe's own second stage
    more SFT        more of the cold start's thoughts, its learning rate risen and fallen again
    better SFT      thoughts that all end at the target: what a teacher who knows the solution would be worth
    rejection       half of the time right answers are drawn and kept, half of it they are learnt

All are measured with the same held-out problems; differences are paired by problem, and their 95 % intervals come from
resampling problems. Runs lie in FOLDER and are not repeated, so seeds may run side by side, in processes of their own,
and be joined by a last call. The seconds that each way took are measured and said.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.harness import RESULTS, processor_times, report, stolen_share
from porcelet.config import LogConfig, TrainConfig
from porcelet.train.estimate import Estimate, difference, estimate
from porcelet.train.evaluate import Evaluation, read_evaluation
from porcelet.train.stages import Stage, read_stages, run_stages

RECIPE = RESULTS.parent.parent / "recipes" / "r1_countdown.toml"
MARGIN = 1.15  # rivals are rather given too much: how fast they go is known from other runs only
WAYS = ("reinforcement", "more SFT", "better SFT", "rejection")


class Way(NamedTuple):
    """What a way came to."""

    evaluation: Evaluation
    seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--append", action="store_true", help="add the line to results.jsonl")
    options = parser.parse_args()
    before = processor_times()
    seeds = {seed: measure(options.folder / f"seed-{seed}", seed) for seed in options.seeds}
    values = {f"seed_{seed}": summary(ways) for seed, ways in seeds.items()} | {"all": joined(list(seeds.values()))}
    print(json.dumps(values, indent=1))
    note = {"stolen_percent": round(100 * stolen_share(before, processor_times()), 2)}
    settings = {"seeds": options.seeds}
    report("r1", settings, values, note, append=options.append)


def measure(folder: Path, seed: int) -> dict[str, Way]:
    """The cold start and the four ways on from it."""
    cold, reason, *_ = read_stages(RECIPE, [f"seed={seed}", f"output={folder}"])
    run(cold, reason)
    seconds, per_step = MARGIN * _seconds(reason.config), _seconds(cold.config) / cold.config.steps
    more = _tuned(cold, reason, folder / "more", round(seconds / per_step))
    run(more)
    per_step = _seconds(more.config) / more.config.steps  # the cold start may have met another load
    task = dataclasses.replace(cold.config.task, options={**cold.config.task.options, "trace": "mixed"})
    better = _tuned(cold, reason, folder / "better", round(seconds / per_step))
    better = better._replace(config=dataclasses.replace(better.config, task=task))
    run(better)
    drawn = _sampled(reason, folder / "drawn", 0.5 * seconds)
    run(drawn)
    learnt = _tuned(cold, reason, folder / "learnt", round((seconds - _seconds(drawn.config)) / per_step))
    data = dataclasses.replace(cold.config.data, conversations=(f"{drawn.config.output}/samples.jsonl",))
    learnt = learnt._replace(config=dataclasses.replace(learnt.config, data=data))
    run(learnt)
    return {
        "cold start": _way(cold),
        "reinforcement": _way(reason),
        "more SFT": _way(more),
        "better SFT": _way(better),
        "rejection": _way(learnt, also=drawn),
    }


def run(*stages: Stage) -> None:
    """Run what is not finished yet."""
    quiet = [stage._replace(config=dataclasses.replace(stage.config, log=LogConfig())) for stage in stages]
    run_stages(quiet, lambda stage: nullcontext(lambda metrics: None), resume=True)


def _tuned(cold: Stage, reason: Stage, output: Path, steps: int) -> Stage:
    """The cold start's training, gone on with from its model, in another order."""
    again = {"model": cold.config.output, "output": str(output), "steps": steps, "seed": cold.config.seed + 1000}
    config = dataclasses.replace(cold.config, **again)
    return Stage(output.name, dataclasses.replace(config, evaluate=reason.config.evaluate), {})


def _sampled(reason: Stage, output: Path, seconds: float) -> Stage:
    """Rejection sampling with the rollouts' settings, for about so many seconds at the speed that the first ones had:
    later answers are longer."""
    lines = _metrics(reason.config)[:2]
    speed = sum(line["seconds_draw"] for line in lines) / len(lines)
    policy = dataclasses.replace(reason.config.policy, keep=4)
    config = dataclasses.replace(
        reason.config, method="sample", output=str(output), steps=max(1, round(seconds / speed)), policy=policy
    )
    return Stage(output.name, config, {})


def _way(stage: Stage, also: Stage | None = None) -> Way:
    evaluation = read_evaluation(Path(stage.config.output, "evaluation.json"))
    return Way(evaluation, _seconds(stage.config) + (_seconds(also.config) if also else 0.0))


def _metrics(config: TrainConfig) -> list[dict[str, float]]:
    lines = Path(config.output, "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def _seconds(config: TrainConfig) -> float:
    return sum(line["seconds"] for line in _metrics(config))


def summary(ways: dict[str, Way]) -> dict[str, Any]:
    """One seed: shares, seconds, lengths, and by how much reinforcement is ahead."""
    found: dict[str, Any] = {
        name.replace(" ", "_"): {
            **{f"pass_{k}": _shown(way.evaluation.pass_at[k]) for k in (1, 16)},
            "tokens": round(way.evaluation.num_tokens, 1),
            "seconds": round(way.seconds, 1),
        }
        for name, way in ways.items()
    }
    ahead = {name: _ahead(ways, name) for name in ("cold start", *WAYS[1:])}
    return found | {"ahead_of": {name.replace(" ", "_"): _shown(value) for name, value in ahead.items()}}


def _ahead(ways: dict[str, Way], name: str) -> Estimate:
    return difference(ways["reinforcement"].evaluation.solved, ways[name].evaluation.solved)


def joined(seeds: list[dict[str, Way]]) -> dict[str, Any]:
    """Means over seeds; each problem counts once, with the mean of its seeds."""

    def solved(name: str) -> list[float]:
        each = [ways[name].evaluation.solved for ways in seeds]
        return [sum(values) / len(values) for values in zip(*each, strict=True)]

    shares = {name.replace(" ", "_"): _shown(estimate(solved(name))) for name in ("cold start", *WAYS)}
    ahead = {
        name.replace(" ", "_"): _shown(difference(solved("reinforcement"), solved(name)))
        for name in ("cold start", *WAYS[1:])
    }
    return {"pass_1": shares, "ahead_of": ahead}


def _shown(found: Estimate) -> dict[str, float]:
    return {name: round(value, 4) for name, value in dataclasses.asdict(found).items()}


if __name__ == "__main__":
    main()
