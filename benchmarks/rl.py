"""A GRPO step beside TRL's: end to end, and all but the drawing on the same recorded answers.

    python -m benchmarks.rivals.environments trl           once: TRL's environment
    python -m benchmarks.rl [--model 10m smollm2] [--workload L M S] [--rounds N] [--threads N] [--append]
    python -m benchmarks.rl --ablate [...]                 what each part of ours saves (rl_ablation.py)

32 answers a step, all of the workload's length: P prompt tokens, R answer tokens, G answers a prompt. Same weights,
float32, AdamW, the loss "dapo" with advantages r - mean, no KL, one update a rollout. Both sides pay the same reward, a
sum over the answer's token ids. Before anything is timed, both compute the update of the same answers from the same
weights: the losses must agree within 1e-5 and the gradients' cosine must exceed 0.9999. TRL runs in each way of
`--trl`; the quickest is its row. The model "tiny" shows that all of this works.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks import rl_ablation
from benchmarks.harness import interleave, report
from benchmarks.rivals import environments
from porcelet.config import OptimizerConfig, PolicyConfig, TrainConfig, read_hf
from porcelet.models.attention import PackedView
from porcelet.models.transformer import Transformer, build, initialize
from porcelet.train.advantages import advantages
from porcelet.train.loop import deterministic
from porcelet.train.loss import Totals, compute_loss
from porcelet.train.optim import make_optimizer
from porcelet.train.packing import pack, passes
from porcelet.train.rendering import make_tokenizer
from porcelet.train.sampler import make_engine, refresh
from porcelet.types import Output, Sample, SamplingParams
from porcelet.weights.load import load, save

NUM_ANSWERS = 32
LEARNING_RATE = 1e-6
MAX_LOSS_DIFFERENCE = 1e-5
MIN_COSINE = 0.9999
SHAPES: dict[str, dict[str, int]] = {
    "10m": {"vocab_size": 4096, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8},
    "tiny": {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
}
MODELS = (*SHAPES, "smollm2")
TRL_WAYS: dict[str, dict[str, Any]] = {  # what TRL's documentation offers for speed on a processor
    "trl": {"micro_batch": NUM_ANSWERS, "more": {}},
    "trl_micro8": {"micro_batch": 8, "more": {}},
    "trl_continuous": {"micro_batch": NUM_ANSWERS, "more": {"use_transformers_continuous_batching": True}},
}


@dataclass(frozen=True)
class Workload:
    prompt: int  # P
    answer: int  # R
    group: int  # G

    @property
    def num_prompts(self) -> int:
        return NUM_ANSWERS // self.group


WORKLOADS = {"L": Workload(128, 32, 16), "M": Workload(64, 64, 8), "S": Workload(32, 128, 8), "XS": Workload(8, 4, 16)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="*", choices=MODELS, default=["10m"])
    parser.add_argument("--workload", nargs="*", choices=WORKLOADS, default=["L", "M", "S"])
    parser.add_argument("--trl", nargs="*", choices=TRL_WAYS, default=["trl", "trl_micro8"], help="ways to run TRL")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--max-stolen", type=float, default=0.02)
    parser.add_argument("--ablate", action="store_true", help="our own parts, each switched off in turn")
    parser.add_argument("--append", action="store_true", help="add the line to results.jsonl")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name in options.model:
        results, notes = {}, {}
        with tempfile.TemporaryDirectory() as folder:
            path = model_folder(name, Path(folder))
            for letter in options.workload:
                measure = ablation if options.ablate else comparison
                results[letter], notes[letter] = measure(path, WORKLOADS[letter], options)
        benchmark = f"rl_ablation_{name}" if options.ablate else f"rl_{name}"
        report(benchmark, vars(options), results, {"notes": notes}, append=options.append)


def model_folder(name: str, folder: Path) -> Path:
    """A model that both sides read; a new one is random, with a tokenizer that TRL asks for."""
    if name == "smollm2":
        return environments.float32_folder()
    make_tokenizer(folder)
    fields = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, **SHAPES[name]}
    fields |= {"eos_token_id": 1, "bos_token_id": 0, "initializer_range": 0.05}
    save(initialize(build(read_hf({"model_type": "llama", **fields}, name)), seed=0), folder)
    return folder


def make_prompts(workload: Workload, vocab_size: int) -> list[tuple[int, ...]]:
    """Random tokens, none of them special."""
    draw = random.Random(0)
    return [tuple(draw.randrange(300, vocab_size) for _ in range(workload.prompt)) for _ in range(workload.num_prompts)]


def reward(tokens: Sequence[int]) -> float:
    """As in rivals/trl_grpo.py."""
    return float(sum(tokens) % 7)


@dataclass
class Trainer:
    """Our side: the package's own parts, put together as the loop does."""

    folder: Path
    workload: Workload
    tokens_per_pass: int = 4096
    model: Transformer = field(init=False)

    def __post_init__(self) -> None:
        self.model = load(self.folder)
        policy = PolicyConfig(loss="dapo", group_size=self.workload.group, max_new_tokens=self.workload.answer)
        rates = OptimizerConfig(learning_rate=LEARNING_RATE, min_learning_rate=0.0, weight_decay=0.0)
        self.config = TrainConfig(policy=policy, optimizer=rates, tokens_per_pass=self.tokens_per_pass)
        self.optimizer = make_optimizer(self.model, rates)
        self.engine = make_engine(self.model, policy)
        self.prompts = make_prompts(self.workload, self.model.config.vocab_size)
        self.num_rollouts = 0

    def rollout(self) -> list[Sample]:
        """Answers of the workload's length with their advantages."""
        return self.judged(self.draw())

    def draw(self) -> list[Output]:
        """Answers of the workload's length, group by group."""
        self.num_rollouts += 1
        params = [
            SamplingParams(
                max_tokens=self.workload.answer,
                n=self.workload.group,
                ignore_eos=True,
                seed=self.num_rollouts * 1000 + i,
            )
            for i in range(len(self.prompts))
        ]
        refresh(self.engine, self.model)
        return self.engine.generate(self.prompts, params)

    def judged(self, outputs: Sequence[Output]) -> list[Sample]:
        """Answers as samples, their advantages r - mean."""
        size, samples = self.workload.group, []
        for number, prompt in enumerate(self.prompts):
            group = outputs[number * size : (number + 1) * size]
            relative = advantages([reward(output.tokens) for output in group], "centred")
            samples += [
                answer(prompt, output.tokens, output.logprobs, advantage)
                for output, advantage in zip(group, relative, strict=True)
            ]
        return samples

    def gradient(self, samples: Sequence[Sample]) -> float:
        """The loss; its gradients are in the model."""
        self.optimizer.zero_grad()
        totals, total = Totals.of(samples), 0.0
        for some in passes(samples, self.config.tokens_per_pass):
            batch = pack(some)
            loss, _ = compute_loss(self.model, batch, PackedView(batch.segments), self.config, totals)
            loss.backward()
            total += float(loss.detach())
        return total

    def descend(self) -> None:
        """A step of the optimizer, which clips."""
        self.optimizer.step(self.optimizer.gradient_norm(), LEARNING_RATE)

    def step(self, recorded: Sequence[Output] | None) -> dict[str, float]:
        """A step end to end, or all but the drawing of recorded answers; its seconds."""
        start = time.perf_counter()
        with deterministic():  # as training runs
            drawn = self.draw() if recorded is None else recorded
            middle = time.perf_counter()
            self.gradient(self.judged(drawn))
            self.descend()
        end = time.perf_counter()
        return {"seconds": end - start} | ({"rollout_seconds": middle - start} if recorded is None else {})


def answer(prompt: tuple[int, ...], tokens: tuple[int, ...], logprobs: tuple[float, ...], advantage: float) -> Sample:
    silent = (0.0,) * len(prompt)
    return Sample(
        tokens=prompt + tokens,
        advantages=silent + (advantage,) * len(tokens),
        old_logprobs=silent + logprobs,
        num_prompt=len(prompt),
    )


@dataclass
class Rival:
    """A process of rivals/trl_grpo.py."""

    process: subprocess.Popen[str]
    versions: dict[str, str]

    def step(self, gradient: str | None = None) -> dict[str, float]:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps({"gradient": gradient}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"TRL ended with {self.process.wait()}; what it said is above")
        return dict(json.loads(line))


@contextmanager
def rival(options: Mapping[str, Any]) -> Iterator[Rival]:
    """TRL in its own environment, ready for its first step."""
    python = environments.python_of("trl")
    if not python.exists():
        sys.exit("TRL is not installed: python -m benchmarks.rivals.environments trl")
    command = [str(python), "-m", "benchmarks.rivals.trl_grpo", json.dumps(options)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        line = process.stdout.readline()
        if not line:
            sys.exit(f"TRL ended with {process.wait()}; what it said is above")
        yield Rival(process, json.loads(line)["versions"])
        assert process.stdin
        process.stdin.close()


def comparison(folder: Path, workload: Workload, options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """Seconds of both, and what disturbed them, by way of measuring; one TRL process at a time beside ours, as each
    keeps its threads."""
    recorded = Trainer(folder, workload).draw()
    results: dict[str, Any] = {"agreement": agreement(folder, workload, recorded, options.threads)}
    notes: dict[str, Any] = {}
    for kind, replayed in (("replayed", recorded), ("end_to_end", None)):
        results[kind] = {}
        for way in options.trl:
            if replayed is not None and way == "trl_continuous":
                continue  # it differs in generation alone
            ours = Trainer(folder, workload)
            with rival(rival_options(folder, ours, replayed, options.threads) | TRL_WAYS[way]) as theirs:
                runs = {"porcelet": lambda: ours.step(replayed), way: theirs.step}  # noqa: B023  run at once
                measured, notes[f"{kind} {way}"] = interleave(runs, options.rounds, max_stolen=options.max_stolen)
            ratio = measured[way]["seconds"] / measured["porcelet"]["seconds"]
            results[kind][way] = measured | {"times_faster": float(f"{ratio:.3g}")}
        if not results[kind]:
            continue
        results[kind]["least"] = min(way["times_faster"] for way in results[kind].values())
    return results, notes


def rival_options(folder: Path, ours: Trainer, outputs: Sequence[Output] | None, threads: int) -> dict[str, Any]:
    size = ours.workload.group
    recorded = None
    if outputs is not None:
        answers = [output.tokens for output in outputs]
        recorded = [answers[i : i + size] for i in range(0, len(answers), size)]
    return {
        "folder": str(folder),
        "prompts": ours.prompts,
        "group_size": size,
        "num_tokens": ours.workload.answer,
        "completions": recorded,
        "threads": threads,
        "learning_rate": LEARNING_RATE,
        **TRL_WAYS["trl"],
    }


def agreement(folder: Path, workload: Workload, outputs: Sequence[Output], threads: int) -> dict[str, Any]:
    """Loss and gradient of the same answers on both sides; ends the program where they differ."""
    ours = Trainer(folder, workload)
    loss = ours.gradient(ours.judged(outputs))
    with tempfile.TemporaryDirectory() as place, rival(rival_options(folder, ours, outputs, threads)) as theirs:
        found = theirs.step(f"{place}/gradient.safetensors")
        gradients = load_file(f"{place}/gradient.safetensors")
        versions = theirs.versions
    mine = {name: p.grad for name, p in ours.model.named_parameters() if p.grad is not None}
    names = sorted(mine.keys() & gradients.keys())
    assert names and mine.keys() == gradients.keys(), mine.keys() ^ gradients.keys()
    flat: list[Tensor] = [torch.cat([side[name].flatten().double() for name in names]) for side in (mine, gradients)]
    cosine = float(torch.cosine_similarity(*flat, dim=0))
    difference = abs(loss - found["loss"])
    if difference > MAX_LOSS_DIFFERENCE or cosine < MIN_COSINE:
        sys.exit(f"the sides disagree: losses {loss} and {found['loss']}, gradients' cosine {cosine}")
    norms = float(flat[0].norm().clamp(max=ours.config.optimizer.max_grad_norm) / flat[1].norm())  # TRL's are clipped
    return {"loss_difference": difference, "cosine": cosine, "norm_ratio": norms, "versions": versions}


def ablation(folder: Path, workload: Workload, options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    variants = rl_ablation.variants(Trainer(folder, workload))
    return interleave(variants, options.rounds, max_stolen=options.max_stolen)


if __name__ == "__main__":
    main()
