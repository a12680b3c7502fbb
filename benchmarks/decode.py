"""Prefill and decode of the default model beside other engines: same file or weights, same threads, interleaved.

    python -m benchmarks.decode [--rounds 5] [--sequences 1 8] [--prompt 128] [--rival llama.cpp openvino] [--append]

Variants in this process: `transformers` in float32 (its model called directly with its own cache, which is faster than
its `generate`), and the engine in float32, int8 and as the file stores it. The packed weights are the file's own
numbers without loss; only activations are rounded. `--weights stored q4_0` names others, q4_0 being a file made by
llama.cpp's own tool.

Rivals run in processes of their own (benchmarks.rivals.environments makes them): llama.cpp's llama-batched-bench in its
quickest formats (`--formats q4_0`), OpenVINO GenAI's continuous batching pipeline in int8. Rates are tokens a second
over all sequences; OpenVINO's, whose prompts and answers overlap, over the time in which all sequences decode.

`floor` is what the machine allows in the same run (benchmarks/floor.py): a step of decoding cannot take less than
reading the weights (5 bits each, 9 in the head) and the cached values once, nor than its multiplications at the rate of
8-bit ones; a prompt not less than the latter. `of_floor` are our rates with stored weights over that.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from collections.abc import Callable, Mapping
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks.floor import integer_rate, read_bandwidth
from benchmarks.harness import Run, interleave, report
from benchmarks.rivals import environments
from benchmarks.rivals.protocol import Asked
from porcelet import hub
from porcelet.config import EngineConfig, ModelConfig, write_hf
from porcelet.engine.engine import Engine
from porcelet.models.transformer import Transformer
from porcelet.types import Request, SamplingParams
from porcelet.weights.files import open_checkpoint
from porcelet.weights.load import checkpoint_tensors, load

SEEDS = count()  # no prompt comes twice: some rivals keep prefixes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt", type=int, default=128, help="prompt tokens a sequence")
    parser.add_argument("--new", type=int, default=48, help="decoded tokens a sequence")
    parser.add_argument("--weights", nargs="*", default=["transformers", "float32", "int8", "stored"])
    parser.add_argument("--rival", nargs="*", choices=["llama.cpp", "openvino"], default=[])
    parser.add_argument("--formats", nargs="*", default=["q4_0"], help="llama.cpp's")
    parser.add_argument("--max-stolen", type=float, default=0.05, help="a round's, if it is to count")
    parser.add_argument("--append", action="store_true", help="add the line to results.jsonl")
    options = parser.parse_args()
    threads = torch.get_num_threads()
    engines = {name: variant(name) for name in options.weights}
    for name in options.formats if "llama.cpp" in options.rival else []:
        engines[f"llama_{name}"] = partial(run_llama, environments.llama_model(name), threads)
    if "openvino" in options.rival:
        engines["openvino_int8"] = openvino(threads)
    results: dict[str, Mapping[str, float]] = {}
    notes = {}
    for number in options.sequences:
        sizes = number, options.prompt, options.new
        found, notes[f"sequences_{number}"] = compare(engines, sizes, options.rounds, options.max_stolen)
        results |= {f"{name}_{number}": metrics for name, metrics in found.items()}
        if "stored" in engines:
            results[f"floor_{number}"] = floor(load_config(), number, options.prompt + options.new // 2)
            own = results[f"stored_{number}"]
            shares = {key: float(f"{own[key] / results[f'floor_{number}'][key]:.3g}") for key in ("prefill", "decode")}
            results[f"stored_{number}"] = dict(own) | {f"{key}_of_floor": value for key, value in shares.items()}
    config = {"model": hub.DEFAULT_MODEL, "threads": threads, **vars(options)}
    name = f"decode_{options.prompt}" if options.rival else "decode"
    report(name, config, results, {"notes": notes}, append=options.append)


def compare(
    engines: Mapping[str, Measured], sizes: tuple[int, int, int], rounds: int, max_stolen: float
) -> tuple[dict[str, dict[str, float]], dict[str, Any]]:
    """Rates of all engines at (sequences, prompt tokens, new tokens), taken in turns, with their ratios to the first
    one's; and what was dropped."""
    runs: dict[str, Run] = {name: partial(engine, *sizes) for name, engine in engines.items()}
    medians, note = interleave(runs, rounds, max_stolen=max_stolen)
    base = dict(medians[next(iter(medians))])
    for metrics in medians.values():
        metrics.update({f"{key}_ratio": float(f"{value / base[key]:.3g}") for key, value in metrics.items()})
    return medians, note


def load_config() -> ModelConfig:
    return open_checkpoint(hub.resolve(hub.DEFAULT_MODEL)).config


def floor(config: ModelConfig, number: int, context: int) -> dict[str, float]:
    """Tokens a second that memory and multiplications allow, with cached values in half precision."""
    bandwidth, rate = read_bandwidth(), integer_rate() or float("inf")
    cached = 2 * config.cache_values_per_token() * number * context
    seconds = max((config.packed_bytes(4) + cached) / bandwidth, number * config.flops_per_token() / rate)
    head = 2 * config.vocab_size * config.hidden_size
    return {
        "prefill": rate / (config.flops_per_token() - head),
        "decode": number / seconds,
        "gb_per_s": bandwidth / 1e9,
        "gop_per_s": rate / 1e9,
    }


Measured = Callable[[int, int, int], Mapping[str, float]]  # (sequences, prompt tokens, new tokens) → rates


def variant(name: str) -> Measured:
    """One of ours, or transformers, in this process."""
    stored = hub.resolve(hub.DEFAULT_MODEL)
    if name == "transformers":
        return partial(run_transformers, as_transformers(load(stored, "float32")))
    if name in environments.LLAMA_FORMATS:
        return partial(run_engine, load(environments.llama_model(name), "stored"))
    return partial(run_engine, load(stored, name))


def as_transformers(model: Transformer) -> LlamaForCausalLM:
    """The rival with our dequantised weights, which equal its own bit for bit (tests/weights/test_quantize.py)."""
    config = LlamaConfig(**write_hf(model.config))
    rival = LlamaForCausalLM(config).eval()
    missing, surplus = rival.load_state_dict(dict(checkpoint_tensors(model)), strict=False)
    assert set(missing) <= {"lm_head.weight"} and not surplus, (missing, surplus)
    rival.tie_weights()
    return rival


def make_prompts(number: int, length: int) -> Tensor:
    """Random tokens, none special."""
    generator = torch.Generator().manual_seed(next(SEEDS))
    return torch.randint(100, 49000, (number, length), generator=generator)


@torch.inference_mode()
def run_transformers(model: PreTrainedModel, number: int, length: int, num_new: int) -> Mapping[str, float]:
    """Prefill and greedy decode through the model's forward and its own cache."""
    cache, prompts = DynamicCache(config=model.config), make_prompts(number, length)
    start = time.perf_counter()
    logits = model(prompts, past_key_values=cache, logits_to_keep=1).logits
    first = time.perf_counter()
    for _ in range(num_new):
        logits = model(logits[:, -1:].argmax(-1), past_key_values=cache, logits_to_keep=1).logits
    return _rates(prompts, num_new, start, first, time.perf_counter())


def run_engine(model: Transformer, number: int, length: int, num_new: int) -> Mapping[str, float]:
    """The same through the engine: scheduler, pages, sampler and all."""
    prompts = make_prompts(number, length)
    config = EngineConfig(
        max_batch_tokens=512, speculation="off", prefix_cache="off", cache_tokens=number * (length + num_new + 64)
    )
    engine = Engine(model, config)
    engine.generate(make_prompts(1, length).tolist(), SamplingParams(max_tokens=2))  # records, and touches the buffers
    params = SamplingParams(max_tokens=num_new + 1, temperature=0, ignore_eos=True)
    for index, prompt in enumerate(prompts.tolist()):
        engine.submit(Request(id=str(index), prompt=tuple(prompt), params=params))
    start = time.perf_counter()
    begun: set[str] = set()
    while len(begun) < number:
        begun |= {output.request_id for output in engine.step()}
    first, count = time.perf_counter(), 0
    while engine.has_work:
        outputs = engine.step()
        count += len(outputs)
        if len(outputs) < number:  # the first one begun has ended
            break
    end = time.perf_counter()
    while engine.has_work:
        engine.step()
    return {"prefill": prompts.numel() / (first - start), "decode": count / (end - first)}


def run_llama(path: Path, threads: int, number: int, length: int, num_new: int) -> Mapping[str, float]:
    """llama-batched-bench: prompts in batches of 512, then steps of one token each."""
    sizes = ["-npp", length, "-ntg", num_new, "-npl", number, "-c", number * (length + num_new + 64), "-b", 2048]
    program = environments.llama_program("llama-batched-bench")
    command = [program, "-m", path, *sizes, "-ub", 512, "-t", threads]
    command += ["--output-format", "jsonl"]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=True)
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    return {"prefill": found["speed_pp"], "decode": found["speed_tg"]}


def openvino(threads: int) -> Measured:
    """Its process, started once."""
    from benchmarks.serve import Process, engines

    process = Process(engines(threads)["openvino_int8"], {})

    def run(number: int, length: int, num_new: int) -> Mapping[str, float]:
        prompts = make_prompts(number, length).tolist()
        answers = process.run([Asked(str(i), prompt, num_new + 1, 0.0) for i, prompt in enumerate(prompts)], limit=600)
        times = [answer["times"] for answer in answers["answers"].values()]
        first, last = max(own[0] for own in times), min(own[-1] for own in times)
        decoded = sum(first < moment <= last for own in times for moment in own)
        return {"prefill": number * length / first, "decode": decoded / (last - first)}

    return run


def _rates(prompts: Tensor, num_new: int, start: float, first: float, end: float) -> Mapping[str, float]:
    """Tokens a second over all sequences."""
    return {"prefill": prompts.numel() / (first - start), "decode": len(prompts) * num_new / (end - first)}


if __name__ == "__main__":
    main()
