"""What a step costs: seconds by phase, memory, and how much of the machine's arithmetic it used.

Utilisation is model flops over the seconds of the update, divided by the rate at which this machine multiplies large
float32 matrices, measured when a run starts. Generation is not in it; its tokens a second are a metric of their own.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import torch

from porcelet.train.files import writing

WIDTH = 1024  # of the matrices that are multiplied: out of the caches of a core, 20 to 50 ms on one
ROUNDS = 4

# Metrics that differ between two equal runs.
MEASURED = (
    "seconds",
    "seconds_draw",
    "seconds_gradient",
    "seconds_optimizer",
    "tokens_per_second",
    "utilisation",
    "resident_bytes",
    "peak_bytes",
)


@dataclass
class Stopwatch:
    """Seconds spent in each phase of a step."""

    began: float = field(default_factory=time.perf_counter)
    seconds: dict[str, float] = field(default_factory=lambda: {"draw": 0.0, "gradient": 0.0, "optimizer": 0.0})
    flops: int = 0  # of the model, in the updates

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time of the block to a phase."""
        start = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - start

    def metrics(self, num_tokens: int, device: str) -> dict[str, float]:
        """The step's `MEASURED`."""
        total = time.perf_counter() - self.began
        update = self.seconds["gradient"] + self.seconds["optimizer"]
        phases = {f"seconds_{name}": seconds for name, seconds in self.seconds.items()}
        rate = matmul_rate(device, torch.get_num_threads())
        used = self.flops / update / rate if self.flops else 0.0
        speed = {"tokens_per_second": num_tokens / total, "utilisation": used}
        return {"seconds": total, **phases, **speed, **memory()}


@lru_cache(maxsize=4)
def matmul_rate(device: str, num_threads: int) -> float:
    """Flops a second of a large float32 matrix product, the best of a few."""
    one = torch.ones(WIDTH, WIDTH, device=device)
    best = float("inf")
    for _ in range(ROUNDS):
        start = time.perf_counter()
        (one @ one)[0, 0].item()  # the item waits for the device
        best = min(best, time.perf_counter() - start)
    return 2.0 * WIDTH**3 / best


def record_session(output: Path, step: int, device: str) -> None:
    """Add a line to sessions.jsonl: where and when a run was started or continued behind `step`."""
    threads = torch.get_num_threads()
    facts = {
        "step": step,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "device": device,
        "threads": threads,
        "torch": torch.__version__,
        "matmul_flops_per_second": matmul_rate(device, threads),
    }
    path = output / "sessions.jsonl"
    with writing(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(facts) + "\n")


def memory() -> dict[str, float]:
    """Resident memory of this process now and at its highest, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    sizes = dict(line.split(":", 1) for line in lines)
    return {name: 1024 * int(sizes[key].split()[0]) for name, key in _SIZES.items()}


_SIZES = {"resident_bytes": "VmRSS", "peak_bytes": "VmHWM"}
