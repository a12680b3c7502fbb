"""The native bodies beside torch on the default model's shapes, beside what the memory gives, and what dispatch costs.

    python -m benchmarks.kernels [--rounds 7] [--append]
    python -m benchmarks.kernels --device cuda [--minutes 8]    the GPU kernels (benchmarks/gpu.py)

Weights rotate through more memory than the caches hold, as they do in a model, so one token's speed is set by
bandwidth.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks import gpu
from benchmarks.harness import Run, interleave, report
from porcelet.errors import InputError
from porcelet.kernels import cpu, op
from porcelet.kernels.linear import PackedWeight, linear
from porcelet.weights.quantize import to_packed

SHAPES = {"head": (576, 49152), "up": (576, 1536), "down": (1536, 576)}  # (inputs, outputs)
TOKENS = (1, 16, 512)
ROTATED_BYTES = 1 << 27


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--append", action="store_true", help="add the line to results.jsonl")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--minutes", type=float, default=8.0, help="after which the GPU's lines end")
    options = parser.parse_args()
    if options.device == "cuda":
        try:
            gpu.show(options.minutes)
        except InputError as problem:
            parser.error(str(problem))
        return
    torch.manual_seed(0)
    runs: dict[str, Run] = {"read": read_bandwidth, "dispatch": dispatch_cost}
    for (name, (inputs, outputs)), tokens in itertools.product(SHAPES.items(), TOKENS):
        if name == "head" and tokens > 16:
            continue  # the head sees sampled rows only
        copies = max(1, min(64, ROTATED_BYTES // (inputs * outputs)))
        dense = [torch.randn(outputs, inputs) for _ in range(copies)]
        x = torch.randn(tokens, inputs)
        for bits in (8, 4):
            packed = [to_packed(weight, bits) for weight in dense]
            runs[f"{name}_{tokens}_int{bits}"] = timed(linear, x, packed)
        runs[f"{name}_{tokens}_float32"] = timed(functional.linear, x, dense)
    with torch.inference_mode():
        results, note = interleave(runs, options.rounds)
    settings = {"rounds": options.rounds, "append": options.append}
    config = {"threads": torch.get_num_threads(), "isa": cpu.isa(), **settings}
    report("kernels", config, results, note, append=options.append)


def timed(function: Callable[[Tensor, Tensor | PackedWeight], Tensor], x: Tensor, weights: list) -> Run:  # type: ignore[type-arg]
    """Run through all weights often enough for some milliseconds; rates per call of the mean."""

    def run() -> Mapping[str, float]:
        repeats = max(1, 40 // len(weights))
        start = time.perf_counter()
        for _ in range(repeats):
            for weight in weights:
                function(x, weight)
        seconds = (time.perf_counter() - start) / (repeats * len(weights))
        first = weights[0]
        size = first.packed.numel() if isinstance(first, PackedWeight) else first.numel() * 4
        operations = 2 * len(x) * first.shape[0] * first.shape[1]
        return {
            "microseconds": seconds * 1e6,
            "gb_per_s": size / seconds / 1e9,
            "gop_per_s": operations / seconds / 1e9,
        }

    return run


def read_bandwidth(size: int = 1 << 28) -> Mapping[str, float]:
    """What reading memory once gives with all threads: the sum of a large tensor."""
    values = torch.ones(size // 4)
    start = time.perf_counter()
    values.sum()
    return {"gb_per_s": size / (time.perf_counter() - start) / 1e9}


@op
def _nothing(x: Tensor, weight: Tensor) -> Tensor:
    return x


def dispatch_cost(number: int = 20000) -> Mapping[str, float]:
    """What a call through the table of ops adds to the function itself."""
    x, weight = torch.zeros(1), torch.zeros(1)
    seconds = {}
    for name, function in {"through": _nothing, "direct": _nothing.reference}.items():
        start = time.perf_counter()
        for _ in range(number):
            function(x, weight)
        seconds[name] = time.perf_counter() - start
    with torch.inference_mode(False), torch.enable_grad():
        start = time.perf_counter()
        for _ in range(number):
            _nothing(x, weight)
        seconds["grad"] = time.perf_counter() - start
    cost = {name: (seconds[name] - seconds["direct"]) / number * 1e6 for name in ("through", "grad")}
    return {"microseconds": cost["through"], "microseconds_grad": cost["grad"]}


if __name__ == "__main__":
    main()
