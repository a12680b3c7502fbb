"""Which kernel each task takes on this machine's GPU: measured once, kept in a file, taken from then on.

A rival is measured beside ours in Triton on the same arguments, in turns and with empty caches. It must agree on all of
them and be faster over all. What was measured holds for the GPU and for the versions it was measured with; under others
nothing is taken from it.
"""

from __future__ import annotations

import json
import logging
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from porcelet import __version__
from porcelet.errors import CapacityError, InputError
from porcelet.kernels.linear import FP8_BLOCK, FP8Weight
from porcelet.kernels.triton.tasks import (
    OWN,
    TASKS,
    Rival,
    Task,
    fp8_experts,
    fp8_product,
    grouped_attention,
    latent_attention,
)

FILE = "gpu.json"
ROUNDS, RUNS = 5, 20  # of each kernel: in turns, and in a row
EMPTIED = 256 << 20  # bytes written between runs, more than any cache holds
MARGIN = 1.03  # how many times faster a rival must be
AGREE = 1e-3  # 1 less the cosine-like likeness of two results (DeepGEMM's metric) that still counts as the same

Timer = Callable[[Callable[[], object]], float]
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """Of one task: what is taken, how many times faster than ours in Triton each rival was (geometric mean), and why
    others were not measured to the end."""

    task: str
    taken: str
    ratios: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Contest:
    """All tasks' outcomes and what they hold for."""

    conditions: dict[str, str]
    date: str
    outcomes: tuple[Outcome, ...]


def timed(run: Callable[[], object], runs: int = RUNS) -> float:
    """Seconds of the median of some runs, each with empty caches."""
    for _ in range(3):
        run()
    emptied = torch.empty(EMPTIED // 4, device="cuda")
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(runs)]
    for start, stop in marks:
        emptied.zero_()
        start.record()
        run()
        stop.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(stop) for start, stop in marks) / 1e3


def hold(
    device: torch.device, timer: Timer = timed, *, small: bool = False, tell: Callable[[str], None] = log.info
) -> Contest:
    """Measure every task; tasks take nothing of it yet. `small` arguments are for tests; `tell` hears of each rival
    before it runs, so that one that never ends is known."""
    outcomes = []
    with torch.inference_mode():
        for one in TASKS.values():
            outcomes.append(_outcome(one, device, timer, small, tell))
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return Contest(conditions(device), time.strftime("%Y-%m-%d"), tuple(outcomes))


def conditions(device: torch.device) -> dict[str, str]:
    """What a measurement holds for: the GPU and the versions of all that was or could have been measured."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    found = {"gpu": name, "porcelet": __version__, "torch": torch.__version__}
    distributions = packages_distributions()
    packages = {rival.package for one in TASKS.values() for rival in one.rivals.values() if rival.package}
    for package in sorted(packages | {"triton"}):
        found[package] = ", ".join(f"{name} {version(name)}" for name in distributions.get(package, [])) or "none"
    return found


def _outcome(
    one: Task[Any, Any], device: torch.device, timer: Timer, small: bool, tell: Callable[[str], None]
) -> Outcome:
    ratios: dict[str, list[float]] = {name: [] for name in one.names(device) if name != OWN}
    failed: dict[str, str] = {}
    for arguments in ARGUMENTS[one.name](device, small) if ratios else ():
        wanted = _values(one.own(*arguments))
        for name in ratios:
            if name in failed:
                continue
            tell(f"measuring {one.name} by {name}")
            if reason := _unlike(one.rivals[name], arguments, wanted):
                failed[name] = reason
        runs = {name: partial(one.rivals[name].function, *arguments) for name in ratios if name not in failed}
        if not runs:
            break
        seconds: dict[str, list[float]] = {name: [] for name in (OWN, *runs)}
        for _ in range(ROUNDS):
            for name, run in {OWN: partial(one.own, *arguments), **runs}.items():
                seconds[name].append(timer(run))
        for name in runs:
            ratios[name].append(statistics.median(seconds[OWN]) / statistics.median(seconds[name]))
    means = {name: statistics.geometric_mean(each) for name, each in ratios.items() if name not in failed}
    best = max(means, key=lambda name: means[name], default=OWN)
    return Outcome(one.name, best if means.get(best, 0.0) > MARGIN else OWN, means, failed)


def _unlike(rival: Rival[Any, Any], arguments: tuple[Any, ...], wanted: Tensor) -> str:
    """Why a rival is not measured; nothing if it gives what ours gave."""
    if not rival.serves(*arguments):
        return "it does not serve what was measured"
    try:
        found = _values(rival.function(*arguments))
    except Exception as problem:  # a vendor's package may raise anything; it is told, and ours is taken
        return f"{type(problem).__name__}: {problem}"
    distance = float(1 - 2 * (found * wanted).sum() / (found**2 + wanted**2).sum())
    return "" if distance < AGREE else f"its results differ from ours by {distance:.2g}, where {AGREE:g} is allowed"


def _values(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Of attention the results without the log-sum-exps."""
    return (result if isinstance(result, Tensor) else result[0]).double()


# ---- what is measured -----------------------------------------------------------------------------------------------


def _latents(device: torch.device, small: bool) -> Iterator[tuple[Any, ...]]:
    """16 and 128 heads over 4,096 and 16,384 latents, some sequences shorter."""
    for heads, length in ((16, 70),) if small else ((16, 4096), (128, 4096), (128, 16384)):
        past = _past(2 if small else 64, length, device)
        pages = torch.randn(past[2].numel(), 64, 1, 576, device=device, dtype=_half(device)) / 10
        q = torch.randn(len(past[1]), heads, 576, device=device, dtype=_half(device))
        yield q, pages, 512, *past, 576**-0.5


def _grouped(device: torch.device, small: bool) -> Iterator[tuple[Any, ...]]:
    """32 heads on 8, as Llama 3 8B has them."""
    for length in (70,) if small else (1024, 8192):
        past = _past(2 if small else 64, length, device)
        shape = past[2].numel(), 8, 64, 128
        k, v = (torch.randn(shape, device=device, dtype=_half(device)).transpose(1, 2) for _ in range(2))
        q = torch.randn(len(past[1]), 32, 128, device=device, dtype=_half(device))
        yield q, k, v, *past, 128**-0.5


def _past(batch: int, length: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """One new token each; lengths from half of `length` on; pages in random order. As the engine has them, 64 bits."""
    each = -(-length // 64)
    lengths = torch.linspace(length // 2, length, batch, device=device).long()
    tables = torch.randperm(batch * each, device=device).view(batch, each)
    return torch.arange(batch + 1, device=device), lengths, tables


def _products(device: torch.device, small: bool) -> Iterator[tuple[Any, ...]]:
    """V3's shapes at few, some and many rows."""
    from porcelet.kernels.triton.matmul import quantize_rows

    shapes = [(128, 256)] if small else [(4096, 7168), (7168, 2048), (24576, 1536)]
    for (N, K), M in ((shape, rows) for shape in shapes for rows in ((3,) if small else (1, 128, 4096))):
        values = torch.randn(N, K, device=device).to(torch.float8_e4m3fn)
        scale = torch.rand(-(-N // FP8_BLOCK), -(-K // FP8_BLOCK), device=device) / K
        rows = quantize_rows(torch.randn(M, K, device=device, dtype=_half(device)))
        yield rows, FP8Weight(values, scale), torch.bfloat16


def _experts(device: torch.device, small: bool) -> Iterator[tuple[Any, ...]]:
    """V3's gate and up projections of 32 experts: as decoding has them, and prompts."""
    from porcelet.kernels.triton.matmul import ALIGNED, quantize_rows

    E, N, K = (2, 64, 256) if small else (32, 4096, 7168)
    values = torch.randn(E, N, K, device=device, dtype=_half(device)).to(torch.float8_e4m3fn)
    scale = torch.rand(E, -(-N // FP8_BLOCK), -(-K // FP8_BLOCK), device=device) / K
    for groups in (1,) if small else (1, 8):
        owners = torch.arange(E, dtype=torch.int32, device=device).repeat_interleave(groups * ALIGNED)
        rows = quantize_rows(torch.randn(len(owners), K, device=device, dtype=_half(device)))
        yield rows, FP8Weight(values, scale), owners, ALIGNED, torch.bfloat16


def _half(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float16  # the interpreter multiplies bfloat16 wrongly


ARGUMENTS: dict[str, Callable[[torch.device, bool], Iterator[tuple[Any, ...]]]] = {
    latent_attention.name: _latents,
    grouped_attention.name: _grouped,
    fp8_product.name: _products,
    fp8_experts.name: _experts,
}


# ---- the file -------------------------------------------------------------------------------------------------------


def save(contest: Contest, path: Path) -> None:
    """Write what was measured.

    Raises:
        CapacityError: it cannot be written.
    """
    unfinished = path.with_suffix(".unfinished")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(json.dumps(asdict(contest), indent=1), encoding="utf-8")
        os.replace(unfinished, path)
    except OSError as problem:
        raise CapacityError(f"{path} cannot be written: {problem.strerror}; set PORCELET_HOME elsewhere") from problem


def load(path: Path) -> Contest | None:
    """What was measured, or None if nothing was.

    Raises:
        InputError: the file is none.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        outcomes = tuple(Outcome(**outcome) for outcome in values.pop("outcomes"))
        return Contest(outcomes=outcomes, **values)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as problem:
        raise InputError(f"{path} is no measurement of kernels ({problem}); run `porcelet bench` again") from problem


def stale(contest: Contest, device: torch.device) -> str:
    """Which conditions are others now; nothing if it still holds."""
    return ", ".join(name for name, now in conditions(device).items() if now != contest.conditions.get(name))


def apply(path: Path, device: torch.device) -> None:
    """Let each task take what was measured fastest here, if anything was, under these conditions.

    Raises:
        InputError: the file is none, or names a kernel that the task has not.
    """
    for one in TASKS.values():
        one.take(OWN)
    found = load(path)
    if found is None:
        return
    if differing := stale(found, device):
        log.info("kernels were measured with another %s; run `porcelet bench` again", differing)
        return
    for outcome in found.outcomes:
        if outcome.task not in TASKS:
            raise InputError(f"{path} has an unknown task {outcome.task!r}; run `porcelet bench` again")
        if outcome.taken in TASKS[outcome.task].names(device):
            TASKS[outcome.task].take(outcome.taken)
            log.info("%s by %s", outcome.task, outcome.taken)
