"""Prefill and decode of a model of DeepSeek's shape beside llama.cpp and transformers: same files, interleaved.

    python -m benchmarks.deepseek [--rounds 5] [--prompt 128 512] [--sequences 1 4 8 16] [--append]

The model (benchmarks/rivals/deepseek.py: latent attention, experts, random weights) is written once in float32;
llama.cpp's own tool makes Q4_0 and Q8_0 of it, and both engines read these files (`python -m
benchmarks.rivals.environments deepseek` makes all of them). Random weights say nothing about quality and cost what
trained ones do; only the choice of experts is more even. transformers computes in float32, its model called directly.

Before anything is timed, the engines have to compute the same function: log-probabilities of a text's tokens from the
float32 file. `agreement` has that, and how far each is from what the numbers of a quantised file give: rounding often
chooses other experts there, as a gate of random weights has many scores next to each other.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.decode import Measured, compare, run_engine, run_llama, run_transformers
from benchmarks.harness import report
from benchmarks.perplexity import documentation, scores
from benchmarks.rivals import environments
from benchmarks.rivals.llama_perplexity import judge
from porcelet.weights.load import load

WINDOWS, SIZE = 4, 128  # of the text that must be judged alike
ALIKE = 1e-3  # nats a token, from the float32 file
EXACT = ("-ctk", "f32", "-ctv", "f32", "-fa", "off")  # llama.cpp's cache as ours is


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=int, nargs="+", default=[128, 512], help="prompt tokens a sequence")
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--new", type=int, default=48, help="decoded tokens a sequence")
    parser.add_argument("--variants", nargs="+", default=["transformers", "q4_0", "llama_q4_0", "q8_0", "llama_q8_0"])
    parser.add_argument("--max-stolen", type=float, default=0.05, help="a round's, if it is to count")
    parser.add_argument("--append", action="store_true", help="add the line to results.jsonl")
    options = parser.parse_args()
    threads = torch.get_num_threads()
    agreed = {name: agreement(name, threads) for name in ("f32", *environments.DEEPSEEK_FORMATS)}
    if agreed["f32"]["llama_largest"] > ALIKE:
        sys.exit(f"the engines do not compute the same function: {agreed}")
    engines = {name: variant(name, threads) for name in options.variants}
    results, notes = measure(engines, options.prompt, options.sequences, options)
    config = {"model": "deepseek_v3, random", "threads": threads, **vars(options)}
    report("deepseek", config, results | {"agreement": agreed}, {"notes": notes}, append=options.append)


def agreement(weights: str, threads: int) -> dict[str, float]:
    """How far log-probabilities are from those that our float32 bodies give the file's numbers, in nats a token:
    llama.cpp's in the mean and at most, and in the mean our own from packed weights."""
    path = environments.deepseek_model(weights)
    theirs = judge(path, documentation(WINDOWS * SIZE * 8), WINDOWS, SIZE, threads, EXACT)
    exact = scores(load(path, "float32"), theirs.tokens)
    apart = (theirs.logprobs - exact).abs()
    found = {"llama": apart.mean(), "llama_largest": apart.max()}
    if weights != "f32":
        found["porcelet"] = (scores(load(path, "stored"), theirs.tokens) - exact).abs().mean()
    return {name: float(f"{value:.3g}") for name, value in found.items()}


def variant(name: str, threads: int) -> Measured:
    """transformers, one of ours as its file stores it, or llama.cpp's in its own process."""
    if name == "transformers":
        folder = environments.deepseek_folder()
        return partial(run_transformers, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval())
    if name == "float32":
        return partial(run_engine, load(environments.deepseek_model("f32"), "float32"))
    path = environments.deepseek_model(name.removeprefix("llama_"))
    return partial(run_llama, path, threads) if name.startswith("llama_") else partial(run_engine, load(path, "stored"))


def measure(
    engines: Mapping[str, Measured], prompts: Sequence[int], sequences: Sequence[int], options: argparse.Namespace
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Rates by "prompt_<tokens>" and "<variant>_<sequences>", and what was dropped."""
    results: dict[str, Any] = {}
    notes: dict[str, Any] = {}
    for length in prompts:
        rates = results[f"prompt_{length}"] = {}
        for number in sequences:
            sizes = number, length, options.new
            found, notes[f"prompt_{length}_{number}"] = compare(engines, sizes, options.rounds, options.max_stolen)
            rates |= {f"{name}_{number}": metrics for name, metrics in found.items()}
    return results, notes


if __name__ == "__main__":
    main()
