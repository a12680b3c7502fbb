"""Where a decoding step's time goes, and how near the engine comes to what its matrix products alone reach.

    python -m benchmarks.step [--sequences 1 16] [--weights float32 int8] [--rounds 5] [--append]

Requests of the same length decode greedily; speculation is off, and steps with prompts in them are not counted. Medians
over the steps, in milliseconds, of the engine's own parts in the order in which they happen: `schedule`, `view` (the
batch as tensors), `model`, `sample`, `commit`, `pack` (the step's outputs as the frame that goes to the server).
`overhead` is all but model and sample, `sample_share` the sampler's part of the step.

In float32 `gemm` is the time of the step's matrix products alone, on as many rows, over all of the model's own
weights, with torch; `gemm_engine` the same through kernels.linear. `of_gemm` is `gemm` over the step: the share of that
ceiling that the engine reaches. `over_alone` is tokens a second over those of the fewest sequences in the same run.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from functools import partial
from statistics import median
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.harness import Run, interleave, report
from porcelet import Engine, SamplingParams, hub
from porcelet.config import EngineConfig
from porcelet.engine.messages import Outputs, pack
from porcelet.kernels.linear import linear
from porcelet.models.layers import Linear
from porcelet.models.transformer import Transformer
from porcelet.types import Request
from porcelet.weights.load import load

Result = TypeVar("Result")
OVERHEAD = ("schedule", "view", "commit", "pack")


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    runs: dict[str, Run] = {}
    for weights in options.weights:
        model = load(hub.resolve(hub.DEFAULT_MODEL), weights)
        for count in options.sequences:
            runs[f"{weights}_{count}"] = partial(run, model, count, options.prompt, options.new)
            if weights == "float32":
                runs[f"gemm_{count}"] = partial(products, functional.linear, model, count, options.new)
                runs[f"gemm_engine_{count}"] = partial(products, linear, model, count, options.new)
    results, note = interleave(runs, options.rounds, max_stolen=options.max_stolen)
    for weights in options.weights:
        for count in options.sequences:
            compare(results, weights, count, min(options.sequences))
    config = {"model": hub.DEFAULT_MODEL, **vars(options)}
    report("step", config, results, note, append=options.append)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--weights", nargs="+", choices=["float32", "int8"], default=["float32", "int8"])
    parser.add_argument("--prompt", type=int, default=128, help="prompt tokens a sequence")
    parser.add_argument("--new", type=int, default=32, help="steps measured")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--max-stolen", type=float, default=0.05, help="a round's, if it is to count")
    parser.add_argument("--append", action="store_true", help="add the line to results.jsonl")
    return parser.parse_args()


def run(model: Transformer, count: int, num_prompt: int, num_new: int) -> Mapping[str, float]:
    """Decode with a fresh engine; medians over the steps that only decode."""
    engine = Engine(model, EngineConfig(max_batch_tokens=max(512, count), speculation="off"))
    engine.generate([[1]], SamplingParams(max_tokens=2))  # makes the recording
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(0, model.config.vocab_size, (count, num_prompt), generator=generator).tolist()
    params = SamplingParams(max_tokens=num_new + 2, temperature=0, ignore_eos=True)
    for index, prompt in enumerate(prompts):
        engine.submit(Request(id=str(index), prompt=tuple(prompt), params=params))
    parts = Parts(engine)
    steps = []
    while engine.has_work:
        parts.clear()
        start = time.perf_counter()
        outputs = engine.step()
        end = time.perf_counter()
        pack(Outputs(outputs, dict(engine.stats())))
        packed = time.perf_counter()
        if len(outputs) == count and parts.num_tokens == count:  # all decode, none computes its prompt
            steps.append(parts.seconds | {"step": end - start, "pack": packed - end})
    medians = {name: 1e3 * median(step[name] for step in steps) for name in steps[0]}
    medians["overhead"] = sum(medians[name] for name in OVERHEAD)
    medians["sample_share"] = medians["sample"] / medians["step"]
    medians["tokens_per_second"] = 1e3 * count / (medians["step"] + medians["pack"])
    return medians


class Parts:
    """Times the calls that an engine's step consists of, by wrapping them in this one engine."""

    def __init__(self, engine: Engine) -> None:
        self.seconds: dict[str, float] = {}
        self.num_tokens = 0
        assert engine.runner.recorded, engine.runner.why_not
        for name, (owner, method) in {
            "schedule": (engine.scheduler, "schedule"),
            "view": (engine.runner._steps[False]._inputs, "fill"),
            "run": (engine.runner, "run"),
            "sample": (engine.sampler, "draw"),
            "commit": (engine.scheduler, "commit"),
        }.items():
            setattr(owner, method, self._timed(name, getattr(owner, method)))

    def clear(self) -> None:
        self.seconds.clear()
        self.num_tokens = 0

    def _timed(self, name: str, function: Callable[..., Result]) -> Callable[..., Result]:
        def timed(*arguments: Any) -> Result:
            start = time.perf_counter()
            result = function(*arguments)
            self.seconds[name] = time.perf_counter() - start
            if name == "run":
                self.seconds["model"] = self.seconds.pop("run") - self.seconds.get("view", 0.0)
                self.num_tokens = len(arguments[0].tokens)
            return result

        return timed


@torch.inference_mode()
def products(
    product: Callable[[Tensor, Tensor], Tensor], model: Transformer, rows: int, repeats: int
) -> Mapping[str, float]:
    """Milliseconds of one step's matrix products alone: every linear layer, the head among them, once."""
    weights = [module.weight for module in model.modules() if isinstance(module, Linear)]
    assert all(isinstance(weight, Tensor) for weight in weights)
    inputs = {weight.shape[1]: torch.randn(rows, weight.shape[1]) for weight in weights}
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for weight in weights:
            product(inputs[weight.shape[1]], weight)
        times.append(time.perf_counter() - start)
    return {"milliseconds": 1e3 * median(times)}


def compare(results: dict[str, dict[str, float]], weights: str, count: int, fewest: int) -> None:
    """Add the ratios between a variant and others of the same run."""
    own = results[f"{weights}_{count}"]
    own["over_alone"] = _round(own["tokens_per_second"] / results[f"{weights}_{fewest}"]["tokens_per_second"])
    if weights == "float32":
        own["of_gemm"] = _round(results[f"gemm_{count}"]["milliseconds"] / own["step"])


def _round(value: float) -> float:
    return float(f"{value:.3g}")


if __name__ == "__main__":
    main()
