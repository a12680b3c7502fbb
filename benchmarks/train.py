"""The two recipes of the README from random weights: what they learn and how long they take.

    python -m benchmarks.train [--append]

Runs in a temporary folder: recipes/sums.toml, its early state, and recipes/sums_grpo.toml from there. One run each,
about four minutes on one thread; results depend on the seed, which is the recipes' own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

from benchmarks.harness import processor_times, report, stolen_share
from porcelet.train.evaluate import held_out_accuracy
from porcelet.train.loop import train
from porcelet.train.recipe import read_recipe

RECIPES = Path(__file__).parent.parent / "recipes"
ENDS = 5  # steps that make the first and the last mean reward


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--append", action="store_true", help="add the line to results.jsonl")
    options = parser.parse_args()
    before = processor_times()
    with tempfile.TemporaryDirectory() as folder:
        start = f"{folder}/early"
        results = {
            "sums": run("sums.toml", [f"output={folder}/sums"]),
            "early": run("sums.toml", ["steps=300", f"output={start}"]),
            "grpo": run("sums_grpo.toml", [f"model={start}", f"output={folder}/grpo"]),
        }
    note = {"stolen_percent": round(100 * stolen_share(before, processor_times()), 2)}
    report("train", vars(options), results, note, append=options.append)


def run(recipe: str, overrides: list[str]) -> dict[str, float]:
    """Train one recipe; seconds, speed and what the model can do."""
    config, fields = read_recipe(RECIPES / recipe, overrides)
    start = time.perf_counter()
    output = train(config, fields)
    seconds = time.perf_counter() - start
    accuracy, count = held_out_accuracy(output, config)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    found = {
        "steps": float(len(lines)),
        "seconds": seconds,
        "tokens_per_second": statistics.median(line["tokens_per_second"] for line in lines),
        "held_out_percent": 100 * accuracy,
        "held_out_problems": float(count),
    }
    if "reward" in lines[0]:
        rewards = [line["reward"] for line in lines]
        found |= {"first_reward": statistics.fmean(rewards[:ENDS]), "last_reward": statistics.fmean(rewards[-ENDS:])}
        found["mismatch"] = max(line.get("mismatch", 0.0) for line in lines)
    return {name: float(f"{value:.4g}") for name, value in found.items()}


if __name__ == "__main__":
    main()
