"""Perplexity of the default model on a text of this machine, in porcelet's formats and in llama.cpp's.

    python -m benchmarks.perplexity [--windows 16] [--size 512] [--append]

The text is Python's own documentation of its language (pydoc_data.topics). It is cut into windows of `size` tokens,
each computed from nothing; of a window the second half counts, the same tokens for every variant, as llama.cpp's own
tool does it. Ours are computed through the engine, so with its pages, its recorded step and its rounded activations.

`float32` are the pulled file's Q4_1 numbers without rounding of activations: what its other formats are measured
against. `int8`, `int4` and `stored` are made of the same file, `q4_0` of the file that llama.cpp's tool made of it.
llama.cpp's float16 is the control: it has to come out like our float32, or the engines did not see the same text.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pydoc_data.topics import topics

import torch
from torch import Tensor

from benchmarks.harness import report
from benchmarks.rivals import environments
from benchmarks.rivals.llama_perplexity import counted, judge
from porcelet import hub
from porcelet.config import EngineConfig
from porcelet.engine.engine import Engine
from porcelet.models.transformer import Transformer
from porcelet.types import SamplingParams
from porcelet.weights.load import load

CHARACTERS_A_TOKEN = 8  # more than the text has, so that a cut text still fills its windows
CONTROL = 1e-3  # of perplexity, between our float32 and llama.cpp's float16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--size", type=int, default=512, help="tokens a window")
    parser.add_argument("--append", action="store_true", help="add the line to results.jsonl")
    options = parser.parse_args()
    threads, windows = torch.get_num_threads(), options.windows
    text = documentation(windows * options.size * CHARACTERS_A_TOKEN)
    theirs = {
        name: judge(environments.llama_model(name), text, windows, options.size, threads)
        for name in ("f16", "q4_1", "q8_0", "q4_0")
    }
    tokens = theirs["f16"].tokens
    assert all(torch.equal(tokens, other.tokens) for other in theirs.values())
    found = {name: perplexity(scores(model, tokens)) for name, model in ours()}
    found |= {f"llama_{name}": judged.perplexity for name, judged in theirs.items()}
    base = found["float32"]
    assert abs(found["llama_f16"] / base - 1) < CONTROL, found
    results = {
        name: {"perplexity": round(value, 4), "above_float32_percent": round(100 * (value / base - 1), 3)}
        for name, value in found.items()
    }
    config = {"model": hub.DEFAULT_MODEL, "text": "pydoc_data.topics", "threads": threads, **vars(options)}
    report("perplexity", config, results, {"counted": windows * len(counted(options.size))}, append=options.append)


def documentation(characters: int) -> str:
    """The beginning of all topics, in the order of their names."""
    return "\n".join(topics[name] for name in sorted(topics))[:characters].strip()


def ours() -> Iterator[tuple[str, Transformer]]:
    """Name and model of every format of ours, one at a time."""
    path = hub.resolve(hub.DEFAULT_MODEL)
    for weights in ("float32", "int8", "stored", "int4"):
        yield weights, load(path, weights)
    yield "q4_0", load(environments.llama_model("q4_0"), "stored")


def scores(model: Transformer, tokens: Tensor) -> Tensor:
    """Log-probabilities [windows, counted] of the tokens that count, through the engine."""
    windows, size = tokens.shape
    config = EngineConfig(speculation="off", prefix_cache="off", cache_tokens=size + 64, max_batch_tokens=size)
    engine = Engine(model, config)
    params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    answers = (engine.generate([window], params)[0] for window in tokens.tolist())
    return torch.tensor([[answer.prompt_logprobs[i][0] for i in counted(size)] for answer in answers])


def perplexity(logprobs: Tensor) -> float:
    return math.exp(-logprobs.double().mean().item())


if __name__ == "__main__":
    main()
