"""Reinforcement behind supervised training: pass@1 rises much, pass@16 little.

Published: Qwen2.5-0.5B on countdown, supervised then RLOO, pass@1 0.30 to 0.64 and pass@16 0.75 to 0.78 (model card of
ba144220/cs224r-default-project-rloo); that RL lifts the share of right answers and not what many samples reach is
DeepSeekMath's finding (Shao et al. 2024, arXiv 2402.03300, section 5.2.2 and figure 7). Here recipes/sums.toml, cut
short so that it only half knows how to add, and recipes/sums_grpo.toml behind it.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from benchmarks.harness import RESULTS
from benchmarks.shapes.trials import Claim, Setting, Shape, logged, paired, run, take_turns
from porcelet.train.evaluate import Evaluation, evaluate_folder

RECIPES = RESULTS.parent.parent / "recipes"
SUPERVISED_STEPS, STEPS = 300, 20


def measure(setting: Setting) -> Shape:
    supervised, steps = setting.steps(SUPERVISED_STEPS), setting.steps(STEPS)
    found = take_turns(setting, {"sums": partial(trial, supervised, steps)})
    sums = found["sums"]
    gains = {k: paired(sums[f"pass_{k}_after"], sums[f"pass_{k}_before"], lambda a, b: a - b) for k in (1, 16)}
    return Shape(
        found,
        [
            Claim("pass_1", "gain in pass@1", "0.34 (0.30 to 0.64)", gains[1], lambda gain: gain > 0),
            Claim(
                "pass_16",
                "gain in pass@16 less that in pass@1",
                "-0.31 (pass@16 0.75 to 0.78)",
                paired(gains[16], gains[1], lambda a, b: a - b),
                lambda difference: difference < 0,
            ),
        ],
    )


def trial(supervised: int, steps: int, seed: int, folder: Path) -> dict[str, float]:
    """Both runs; answers to the second's held-out problems before and after it, drawn at temperature 1."""
    early, _ = run(RECIPES / "sums.toml", [f"steps={supervised}", f"seed={seed}"], folder / "early")
    words = [f"steps={steps}", f"model={early}", f"seed={seed}", "evaluate.num_problems=200"]
    output, config = run(RECIPES / "sums_grpo.toml", words, folder / "grpo")
    before, after = (_shares(evaluate_folder(one, config)) for one in (early, output))
    rewards = logged(output, "reward")
    return {
        **{f"{name}_before": value for name, value in before.items()},
        **{f"{name}_after": value for name, value in after.items()},
        "first_reward": rewards[0],
        "last_reward": rewards[-1],
    }


def _shares(found: Evaluation) -> dict[str, float]:
    return {f"pass_{k}": found.pass_at[k].value for k in (1, 16)}
