"""Prefill and decode of the default model beside `transformers`: same weights, same threads, interleaved.

    python -m benchmarks.decode [--rounds 5] [--sequences 1 8] [--append]

Variants: `transformers` in float32 (its model called directly with its own cache, which is faster than its
`generate`), and the engine in float32 and in int8. The int8 weights are the file's own numbers without loss; only
activations are rounded.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from benchmarks.harness import Run, interleave, report
from porcelet import hub
from porcelet.config import EngineConfig, write_hf
from porcelet.engine.engine import Engine
from porcelet.models.transformer import Transformer
from porcelet.types import Request, SamplingParams
from porcelet.weights.load import checkpoint_tensors, load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt", type=int, default=128, help="prompt tokens a sequence")
    parser.add_argument("--new", type=int, default=48, help="decoded tokens a sequence")
    parser.add_argument("--append", action="store_true", help="add the line to results.jsonl")
    options = parser.parse_args()

    path = hub.resolve(hub.DEFAULT_MODEL)
    exact, quick = load(path, "float32"), load(path, "int8")
    rival = as_transformers(exact)
    results: dict[str, Mapping[str, float]] = {}
    notes = {}
    for count in options.sequences:
        prompts = torch.randint(
            0, exact.config.vocab_size, (count, options.prompt), generator=torch.Generator().manual_seed(0)
        )
        runs: dict[str, Run] = {
            "transformers_float32": lambda p=prompts: run_transformers(rival, p, options.new),
            "porcelet_float32": lambda p=prompts: run_engine(exact, p, options.new),
            "porcelet_int8": lambda p=prompts: run_engine(quick, p, options.new),
        }
        medians, note = interleave(runs, options.rounds)
        base = medians["transformers_float32"]
        for name, metrics in medians.items():
            ratios = {f"{key}_ratio": float(f"{value / base[key]:.3g}") for key, value in metrics.items()}
            results[f"{name}_{count}"] = metrics | ratios
        notes[f"sequences_{count}"] = note
    config = {"model": hub.DEFAULT_MODEL, "threads": torch.get_num_threads(), **vars(options)}
    report("decode", config, results, {"notes": notes}, append=options.append)


def as_transformers(model: Transformer) -> LlamaForCausalLM:
    """The rival with our dequantised weights, which equal its own bit for bit (tests/weights/test_quantize.py)."""
    config = LlamaConfig(**write_hf(model.config))
    rival = LlamaForCausalLM(config).eval()
    missing, surplus = rival.load_state_dict(dict(checkpoint_tensors(model)), strict=False)
    assert set(missing) <= {"lm_head.weight"} and not surplus, (missing, surplus)
    rival.tie_weights()
    return rival


@torch.inference_mode()
def run_transformers(model: LlamaForCausalLM, prompts: Tensor, num_new: int) -> Mapping[str, float]:
    """Prefill and greedy decode through the model's forward and its own cache."""
    cache = DynamicCache(config=model.config)
    start = time.perf_counter()
    logits = model(prompts, past_key_values=cache, logits_to_keep=1).logits
    first = time.perf_counter()
    for _ in range(num_new):
        logits = model(logits[:, -1:].argmax(-1), past_key_values=cache, logits_to_keep=1).logits
    return _rates(prompts, num_new, start, first, time.perf_counter())


def run_engine(model: Transformer, prompts: Tensor, num_new: int) -> Mapping[str, float]:
    """The same through the engine: scheduler, pages, sampler and all."""
    engine = Engine(model, EngineConfig(max_batch_tokens=prompts.numel(), speculation="off", prefix_cache="off"))
    params = SamplingParams(max_tokens=num_new + 1, temperature=0, ignore_eos=True)
    for index, prompt in enumerate(prompts.tolist()):
        engine.submit(Request(id=str(index), prompt=tuple(prompt), params=params))
    start = time.perf_counter()
    engine.step()
    first = time.perf_counter()
    while engine.has_work:
        engine.step()
    return _rates(prompts, num_new, start, first, time.perf_counter())


def _rates(prompts: Tensor, num_new: int, start: float, first: float, end: float) -> Mapping[str, float]:
    """Tokens a second over all sequences."""
    return {"prefill": prompts.numel() / (first - start), "decode": len(prompts) * num_new / (end - first)}


if __name__ == "__main__":
    main()
