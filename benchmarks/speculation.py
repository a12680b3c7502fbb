"""What the MTP layer's guesses save on a model that has learned: the sums recipe's.

    porcelet train recipes/sums.toml
    python -m benchmarks.speculation [--model runs/sums] [--sequences 1 8] [--rounds 5] [--append]

Held-out sums are answered greedily, so many at a time, without guesses, with one a step ("mtp"), and with one where it
pays ("auto"). `tokens_per_second` of answers, `tokens_per_step` of a sequence, and `acceptance`, the share of guesses
that were right. Every variant must give the same answers.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from benchmarks.harness import Run, interleave, report
from porcelet import Engine, SamplingParams
from porcelet.config import EngineConfig
from porcelet.train.rendering import Renderer
from porcelet.train.tasks import load_task
from porcelet.types import Output, Request


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    prompts = [Renderer(options.model).prompt(sum_.question) for sum_ in load_task("sums", {}).held_out]
    prompts = prompts[: options.prompts]
    answers: dict[int, list[tuple[int, ...]]] = {}
    runs: dict[str, Run] = {}
    for count in options.sequences:
        for speculation in ("off", "mtp", "auto"):
            engine = Engine.load(options.model, EngineConfig(speculation=speculation, max_sequences=count))
            runs[f"{speculation}_{count}"] = partial(run, engine, prompts, answers.setdefault(count, []))
    results, note = interleave(runs, options.rounds)
    for count in options.sequences:
        plain = results[f"off_{count}"]["tokens_per_second"]
        for speculation in ("mtp", "auto"):
            result = results[f"{speculation}_{count}"]
            result["gain"] = result["tokens_per_second"] / plain
    report("speculation", vars(options) | {"model": options.model.name}, results, note, append=options.append)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("runs/sums"))
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--append", action="store_true", help="add the line to results.jsonl")
    return parser.parse_args()


def run(engine: Engine, prompts: Sequence[tuple[int, ...]], answers: list[tuple[int, ...]]) -> Mapping[str, float]:
    """Answer all prompts; `answers` are those of the first run, which every other has to equal."""
    params = SamplingParams(max_tokens=8, temperature=0)
    for number, prompt in enumerate(prompts):
        engine.submit(Request(id=str(number), prompt=tuple(prompt), params=params))
    before, outputs = engine.stats(), list[Output]()
    start = time.perf_counter()
    while engine.has_work:
        outputs += engine.step()
    seconds = time.perf_counter() - start
    texts = dict[str, tuple[int, ...]]()
    for output in outputs:
        texts[output.request_id] = texts.get(output.request_id, ()) + output.tokens
    answers[:] = answers or [texts[str(number)] for number in range(len(prompts))]
    assert answers == [texts[str(number)] for number in range(len(prompts))], "guesses changed an answer"
    after = engine.stats()
    num_drafted, num_accepted = (after[name] - before[name] for name in ("num_drafted", "num_accepted"))
    num_tokens = sum(output.num_generated for output in outputs if output.finish_reason)
    return {
        "tokens_per_second": num_tokens / seconds,
        "tokens_per_step": num_tokens / len(outputs),
        "acceptance": num_accepted / num_drafted if num_drafted else 0.0,
    }


if __name__ == "__main__":
    main()
