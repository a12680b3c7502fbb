"""What judging costs: answers a second of each reward, for a step's worth of right and wrong answers.

    python -m benchmarks.rewards [--answers 512] [--rounds 5] [--append]

Processes are started before the clock is. `hanging` is one answer in a batch that never ends, with a limit of 1 s: the
batch should cost about that much more, and no more. `problems` are problems of countdown drawn with their traces.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from benchmarks.harness import Run, interleave, report
from porcelet.config import RewardConfig
from porcelet.train.rewards import Answer, Term, judge, load_rewards
from porcelet.train.tasks import Problem, load_task

SQUARE = "```python\ndef square(x):\n    return x * x\n```"
SHARES = {"code": 0.1, "math": 0.5}  # of the answers: the slow ones take fewer


def main() -> None:
    options = parse()
    runs: dict[str, Run] = {"problems": partial(draw, options.answers)}
    for name, problem, text, settings in cases():
        terms = load_rewards([RewardConfig(name=name, options=settings)])
        count = max(1, int(options.answers * SHARES.get(name, 1.0)))
        runs[name] = partial(run, terms, [problem] * count, [said(text)] * count)
    hanging = load_rewards([RewardConfig(name="math", options={"seconds": 1.0})])
    texts = ["$9^{9^{9^9}}$", *["$2$"] * (options.answers // 2)]
    runs["hanging"] = partial(run, hanging, [Problem("", "2")] * len(texts), [said(text) for text in texts])
    results, note = interleave(runs, options.rounds)
    report("rewards", vars(options), results, note, append=options.append)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--append", action="store_true", help="add the line to results.jsonl")
    return parser.parse_args()


def cases() -> list[tuple[str, Problem, str, dict[str, Any]]]:
    """A reward, a problem, an answer, and the reward's options."""
    countdown = load_task("countdown", {}).draw(0, 0)
    chain = load_task("reasoning-gym:chain_sum", {}).draw(0, 0)
    return [
        ("exact", Problem("", "3"), "3", {}),
        ("countdown", countdown, countdown.answer, {}),
        ("language", Problem("", ""), "we add three and four", {}),
        ("regex", Problem("", ""), "<think>a</think>b", {"pattern": "<think>.*</think>"}),
        ("math", Problem("", "3/4"), r"so it is $\frac{6}{8}$", {}),
        ("reasoning-gym", chain, chain.answer, {}),
        ("code", Problem("", "", data={"tests": "assert square(3) == 9"}), SQUARE, {}),
    ]


def said(text: str) -> Answer:
    return Answer(text=text, reasoning="", content=text, finished=True, num_tokens=len(text))


def run(terms: Sequence[Term], problems: Sequence[Problem], answers: Sequence[Answer]) -> Mapping[str, float]:
    began = time.perf_counter()
    judge(terms, problems, answers)
    seconds = time.perf_counter() - began
    return {"answers_per_second": len(answers) / seconds, "seconds": seconds}


def draw(count: int) -> Mapping[str, float]:
    task = load_task("countdown", {})
    began = time.perf_counter()
    for position in range(count):
        task.draw(0, position)
    seconds = time.perf_counter() - began
    return {"problems_per_second": count / seconds, "seconds": seconds}


if __name__ == "__main__":
    main()
