"""What experts buy: dense < GShard's few large ones < DeepSeekMoE's many small ones beside a shared one.

Published (Dai et al. 2024, arXiv 2401.06066, table 1, 2B on 100B tokens): loss 2.060 dense, 1.867 GShard (2 of 16),
1.808 DeepSeekMoE (1 shared, 7 of 63 a quarter as wide), GShard and DeepSeekMoE with equal totals and equal active
parameters. Here all three activate the same widths: dense 256, GShard 2 of 8 of 128, DeepSeekMoE 1 shared and 7 of 31
of 32. All balance by the sign rule, and routed outputs are scaled by the root of their number, so that the gates differ
in nothing else; the paper's dense model is as wide as one GShard expert, ours as the two.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from benchmarks.shapes.text import Corpus, make_corpus, read_held_out
from benchmarks.shapes.trials import Claim, Setting, Shape, paired, run, take_turns
from porcelet.weights.load import load

STEPS = 480
VARIANTS: dict[str, dict[str, float]] = {
    "dense": {"n_routed_experts": 0},
    "gshard": {
        "n_routed_experts": 8,
        "n_shared_experts": 0,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 128,
        "routed_scaling_factor": 1.41,
    },
    "deepseek_moe": {
        "n_routed_experts": 31,
        "n_shared_experts": 1,
        "num_experts_per_tok": 7,
        "moe_intermediate_size": 32,
        "routed_scaling_factor": 2.65,
    },
}


def measure(setting: Setting) -> Shape:
    corpus = make_corpus(setting.folder)
    steps = setting.steps(STEPS)
    found = take_turns(setting, {name: partial(trial, corpus, name, steps) for name in VARIANTS})
    dense, gshard, ours = (found[name]["loss"] for name in VARIANTS)
    return Shape(
        found,
        [
            Claim("gshard", "loss, dense less GShard", "0.193", paired(dense, gshard, _less), _is_positive),
            Claim("deepseek_moe", "loss, GShard less DeepSeekMoE", "0.059", paired(gshard, ours, _less), _is_positive),
        ],
        corpus.facts,
    )


def trial(corpus: Corpus, name: str, steps: int, seed: int, folder: Path) -> dict[str, float]:
    """Train one architecture; held-out loss and parameters."""
    shape = [f"model.{key}={value}" for key, value in VARIANTS[name].items()]
    words = [*shape, "model.first_k_dense_replace=0", *corpus.settings, f"steps={steps}", f"seed={seed}"]
    output, _ = run("text.toml", words, folder / "run")
    shape_ = load(output).config
    counts = {"parameters": shape_.num_parameters(), "active_parameters": shape_.num_active_parameters()}
    return {**read_held_out(output, corpus), **counts}


def _less(a: float, b: float) -> float:
    return a - b


def _is_positive(value: float) -> bool:
    return value > 0
