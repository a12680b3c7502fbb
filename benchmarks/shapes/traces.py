"""What to imitate: searches with their dead ends, or solutions alone.

Published (Gandhi et al. 2024, arXiv 2404.03683, abstract and section 4): countdown of four numbers, half a million
traces each, 250M parameters: 25 points more accuracy from searches than from optimal paths, which are far shorter. Here
three digits and a digit to reach, and equal tokens, prompts included, so that solutions are seen almost twice as often
as searches; every model may write as much as it likes.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

from benchmarks.shapes.trials import HERE, Claim, Setting, Shape, paired, run, take_turns
from porcelet.train.evaluate import evaluate_folder
from porcelet.train.recipe import read_recipe
from porcelet.train.rendering import Renderer, make_tokenizer
from porcelet.train.tasks import load_task

TOKENS = 900_000
QUICK_TOKENS = 10_000
VARIANTS = ("optimal", "self-correct", "search")


def measure(setting: Setting) -> Shape:
    tokens = QUICK_TOKENS if setting.quick else TOKENS
    found = take_turns(setting, {name.replace("-", "_"): partial(trial, name, tokens) for name in VARIANTS})
    optimal, corrected, search = found.values()
    return Shape(
        found,
        [
            Claim(
                f"{name}_pass_{k}",
                f"pass@{k}, {name.replace('_', ' ')} less optimal",
                "0.25 (one greedy answer)" if (name, k) == ("search", 1) else "",
                paired(values[f"pass_{k}"], optimal[f"pass_{k}"], lambda a, b: a - b),
                lambda gain: gain > 0,
            )
            for name, values in (("search", search), ("self_correct", corrected))
            for k in (1, 16)
        ],
    )


def trial(trace: str, tokens: int, seed: int, folder: Path) -> dict[str, float]:
    """Learn from one kind of trace; answers to held-out problems, drawn at temperature 1."""
    own = f'task.trace="{trace}"'
    steps = max(2, round(tokens / tokens_per_step(own)))
    words = [own, f"steps={steps}", f"seed={seed}"]
    output, config = run("countdown.toml", words, folder / "run")
    found = evaluate_folder(output, config)
    shares = {f"pass_{k}": found.pass_at[k].value for k in (1, 16)}
    return {**shares, "steps": steps, "answer_tokens": found.num_tokens, "finished": found.finished}


def tokens_per_step(own: str) -> float:
    """How many tokens a step of the recipe has, from its first problems."""
    config, _ = read_recipe(HERE / "countdown.toml", [own])
    task = load_task(config.task.name, config.task.options)
    with tempfile.TemporaryDirectory() as folder:
        make_tokenizer(Path(folder), config.chat_format)
        renderer = Renderer(Path(folder))
        return float(sum(len(renderer.sample(task.draw(0, i)).tokens) for i in range(config.samples_per_step)))
