"""Balance without a loss: V3's sign rule against the sequence-wise auxiliary loss, and against nothing.

Published (Wang et al. 2024, arXiv 2408.15664, table 2, 1B on 100B tokens): MaxVio 0.04 against 0.72 with an auxiliary
loss, at a perplexity of 9.50 against 9.56. Without either the gate is left to itself. MaxVio is taken as there: of all
held-out text at once, the mean over layers. The rule's speed is 0.005, as a run of hundreds of steps cannot wait for
0.001; the loss has the paper's weight, and ten times that.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from benchmarks.shapes.text import Corpus, make_corpus, read_held_out
from benchmarks.shapes.trials import Claim, Setting, Shape, Values, logged, paired, run, take_turns

STEPS = 110
VARIANTS = {
    "sign_rule": ["bias_update_speed=0.005"],
    "published_loss": ["bias_update_speed=0", "balance_weight=0.001"],
    "tenfold_loss": ["bias_update_speed=0", "balance_weight=0.01"],
    "none": ["bias_update_speed=0"],
}
EQUAL = 0.01  # of the loss
TIMES = 2  # less would be no shape


def measure(setting: Setting) -> Shape:
    corpus = make_corpus(setting.folder)
    steps = setting.steps(STEPS)
    trials = {name: partial(trial, corpus, [*words, f"steps={steps}"]) for name, words in VARIANTS.items()}
    found = take_turns(setting, trials)
    rule = found["sign_rule"]
    times = [
        Claim(
            f"violation_{name}",
            f"MaxVio with {what} over that with the sign rule: at least {TIMES:g}",
            published,
            paired(found[name]["max_violation"], rule["max_violation"], lambda a, b: a / b),
            lambda ratio: ratio >= TIMES,
        )
        for name, what, published in (
            ("published_loss", "the auxiliary loss, weight 0.001,", "18 (0.72 / 0.04)"),
            ("tenfold_loss", "the auxiliary loss, weight 0.01,", ""),
            ("none", "nothing", ""),
        )
    ]
    return Shape(found, [*times, *(_equal(found, name) for name in ("published_loss", "none"))], corpus.facts)


def _equal(found: Mapping[str, Values], name: str) -> Claim:
    other = found[name]["loss"]
    return Claim(
        f"loss_{name}",
        f"held-out loss with the rule less that with {name.replace('_', ' ')}: at most {EQUAL:.0%} more",
        "-0.006 (perplexity 9.50, 9.56)" if name == "published_loss" else "",
        paired(found["sign_rule"]["loss"], other, lambda a, b: a - b),
        lambda difference: difference <= EQUAL * statistics.fmean(other),
    )


def trial(corpus: Corpus, settings: list[str], seed: int, folder: Path) -> dict[str, float]:
    """Train and read the held-out text; also the batches' MaxVio of the last tenth of the steps."""
    output, _ = run("text.toml", [*settings, *corpus.settings, f"seed={seed}"], folder / "run")
    batches = logged(output, "mean_violation")
    last = batches[-max(1, len(batches) // 10) :]
    return {**read_held_out(output, corpus), "batch_violation": statistics.fmean(last)}
