"""A recipe run whole: what each of its stages comes to, and how long it takes.

    python -m benchmarks.recipe NAME [--folder FOLDER] [--append]

NAME is a file of recipes/ without its ending, such as r1_countdown. The run lies in FOLDER, runs/NAME unless told; one
that is there already is gone on with, or read. Seconds are those of the steps, as the metrics say, so that a run that
was paused is not charged for it; shares are in percent, of the recipe's own held-out problems, with the 95 % intervals
of its evaluations.
"""

from __future__ import annotations

import argparse
import json
from contextlib import nullcontext
from pathlib import Path

from benchmarks.harness import RESULTS, report
from porcelet.train.evaluate import read_evaluation
from porcelet.train.stages import Stage, read_stages, run_stages

ROOT = RESULTS.parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=sorted(path.stem for path in (ROOT / "recipes").glob("*.toml")))
    parser.add_argument("--folder", type=Path, help="where the run lies; runs/NAME unless given")
    parser.add_argument("--append", action="store_true", help="add the line to results.jsonl")
    options = parser.parse_args()
    folder = options.folder or ROOT / "runs" / options.name
    stages = read_stages(ROOT / "recipes" / f"{options.name}.toml", [f"output={folder}"])
    run_stages(stages, lambda stage: nullcontext(lambda metrics: None), resume=True)
    results = {stage.name.replace("-", "_") or "run": summary(stage) for stage in stages}
    seconds = sum(found.get("seconds", 0.0) for found in results.values())
    results["all"] = {"seconds": seconds, "minutes": round(seconds / 60, 1)}
    report(f"recipe_{options.name}", {"name": options.name}, results, {}, append=options.append)


def summary(stage: Stage) -> dict[str, float]:
    """One stage: its steps and seconds, and what its model can do or what it has collected."""
    output = Path(stage.config.output)
    found = {"steps": float(stage.config.steps)}
    metrics = output / "metrics.jsonl"
    if metrics.exists():
        found["seconds"] = round(sum(json.loads(line)["seconds"] for line in _lines(metrics)), 1)
    if (output / "samples.jsonl").exists():
        found["samples"] = float(len(_lines(output / "samples.jsonl")))
    if (output / "evaluation.json").exists():
        evaluation = read_evaluation(output / "evaluation.json")
        for k, share in evaluation.pass_at.items():
            bounds = {"value": share.value, "low": share.low, "high": share.high}
            found |= {f"pass_{k}_{name}": round(100 * value, 2) for name, value in bounds.items()}
        found["answer_tokens"] = round(evaluation.num_tokens, 1)
    return found


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


if __name__ == "__main__":
    main()
