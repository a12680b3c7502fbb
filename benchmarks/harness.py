"""How every benchmark measures: variants interleaved, medians, stolen time watched, one JSON line.

On a shared machine the hypervisor takes processor time away in bursts. A run that lost more than 2 % of the
machine's time is dropped and repeated; what is left is compared as a ratio within one program run, never across runs.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results.jsonl"
MAX_STOLEN = 0.02
Run = Callable[[], Mapping[str, float]]  # one timed run: metric → value


@dataclass
class Series:
    """What the runs of one variant measured, run by run."""

    values: dict[str, list[float]] = field(default_factory=dict)

    def add(self, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self.values.setdefault(name, []).append(value)

    def medians(self) -> dict[str, float]:
        return {name: float(f"{statistics.median(values):.4g}") for name, values in self.values.items()}


def interleave(
    variants: Mapping[str, Run],
    rounds: int,
    max_attempts: int = 4,
    max_stolen: float = MAX_STOLEN,
    warm_up: bool = True,
) -> tuple[dict[str, dict[str, float]], dict[str, Any]]:
    """Run every variant once a round, after one unmeasured `warm_up`, in turning order; medians by variant, and what
    was dropped.

    A round in which any run lost more than `max_stolen` is dropped as a whole, so that ratios compare equal conditions.
    """
    for run in variants.values() if warm_up else ():
        run()
    series = {name: Series() for name in variants}
    kept, dropped, stolen = 0, 0, []
    names = list(variants)
    while kept < rounds and kept + dropped < rounds * max_attempts:
        turned = names[kept % len(names) :] + names[: kept % len(names)]
        measured, worst = {}, 0.0
        for name in turned:
            before = processor_times()
            measured[name] = variants[name]()
            worst = max(worst, stolen_share(before, processor_times()))
        if worst > max_stolen:
            dropped += 1
            continue
        kept += 1
        stolen.append(worst)
        for name, metrics in measured.items():
            series[name].add(metrics)
    if not kept:
        sys.exit(
            f"all {dropped} rounds lost more than {max_stolen:.0%} of the machine's time to others; try again later"
        )
    note = {"rounds": kept, "dropped_rounds": dropped, "stolen_percent": round(100 * max(stolen), 2)}
    return {name: one.medians() for name, one in series.items()}, note


def processor_times() -> tuple[int, int]:
    """(stolen, total) ticks of all processors since boot; (0, 0) where /proc/stat does not exist."""
    path = Path("/proc/stat")
    if not path.exists():
        return 0, 0
    fields = [int(word) for word in path.read_text().splitlines()[0].split()[1:9]]
    return fields[7], sum(fields)


def stolen_share(before: tuple[int, int], after: tuple[int, int]) -> float:
    """The share of the machine's time between two readings that the hypervisor gave to others."""
    total = after[1] - before[1]
    return (after[0] - before[0]) / total if total else 0.0


def report(
    benchmark: str, config: Mapping[str, Any], results: Mapping[str, Any], note: Mapping[str, Any], *, append: bool
) -> None:
    """Print the JSON line, and add it to results.jsonl if asked to."""
    line = {
        "benchmark": benchmark,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "machine": _machine(),
        "versions": {name: version(name) for name in ("torch", "transformers", "porcelet")}
        | {"python": platform.python_version()},
        "arguments": portable(sys.argv[1:]),
        "config": dict(config),
        **note,
        "results": dict(results),
    }
    print(json.dumps(line))
    if append:
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def portable(words: Sequence[str]) -> list[str]:
    """A command line that measures the same elsewhere: nothing is appended, and a run lies where it lies by default. Of
    a path from the root the last part is left, as its folders are this machine's own."""
    folders = {i + 1 for i, word in enumerate(words) if word == "--folder"}
    kept = [w for i, w in enumerate(words) if i not in folders and w not in ("--append", "--folder")]
    return [Path(word).name if Path(word).is_absolute() else word for word in kept]


def _commit() -> str:
    """The commit measured, "-dirty" if more than earlier results differs from it; "unknown" outside a checkout."""
    head = _git("rev-parse", "--short=10", "HEAD")
    changed = _git("status", "--porcelain", "--", ".", f":(exclude){RESULTS}")
    return (f"{head}-dirty" if changed else head) or "unknown"


def _git(*arguments: str) -> str:
    command = ["git", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=RESULTS.parent.parent
    ).stdout.strip()


def _machine() -> dict[str, Any]:
    model = "unknown"
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    return {"processor": model, "cores": os.cpu_count(), "system": platform.system()}
