"""Muon's steps to AdamW's loss.

Published: 52 % of AdamW's training compute at the compute-optimal point (Liu et al. 2025, arXiv 2502.16982, figure 1a);
0.59 to 0.64 of its steps on GPT-2 small (modded-nanogpt, track 3). Rates are swept for both at the full length with the
first seed: AdamW's over `RATES`, Muon's matrices over `MUON_RATES` with the rest at AdamW's best. Then AdamW runs at
its best for all of the steps, and Muon for shares of them, each with its own schedule to the end; a line between two
shares gives the share at which Muon's held-out loss is AdamW's. Equal steps are equal tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from benchmarks.shapes.text import Corpus, make_corpus, read_held_out
from benchmarks.shapes.trials import Claim, Setting, Shape, logged, run, take_turns

STEPS = 110
RATES = (4e-3, 8e-3, 16e-3)
MUON_RATES = (16e-3, 32e-3, 64e-3)
SHARES = (0.5, 0.7, 1.0)


def measure(setting: Setting) -> Shape:
    corpus = make_corpus(setting.folder)
    full = setting.steps(STEPS)
    best, swept = best_rates(setting, corpus, full)
    muon = [*best, "optimizer.name=muon"]
    adamw = [word for word in best if "muon" not in word]
    variants = {"adamw": partial(trial, corpus, adamw, full)}
    for share in SHARES:
        variants[f"muon_{share:.0%}".rstrip("%")] = partial(trial, corpus, muon, max(2, round(full * share)))
    found = take_turns(setting, variants)
    losses = [found[name]["loss"] for name in variants if name != "adamw"]
    shares = [crossing(SHARES, own, goal) for goal, *own in zip(found["adamw"]["loss"], *losses, strict=True)]
    claim = Claim(
        "share_of_steps",
        f"Muon's share of AdamW's steps to the same loss ({SHARES[0]:g}: or less, 1: or more)",
        "0.52 of the compute",
        shares,
        lambda share: share < 1,
    )
    return Shape({**swept, **found}, [claim], corpus.facts)


def best_rates(setting: Setting, corpus: Corpus, steps: int) -> tuple[list[str], dict[str, dict[str, list[float]]]]:
    """The settings of both optimizers' best rates, and the losses of all that were tried."""
    once = Setting(setting.folder, 1, setting.quick)
    words = {rate: [f"optimizer.learning_rate={rate}"] for rate in RATES}
    first = take_turns(once, {_name("adamw", rate): partial(trial, corpus, words[rate], steps) for rate in RATES})
    best = min(RATES, key=lambda rate: first[_name("adamw", rate)]["loss"][0])
    own = {rate: [*words[best], f"optimizer.muon_learning_rate={rate}"] for rate in MUON_RATES}
    second = take_turns(
        once,
        {
            _name("muon", rate): partial(trial, corpus, [*own[rate], "optimizer.name=muon"], steps)
            for rate in MUON_RATES
        },
    )
    return own[min(MUON_RATES, key=lambda rate: second[_name("muon", rate)]["loss"][0])], {**first, **second}


def _name(optimizer: str, rate: float) -> str:
    return f"{optimizer}_at_{rate * 1000:g}_thousandths"


def trial(corpus: Corpus, settings: list[str], steps: int, seed: int, folder: Path) -> dict[str, float]:
    """Train and read the held-out text; also seconds a step."""
    words = [*settings, *corpus.settings, f"steps={steps}", f"seed={seed}"]
    output, _ = run("text.toml", words, folder / "run")
    seconds = logged(output, "seconds")
    return {"loss": read_held_out(output, corpus)["loss"], "step_seconds": sum(seconds) / len(seconds)}


def crossing(shares: Sequence[float], losses: Sequence[float], goal: float) -> float:
    """The share at which falling losses reach the goal, on a line between two; the first or last if beyond them."""
    if losses[0] <= goal:
        return shares[0]
    for (a, high), (b, low) in itertools.pairwise(zip(shares, losses, strict=True)):
        if low <= goal:
            return a + (b - a) * (high - goal) / (high - low)
    return shares[-1]
