"""The training loop beside transformers and a plain one: seconds of a step on a DeepSeek-V3 of 10 M parameters.

    python -m benchmarks.loop [--workload filled documents] [--rounds N] [--append]

Both sides start from the same weights, in float32, and take whole steps of AdamW with clipped gradients on two threads
or as many as torch is told. Before anything is timed their losses on the same samples must agree within 1e-5 and their
gradients' cosine must exceed 0.9999.

    filled       8 sequences of 512 tokens: nothing that padding could waste
    documents    32 sequences of 32 to 512 tokens, evenly by logarithm, as conversations are

The plain loop is what transformers' documentation leads to: DeepseekV3ForCausalLM, SDPA, torch's fused AdamW, a batch
padded to its longest sequence, in one pass or in micro-batches of 8 by length. Experts are computed in a loop and by
torch's grouped product; the quickest way is its row (transformers' third, a product a token, wants over 20 GB).
"""

from __future__ import annotations

import argparse
import itertools
import random
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from benchmarks.gradients import MODEL, SEQUENCE, make_matmul_rate
from benchmarks.harness import Run, interleave, report
from porcelet.config import OptimizerConfig, TrainConfig, read_hf
from porcelet.kernels.cpu import keep_freed_memory
from porcelet.models.transformer import build, initialize
from porcelet.train.flops import train_flops
from porcelet.train.loop import deterministic
from porcelet.train.measure import Stopwatch
from porcelet.train.optim import make_optimizer
from porcelet.train.packing import pack
from porcelet.train.spikes import SpikeRule
from porcelet.train.step import Run as TrainingRun
from porcelet.train.step import gradients, take_step
from porcelet.types import Sample
from porcelet.weights.load import load, save

EXPERTS = ("eager", "grouped_mm")
MICRO_BATCH = 8
LEARNING_RATE = 1e-5
MAX_LOSS_DIFFERENCE = 1e-5
MIN_COSINE = 0.9999
WORKLOADS = ("filled", "documents")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", nargs="*", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--append", action="store_true", help="add the line to results.jsonl")
    options = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    keep_freed_memory()  # the allocator's setting serves both sides
    results, notes = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        path = model_folder(MODEL, Path(folder))
        for name in options.workload:
            results[name], notes[name] = comparison(path, make_samples(name, MODEL["vocab_size"]), options.rounds)
    config = {"threads": torch.get_num_threads(), **vars(options)}
    report("loop", config, results, {"notes": notes}, append=options.append)


def model_folder(fields: Mapping[str, Any], folder: Path) -> Path:
    """Random weights that both sides read."""
    save(initialize(build(read_hf(fields, "benchmark")), seed=0), folder)
    return folder


def make_samples(workload: str, vocab_size: int) -> list[Sample]:
    """Random tokens, each predicted but the first."""
    draw = random.Random(0)
    lengths = [SEQUENCE] * 8
    if workload == "documents":
        lengths = [round(32 * (SEQUENCE / 32) ** (i / 31)) for i in range(32)]
        draw.shuffle(lengths)
    drawn = [tuple(draw.randrange(2, vocab_size) for _ in range(length + 1)) for length in lengths]
    return [Sample(tokens=tokens, weights=(0.0,) + (1.0,) * (len(tokens) - 1)) for tokens in drawn]


def comparison(folder: Path, samples: Sequence[Sample], rounds: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Seconds of a step of ours and of every plain way, in turn; the agreement of both sides before."""
    ours = training_run(folder, samples)
    ways = {
        f"{experts}_{'whole' if whole else 'micro'}": Plain(folder, samples, experts, whole=whole)
        for experts, whole in itertools.product(EXPERTS, (True, False))
        if whole or len(samples) > MICRO_BATCH
    }
    agreed = [agreement(ours, plain, samples) for plain in ways.values()]
    num_tokens = sum(len(sample.tokens) - 1 for sample in samples)
    flops = train_flops(ours.model.config, pack(samples), mtp=False)
    runs: dict[str, Run] = {"porcelet": timed(partial(our_step, ours), num_tokens, flops)}
    runs |= {name: timed(plain.step, num_tokens, flops) for name, plain in ways.items()}
    results, note = interleave(runs, rounds)
    best = min(ways, key=lambda name: results[name]["seconds"])
    return {
        **results,
        "agreement": {"loss_difference": max(one[0] for one in agreed), "cosine": min(one[1] for one in agreed)},
        "best": best,
        "times_faster": float(f"{results[best]['seconds'] / results['porcelet']['seconds']:.3g}"),
    }, note


def timed(step: Callable[[], object], num_tokens: int, flops: int) -> Run:
    """A step's seconds, tokens a second and share of what a large product reaches just before it."""
    matmul_rate = make_matmul_rate()

    def run() -> Mapping[str, float]:
        rate = matmul_rate()
        start = time.perf_counter()
        step()
        seconds = time.perf_counter() - start
        percent = 100 * flops / seconds / rate
        return {"seconds": seconds, "tokens_per_second": num_tokens / seconds, "percent_of_matmul": percent}

    return run


def training_run(folder: Path, samples: Sequence[Sample]) -> TrainingRun:
    """Ours: a run of the package's loop that always gets these samples."""
    rates = OptimizerConfig(learning_rate=LEARNING_RATE, warmup_steps=0)
    config = TrainConfig(optimizer=rates, mtp_weight=0.0, steps=1_000_000)
    model = load(folder)
    spikes = SpikeRule(config.spike_window, config.spike_deviations)
    return TrainingRun(config, {}, model, make_optimizer(model, rates), lambda step: (samples, {}), spikes)


def our_step(run: TrainingRun) -> None:
    """As `train` takes it, but for the line in the log."""
    with deterministic():
        take_step(run)


class Plain:
    """transformers' model in a plain loop."""

    def __init__(self, folder: Path, samples: Sequence[Sample], experts: str, *, whole: bool) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="sdpa", experts_implementation=experts
        ).train()
        decay = [p for p in self.model.parameters() if p.dim() > 1]
        rest = [p for p in self.model.parameters() if p.dim() <= 1]
        groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95), eps=1e-8, fused=True)
        ordered = sorted((sample.tokens for sample in samples), key=len)
        size = len(ordered) if whole else MICRO_BATCH
        self.batches = [padded(ordered[i : i + size]) for i in range(0, len(ordered), size)]
        self.num_tokens = sum(len(tokens) - 1 for tokens in ordered)

    def gradient(self) -> float:
        """The loss, a mean over all tokens; its gradients are in the model."""
        self.optimizer.zero_grad()
        total = 0.0
        for tokens, mask, targets in self.batches:
            logits = self.model(input_ids=tokens, attention_mask=mask, use_cache=False).logits
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum") / self.num_tokens
            loss.backward()
            total += float(loss.detach())
        return total

    def step(self) -> None:
        """The gradient, then a step of the optimizer, which clips."""
        self.gradient()
        self.descend()

    def descend(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()


def padded(rows: Sequence[tuple[int, ...]]) -> tuple[Tensor, Tensor | None, Tensor]:
    """Tokens, mask and targets (-100: none), filled up to the longest row; no mask where nothing is filled up."""
    width = max(map(len, rows)) - 1
    tokens, targets = torch.zeros(len(rows), width, dtype=torch.long), torch.full((len(rows), width), -100)
    for i, row in enumerate(rows):
        tokens[i, : len(row) - 1], targets[i, : len(row) - 1] = torch.tensor(row[:-1]), torch.tensor(row[1:])
    mask = (targets != -100).long()
    return tokens, None if bool(mask.all()) else mask, targets


def agreement(ours: TrainingRun, plain: Plain, samples: Sequence[Sample]) -> tuple[float, float]:
    """Difference of the losses and cosine of the gradients; ends the program where the sides disagree."""
    ours.optimizer.zero_grad()
    parts, _ = gradients(ours, samples, ours.config, Stopwatch())
    difference = abs(parts["loss"] - plain.gradient())
    mine, theirs = (
        {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        for model in (ours.model, plain.model)
    )
    assert mine.keys() == theirs.keys(), mine.keys() ^ theirs.keys()
    flat = [torch.cat([side[name].flatten().double() for name in sorted(mine)]) for side in (mine, theirs)]
    cosine = float(torch.cosine_similarity(*flat, dim=0))
    if difference > MAX_LOSS_DIFFERENCE or cosine < MIN_COSINE:
        raise SystemExit(f"the sides disagree: losses differ by {difference}, gradients' cosine is {cosine}")
    return difference, cosine


if __name__ == "__main__":
    main()
