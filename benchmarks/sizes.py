"""How large may a model be that is to learn in an hour? Speeds by width, for the choice of a recipe's [model].

    python -m benchmarks.sizes [--widths 64 128 192 256] [--append]

Each width takes a few steps of the R1 recipe's cold start, then a few of its reinforcement, on one thread; medians
without the first step. All else of the architecture is the recipe's, scaled with the width.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS, processor_times, report, stolen_share
from porcelet.config import LogConfig
from porcelet.train.loop import train
from porcelet.train.stages import Stage, read_stages
from porcelet.weights.header import read_config

RECIPE = RESULTS.parent.parent / "recipes" / "r1_countdown.toml"
SCALED = (
    *("hidden_size", "intermediate_size", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim"),
    "moe_intermediate_size",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 192, 256])
    parser.add_argument("--append", action="store_true", help="add the line to results.jsonl")
    options = parser.parse_args()
    before = processor_times()
    values = {f"width_{width}": measure(width) for width in options.widths}
    note = {"stolen_percent": round(100 * stolen_share(before, processor_times()), 2)}
    report("sizes", {"widths": options.widths}, values, note, append=options.append)


def measure(width: int) -> dict[str, float]:
    """Parameters, and tokens a second of each part of training."""
    with tempfile.TemporaryDirectory() as folder:
        cold, reason, *_ = read_stages(RECIPE, [f"output={folder}"])
        fields = cold.model_fields
        scaled = {name: fields[name] * width // fields["hidden_size"] for name in SCALED}
        supervised = _run(cold, 9, {**fields, **scaled})
        rollouts = _run(reason, 3, {})
        config = read_config(Path(cold.config.output))
    updates = reason.config.policy.updates_per_rollout
    return {
        "million_parameters": config.num_parameters() / 1e6,
        "million_active": config.num_active_parameters() / 1e6,
        "supervised_tokens_per_second": _median(supervised, lambda line: line["tokens"] / line["seconds"]),
        "drawn_tokens_per_second": _median(
            rollouts,
            lambda line: line["completions/mean_length"] * reason.config.samples_per_step / line["seconds_draw"],
        ),
        "learnt_tokens_per_second": _median(rollouts, lambda line: updates * line["tokens"] / line["seconds_gradient"]),
    }


def _run(stage: Stage, steps: int, fields: dict[str, Any]) -> list[dict[str, float]]:
    optimizer = dataclasses.replace(stage.config.optimizer, warmup_steps=1)
    config = dataclasses.replace(
        stage.config, steps=steps, optimizer=optimizer, checkpoint_every=steps, log=LogConfig()
    )
    folder = train(config, fields, reward=None if fields else _lengths)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()][1:]


def _lengths(problem: object, answer: Any) -> float:
    """Untrained answers are all wrong; a reward that tells them apart lets the update compute them."""
    return float(answer.num_tokens + sum(answer.text.encode()) % 7)


def _median(lines: list[dict[str, float]], value: Any) -> float:
    return statistics.median(map(value, lines))


if __name__ == "__main__":
    main()
